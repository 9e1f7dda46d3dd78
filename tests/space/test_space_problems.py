"""Every rule of a search space has a wrong space in bad_spaces, with what is said about it.

A file is named after the rule that it breaks. Comments at its head give the messages (``says``),
settings of the trial that it is read on (``trial``) and what is known of the images (``images``).
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import drtune_ray
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.space.corners import MAX_POINTS, corners
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
        "search space: training.patience_epochs never applies: nothing that is searched or set "
        "makes \"optim.name == 'adamw'\" true (optim.name is 'sgd')",
        "search space: no trial can keep the constraint 'training.batch_size <= 8' "
        "(training.batch_size is 32)",
        "search space: unknown setting 'data.num_trian'; did you mean 'data.num_train'?",
    )


def test_from_mapping__what_depends_on_a_broken_parameter_is_not_judged(
    make_trial: MakeTrial,
) -> None:
    # `optim.name` shall be searched; as long as it cannot be read, nothing is known of it.
    content = {
        "parameters": {
            "optim.name": {"choice": ["sgd", "adam"]},
            "optim.momentum": {"float": [0.1, 0.9], "when": {"optim.name": "adamw"}},
            "optim.nesterov": {"choice": [True, False], "when": "optim.momentum > 2"},
            "method.bank_size": {"int": [1, 9], "when": {"method.reduction": "mean"}},
        },
        "constraints": ["optim.name == 'adamw'"],
    }
    assert [problem.split(" is ")[0] for problem in problems_of(content, make_trial())] == [
        "search space: optim.name='adam'",
        "search space: method.bank_size never applies: nothing that",
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
        # Some of these could be refused, but the corners do not show which.
        "method.bank_size % 100 == 37",
        "(method.bank_size - 200) ** 2 < 25",
        "method.bank_size * method.bank_size - 400 * method.bank_size < 0 - 30000",
        "90 < method.bank_size < 100",
        "method.calibration.rotation_rank * (1 - optim.momentum) > 25",
        {"method.calibration.normalize": True},
        # The images are not known yet.
        "data.num_train > 10",
        {"method.reduction": "mean"},
        # The last of 8000 corners.
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
    assert problem.startswith("search space: optim.weight_decay never applies: nothing that is ")


def test_corners__are_bounded(make_trial: MakeTrial) -> None:
    base = make_trial()
    space = SearchSpace.from_mapping({"parameters": RANGES}, base)
    needed = [p for p in space.parameters if p.kind == "ordered"]
    values = flattened(base.to_mapping())
    assert len(list(corners(needed[:2], values, {}))) == 400
    assert len(list(corners(needed, values, {}))) == MAX_POINTS + 1


def test_from_mapping__lines_of_a_space_in_a_study_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
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
        "study.yaml:8: optim.name='sdg' is not valid: input should be 'sgd' or 'adamw'",
        "study.yaml:11: unknown setting 'data.num_trian'; did you mean 'data.num_train'?",
    )
