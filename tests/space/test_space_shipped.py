"""The search spaces that come with the package, and their JSON Schema."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import optuna
import pytest
import yaml
from optuna.trial import FixedTrial

from drtune_ray.config.method import READS
from drtune_ray.config.study import StudyConfig, reference_config
from drtune_ray.config.trial import TrialConfig
from drtune_ray.results.used_settings import unused_settings
from drtune_ray.search.samplers import check_sampler
from drtune_ray.space.expression_syntax import FUNCTIONS
from drtune_ray.space.json_schema import schema_text, space_schema
from drtune_ray.space.parameters import KINDS, Parameter
from drtune_ray.space.search_space import SearchSpace, read_space, shipped_spaces
from drtune_ray.space.settings import FACTS
from drtune_ray.study.tables import table_variants
from drtune_ray.training.methods import METHODS
from drtune_ray.values import flattened
from tests.conftest import MakeTrial

SHIPPED = sorted(shipped_spaces())
FOLDER = Path(__file__).parents[2] / "search_spaces"
FIRST_LINE = "# yaml-language-server: $schema=schema.json"
DOCS = FOLDER.parent / "docs" / "search-space.md"
BAD_SPACES = Path(__file__).parent / "bad_spaces"


@pytest.fixture
def base(make_trial: MakeTrial) -> TrialConfig:
    return make_trial()


def shipped(name: str, base: TrialConfig) -> SearchSpace:
    return SearchSpace.from_mapping(read_space(name), base)


def drawn(number: int, seed: int = 1) -> list[optuna.Trial]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [study.ask() for _ in range(number)]


def fixed(space: SearchSpace, values: dict[str, Any]) -> FixedTrial:
    sampled = [parameter for parameter in space.parameters if parameter.is_sampled]
    return FixedTrial({p.name: p.stored(values[p.path]) for p in sampled})


def test_shipped__are_these() -> None:
    purposes = {"ablation", "authors", "dr_tune", "low_data", "quick", "recipe", "vit"}
    assert set(SHIPPED) == purposes | set(METHODS)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dr_tune"}))
def test_shipped__a_methods_own_space_searches_what_it_reads(base: TrialConfig, name: str) -> None:
    space = shipped(name, base)
    for trial in drawn(5):
        config = space.suggest(trial, base)
        assert config.method.name == name
        searched = {parameter.path for parameter in space.parameters if parameter.is_sampled}
        is_read = searched - set(unused_settings(config))
        assert is_read >= searched - {"method.calibration.rotation_interval"}
    own = {p.split(".")[1] for p in searched if p.startswith("method.")} - {"head_lr_multiplier"}
    assert own <= set(READS.get(name, ()))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped__says_for_whom(name: str) -> None:
    first, second, *_ = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert first == FIRST_LINE
    assert second.startswith("# For ")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped__every_draw_is_valid(base: TrialConfig, name: str) -> None:
    space = shipped(name, base)
    for trial in drawn(60):
        config = space.suggest(trial, base)
        assert space.locate(config, base) == trial.params


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped__both_ends_of_each_range_are_valid(base: TrialConfig, name: str) -> None:
    space = shipped(name, base)
    sampled = [parameter for parameter in space.parameters if parameter.is_sampled]
    num_reached = 0
    for parameter, other in product(sampled, (0, -1)):
        for value in parameter.ends():
            assert parameter.holds(value)
            values = {p.path: p.ends()[other] for p in sampled} | {parameter.path: value}
            config = space.suggest(fixed(space, values), base)  # type: ignore[arg-type]
            found = space.locate(config, base)
            assert found is not None
            flat = flattened(config.to_mapping())
            if parameter.name in found:
                num_reached += 1
                assert flat[parameter.path] == value
    assert num_reached >= 2 * len(sampled)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped__depends_on_earlier_parameters_only(base: TrialConfig, name: str) -> None:
    space = shipped(name, base)
    paths = [parameter.path for parameter in space.parameters]
    for rank, parameter in enumerate(space.parameters):
        assert not parameter.reads() & set(paths[rank:])


@pytest.mark.parametrize(
    ("name", "num_train"),
    [
        ("quick", 5000),
        ("dr_tune", 5000),
        ("recipe", 5000),
        ("low_data", 5000),
        ("low_data", 60),
        ("ablation", 60),
    ],
)
def test_shipped__holds_the_default_preset(base: TrialConfig, name: str, num_train: int) -> None:
    # Else the reference trial of this name would teach the sampler nothing.
    space, _ = shipped(name, base).clamped(num_train)
    cut = base.with_values({"method.bank_size": min(base.method.bank_size, num_train)})
    assert space.locate(reference_config(cut, "default"), cut) is not None


def test_authors__is_the_preset(base: TrialConfig) -> None:
    space, _ = shipped("authors", base).clamped(5000)
    wanted = reference_config(base, "authors")
    assert space.locate(wanted, base) == {"method.bank_size [256, 512, 1024, 2048, 4096]": 3}
    several = base.with_values({"training.workers": 2})
    of_several = SearchSpace.from_mapping(read_space("authors"), several)
    (trial,) = drawn(1)
    assert of_several.suggest(trial, several).training.batch_norm == "frozen"


def test_ablation__the_rows_of_tables_6_and_7(base: TrialConfig) -> None:
    space = shipped("ablation", base)
    ranges = {parameter.path: parameter.values for parameter in space.parameters}
    rows = set()
    for values in product(*ranges.values()):
        trial = fixed(space, dict(zip(ranges, values, strict=True)))
        config = space.suggest(trial, base)  # type: ignore[arg-type]
        calibration = config.method.calibration
        parts = (
            ("GR", calibration.rotation),
            ("CLT", calibration.translation),
            ("CGA", calibration.translation and calibration.confidence_weighting),
        )
        is_dr = config.method.name == "dr_tune"
        rows.add("+".join(["DR", *(part for part, on in parts if on)]) if is_dr else "CE")
        assert len(trial.params) <= len(ranges)
    table_6 = {"CE", "DR", "DR+GR+CLT+CGA"}
    table_7 = {"DR", "DR+GR", "DR+CLT", "DR+CLT+CGA", "DR+GR+CLT+CGA"}
    assert rows == table_6 | table_7 | {"DR+GR+CLT"}


def test_quick__as_the_reference_results_of_the_demo_had_it() -> None:
    assert read_space("quick") == {
        "parameters": {
            "method.regularization_weight": {"float": [0.05, 4.0], "log": True},
            "method.bank_size": {"choice": [64, 256, 512, 1024]},
            "method.head_lr_multiplier": {"float": [0.5, 10.0], "log": True},
            "method.calibration.rotation": {"choice": [True, False]},
            "method.calibration.rotation_interval": {
                "int": [1, 20],
                "log": True,
                "when": {"method.calibration.rotation": True},
            },
            "optim.backbone_lr": {"float": [0.0003, 0.004], "log": True},
        }
    }


def test_dr_tune__has_every_calibration_setting(base: TrialConfig) -> None:
    paths = {parameter.path for parameter in shipped("dr_tune", base).parameters}
    assert {
        f"method.calibration.{name}" for name in type(base.method.calibration).model_fields
    } <= (paths)
    assert {f"optim.{name}" for name in type(base.optim).model_fields} <= paths
    read = {"head_lr_multiplier", *READS["dr_tune"]} - {"calibration"}
    assert {f"method.{name}" for name in read} <= paths


def test_dr_tune__is_conditional(base: TrialConfig) -> None:
    space = shipped("dr_tune", base)
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    for trial in drawn(200):
        config = space.suggest(trial, base)
        seen[config.method.calibration.rotation] |= trial.params.keys()
        names = {name.rsplit(".", 1)[-1] for name in trial.params}
        assert ("momentum" in names) == (config.optim.name == "sgd")
        assert ("confidence_temperature" in names) == (
            config.method.calibration.translation and config.method.calibration.confidence_weighting
        )
    only = {name.rsplit(".", 1)[-1] for name in seen[True] - seen[False]}
    assert only == {
        "rotation_interval",
        "rotation_kept",
        "rotation_restarts_each_epoch",
        "rotation_solver",
        "rotation_rank",
        "rotation_shrinkage",
        "proper_rotation",
        "recenter",
    }


# ---- docs/search-space.md

BLOCKS = re.findall(r"```(yaml|python)\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
DOCUMENTED = [block for language, block in BLOCKS if language == "yaml"]


@pytest.mark.parametrize("block", DOCUMENTED)
def test_docs__spaces_are_valid(base: TrialConfig, block: str) -> None:
    space, _ = SearchSpace.from_mapping(yaml.safe_load(block), base).clamped(5000, 10)
    for trial in drawn(20):
        config = space.suggest(trial, base)
        assert space.locate(config, base) == trial.params
    assert complaints(yaml.safe_load(block)) == []


def test_docs__python(base: TrialConfig) -> None:
    (code,) = [block for language, block in BLOCKS if language == "python"]
    *lines, last = code.splitlines()
    names: dict[str, Any] = {"trial": base, "optuna_trial": drawn(1)[0]}
    exec("\n".join(lines), names)
    assert eval(last, names) is True
    assert names["config"].method.bank_size <= 180
    assert len(DOCUMENTED) == 3


def test_docs__name_every_space_function_and_fact() -> None:
    text = DOCS.read_text()
    for name in (*SHIPPED, *FUNCTIONS, *FACTS, *KINDS):
        assert f"`{name}" in text, name


# ---- the schema


def test_schema__is_current() -> None:
    remedy = (
        "write it again: python -c 'from drtune_ray.space.json_schema import *; "
        "print(schema_text(), end=str())' > search_spaces/schema.json"
    )
    assert (FOLDER / "schema.json").read_text() == schema_text(), remedy


def test_schema__is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(space_schema())
    assert json.loads(schema_text()) == space_schema()


def complaints(content: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(space_schema())
    return [error.message for error in validator.iter_errors(content)]


@pytest.mark.parametrize("name", SHIPPED)
def test_schema__takes_the_shipped_spaces(name: str) -> None:
    assert complaints(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())) == []


@pytest.mark.parametrize(
    "rule",
    [
        *("space-key", "no-parameters", "constraints-list", "one-kind", "option", "restricted"),
        *("group", "setting", "log-word", "step-number", "whole-bounds", "step", "range-value"),
        *("range-of-words", "float-for-int", "values-list", "value", "condition"),
        *("condition-setting", "expression-text", "bounds"),
    ],
)
def test_schema__an_editor_sees_what_one_line_shows(rule: str) -> None:
    assert complaints(yaml.safe_load((BAD_SPACES / f"{rule}.yaml").read_text()))


def test_schema__kinds_of_a_setting() -> None:
    properties = space_schema()["properties"]["parameters"]["properties"]
    rest = {"choice", "ordered", "constant", "expression", "when"}
    assert set(properties["method.reduction"]["properties"]) == rest
    assert set(properties["method.bank_size"]["properties"]) == rest | {"int", "log", "step"}
    assert set(properties["optim.momentum"]["properties"]) == rest | {
        *("float", "int", "log", "step")
    }
    assert set(properties["data.image_size"]["properties"]) == {
        *("choice", "ordered"),
        "constant",
        "when",
    }
    closed = ("data.view_seed", "data.train_per_class", "seed", "training.epochs")
    assert not properties.keys() & set(closed)


def test_parameter__has_no_place_in_comparisons(base: TrialConfig) -> None:
    plain = SearchSpace.from_mapping(yaml.safe_load((FOLDER / "vit.yaml").read_text()), base)
    assert plain == shipped("vit", base)
    assert isinstance(plain.parameters[0], Parameter)


def test_docs_searching__its_study_is_valid() -> None:
    """The study of several objectives in docs/searching.md, with its other blocks on top."""
    text = DOCS.with_name("searching.md").read_text()
    blocks = [yaml.safe_load(b) for b in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    study = next(block for block in blocks if "space" in block)
    for block in blocks:
        if "start_with" not in block:
            study = block | study
    config = StudyConfig.from_mapping(study)
    assert config.budget.patience_trials and config.sampler.options
    space, _ = SearchSpace.from_mapping(study["space"], config.trial).clamped(5000, 10)
    assert len(table_variants(space, config.trial)) == 7  # the base's and two times three
    check_sampler(config.sampler)
