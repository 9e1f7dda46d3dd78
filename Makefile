# Everything works on a fresh clone: `make demo`, `make test`. Python 3.11 or newer is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder
# A GPU machine needs torch, timm, pyarrow, pydantic and pytest: nothing is installed.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install demo test test-all test-fast test-chaos test-mutants test-gpu check style types security \
	format clean

help:
	@echo "make demo       a small real study, start to end"
	@echo "make test       checks and all tests"
	@echo "make test-fast  the tests without Ray, several processes or a browser"
	@echo "make test-chaos more kills, at random moments: an hour"
	@echo "make test-mutants small wrong changes that the tests must notice"
	@echo "make test-gpu   the tests of a CUDA device: without Ray, MLflow or an installation"
	@echo "make check      ruff, mypy and bandit"
	@echo "make install    .venv with everything that development needs"

install: $(VENV)/.installed

$(VENV)/.installed: EXTRAS := demo,dev
$(VENV)/.installed-demo: EXTRAS := demo
$(VENV)/.installed $(VENV)/.installed-demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

# Without the tools of development.
demo: $(if $(wildcard $(VENV)/.installed),install,$(VENV)/.installed-demo)
	$(BIN)/drtune-ray demo

# mypy takes one core for a minute, and the tests that come first mostly wait.
test: install style
	$(MAKE) --jobs 3 types security test-all

test-all: install
	$(PYTEST) $(PARALLEL)

test-fast: install
	$(PYTEST) $(PARALLEL) -m "not ray and not ddp and not slow and not browser and not chaos"

test-chaos: install
	$(PYTEST) -m chaos

test-mutants: install
	$(BIN)/python -m tests.mutants

test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu -rs $(shell grep -rl '^@pytest.mark.gpu' tests --include='test_*.py')

check: style types security

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

security: install
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive drtune_ray

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) drtune-studies build dist
