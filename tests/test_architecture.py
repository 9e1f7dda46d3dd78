"""Holds the import directions of DESIGN.md by walking the syntax trees of the package."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import drtune_ray

PACKAGE = "drtune_ray"
ROOT = Path(drtune_ray.__file__).parent

# From below; the modules of a room may import those of the rooms below it, besides its own.
STOREYS: tuple[set[str], ...] = (
    {"errors", "import_path", "processes", "method"},
    {"values", "server_uri"},
    {"folders"},
    {"config"},
    {"space", "data", "tracking"},
    {"training", "storage"},
    {"results"},
    {"search"},
    {"execution"},
    {"study", "jobs", "manifests"},
    {"preview", "doctor", "demo"},
    {"display"},
    {"cli"},
    {"__main__"},
)
FLOOR = {"errors", "import_path", "processes", "values", "server_uri", "folders", "config"}
# What may be imported of the rooms below; of the others, everything below.
NARROW: dict[str, set[str]] = {
    "method": set(),
    "config": FLOOR - {"config"},
    "data": FLOOR,
    "tracking": FLOOR,
    "space": FLOOR | {"method"},
    "training": FLOOR | {"data", "method"},
}
LAYERS: dict[str, set[str]] = {
    room: NARROW.get(room, set().union(*STOREYS[:height]))
    for height, storey in enumerate(STOREYS)
    for room in storey
}
# Who alone may import these.
OWNERS = {
    "ray": {"execution", "doctor", "jobs"},
    "mlflow": {"tracking"},
    "optuna": {"space", "search", "storage", "results", "study", "execution"},
}
# What Ray does not promise: see `drtune_ray.execution.ray_state`.
RAY_STATE_FILE = "execution/ray_state.py"
INSIDE_RAY = re.compile(r"ray\._private|ray\.core\.generated|internal_kv")
DISTRIBUTED_FILE = "training/distributed.py"
TEST_SPLIT_FILES = {"data/splits.py", "results/evaluate.py"}
LAZY_FILES = {"__init__.py"}  # names its homes as strings

HEAVY = ("torch", "ray", "mlflow", "optuna", "timm", "pyarrow", "PIL", "numpy")


def violations(root: Path) -> list[str]:
    """Every import or name below `root` that DESIGN.md forbids, as ``file:line what``."""
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        layer = path.relative_to(root).parts[0].removesuffix(".py")
        if name in LAZY_FILES:
            continue
        if layer not in LAYERS:
            found.append(f"{name}:1 has no place in LAYERS")
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            for problem in problems_of(node, name, layer):
                found.append(f"{name}:{getattr(node, 'lineno', 0)} {problem}")
    return found


def problems_of(node: ast.AST, name: str, layer: str) -> Iterator[str]:
    for module in imported(node, name):
        yield from module_problems(module, name, layer)
    if isinstance(node, ast.Attribute):
        whole = ast.unparse(node)
        if whole == "ray._private" and name != RAY_STATE_FILE:
            yield "uses ray._private"
        if whole == "torch.distributed" and name != DISTRIBUTED_FILE:
            yield "uses torch.distributed"
        if whole.endswith(".TEST") and name not in TEST_SPLIT_FILES:
            yield "uses the test split"
        if whole == "importlib.import_module":
            yield "imports importlib.import_module"
    if isinstance(node, ast.Constant) and node.value == "test" and name not in TEST_SPLIT_FILES:
        yield "uses the test split"


def module_problems(module: str, name: str, layer: str) -> Iterator[str]:
    if problem := import_problem(module, layer):
        yield problem
    if INSIDE_RAY.search(module) and name != RAY_STATE_FILE:
        yield f"imports {module}"
    if module.startswith("torch.distributed") and name != DISTRIBUTED_FILE:
        yield "uses torch.distributed"
    if module.endswith((".data.splits.TEST", ".import_module")):
        if module.endswith(".import_module") or name not in TEST_SPLIT_FILES:
            yield f"imports {module}"


def imported(node: ast.AST, name: str) -> list[str]:
    """Absolute names of what an import statement imports, down to the last name."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    module = node.module or ""
    if node.level:
        above = [PACKAGE, *name.split("/")[:-1]]
        module = ".".join([*above[: len(above) - node.level + 1], *filter(None, [module])])
    return [f"{module}.{alias.name}" for alias in node.names]


def import_problem(module: str, layer: str) -> str | None:
    top, *rest = module.split(".")
    if top == PACKAGE:
        if rest in ([], ["__version__"]) and layer != "method":
            return None
        target = rest[0] if rest else PACKAGE
        is_allowed = target == layer or target in LAYERS[layer]
    elif layer == "method":
        is_allowed = top == "torch" or top in sys.stdlib_module_names
    else:
        is_allowed = layer in OWNERS.get(top, {layer})
    return None if is_allowed else f"imports {module}"


# ---- the package


def test_package__imports_point_one_way() -> None:
    assert violations(ROOT) == []


def test_package__the_walk_sees_it() -> None:
    walked = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert {
        "method",
        "data",
        "training",
        "search",
        "tracking",
        "results",
        "config",
        "execution",
    } <= walked
    assert (ROOT / DISTRIBUTED_FILE).exists()
    assert all((ROOT / name).exists() for name in TEST_SPLIT_FILES)


def test_layers__without_a_cycle() -> None:
    above: set[str] = set()
    left = dict(LAYERS)
    while left:
        free = {layer for layer, below in left.items() if below <= above}
        assert free, f"a cycle among {sorted(left)}"
        above |= free
        left = {layer: below for layer, below in left.items() if layer not in free}


# ---- the walk itself


@pytest.mark.parametrize(
    ("name", "code", "problem"),
    [
        ("data/x.py", "import ray", "1 imports ray"),
        ("data/x.py", "from ray.train import torch", "1 imports ray.train.torch"),
        ("training/x.py", "import optuna.trial", "1 imports optuna.trial"),
        ("results/x.py", "import mlflow", "1 imports mlflow"),
        ("search/x.py", "from mlflow import MlflowClient", "1 imports mlflow.MlflowClient"),
        ("cli/x.py", "import ray", "1 imports ray"),
        ("search/x.py", "import ray", "1 imports ray"),
        ("execution/x.py", "import ray._private.state", "1 imports ray._private.state"),
        ("doctor/x.py", "import ray\nray._private.worker", "2 uses ray._private"),
        ("method/x.py", "import numpy as np", "1 imports numpy"),
        ("method/x.py", "import drtune_ray", "1 imports drtune_ray"),
        (
            "method/x.py",
            "from drtune_ray.config import MethodConfig",
            "1 imports drtune_ray.config.MethodConfig",
        ),
        (
            "training/x.py",
            "from drtune_ray.space.search_space import SearchSpace",
            "1 imports drtune_ray.space.search_space.SearchSpace",
        ),
        ("training/x.py", "from drtune_ray import tracking", "1 imports drtune_ray.tracking"),
        ("training/x.py", "from drtune_ray import run_study", "1 imports drtune_ray.run_study"),
        ("data/x.py", "from ..training import optim", "1 imports drtune_ray.training.optim"),
        ("data/deep/x.py", "from ...search import y", "1 imports drtune_ray.search.y"),
        ("tracking/x.py", "from drtune_ray.results import y", "1 imports drtune_ray.results.y"),
        ("config/x.py", "import drtune_ray.data.views", "1 imports drtune_ray.data.views"),
        ("search/x.py", "from drtune_ray.cli import main", "1 imports drtune_ray.cli.main"),
        ("data/x.py", "def f():\n    import ray", "2 imports ray"),
        (
            "training/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import optuna",
            "3 imports optuna",
        ),
        ("training/x.py", "import torch.distributed as dist", "1 uses torch.distributed"),
        ("training/x.py", "from torch import distributed", "1 uses torch.distributed"),
        ("search/x.py", "import torch\ntorch.distributed.barrier()", "2 uses torch.distributed"),
        (
            "search/x.py",
            "from drtune_ray.data.splits import TEST",
            "1 imports drtune_ray.data.splits.TEST",
        ),
        ("search/x.py", "rows = splits.rows(splits_module.TEST)", "1 uses the test split"),
        ("training/x.py", "rows = splits.rows('test')", "1 uses the test split"),
        (
            "data/x.py",
            "import importlib\nimportlib.import_module('ray')",
            "2 imports importlib.import_module",
        ),
        ("helpers/x.py", "", "1 has no place in LAYERS"),
    ],
)
def test_violations__planted(tmp_path: Path, name: str, code: str, problem: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(code)
    assert violations(tmp_path) == [f"{name}:{problem}"]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("method/x.py", "import math, torch\nfrom drtune_ray.method.y import z"),
        ("data/x.py", "import numpy, torch\nfrom drtune_ray.config import digest"),
        ("training/x.py", "from drtune_ray.data.splits import TRAIN\nfrom . import optim"),
        (DISTRIBUTED_FILE, "import torch.distributed as dist\ndist.barrier()"),
        ("execution/x.py", "import ray, optuna\nfrom drtune_ray import __version__"),
        (RAY_STATE_FILE, "from ray._private.state import state"),
        ("results/x.py", "import optuna"),
        ("results/evaluate.py", "from drtune_ray.data.splits import TEST"),
        ("tracking/x.py", "def f():\n    import mlflow"),
        ("cli/x.py", "'tests the latest test split'\nimport click"),
    ],
)
def test_violations__allowed(tmp_path: Path, name: str, code: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(code)
    assert violations(tmp_path) == []


# ---- importing does little


def loaded_by(code: str) -> tuple[str, list[str]]:
    """What a new process prints for a piece of code, and the heavy modules it has then."""
    ending = f"import json, sys; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{ending}"], capture_output=True, text=True, check=True
    )
    *printed, modules = done.stdout.splitlines()
    return "\n".join(printed), json.loads(modules)


def test_import__package_and_command_line_are_light() -> None:
    assert loaded_by("import drtune_ray, drtune_ray.cli")[1] == []


@pytest.mark.parametrize("command", [[], ["tune"], ["submit"], ["logs"], ["stop"], ["status"]])
def test_help__is_light(command: list[str]) -> None:
    code = (
        "from drtune_ray.cli import cli\n"
        f"try:\n    cli({[*command, '--help']}, prog_name='drtune-ray')\n"
        "except SystemExit as end:\n    assert end.code == 0"
    )
    printed, modules = loaded_by(code)
    assert modules == []
    assert printed.startswith(" ".join(["Usage: drtune-ray", *command, "["]))


@pytest.mark.parametrize(
    "command",
    [
        ["tune", "--data", "nowhere"],
        ["preview", "--data", "nowhere"],
        ["train", "--data", "nowhere"],
        ["compare", "--data", "nowhere", "--methods", "ce_tuning,dr_tune"],
        ["tune", "--data", ".", "--trials", "2"],
        ["tune", "nowhere.yaml"],
        ["evaluate", "nothing"],
    ],
    ids=" ".join,
)
def test_refusal__comes_before_anything_heavy_is_imported(command: list[str]) -> None:
    code = (
        "from drtune_ray.cli import cli\n"
        "from drtune_ray.errors import ConfigError\n"
        f"try:\n    cli({command}, standalone_mode=False)\n"
        "except ConfigError as error:\n    print(error)"
    )
    printed, modules = loaded_by(code)
    assert printed and not {"torch", "ray", "mlflow", "timm"} & set(modules), modules


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("drtune_ray.config.trial", []),
        ("drtune_ray.space.search_space", []),
        ("drtune_ray.storage.record", []),
        ("drtune_ray.tracking.spool", []),
        ("drtune_ray.data.splits", ["pyarrow", "PIL", "numpy"]),
        ("drtune_ray.method", ["torch", "numpy"]),  # the check can fail
        # Imported by a trial's driver and controller, which do not train: no timm.
        (
            "drtune_ray.execution.ray_train.trainer",
            ["torch", "ray", "pyarrow", "PIL", "numpy"],
        ),
    ],
)
def test_import__light_modules(module: str, heavy: list[str]) -> None:
    assert set(loaded_by(f"import {module}")[1]) == set(heavy)


def test_package__exported_names() -> None:
    assert sorted(drtune_ray.__all__) == drtune_ray.__all__
    assert set(drtune_ray.__all__) == set(drtune_ray._HOMES)
    assert drtune_ray.TrialConfig.__module__ == "drtune_ray.config.trial"
    with pytest.raises(AttributeError, match="^module 'drtune_ray' has no attribute 'tune'$"):
        drtune_ray.tune  # noqa: B018


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("drtune_ray.config", ["StudyConfig", "TrialConfig"]),
        ("drtune_ray.training", ["train_epochs"]),
        ("drtune_ray.study", ["run_study"]),
        ("drtune_ray.cli", ["cli", "main"]),
        ("drtune_ray.method", ["DRTune", "FeatureBank", "SemanticCalibration", "global_rotation"]),
    ],
)
def test_faces__hand_on_the_names_that_others_rely_on(module: str, names: list[str]) -> None:
    face = importlib.import_module(module)
    assert all(callable(getattr(face, name)) for name in names)
    assert set(names) <= set(face.__all__)
    with pytest.raises(AttributeError):
        face.nothing_of_this_name  # noqa: B018
