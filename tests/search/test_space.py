from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FixedTrial

from drtune_ray.config import TrialConfig, reference_config
from drtune_ray.errors import ConfigError
from drtune_ray.search.space import Parameter, SearchSpace, read_space, shipped_spaces
from drtune_ray.values import flattened
from tests.conftest import MakeTrial

EVERY_KIND = {
    "optim.backbone_lr": {"float": [0.001, 0.1], "log": True},
    "optim.weight_decay": {"float": [0.0, 0.5], "step": 0.1},
    "optim.momentum": {"float": [0.1, 0.9]},
    "training.batch_size": {"int": [8, 64], "step": 8},
    "training.patience_epochs": {"int": [1, 50], "log": True},
    "method.bank_size": {"int": [3, 300]},
    "method.regularization_weight": {"choice": [0.5, "bank_over_batch"]},
    "method.calibration.rotation": {"choice": [True, False]},
    "method.calibration.rotation_interval": {
        "int": [1, 9],
        "when": {"method.calibration.rotation": True},
    },
    "method.calibration.proper_rotation": {
        "choice": [True, False],
        "when": {
            "method.calibration.rotation": True,
            "method.regularization_weight": "bank_over_batch",
        },
    },
}


@pytest.fixture
def base(make_trial: MakeTrial) -> TrialConfig:
    return make_trial()


def space(parameters: Mapping[str, Any], base: TrialConfig) -> SearchSpace:
    return SearchSpace.from_mapping({"parameters": parameters}, base)


def problems_of(content: Mapping[str, Any], base: TrialConfig) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        SearchSpace.from_mapping(content, base)
    return caught.value.problems


# ---- reading


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"float": [0, 1]}, Parameter("optim.weight_decay", "float", (0.0, 1.0))),
        (
            {"float": [0.1, 1.0], "log": True},
            Parameter("optim.weight_decay", "float", (0.1, 1.0), log=True),
        ),
        (
            {"float": [0.0, 1.0], "step": 0.25},
            Parameter("optim.weight_decay", "float", (0.0, 1.0), step=0.25),
        ),
        (
            {"choice": [0.0, 0.1], "when": {"optim.name": "adamw"}},
            Parameter(
                "optim.weight_decay",
                "choice",
                values=(0.0, 0.1),
                when=(("optim.name", "adamw"),),
            ),
        ),
    ],
)
def test_from_mapping__parameter(
    base: TrialConfig, body: dict[str, Any], expected: Parameter
) -> None:
    assert space({"optim.weight_decay": body}, base).parameters == (expected,)


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        (
            "method.bank_sizes",
            {"int": [1, 2]},
            "unknown key 'method.bank_sizes'; did you mean 'method.bank_size'?",
        ),
        (
            "method.bank_size",
            64,
            "method.bank_size needs exactly one of ['float', 'int', 'choice'], but got 64; write "
            "for example method.bank_size: {float: [0.1, 1.0]}",
        ),
        (
            "method.bank_size",
            {"int": [1, 2], "choice": [1]},
            "method.bank_size needs exactly one of ['float', 'int', 'choice'], but got {'int': [1,"
            " 2], 'choice': [1]}; write for example method.bank_size: {float: [0.1, 1.0]}",
        ),
        (
            "method.bank_size",
            {"int": [1, 2], "logg": True},
            "unknown key 'logg' in method.bank_size; valid are ['int', 'log', 'step', 'when']",
        ),
        (
            "method.bank_size",
            {"choice": []},
            "method.bank_size needs a list of values, but got []",
        ),
        ("method.bank_size", {"choice": 8}, "method.bank_size needs a list of values, but got 8"),
        ("method.bank_size", {"int": [1]}, "method.bank_size needs [low, high], but got [1]"),
        (
            "method.bank_size",
            {"int": ["low", "high"]},
            "method.bank_size needs [low, high], but got ['low', 'high']",
        ),
        (
            "optim.backbone_lr",
            {"float": [0.5, 0.1]},
            "optim.backbone_lr has an empty range: low <= high must hold in [0.5, 0.1]",
        ),
        (
            "optim.weight_decay",
            {"float": [0.0, 0.1], "log": True},
            "optim.weight_decay is logarithmic: low > 0 must hold, but got low=0.0",
        ),
        (
            "method.bank_size",
            {"int": [1, 9], "log": True, "step": 2},
            "method.bank_size has both log and step: choose one",
        ),
        (
            "method.bank_size",
            {"int": [1, 2.5]},
            "method.bank_size is an int: both bounds must be whole, got [1.0, 2.5]",
        ),
        ("method", {"choice": [1]}, "method is a group of settings: search a setting below it"),
        (
            "method.bank_size",
            {"int": [1, 2], "when": {"method.nam": "dr_tune"}},
            "unknown key 'method.nam'; did you mean 'method.name'?",
        ),
        (
            "method.bank_size",
            {"int": [0, 64]},
            "method.bank_size=0 is not valid: input should be greater than 0",
        ),
        (
            "optim.momentum",
            {"float": [0.5, 1.0]},
            "optim.momentum=1.0 is not valid: input should be less than 1",
        ),
        (
            "optim.name",
            {"choice": ["sgd", "lion"]},
            "optim.name='lion' is not valid: input should be 'sgd' or 'adamw'",
        ),
    ],
)
def test_from_mapping__refuses(base: TrialConfig, path: str, body: Any, problem: str) -> None:
    assert problems_of({"parameters": {path: body}}, base) == (f"search space: {problem}",)


@pytest.mark.parametrize("content", [{}, {"parameters": {}}, {"parameters": ["seed"]}])
def test_from_mapping__no_parameters(base: TrialConfig, content: dict[str, Any]) -> None:
    assert problems_of(content, base) == (
        "the search space needs 'parameters': a mapping of paths to ranges",
    )


def test_from_mapping__every_problem_at_once(base: TrialConfig) -> None:
    content = {
        "parameters": {
            "method.bank_size": {"int": [0, 1]},
            "optim.nme": {"choice": ["sgd"]},
            "optim.momentum": {"float": [0.9, 0.1], "log": True, "step": 0.1},
            "training.patience_epochs": {"int": [1, 2]},
        },
        "trials": 20,
    }
    assert problems_of(content, base) == (
        "unknown key 'trials' in the search space: it has the one key 'parameters'",
        "search space: method.bank_size=0 is not valid: input should be greater than 0",
        "search space: unknown key 'optim.nme'; did you mean 'optim.name'?",
        "search space: optim.momentum has an empty range: low <= high must hold in [0.9, 0.1]",
        "search space: optim.momentum has both log and step: choose one",
    )


def test_from_mapping__values_are_checked_against_the_base(make_trial: MakeTrial) -> None:
    parameters = {"optim.nesterov": {"choice": [True, False]}}
    assert space(parameters, make_trial()).parameters
    assert problems_of({"parameters": parameters}, make_trial({"optim.momentum": 0.0})) == (
        "search space: optim: nesterov=true needs momentum > 0, but got momentum=0",
    )


# BUG found: each of these is an AttributeError or OverflowError here, or is taken here and raises
# (or silently never applies) in the midst of the study.
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("method.bank_size", {"int": [1, 9], "when": "method.name"}),
        ("method.bank_size", {"int": [1, 9], "when": ["method.name"]}),
        ("method.bank_size", {"int": [1, float("inf")]}),
        ("method.bank_size", {"int": [1, 9], "step": "two"}),
        ("method.bank_size", {"int": [1, 9], "step": 0}),
        ("method.bank_size", {"int": [1, 9], "step": -1}),
        ("method.bank_size", {"int": [1, 9], "step": 1.5}),
        ("optim.weight_decay", {"float": [0.1, 0.2], "log": "false"}),
        ("method.bank_size", {"int": [1, 9], "when": {"method.calibration.rotation": "true"}}),
    ],
)
def test_from_mapping__malformed_options_are_refused(
    base: TrialConfig, path: str, body: dict[str, Any]
) -> None:
    (problem,) = problems_of({"parameters": {path: body}}, base)
    assert problem.startswith("search space: ")


def test_from_mapping__conditions_look_back_only(base: TrialConfig) -> None:
    # BUG found: a condition on a parameter that is declared later is read from the base, so the
    # interval below is searched (and told to the sampler) where there is no rotation.
    interval = EVERY_KIND["method.calibration.rotation_interval"]
    (problem,) = problems_of(
        {
            "parameters": {
                "method.calibration.rotation_interval": interval,
                "method.calibration.rotation": {"choice": [True, False]},
            }
        },
        base,
    )
    assert "method.calibration.rotation" in problem


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("data.image_size", [32, 64]),
        ("data.views", [2, 4]),
        ("data.view_seed", [0, 1]),
        ("data.train_per_class", [5, 10]),
        ("backbone.name", ["test_vit", "test_resnet"]),
        ("training.epochs", [2, 4]),
        ("training.epochs", [2, 4]),
        ("training.workers", [1, 2]),
    ],
)
def test_from_mapping__what_all_trials_share_cannot_be_searched(
    base: TrialConfig, path: str, values: list[Any]
) -> None:
    # BUG found: these are taken, but splits, views, features and backbone are prepared once from
    # the base: the trials say one thing and do another.
    (problem,) = problems_of({"parameters": {path: {"choice": values}}}, base)
    assert path in problem


def test_from_mapping__scientific_notation_as_yaml_writes_it(
    base: TrialConfig, tmp_path: Path
) -> None:
    # BUG found: YAML 1.1 reads 1e-4 as a string, which a trial's file and --set accept for a
    # number, but a space answers "needs [low, high], but got ['1e-4', '1e-2']".
    path = tmp_path / "space.yaml"
    path.write_text("parameters:\n  optim.backbone_lr: {float: [1e-4, 1e-2], log: true}\n")
    found = SearchSpace.from_mapping(read_space(str(path)), base)
    assert found.parameters[0].bounds == (1e-4, 1e-2)


# ---- suggesting and locating


def asked(number: int, seed: int = 0) -> list[optuna.Trial]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [study.ask() for _ in range(number)]


def test_suggest__values_of_a_fixed_trial(base: TrialConfig) -> None:
    values = {
        "optim.backbone_lr": 0.01,
        "optim.weight_decay": 0.2,
        "optim.momentum": 0.3,
        "training.batch_size": 24,
        "training.patience_epochs": 20,
        "method.bank_size": 77,
        "method.regularization_weight": "bank_over_batch",
        "method.calibration.rotation": True,
        "method.calibration.rotation_interval": 4,
        "method.calibration.proper_rotation": True,
    }
    searched = space(EVERY_KIND, base)
    config = searched.suggest(FixedTrial(values), base)  # type: ignore[arg-type]
    assert config == base.with_values(values)
    assert searched.locate(config, base) == values


@pytest.mark.parametrize(
    ("rotation", "weight", "active"),
    [
        (True, "bank_over_batch", {"rotation_interval", "proper_rotation"}),
        (True, 0.5, {"rotation_interval"}),
        (False, "bank_over_batch", set()),
    ],
)
def test_suggest__conditions(
    make_trial: MakeTrial, rotation: bool, weight: Any, active: set[str]
) -> None:
    # The base's own rotation must not matter: it is searched.
    base = make_trial({"method.calibration.rotation": not rotation})
    parameters = {
        path: body
        for path, body in EVERY_KIND.items()
        if path.startswith(("method.calibration", "method.regularization"))
    }
    fixed = FixedTrial(
        {
            "method.calibration.rotation": rotation,
            "method.regularization_weight": weight,
            "method.calibration.rotation_interval": 9,
            "method.calibration.proper_rotation": True,
        }
    )
    config = space(parameters, base).suggest(fixed, base)  # type: ignore[arg-type]
    before, after = flattened(base.to_mapping()), flattened(config.to_mapping())
    changed = {path.rsplit(".", 1)[-1] for path in before if before[path] != after[path]}
    assert changed - {"rotation", "regularization_weight"} == active


def test_locate__is_the_inverse_of_suggest(base: TrialConfig) -> None:
    searched = space(EVERY_KIND, base)
    drawn: dict[str, list[Any]] = {path: [] for path in EVERY_KIND}
    for trial in asked(120):
        config = searched.suggest(trial, base)
        assert searched.locate(config, base) == trial.params
        for path, value in trial.params.items():
            drawn[path].append(value)
            assert flattened(config.to_mapping())[path] == value
    seen = {path: set(values) for path, values in drawn.items()}
    assert seen["training.batch_size"] == set(range(8, 65, 8))
    assert seen["method.calibration.rotation_interval"] == set(range(1, 10))
    assert seen["method.regularization_weight"] == {0.5, "bank_over_batch"}
    assert all(abs(value * 10 - round(value * 10)) < 1e-9 for value in seen["optim.weight_decay"])
    # Logarithmic ranges: half of the draws lie below the geometric mean.
    assert 40 < sum(value < 0.01 for value in drawn["optim.backbone_lr"]) < 80
    assert 40 < sum(value < 7 for value in drawn["training.patience_epochs"]) < 80


@pytest.mark.parametrize(
    "values",
    [
        {"method.bank_size": 301},
        {"training.batch_size": 12},  # between two steps
        {"optim.weight_decay": 0.15},
        {"method.regularization_weight": 1.0},
        {"method.head_lr_multiplier": 2.0},  # not searched
        {"method.name": "ce_tuning"},
        {"method.calibration.rotation": False, "method.calibration.rotation_interval": 3},
    ],
)
def test_locate__outside(base: TrialConfig, values: dict[str, Any]) -> None:
    inside = {
        "optim.backbone_lr": 0.01,
        "optim.weight_decay": 0.1,
        "training.batch_size": 32,
        "training.patience_epochs": 10,
        "method.bank_size": 30,
        "method.regularization_weight": 0.5,
        "method.calibration.rotation_interval": 9,
    }
    searched = space(EVERY_KIND, base)
    assert searched.locate(base.with_values(inside), base) is not None
    assert searched.locate(base.with_values(inside | values), base) is None


def test_locate__unset_value(base: TrialConfig) -> None:
    # BUG found: TypeError, because None is compared with the bounds.
    searched = space({"training.patience_epochs": {"int": [2, 5]}}, base)
    assert searched.locate(base, base) is None


# ---- bank sizes


@pytest.mark.parametrize(
    ("body", "num_train", "expected"),
    [
        ({"int": [32, 8192], "log": True}, 100, {"bounds": (32.0, 100.0)}),
        ({"int": [512, 8192]}, 100, {"bounds": (100.0, 100.0)}),
        ({"choice": [64, 256, 1024]}, 100, {"values": (64, 100)}),
        ({"choice": [64, 256, 1024]}, 64, {"values": (64,)}),
    ],
)
def test_clamped__bank_size(
    base: TrialConfig, body: dict[str, Any], num_train: int, expected: dict[str, Any]
) -> None:
    searched = space({"optim.momentum": {"float": [0.1, 0.9]}, "method.bank_size": body}, base)
    clamped, notes = searched.clamped(num_train)
    assert {key: getattr(clamped.parameters[1], key) for key in expected} == expected
    assert clamped.parameters[0] == searched.parameters[0]
    assert clamped.parameters[1].log == searched.parameters[1].log
    assert notes == [
        f"method.bank_size is searched up to {num_train}, the number of training images: a larger "
        "bank would hold images twice"
    ]
    for trial in asked(20):
        assert clamped.suggest(trial, base).method.bank_size <= num_train


def test_clamped__enough_images(base: TrialConfig) -> None:
    searched = space(EVERY_KIND, base)
    assert searched.clamped(300) == (searched, [])


# BUG found: the cut range does not end on a step, of which Optuna warns at every trial.
@pytest.mark.filterwarnings("error")
def test_clamped__steps_stay(base: TrialConfig) -> None:
    searched, _ = space({"method.bank_size": {"int": [64, 1024], "step": 64}}, base).clamped(200)
    found = {searched.suggest(trial, base).method.bank_size for trial in asked(40)}
    assert found == {64, 128, 192}


# ---- shipped spaces


@pytest.mark.parametrize("name", sorted(shipped_spaces()))
def test_shipped_space__every_draw_and_both_ends_are_valid(base: TrialConfig, name: str) -> None:
    searched = SearchSpace.from_mapping(read_space(name), base)
    assert len(searched.parameters) >= 5
    for trial in asked(60, seed=1):
        config = searched.suggest(trial, base)
        assert searched.locate(config, base) == trial.params
    ends: list[Callable[[Parameter], Any]] = [lambda p: p.ends()[0], lambda p: p.ends()[-1]]
    for end in ends:
        values = {parameter.path: end(parameter) for parameter in searched.parameters}
        config = searched.suggest(FixedTrial(values), base)  # type: ignore[arg-type]
        found = searched.locate(config, base)
        assert found is not None
        assert found.items() <= values.items()
    for parameter in searched.parameters:
        for value in parameter.ends():
            assert parameter.holds(value)
            flat = flattened(base.with_values({parameter.path: value}).to_mapping())
            assert flat[parameter.path] == value


@pytest.mark.parametrize("name", sorted(shipped_spaces()))
def test_shipped_space__conditions_look_back(base: TrialConfig, name: str) -> None:
    before: set[str] = set()
    for parameter in SearchSpace.from_mapping(read_space(name), base).parameters:
        assert {path for path, _ in parameter.when} <= before
        before.add(parameter.path)


@pytest.mark.parametrize("name", sorted(shipped_spaces()))
def test_shipped_space__holds_the_default_preset(base: TrialConfig, name: str) -> None:
    # DOUBT: `quick` searches bank sizes 64, 256 and 1024, so with more than 512 training images
    # the default preset (512) lies outside and its reference trial teaches the sampler nothing.
    searched, _ = SearchSpace.from_mapping(read_space(name), base).clamped(5000)
    assert searched.locate(reference_config(base, "default"), base) is not None


def test_read_space__file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("parameters:\n  optim.momentum: {float: [0.1, 0.9]}\n")
    assert read_space(str(path)) == {"parameters": {"optim.momentum": {"float": [0.1, 0.9]}}}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("quik", f"space 'quik' is neither a YAML file nor one of {sorted(shipped_spaces())}"),
        ("missing.yaml", "cannot read missing.yaml: No such file or directory"),
    ],
)
def test_read_space__unknown(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(problem)}$"):
        read_space(name)
