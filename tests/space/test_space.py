from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from optuna.trial import FixedTrial

from drtune_ray.config.study import reference_config
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.space import settings
from drtune_ray.space.expressions import Expression, UnknownFact
from drtune_ray.space.parameters import Condition, Parameter, path_of
from drtune_ray.space.search_space import SearchSpace, read_space, shipped_spaces
from drtune_ray.values import flattened, to_yaml
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
    "method.calibration.rotation_rank": {
        "ordered": [4, 64, 16],  # an order of the user's own
        "when": "method.bank_size >= 100 and optim.momentum < 0.5",
    },
    "method.calibration.rotation_shrinkage": {
        "expression": "method.calibration.rotation_rank / method.bank_size"
    },
    "optim.schedule": {"constant": "constant"},
}
RANK = "method.calibration.rotation_rank [4, 64, 16]"


SEARCHED = {"method.bank_size": {"int": [3, 300]}}


@pytest.fixture
def base(make_trial: MakeTrial) -> TrialConfig:
    return make_trial()


def space(parameters: Mapping[str, Any], base: TrialConfig) -> SearchSpace:
    return SearchSpace.from_mapping({"parameters": parameters}, base)


def problems_of(content: Mapping[str, Any], base: TrialConfig) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        SearchSpace.from_mapping(content, base)
    return caught.value.problems


# ---- reading (what is refused: test_space_problems.py)


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
        ({"int": [0, 3]}, Parameter("optim.weight_decay", "int", (0.0, 3.0))),
        (
            {"choice": [0.0, 0.1], "when": {"optim.name": "sgd", "optim.schedule": ["cosine"]}},
            Parameter(
                "optim.weight_decay",
                "choice",
                values=(0.0, 0.1),
                when=Condition((("optim.name", ("sgd",)), ("optim.schedule", ("cosine",)))),
            ),
        ),
        (
            {"ordered": [1, 0.1, "1e-2"]},  # as YAML gives 1e-2
            Parameter("optim.weight_decay", "ordered", values=(1.0, 0.1, 0.01)),
        ),
        (
            {"ordered": [0.1], "when": "optim.momentum > 0"},
            Parameter(
                "optim.weight_decay",
                "ordered",
                values=(0.1,),
                when=Condition(expression=Expression("optim.momentum > 0")),
            ),
        ),
        ({"constant": 1}, Parameter("optim.weight_decay", "constant", values=(1.0,))),
        (
            {"expression": "0.1 * optim.momentum"},
            Parameter(
                "optim.weight_decay",
                "expression",
                expression=Expression("0.1 * optim.momentum"),
            ),
        ),
    ],
)
def test_from_mapping__parameter(
    base: TrialConfig, body: dict[str, Any], expected: Parameter
) -> None:
    found = space({"optim.weight_decay": body} | SEARCHED, base).parameters
    assert found[0] == expected
    assert [type(value) for value in found[0].values] == [type(v) for v in expected.values]


@pytest.mark.parametrize("content", [{}, {"parameters": {}}, {"parameters": ["seed"]}, {"x": 1}])
def test_from_mapping__no_parameters(base: TrialConfig, content: dict[str, Any]) -> None:
    assert problems_of(content, base)[-1] == (
        "search space: it needs 'parameters': a mapping of paths to ranges"
    )


@pytest.mark.parametrize(
    ("values", "parameters"),
    [
        # The base's momentum of 0 is never taken.
        (
            {"optim.momentum": 0.0},
            {"optim.nesterov": {"choice": [True, False]}, "optim.momentum": {"float": [0.1, 0.9]}},
        ),
        (
            {},
            {
                "optim.nesterov": {"choice": [True, False], "when": "optim.momentum > 0"},
                "optim.momentum": {"float": [0.0, 0.9]},
            },
        ),
        # One step would lead to where no momentum is.
        ({}, {"optim.momentum": {"float": [0.5, 0.5], "step": 0.6}}),
    ],
)
def test_from_mapping__what_every_trial_can_be(
    make_trial: MakeTrial, values: dict[str, Any], parameters: dict[str, Any]
) -> None:
    base = make_trial(values)
    searched = space(parameters, base)
    for trial in asked(20):
        searched.suggest(trial, base)


def test_from_mapping__a_condition_may_look_ahead(base: TrialConfig) -> None:
    # Order is by dependency, else as declared.
    paths = [
        "optim.momentum",
        "method.calibration.rotation_rank",
        "method.calibration.rotation_interval",
        "optim.weight_decay",
        "method.calibration.rotation",
        "method.bank_size",
    ]
    parameters = {
        "optim.momentum": {"float": [0.1, 0.9]},
        "method.calibration.rotation_rank": {"expression": "method.bank_size // 8"},
        "method.calibration.rotation_interval": EVERY_KIND["method.calibration.rotation_interval"],
        "optim.weight_decay": {"float": [0.1, 0.9]},
        "method.calibration.rotation": {"choice": [True, False]},
        "method.bank_size": {"int": [64, 512]},
    }
    found = space(parameters, base).parameters
    assert [paths.index(parameter.path) for parameter in found] == [0, 3, 4, 2, 5, 1]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("data.view_seed", {"int": [0, 1]}),
        ("data.train_per_class", {"choice": [5, 10]}),
        ("training.epochs", {"expression": "2 * training.batch_size"}),
        ("training.workers", {"constant": 1}),
        ("seed", {"int": [0, 9]}),
    ],
)
def test_from_mapping__what_all_trials_share_cannot_be_searched(
    base: TrialConfig, path: str, body: dict[str, Any]
) -> None:
    assert problems_of({"parameters": {path: body} | SEARCHED}, base) == (
        f"search space: {path} is shared by all trials of a study, which prepares it once: set it "
        "in the trial and run one study for each value",
    )


def test_restrictions__what_changes_the_tables_is_given_by_category(base: TrialConfig) -> None:
    body = {"ordered": [32, 64]}
    assert space({"data.image_size": body}, base).parameters[0].values == (32, 64)
    assert problems_of({"parameters": {"data.image_size": {"int": [32, 64]}}}, base) == (
        "search space: data.image_size changes the prepared images and features, of which each "
        "value needs its own: search it as choice, ordered or constant",
    )
    assert set(settings.RESTRICTIONS) <= {*settings.setting_paths(), "data", "backbone"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("data.augmentation", {"choice": ["none", "trivial_augment"]}),
        ("data.augmentation_magnitude", {"ordered": [5, 9]}),
        ("data.random_erasing", {"choice": [0.0, 0.25]}),
        ("data.sampling", {"choice": ["uniform", "class_balanced"]}),
        ("backbone.drop_path", {"float": [0.0, 0.3]}),
        ("backbone.dropout", {"float": [0.0, 0.3]}),
        ("training.label_smoothing", {"float": [0.0, 0.2]}),
        ("training.class_weights", {"choice": ["none", "balanced"]}),
        ("training.mixup", {"float": [0.0, 0.8]}),
        ("training.cutmix", {"ordered": [0.0, 1.0]}),
    ],
)
def test_restrictions__recipe_of_data_and_loss_is_searched(
    base: TrialConfig, path: str, body: dict[str, Any]
) -> None:
    fixed = {"data.augmentation": "rand_augment"} if "magnitude" in path else {}
    assert space({path: body}, base.with_values(fixed)).parameters[0].path == path


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
        "method.bank_size": 128,
        "method.regularization_weight": "bank_over_batch",
        "method.calibration.rotation": True,
        "method.calibration.rotation_interval": 4,
        "method.calibration.proper_rotation": True,
    }
    searched = space(EVERY_KIND, base)
    config = searched.suggest(FixedTrial(values | {RANK: 1}), base)  # type: ignore[arg-type]
    follow = {
        "method.calibration.rotation_rank": 64,
        "method.calibration.rotation_shrinkage": 0.5,
        "optim.schedule": "constant",
    }
    assert config == base.with_values(values | follow)
    assert searched.locate(config, base) == values | {RANK: 1}


def test_suggest__the_sampler_sees_the_order_of_values(base: TrialConfig) -> None:
    (trial,) = asked(1)
    searched = space({"training.batch_size": {"ordered": [16, 32, 64]}}, base)
    config = searched.suggest(trial, base)
    name = "training.batch_size [16, 32, 64]"
    assert trial.distributions == {name: optuna.distributions.IntDistribution(0, 2)}
    assert config.training.batch_size == [16, 32, 64][trial.params[name]]


@pytest.mark.parametrize(
    ("translation", "confidence", "is_active"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
@pytest.mark.parametrize("as_expression", [False, True])
def test_suggest__below_an_inactive_parameter_nothing_is_active(
    base: TrialConfig, translation: bool, confidence: bool, is_active: bool, as_expression: bool
) -> None:
    # The base weights by confidence: where that is not searched, its temperature is not either.
    assert base.method.calibration.confidence_weighting
    group = "method.calibration"
    when: Any = {f"{group}.confidence_weighting": True}
    if as_expression:
        when = f"{group}.confidence_weighting"
    searched = space(
        {
            f"{group}.confidence_temperature": {"float": [0.5, 2.0], "when": when},
            f"{group}.confidence_weighting": {
                "choice": [True, False],
                "when": {f"{group}.translation": True},
            },
            f"{group}.translation": {"choice": [True, False]},
        },
        base,
    )
    trial = FixedTrial(
        {
            f"{group}.translation": translation,
            f"{group}.confidence_weighting": confidence,
            f"{group}.confidence_temperature": 1.5,
        }
    )
    config = searched.suggest(trial, base)  # type: ignore[arg-type]
    assert (f"{group}.confidence_temperature" in trial.params) is is_active
    assert config.method.calibration.confidence_temperature == (1.5 if is_active else 0.1)
    assert searched.locate(config, base) == trial.params


def test_suggest__any_of_several_values(base: TrialConfig) -> None:
    searched = space(
        {
            "optim.schedule": {"choice": ["cosine", "cosine_per_epoch", "constant"]},
            "optim.momentum": {
                "float": [0.1, 0.2],
                "when": {"optim.schedule": ["cosine", "constant"]},
            },
        },
        base,
    )
    seen = set()
    for trial in asked(30):
        config = searched.suggest(trial, base)
        seen.add((config.optim.schedule, "optim.momentum" in trial.params))
    assert seen == {("cosine", True), ("cosine_per_epoch", False), ("constant", True)}


def test_suggest__an_expression_that_fails_between_the_points_tried(base: TrialConfig) -> None:
    parameters = {
        "method.bank_size": {"int": [3, 300_000]},
        "method.head_lr_multiplier": {"expression": "9 / (method.bank_size - 77 * 901) ** 2"},
    }
    searched = space(parameters, base)
    with pytest.raises(
        ConfigError,
        match=r"^'9 / \(method\.bank_size - 77 \* 901\) \*\* 2' cannot be computed: division by",
    ):
        searched.suggest(FixedTrial({"method.bank_size": 69_377}), base)  # type: ignore[arg-type]


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
        if path.startswith(("method.calibration.rotation_i", "method.calibration.proper"))
        or path in ("method.calibration.rotation", "method.regularization_weight")
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
    drawn: dict[str, list[Any]] = {parameter.name: [] for parameter in searched.parameters}
    for trial in asked(120):
        config = searched.suggest(trial, base)
        assert searched.locate(config, base) == trial.params
        drawn_paths = {path_of(name) for name in trial.params}
        assert drawn_paths == {p.path for p in searched.parameters if p.is_sampled} & set(
            searched.active(config)
        )
        flat = flattened(config.to_mapping())
        if RANK in trial.params:
            assert flat["method.bank_size"] >= 100
            assert flat["optim.momentum"] < 0.5
            assert flat["method.calibration.rotation_rank"] == (4, 64, 16)[trial.params[RANK]]
        for path, value in trial.params.items():
            drawn[path].append(value)
            assert path == RANK or flat[path] == value
    seen = {path: set(values) for path, values in drawn.items()}
    assert seen["training.batch_size"] == set(range(8, 65, 8))
    assert seen["method.calibration.rotation_interval"] == set(range(1, 10))
    assert seen["method.regularization_weight"] == {0.5, "bank_over_batch"}
    assert seen[RANK] == {0, 1, 2}
    assert all(abs(value * 10 - round(value * 10)) < 1e-9 for value in seen["optim.weight_decay"])
    # Logarithmic ranges: half of the draws lie below the geometric mean.
    assert 40 < sum(value < 0.01 for value in drawn["optim.backbone_lr"]) < 80
    assert 40 < sum(value < 7 for value in drawn["training.patience_epochs"]) < 80


def test_active__of_a_configuration_that_no_trial_had(base: TrialConfig) -> None:
    parameters = {
        "method.name": {"choice": ["ce_tuning", "dr_tune"]},
        "method.bank_size": {"int": [8, 64], "when": {"method.name": "dr_tune"}},
        "method.calibration.rotation": {"choice": [True], "when": {"method.name": "dr_tune"}},
        "method.calibration.rotation_rank": {
            "ordered": [4, 16],
            "when": {"method.calibration.rotation": True},
        },
    }
    searched = space(parameters, base)
    assert searched.active(reference_config(base, "ce_tuning")) == ("method.name",)
    assert set(searched.active(base)) == set(parameters)
    # The authors' weight is a word, from which this condition cannot be computed.
    condition = {"int": [8, 64], "when": "method.regularization_weight > 0.5"}
    of_weight = space({"method.bank_size": condition}, base)
    assert of_weight.active(reference_config(base, "authors")) == ()
    without = base.with_values({"method.calibration.rotation": False})
    assert set(searched.active(without)) == set(parameters) - {"method.calibration.rotation_rank"}


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
        {"method.calibration.rotation_rank": 16},  # searched in larger banks only
        {"method.calibration.rotation_shrinkage": 0.02},  # follows from rank and bank
        {"optim.schedule": "cosine"},
        {"method.bank_size": 120, "optim.momentum": 0.4, "method.calibration.rotation_rank": 5},
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
        "method.calibration.rotation_shrinkage": 32 / 30,
        "optim.schedule": "constant",
    }
    searched = space(EVERY_KIND, base)
    assert searched.locate(base.with_values(inside), base) is not None
    assert searched.locate(base.with_values(inside | values), base) is None


def test_locate__unset_value(base: TrialConfig) -> None:
    # BUG found: TypeError, because None is compared with the bounds.
    searched = space({"training.patience_epochs": {"int": [2, 5]}}, base)
    assert searched.locate(base, base) is None


def test_locate__a_point_that_is_enqueued_comes_out(base: TrialConfig) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searched = space(EVERY_KIND, base)
    for trial in asked(20, seed=3):
        config = searched.suggest(trial, base)
        study = optuna.create_study()
        study.enqueue_trial(searched.locate(config, base) or {})
        again = study.ask()
        assert searched.suggest(again, base) == config
        assert again.params == trial.params


def test_locate__an_expression_that_fails_there(base: TrialConfig) -> None:
    parameters = {
        "method.bank_size": {"int": [3, 300_000]},
        "method.head_lr_multiplier": {"expression": "9 / (method.bank_size - 77 * 901) ** 2"},
    }
    searched = space(parameters, base)
    inside = {"method.bank_size": 69_378, "method.head_lr_multiplier": 9.0}
    assert searched.locate(base.with_values(inside), base) == {"method.bank_size": 69_378}
    assert searched.locate(base.with_values({"method.bank_size": 69_377}), base) is None


# ---- round trip


@pytest.mark.parametrize("name", ["every kind", *shipped_spaces()])
def test_to_mapping__round_trip(base: TrialConfig, name: str) -> None:
    constraints = ["training.batch_size <= method.bank_size", "method.bank_size != 7"]
    content = {"parameters": EVERY_KIND, "constraints": constraints}
    first = SearchSpace.from_mapping(content if name == "every kind" else read_space(name), base)
    plain = first.to_mapping()
    assert SearchSpace.from_mapping(plain, base) == first
    again = SearchSpace.from_mapping(yaml.safe_load(to_yaml(plain)), base)
    assert again == first
    assert again.to_mapping() == plain
    assert again.parameters != first.parameters[1:]  # they can differ


@given(
    low=st.floats(1e-8, 0.4),
    width=st.floats(0.0, 0.4),
    log=st.booleans(),
    values=st.lists(st.floats(0.0, 0.9), min_size=1, max_size=4, unique=True),
    when=st.sampled_from([None, {"optim.name": "sgd"}, {"optim.name": ["adamw"]}, "seed == 0"]),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_to_mapping__round_trip_of_any_numbers(
    low: float, width: float, log: bool, values: list[float], when: Any
) -> None:
    base = TrialConfig.from_mapping({"data": {"train": "images"}})
    content = {
        "optim.name": {"choice": ["sgd", "adamw"]},
        "optim.weight_decay": {"float": [low, low + width], "log": log, "when": when},
        "optim.momentum": {"ordered": values},
    }
    first = space(content, base)
    assert space(yaml.safe_load(to_yaml(first.to_mapping()))["parameters"], base) == first


# ---- constraints


def test_violations(base: TrialConfig) -> None:
    constraints = [
        "training.batch_size <= method.bank_size",
        "method.bank_size <= data.num_train",
        "optim.name == 'sgd' or optim.momentum == 0.9",
    ]
    content = {"parameters": EVERY_KIND, "constraints": constraints}
    searched, _ = SearchSpace.from_mapping(content, base).clamped(300)
    assert searched.violations(base.with_values({"method.bank_size": 300})) == dict.fromkeys(
        constraints, 0.0
    )
    small = base.with_values({"method.bank_size": 8, "optim.name": "adamw", "optim.momentum": 0.0})
    assert searched.violations(small) == dict(zip(constraints, [24 / 32, 0.0, 1.0], strict=True))
    large = base.with_values({"method.bank_size": 400})
    assert searched.violations(large) == dict(zip(constraints, [0.0, 0.25, 0.0], strict=True))


def test_violations__facts_are_known_once_clamped(base: TrialConfig) -> None:
    constraints = ["method.bank_size >= 8 * data.num_classes"]
    content = {"parameters": SEARCHED, "constraints": constraints}
    searched = SearchSpace.from_mapping(content, base)
    with pytest.raises(
        UnknownFact, match=r"^data\.num_classes is not known before the images were read$"
    ):
        searched.violations(base)
    known, _ = searched.clamped(300, num_classes=5)
    assert known.violations(base.with_values({"method.bank_size": 30})) == {constraints[0]: 0.25}


# ---- on the images


@pytest.mark.parametrize(
    ("body", "num_train", "expected"),
    [
        ({"int": [32, 8192], "log": True}, 100, {"bounds": (32.0, 100.0)}),
        ({"int": [512, 8192]}, 100, {"bounds": (100.0, 100.0)}),
        ({"choice": [64, 256, 1024]}, 100, {"values": (64, 100)}),
        ({"choice": [64, 256, 1024]}, 64, {"values": (64,)}),
        ({"ordered": [64, 256, 1024]}, 100, {"values": (64, 100)}),
        ({"constant": 1024}, 100, {"values": (100,)}),
        (
            {"expression": "16 * training.batch_size"},
            100,
            {"expression": Expression("min(data.num_train, 16 * training.batch_size)")},
        ),
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


def test_clamped__expressions_get_the_facts(base: TrialConfig) -> None:
    parameters = {
        "method.bank_size": {"expression": "min(512, data.num_train // 2)"},
        "method.calibration.rotation_rank": {"expression": "8 * data.num_classes"},
        "optim.momentum": {"float": [0.1, 0.9], "when": "data.num_train > 100"},
    }
    parameters["optim.nesterov"] = {"choice": [True, False]}
    searched, notes = space(parameters, base).clamped(150, 3)
    assert notes == []
    trial = FixedTrial({"optim.momentum": 0.5, "optim.nesterov": True})
    config = searched.suggest(trial, base)  # type: ignore[arg-type]
    assert (config.method.bank_size, config.optim.momentum) == (75, 0.5)
    assert config.method.calibration.rotation_rank == 24
    assert searched.locate(config, base) == trial.params


def test_clamped__a_bank_that_is_not_searched_is_cut_too(base: TrialConfig) -> None:
    # The study cuts its base; here only the constraint looks at it.
    content = {
        "parameters": {"optim.momentum": {"float": [0.1, 0.9]}},
        "constraints": ["method.bank_size <= data.num_train"],
    }
    assert base.method.bank_size == 512
    searched, notes = SearchSpace.from_mapping(content, base).clamped(100)
    assert notes == []
    assert searched.violations(base) == {"method.bank_size <= data.num_train": 412 / 512}


def test_clamped__what_these_images_leave_unused_is_said(base: TrialConfig) -> None:
    parameters = {
        "method.bank_size": {"int": [64, 2048]},
        "method.calibration.rotation_rank": {"int": [8, 64], "when": "method.bank_size >= 512"},
    }
    searched, notes = space(parameters, base).clamped(200)
    assert notes == [
        "method.bank_size is searched up to 200, the number of training images: a larger bank "
        "would hold images twice",
        "method.calibration.rotation_rank never applies: 'method.bank_size >= 512' is true at none "
        "of the points tried (method.bank_size is searched in [64, 200]): change the condition or "
        "the ranges",
    ]
    assert len(searched.parameters) == 2


def test_clamped__enough_images(base: TrialConfig) -> None:
    searched = space(EVERY_KIND, base)
    assert searched.clamped(300) == (searched, [])


# BUG found: the cut range does not end on a step, of which Optuna warns at every trial.
@pytest.mark.filterwarnings("error")
def test_clamped__steps_stay(base: TrialConfig) -> None:
    searched, _ = space({"method.bank_size": {"int": [64, 1024], "step": 64}}, base).clamped(200)
    found = {searched.suggest(trial, base).method.bank_size for trial in asked(40)}
    assert found == {64, 128, 192}


# ---- files


def test_read_space__file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("parameters:\n  optim.momentum: {float: [0.1, 0.9]}\n")
    assert read_space(str(path)) == {"parameters": {"optim.momentum": {"float": [0.1, 0.9]}}}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("quik", f"space 'quik' is neither a YAML file nor one of {sorted(shipped_spaces())}"),
        ("missing.yaml", "cannot read missing.yaml: No such file or directory; give a YAML file"),
    ],
)
def test_read_space__unknown(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(problem)}$"):
        read_space(name)
