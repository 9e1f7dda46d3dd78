"""Every rule of a search space has a wrong space in bad_spaces, with what is said about it.

A file is named after the rule that it breaks. Comments at its head give the messages (``says``),
settings of the trial that it is read on (``trial``) and what is known of the images (``images``).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import drtune_ray
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.space.points import NUM_RANDOM, named_values, points
from drtune_ray.space.search_space import SearchSpace, examined, read_space
from drtune_ray.study.resolve import study_request
from drtune_ray.values import flattened
from tests.bad_input import header
from tests.conftest import MakeTrial

BAD_SPACES = Path(__file__).parent / "bad_spaces"
EXAMPLES = sorted(path.name for path in BAD_SPACES.glob("*.yaml"))
SOURCES = sorted((Path(drtune_ray.__file__).parent / "space").glob("*.py"))
# Where these modules may raise by themselves: all problems at once; a name that is no file.
RAISING = {"problems.py:refuse", "search_space.py:read_space", "search_space.py:start_points"}


def rules_in(source: str) -> list[str]:
    """The rule of every ``Problem(...)`` in a module; one that is not written out is refused."""
    rules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Problem"):
            first = node.args[0] if node.args else None
            assert isinstance(first, ast.Constant), f"line {node.lineno}: name the rule"
            rules.append(str(first.value))
    return rules


def without_example(rules: list[str], examples: list[str]) -> set[str]:
    return set(rules) - {name.split(".")[0] for name in examples}


def raising(path: Path) -> Iterator[str]:
    """Functions that make an error of their own."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    "ConfigError",
                    "ValueError",
                ):
                    yield f"{path.name}:{function.name}"


def all_rules() -> list[str]:
    return [rule for path in SOURCES for rule in rules_in(path.read_text())]


# ---- every rule


def test_rules__each_has_an_example() -> None:
    assert without_example(all_rules(), EXAMPLES) == set()


def test_rules__each_is_broken_at_one_place() -> None:
    # Else one of two places could lose its example unseen.
    assert [rule for rule, count in Counter(all_rules()).items() if count > 1] == []


def test_rules__no_other_way_to_complain() -> None:
    assert {name for path in SOURCES for name in raising(path)} == RAISING


def test_rules__the_walk_sees_them() -> None:
    assert {path.name for path in SOURCES} >= {"parsing.py", "validation.py"}
    assert len(all_rules()) > 30
    planted = "def check():\n    yield Problem('brand-new', place, 'sentence')\n"
    assert without_example(rules_in(planted), EXAMPLES) == {"brand-new"}
    with pytest.raises(AssertionError, match="line 1: name the rule"):
        rules_in("yield Problem(rule, place, 'sentence')")


@pytest.mark.parametrize("name", EXAMPLES)
def test_bad_space(name: str, monkeypatch: pytest.MonkeyPatch, make_trial: MakeTrial) -> None:
    monkeypatch.chdir(BAD_SPACES)
    text = Path(name).read_text()
    trial = [yaml.safe_load(line) for line in header(text, "trial")]
    images = [yaml.safe_load(line) for line in header(text, "images")]
    base = make_trial(*trial)
    content = read_space(name)
    if not images:
        _, problems = examined(content, base)
        assert name.split(".")[0] in {problem.rule for problem in problems}
    with pytest.raises(ConfigError) as caught:
        SearchSpace.from_mapping(content, base).clamped(**(images[0] if images else {}))
    assert list(caught.value.problems) == header(text, "says")
    assert caught.value.exit_code == 2


# ---- all at once, and where


def problems_of(content: Any, base: TrialConfig) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        SearchSpace.from_mapping(content, base)
    return caught.value.problems


def test_from_mapping__every_problem_at_once(make_trial: MakeTrial) -> None:
    content = {
        "parameters": {
            "method.bank_size": {"int": [0, 1]},
            "optim.nme": {"choice": ["sgd"]},
            "optim.momentum": {"float": [0.9, 0.1], "log": True, "step": 0.1},
            "training.patience_epochs": {"int": [1, 2], "when": "optim.name == 'adamw'"},
        },
        "constraints": ["training.batch_size <= 8", "method.bank_size <= data.num_trian"],
        "trials": 20,
    }
    assert problems_of(content, make_trial()) == (
        "search space: unknown key of the search space 'trials'; valid are ['parameters', "
        "'constraints']",
        "search space: method.bank_size=0 is not valid: input should be greater than 0",
        "search space: unknown key 'optim.nme'; did you mean 'optim.name'?",
        "search space: optim.momentum has an empty range: low <= high must hold in [0.9, 0.1]",
        "search space: optim.momentum has both log and step: choose one",
        "search space: training.patience_epochs never applies: \"optim.name == 'adamw'\" is true "
        "at none of the points tried (optim.name is 'sgd'): change the condition or the ranges",
        "search space: the constraint 'training.batch_size <= 8' holds at none of the points tried "
        "(training.batch_size is 32): change it or the ranges",
        "search space: unknown setting 'data.num_trian'; did you mean 'data.num_train'?",
    )


def test_from_mapping__what_depends_on_a_broken_parameter_is_not_judged(
    make_trial: MakeTrial,
) -> None:
    # `optim.name` shall be searched; as long as it cannot be read, nothing is known of it.
    content = {
        "parameters": {
            "optim.name": {"choice": ["sgd", "addam"]},
            "optim.momentum": {"float": [0.1, 0.9], "when": {"optim.name": "adamw"}},
            "optim.nesterov": {"choice": [True, False], "when": "optim.momentum > 2"},
            "method.bank_size": {"int": [1, 9], "when": {"method.reduction": "mean"}},
        },
        "constraints": ["optim.name == 'adamw'"],
    }
    assert [problem.split(" is ")[0] for problem in problems_of(content, make_trial())] == [
        "search space: optim.name='addam'",
        "search space: method.bank_size never applies: method.reduction = 'mean'",
    ]


RANGES = {
    "method.bank_size": {"int": [64, 512]},
    "optim.momentum": {"float": [0.1, 0.9]},
    "method.calibration.rotation_rank": {"int": [1, 64], "when": "optim.momentum > 0.5"},
    "method.calibration.normalize": {
        "choice": [True, False],
        "when": "method.bank_size % 100 == 37",
    },
    "method.reduction": {"choice": ["sum", "mean"], "when": "data.num_train > 100"},
    "training.batch_size": {"ordered": list(range(1, 21))},
    "training.patience_epochs": {"ordered": list(range(1, 21))},
    "method.calibration.rotation_interval": {"ordered": list(range(1, 21))},
}


@pytest.mark.parametrize(
    "when",
    [
        # Between the ends.
        {"method.bank_size": 100},
        "method.bank_size == 100",
        "method.bank_size > 100 and method.bank_size < 102",
        "method.bank_size in [600, 100]",
        "100 == method.bank_size",
        "optim.momentum > 0.5 and optim.momentum < 0.6",
        # At few points.
        "method.bank_size % 100 == 37",
        "(method.bank_size - 200) ** 2 < 25",
        "method.bank_size * method.bank_size - 400 * method.bank_size < 0 - 30000",
        "90 < method.bank_size < 100",
        "method.calibration.rotation_rank * (1 - optim.momentum) > 25",
        {"method.calibration.normalize": True},
        # The images are not known yet.
        "data.num_train > 10",
        {"method.reduction": "mean"},
        # One of 8000 combinations.
        "training.batch_size + training.patience_epochs + "
        "method.calibration.rotation_interval == 60",
    ],
)
def test_never_applies__not_claimed(make_trial: MakeTrial, when: Any) -> None:
    parameters = RANGES | {"optim.weight_decay": {"float": [0.0, 0.1], "when": when}}
    assert SearchSpace.from_mapping({"parameters": parameters}, make_trial()).parameters


@pytest.mark.parametrize(
    "when",
    [
        {"method.bank_size": 600},
        {"method.bank_size": [63, 513]},
        "method.bank_size > 100 and method.bank_size < 101",
        "method.bank_size in [600, 700]",
        "optim.momentum < 0.1",
        "optim.momentum > 0.5 and optim.momentum <= 0.5",
        "2 * method.bank_size + 1 < 12 / optim.momentum",
        "min(method.bank_size, training.batch_size) > 20",
        "method.calibration.rotation_rank > 64 or method.bank_size < 64",
        "method.calibration.rotation_rank > 0 and optim.momentum < 0.5",  # not active there
        {"optim.schedule": ["constant", "cosine_per_epoch"]},
    ],
)
def test_never_applies(make_trial: MakeTrial, when: Any) -> None:
    parameters = RANGES | {"optim.weight_decay": {"float": [0.0, 0.1], "when": when}}
    (problem,) = problems_of({"parameters": parameters}, make_trial())
    assert problem.startswith("search space: optim.weight_decay never applies: ")
    assert "is true at none of the points tried (" in problem


def test_points__are_the_same_in_every_process(make_trial: MakeTrial) -> None:
    # Python's hashes of words differ between processes; a point must not depend on their order.
    code = (
        "import sys, yaml\n"
        "from drtune_ray.config.trial import TrialConfig\n"
        "from drtune_ray.space.search_space import examined, read_space\n"
        "base = TrialConfig.from_mapping({'data': {'train': 'images'}})\n"
        "from drtune_ray.space.points import named_values, points\n"
        "from drtune_ray.values import flattened\n"
        "space, _ = examined(read_space('dr_tune'), base)\n"
        "values = flattened(base.to_mapping())\n"
        "sampled = [p for p in space.parameters if p.is_sampled]\n"
        "named = named_values(space.parameters, space.constraints, values)\n"
        "print(list(points(sampled, named, values)))\n"
    )
    drawn = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(drawn) == 1


def test_points__hold_the_ends_and_what_conditions_name(make_trial: MakeTrial) -> None:
    base = make_trial({"method.bank_size": 300, "optim.name": "adamw"})
    content = {
        "parameters": {
            "method.bank_size": {"int": [64, 512], "step": 2},
            "optim.backbone_lr": {"float": [1e-6, 1e-2], "log": True},
            "optim.name": {"choice": ["sgd", "adamw"]},
            "optim.momentum": {"float": [0.1, 0.9], "when": "method.bank_size > 99 * 2"},
            "optim.weight_decay": {"float": [0.1, 0.9], "when": "optim.backbone_lr < 2e-6"},
        }
    }
    space, problems = examined(content, base)
    assert problems == []
    values = flattened(base.to_mapping())
    sampled = [p for p in space.parameters if p.is_sampled]
    named = named_values(space.parameters, (), values)
    drawn = list(points(sampled, named, values))
    assert drawn[0]["method.bank_size"] == 300 and drawn[0]["optim.name"] == "adamw"
    assert drawn[0]["optim.backbone_lr"] == base.optim.backbone_lr
    assert all(parameter.holds(point[parameter.path]) for point in drawn for parameter in sampled)
    for parameter in sampled:
        first, *_, last = parameter.ends()
        assert {first, last} <= {point[parameter.path] for point in drawn[:12]}
    sizes = {point["method.bank_size"] for point in drawn}
    assert sizes >= {64, 98, 512} or sizes >= {64, 100, 512}  # 99 is not on a step
    rates = [point["optim.backbone_lr"] for point in drawn]
    assert rates.count(2e-6) > 30
    # Half of the draws are uniform in the logarithm.
    assert 80 < sum(1e-4 < rate < 4e-3 for rate in rates) < 125
    assert NUM_RANDOM < len(drawn) <= NUM_RANDOM + 1 + 10


def test_never_applies__deep_below_other_conditions(make_trial: MakeTrial) -> None:
    """At no random point do all of these hold; each alone does at some."""
    paths = [
        "training.batch_size",
        "training.patience_epochs",
        "method.bank_size",
        "method.calibration.rotation_rank",
        "method.calibration.rotation_interval",
        "method.head_lr_multiplier",
    ]
    parameters: dict[str, Any] = {
        path: {"ordered": list(range(1, 12)), "when": {above: [5, 7]}}
        for above, path in pairwise(paths)
    }
    parameters[paths[0]] = {"ordered": list(range(1, 12))}
    parameters[paths[-1]]["when"] = f"{paths[-2]} * 3 == 24"
    assert SearchSpace.from_mapping({"parameters": parameters}, make_trial()).parameters


@pytest.mark.parametrize(
    ("constraint", "is_kept"),
    [
        # At one corner of the ranges only.
        ("method.bank_size <= training.batch_size", True),
        ("method.bank_size < training.batch_size", False),
        ("method.bank_size * optim.momentum >= 460.8", True),
        ("method.bank_size * optim.momentum > 460.8", False),
        ("method.bank_size == 333 and optim.momentum < 0.2", True),
        ("method.bank_size == 513", False),
        # Not before the images are known.
        ("data.num_train < 10", True),
        ("method.bank_size < 10 and data.num_train > 10", False),
    ],
)
def test_never_holds(make_trial: MakeTrial, constraint: str, is_kept: bool) -> None:
    parameters = {
        "method.bank_size": {"int": [64, 512]},
        "training.batch_size": {"int": [8, 64]},
        "optim.momentum": {"float": [0.1, 0.9]},
    }
    _, problems = examined({"parameters": parameters, "constraints": [constraint]}, make_trial())
    assert [problem.rule for problem in problems] == ([] if is_kept else ["never-holds"])


def test_invalid_together__names_only_what_matters(make_trial: MakeTrial) -> None:
    parameters = {
        "optim.schedule": {"choice": ["cosine", "constant"]},
        "optim.backbone_lr": {"float": [0.1, 0.9]},
        "optim.momentum": {"expression": "0.9 if method.bank_size > 64 else 0.0"},
        "method.bank_size": {"choice": [64, 128]},
        "optim.nesterov": {"choice": [True, False], "when": {"optim.schedule": "constant"}},
    }
    assert problems_of({"parameters": parameters}, make_trial()) == (
        "search space: optim: nesterov=true needs momentum > 0, but got momentum=0 at "
        "optim.momentum=0.0, optim.nesterov=True: give one of them another range or a `when`",
    )


def test_from_mapping__lines_of_a_space_in_a_study_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Path("study.yaml").write_text(
        "name: mine\n"
        "trial: {data: {train: images}}\n"
        "space:\n"
        "  parameters:\n"
        "    optim.nme: {choice: [sgd]}\n"
        "    optim.momentum:\n"
        "      float: [0.1, 0.9]\n"
        "      when: optim.name == 'sdg'\n"
        "  constraints:\n"
        "    - method.bank_size <= 512\n"
        "    - method.bank_size <= data.num_trian\n"
    )
    config, _ = study_request(Path("study.yaml"), [], {"trials": 4})
    assert problems_of(config.space, config.trial) == (
        "study.yaml:5: unknown key 'optim.nme'; did you mean 'optim.name'?",
        "study.yaml:8: optim.name='sdg' is not valid: there is no optimiser 'sdg': the nearest "
        "is 'sgd', and docs/recipe.md lists all",
        "study.yaml:11: unknown setting 'data.num_trian'; did you mean 'data.num_train'?",
    )
