# Everything works on a fresh clone: `make demo`, `make test`. Python 3.11 or newer is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install demo test test-fast test-chaos check format clean

help:
	@echo "make demo       a small real study, start to end"
	@echo "make test       checks and all tests"
	@echo "make test-fast  the tests without Ray, several processes or a browser"
	@echo "make test-chaos more kills, at random moments: an hour"
	@echo "make check      ruff, mypy and bandit"
	@echo "make install    .venv with everything"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo: install
	$(BIN)/drtune-ray demo

test: install check
	$(BIN)/python -m pytest

test-fast: install
	$(BIN)/python -m pytest -m "not ray and not ddp and not slow and not browser and not chaos"

test-chaos: install
	$(BIN)/python -m pytest -m chaos

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive drtune_ray

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) drtune-studies build dist
