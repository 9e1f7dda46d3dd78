"""What the package never does, held by walking its syntax trees (SECURITY.md says why)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import drtune_ray

ROOT = Path(drtune_ray.__file__).parent

# Reading any of their files runs code that the file holds.
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "ray.cloudpickle", "shelve"}
REFUSED = {
    "asyncio.create_subprocess_shell": "runs a shell",
    "os.popen": "runs a shell",
    "os.system": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "subprocess.getstatusoutput": "runs a shell",
    "builtins.eval": "runs text as code",
    "builtins.exec": "runs text as code",
    "pandas.read_pickle": "unpickles",
    "torch.hub.load": "runs code from elsewhere",
    "torch.jit.load": "runs code of a file",
    "torch.package.PackageImporter": "unpickles",
    "torch.export.load": "runs code of a file",
    "yaml.FullLoader": "makes objects of YAML",
    "yaml.Loader": "makes objects of YAML",
    "yaml.UnsafeLoader": "makes objects of YAML",
    "yaml.full_load": "makes objects of YAML",
    "yaml.load": "makes objects of YAML",
    "yaml.load_all": "makes objects of YAML",
    "yaml.unsafe_load": "makes objects of YAML",
}
# By their last names, whatever they are imported from.
METHODS = {
    "Tuner.restore": "reads Tune's experiment folder",
    "Tuner.can_restore": "reads Tune's experiment folder",
    "TorchTrainer.restore": "reads Tune's experiment folder",
    "load_model": "unpickles",
    "load_checkpoint": "unpickles",
    "pickled_error_file": "unpickles",
}
# As these, but their names may be spoken: `nothing_unpickled` replaces them.
CALLS = {
    "ExperimentAnalysis": "reads Tune's experiment folder",
    "ResultGrid": "reads Tune's experiment folder",
    "get_pickled_error": "unpickles",
}
# A call of the first is safe with the keyword of this value only.
SAFE_WITH = {"torch.load": ("weights_only", True)}
# Allowed where the file was checked before: tests/results/test_export.py plants code in it.
CHECKED = {"results/exported.py": "torch.export.load runs code of a file"}
SAFE_WITHOUT = {"shell": "runs a shell", "allow_pickle": "unpickles"}


def violations(root: Path) -> list[str]:
    """Every unsafe use below `root`, as ``file:line what``."""
    return [
        f"{path.relative_to(root).as_posix()}:{line} {problem}"
        for path in sorted(root.rglob("*.py"))
        for line, problem in sorted(set(problems_of(ast.parse(path.read_text()))))
        if CHECKED.get(path.relative_to(root).as_posix()) != problem
    ]


def problems_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    names = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, problem) for problem in import_problems(node))
        if isinstance(node, ast.Name | ast.Attribute):
            whole = dotted(node, names)
            if problem := name_problem(whole):
                yield node.lineno, f"{whole} {problem}"
        if isinstance(node, ast.Call):
            yield from ((node.lineno, problem) for problem in call_problems(node, names))


def imported_names(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for."""
    names = {"eval": "builtins.eval", "exec": "builtins.exec"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def import_problems(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    for alias in node.names:
        whole = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        if any(f"{whole}.".startswith(f"{name}.") for name in PICKLES):
            yield f"imports {whole}, which unpickles"


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The absolute name of an expression, as far as the imports tell; "" of any other."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return ""


def name_problem(whole: str) -> str | None:
    return REFUSED.get(whole) or by_last_names(whole, METHODS)


def by_last_names(whole: str, problems: dict[str, str]) -> str | None:
    found = (name for name in problems if f".{whole}".endswith(f".{name}"))
    return next((problems[name] for name in found), None)


def call_problems(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    whole = dotted(node.func, names)
    if problem := by_last_names(whole, CALLS):
        yield f"{whole} {problem}"
    given = {
        keyword.arg: keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        for keyword in node.keywords
    }
    if whole in SAFE_WITH:
        option, value = SAFE_WITH[whole]
        if given.get(option) is not value:
            yield f"{whole} without {option}={value} unpickles"
    for option, problem in SAFE_WITHOUT.items():
        if option in given and given[option] is not False:
            yield f"{whole} with {option} {problem}"


# ---- the package


def test_package__nothing_unsafe() -> None:
    assert violations(ROOT) == []


def test_package__the_walk_sees_what_is_there() -> None:
    """The uses that are allowed, found by the same means."""
    seen = {
        dotted(node.func, names)
        for path in ROOT.rglob("*.py")
        for tree in [ast.parse(path.read_text())]
        for names in [imported_names(tree)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    assert {"torch.load", "yaml.safe_load", "tune.Tuner"} <= {
        name.removeprefix("ray.") for name in seen
    }


# ---- the walk itself


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import pickle", "1 imports pickle, which unpickles"),
        ("import ray.cloudpickle", "1 imports ray.cloudpickle, which unpickles"),
        ("from ray import cloudpickle", "1 imports ray.cloudpickle, which unpickles"),
        ("def f():\n    from joblib import load", "2 imports joblib.load, which unpickles"),
        ("import torch\ntorch.load(x)", "2 torch.load without weights_only=True unpickles"),
        (
            "import torch as t\nt.load(x, weights_only=False)",
            "2 torch.load without weights_only=True unpickles",
        ),
        (
            "from torch import load as read\nread(x, weights_only=is_safe)",
            "2 torch.load without weights_only=True unpickles",
        ),
        ("import torch\nread = torch.jit.load", "2 torch.jit.load runs code of a file"),
        ("import numpy as np\nnp.load(x, allow_pickle=True)", "2 numpy.load with allow_pickle"),
        ("import yaml\nyaml.load(x, yaml.SafeLoader)", "2 yaml.load makes objects of YAML"),
        ("import yaml\nclass L(yaml.Loader): ...", "2 yaml.Loader makes objects of YAML"),
        ("from ray import tune\ntune.Tuner.restore(p)", "2 ray.tune.Tuner.restore reads Tune's"),
        ("from ray.tune import Tuner\nTuner.can_restore(p)", "2 ray.tune.Tuner.can_restore reads"),
        ("import mlflow\nmlflow.pytorch.load_model(u)", "2 mlflow.pytorch.load_model unpickles"),
        ("trial.get_pickled_error()", "1 trial.get_pickled_error unpickles"),
        ("from ray.tune import ResultGrid\nResultGrid(x)", "2 ray.tune.ResultGrid reads Tune's"),
        ("open(trial.pickled_error_file)", "1 trial.pickled_error_file unpickles"),
        ("import os\nos.system(x)", "2 os.system runs a shell"),
        ("from os import popen\npopen(x)", "2 os.popen runs a shell"),
        ("import subprocess\nsubprocess.run(x, shell=True)", "2 subprocess.run with shell runs"),
        ("import subprocess\nsubprocess.Popen(x, shell=s)", "2 subprocess.Popen with shell runs"),
        ("import subprocess as s\ns.getoutput(x)", "2 subprocess.getoutput runs a shell"),
        ("eval(x)", "1 builtins.eval runs text as code"),
    ],
)
def test_violations__planted(tmp_path: Path, code: str, problem: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.py").write_text(code)
    (found,) = violations(tmp_path)
    assert found.startswith(f"deep/x.py:{problem}")


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(x, map_location='cpu', weights_only=True)",
        "import yaml\nyaml.safe_load(x)\nclass L(yaml.SafeLoader): ...",
        "import numpy as np\nnp.load(x, allow_pickle=False)",
        "import subprocess\nsubprocess.run([x], shell=False)",
        "model.eval()\nspool.restore(unsent)\nstudy.load()",
        "import os\nos.execv(x, [x])",
    ],
)
def test_violations__allowed(tmp_path: Path, code: str) -> None:
    (tmp_path / "x.py").write_text(code)
    assert violations(tmp_path) == []


# ---- the documents

# Options whose values every user of the machine can read in the list of processes.
SECRET_ARGUMENTS = re.compile(
    r"--from-literal|curl .*(-u|--user)\b|--set \w+=\"\$|://[^\s/$]+:[^\s@$/]+@"
)


def test_documents__no_secret_is_an_argument() -> None:
    folder = ROOT.parent
    documents = [*folder.glob("*.md"), *folder.glob("docs/*.md"), *folder.glob("deploy/**/*.sh")]
    assert {"README.md", "kubernetes.md", "postgres-init.sh"} <= {path.name for path in documents}
    found = [
        f"{path.name}: {line}"
        for path in documents
        for line in path.read_text().splitlines()
        if SECRET_ARGUMENTS.search(line)
    ]
    assert found == []
