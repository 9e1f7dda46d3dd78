from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from drtune_ray.config.inputs import DataConfig
from drtune_ray.config.presets import PRESETS
from drtune_ray.config.section import Section, known_paths
from drtune_ray.config.study import StudyConfig, reference_config, study_name
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.table_store import CACHE_FOLDER
from drtune_ray.errors import ConfigError
from drtune_ray.results.evaluate import OPENINGS_FOLDER, OPENINGS_NAME
from drtune_ray.study.inputs import manifest_path
from drtune_ray.tracking.sqlite_store import ARTIFACTS_NAME
from drtune_ray.values import (
    deep_merge,
    digest,
    flattened,
    nested,
    parse_assignments,
    read_yaml,
    to_yaml,
)

DATA = {"data": {"train": "images"}}
STUDY = {"name": "flowers", "trial": DATA}


def trial(values: Mapping[str, Any], preset: str | None = None) -> TrialConfig:
    return TrialConfig.from_mapping(deep_merge(DATA, nested(values)), preset=preset)


def study(values: Mapping[str, Any]) -> StudyConfig:
    return StudyConfig.from_mapping(deep_merge(STUDY, nested(values)))


def problems_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        trial(values)
    return caught.value.problems


def sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation)


# ---- unknown keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainig.epochs", "training"),
        ("training.batch_sze", "training.batch_size"),
        ("method.bank_sizes", "method.bank_size"),
        ("method.calibration.rotation_intervall", "method.calibration.rotation_interval"),
        ("batch_size", "training.batch_size"),  # the right key in the wrong group
        ("data.epochs", "training.epochs"),
    ],
)
def test_from_mapping__unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    shown = "trainig" if key == "trainig.epochs" else key
    assert problems_of({key: 3}) == (f"unknown key {shown!r}; did you mean {nearest!r}?",)


def test_study_from_mapping__unknown_key_below_trial() -> None:
    with pytest.raises(ConfigError) as caught:
        study({"trial.method.bank_sizes": 3, "sampler.nme": "tpe"})
    assert set(caught.value.problems) == {
        "unknown key 'trial.method.bank_sizes'; did you mean 'trial.method.bank_size'?",
        "unknown key 'sampler.nme'; did you mean 'sampler.name'?",
    }


# ---- refused values


def test_from_mapping__fractions_are_proportions_with_train_per_class() -> None:
    fractions = {"data.validation_fraction": 0.6, "data.test_fraction": 0.6}
    assert trial(fractions | {"data.train_per_class": 5}).data.train_per_class == 5


def test_from_mapping__shows_every_problem_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrialConfig.from_mapping(
            nested(
                {
                    "method.bank_size": 0,
                    "optim.name": "SGDD",
                    "training.batch_sze": 3,
                    "data.image_size": 64,
                    "seed": "one",
                }
            )
        )
    assert set(caught.value.problems) == {
        "data.train is missing: give it a value",
        "method.bank_size=0 is not valid: input should be greater than 0",
        "optim.name: there is no optimiser 'SGDD': the nearest is 'sgd', and "
        "docs/recipe.md lists all",
        "seed='one' is not valid: input should be a valid integer, unable to parse string as an "
        "integer",
        "unknown key 'training.batch_sze'; did you mean 'training.batch_size'?",
    }
    assert str(caught.value) == "\n".join(caught.value.problems)


def test_study_from_mapping__fewer_trials_with_fewer_references() -> None:
    assert study({"trials": 1, "reference_trials": ["ce_tuning"]}).trials == 1


@pytest.mark.parametrize("name", ["", "-dash-first", "with/slash", "with space", "x" * 101])
def test_study_from_mapping__name_is_a_folder_name(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        study({"name": name})
    assert str(caught.value) == (
        "name: a name has letters, digits, '.', '_' and '-', a letter or digit first, and at most "
        f"100 of them, but got {name!r}"
    )


@pytest.mark.parametrize(
    "values",
    [
        {"trial": "trial.yaml"},
        {"trial": ["data"]},
        {"trial": {"preset": ["authors"]}},
    ],
)
def test_study_from_mapping__a_trial_of_another_type_is_a_config_error(
    values: dict[str, Any],
) -> None:
    # BUG found: dict("trial.yaml") and `[...] not in PRESETS` raise ValueError and TypeError.
    with pytest.raises(ConfigError):
        StudyConfig.from_mapping(STUDY | values)


# ---- frozen


@pytest.mark.parametrize("config", [trial({}), study({})], ids=["trial", "study"])
def test_config__is_frozen(config: Section) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[attr-defined]
    assert all(
        section.model_config["frozen"] and section.model_config["extra"] == "forbid"
        for section in sections(type(config))
    )


def test_trial_config__groups_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        trial({}).training.epochs = 3


# ---- YAML, --set, presets


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_trial_config__yaml_round_trip(tmp_path: Path, preset: str) -> None:
    config = trial({"optim.backbone_lr": 1e-6, "training.patience_epochs": 4}, preset)
    (tmp_path / "trial.yaml").write_text(to_yaml(config.to_mapping()))
    assert TrialConfig.from_mapping(read_yaml(tmp_path / "trial.yaml")) == config


def test_study_config__yaml_round_trip(tmp_path: Path) -> None:
    config = study(
        {
            "trial.preset": "authors",
            "trial.training.epochs": 7,
            "space": {"parameters": {"method.bank_size": {"choice": [64, 256]}}},
            "reference_trials": ["paper", "ce_tuning"],
            "resources.trials_at_a_time": 2,
        }
    )
    (tmp_path / "study.yaml").write_text(to_yaml(config.to_mapping()))
    assert StudyConfig.from_mapping(read_yaml(tmp_path / "study.yaml")) == config
    assert config.trial.training.epochs == 7
    assert config.trial.method.reduction == "mean"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read {path}: No such file or directory"),
        (b"a: [1", "{path} is not valid YAML: while parsing"),
        (b"\xff\xfe\x00", "{path} is not valid YAML: "),
        (b"- 1\n- 2\n", "{path} must hold a mapping of keys to values"),
        (b"", "{path} must hold a mapping of keys to values"),
    ],
)
def test_read_yaml__refuses(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "study.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(problem.format(path=path))


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("training.epochs=20", "training.epochs", 20),
        ("optim.backbone_lr=1e-3", "optim.backbone_lr", 0.001),
        ("optim.backbone_lr=0.02", "optim.backbone_lr", 0.02),
        ("method.regularization_weight=1e-3", "method.regularization_weight", 0.001),
        (
            "method.regularization_weight=bank_over_batch",
            "method.regularization_weight",
            "bank_over_batch",
        ),
        ("optim.nesterov=true", "optim.nesterov", True),
        ("method.calibration.rotation=false", "method.calibration.rotation", False),
        ("training.patience_epochs=null", "training.patience_epochs", None),
        ("data.train=/images/a=b", "data.train", "/images/a=b"),
        (" seed = 3", "seed", 3),
    ],
)
def test_parse_assignments__as_the_config_takes_them(text: str, path: str, value: Any) -> None:
    found = flattened(trial(parse_assignments([text])).to_mapping())[path]
    assert found == value
    assert type(found) is type(value)


def test_parse_assignments__later_ones_win() -> None:
    assert parse_assignments(["seed=1", "training.epochs=2", "seed=3"]) == {
        "seed": 3,
        "training.epochs": 2,
    }


def test_from_mapping__preset_key_beats_the_argument() -> None:
    by_key = TrialConfig.from_mapping(DATA | {"preset": "paper"}, preset="authors")
    assert by_key == trial({}, "paper")
    assert by_key != trial({}, "authors")


def test_from_mapping__values_beat_the_preset() -> None:
    config = trial({"method.calibration.normalize": False, "training.epochs": 3}, "authors")
    assert config.method.calibration.normalize is False
    assert config.training.epochs == 3
    assert config.method.calibration.recenter is False  # the preset's neighbour stays


@pytest.mark.parametrize(
    ("preset", "values"),
    [
        (
            "paper",
            {
                "method.regularization_weight": "bank_over_batch",
                "method.reduction": "sum",
                "method.calibration.rotation_interval": 1,
                "method.calibration.recenter": True,
                "method.calibration.normalize": False,
                "method.calibration.similarity": "dot",
                "method.calibration.confidence_temperature": 1.0,
            },
        ),
        (
            "authors",
            {
                "method.regularization_weight": "bank_over_batch",
                "method.reduction": "mean",
                "method.head_lr_multiplier": "one_plus_bank_over_batch",
                "method.calibration.rotation_kept": False,
                "method.calibration.proper_rotation": True,
                "method.calibration.recenter": False,
                "optim.nesterov": True,
                "optim.schedule": "cosine_per_epoch",
                "training.drop_last": True,
            },
        ),
    ],
)
def test_presets__hold_what_they_stand_for(preset: str, values: dict[str, Any]) -> None:
    flat = flattened(trial({}, preset).to_mapping())
    assert {path: flat[path] for path in values} == values


def test_presets__are_not_changed_by_their_use() -> None:
    before = to_yaml(PRESETS)
    config = trial({"method.calibration.normalize": False}, "authors")
    reference_config(config, "authors")
    assert to_yaml(PRESETS) == before


# ---- reference trials


@pytest.fixture
def base() -> TrialConfig:
    return trial(
        {
            "backbone.name": "resnet18",
            "data.image_size": 96,
            "method.bank_size": 100,
            "optim.backbone_lr": 0.02,
            "optim.weight_decay": 0.5,
            "training.epochs": 7,
            "training.batch_size": 8,
            "seed": 5,
        }
    )


@pytest.mark.parametrize("name", ["default", "ce_tuning", "authors", "paper"])
def test_reference_config__same_backbone_epochs_and_data(base: TrialConfig, name: str) -> None:
    reference = reference_config(base, name)
    assert (reference.data, reference.backbone, reference.seed) == (base.data, base.backbone, 5)
    assert (reference.training.epochs, reference.training.batch_size) == (7, 8)
    assert reference.optim.backbone_lr == 0.02


@pytest.mark.parametrize("name", ["authors", "paper"])
def test_reference_config__method_and_recipe_of_the_preset(base: TrialConfig, name: str) -> None:
    reference, preset = reference_config(base, name), trial({}, name)
    assert reference.method == preset.method
    assert reference.optim == preset.optim.model_copy(update={"backbone_lr": 0.02})
    assert reference.training.batch_norm == "local"
    assert reference.training.drop_last == (name == "authors")


def test_reference_config__ce_tuning_differs_by_the_method_alone(base: TrialConfig) -> None:
    before, after = (
        flattened(base.to_mapping()),
        flattened(reference_config(base, "ce_tuning").to_mapping()),
    )
    assert {path for path in before if before[path] != after[path]} == {"method.name"}


def test_reference_config__default_of_a_ce_tuning_base_is_dr_tune(base: TrialConfig) -> None:
    ce_tuning = base.with_values({"method.name": "ce_tuning"})
    assert reference_config(ce_tuning, "default") == base


def test_reference_config__several_workers_keep_their_batch_norm(base: TrialConfig) -> None:
    several = base.with_values({"training.workers": 2, "training.batch_norm": "frozen"})
    assert reference_config(several, "authors").training.batch_norm == "frozen"


# ---- plain functions


def test_with_values__validates_the_whole() -> None:
    config = trial({"optim.nesterov": True})
    assert config.with_values({"optim.momentum": 0.5}).optim.momentum == 0.5
    with pytest.raises(ConfigError, match="nesterov=true needs momentum > 0"):
        config.with_values({"optim.momentum": 0.0})
    assert config.optim.momentum == 0.9


def test_known_paths__every_leaf_of_a_config() -> None:
    config = trial({})
    assert set(flattened(config.to_mapping())) <= set(known_paths(TrialConfig))
    assert "method.calibration" in set(known_paths(TrialConfig))


def test_nested__is_the_inverse_of_flattened() -> None:
    mapping = trial({}, "authors").to_mapping()
    assert nested(flattened(mapping)) == mapping
    assert flattened({"a": {}, "b": {"c": 1}}) == {"a": {}, "b.c": 1}


def test_deep_merge__leaves_its_arguments_alone() -> None:
    low, high = {"a": {"b": 1, "c": 2}, "d": {"e": 1}}, {"a": {"b": 3}, "d": 4}
    assert deep_merge(low, high) == {"a": {"b": 3, "c": 2}, "d": 4}
    assert low == {"a": {"b": 1, "c": 2}, "d": {"e": 1}}


def test_digest__same_in_another_process() -> None:
    code = "from drtune_ray.values import digest; print(digest('a', [1, 2], {'x': 1, 'y': 2}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest("a", [1, 2], {"y": 2, "x": 1})
    assert digest("a", "b") != digest("ab")


def test_study_config__folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert study({}).folder == tmp_path / "drtune-studies" / "flowers"
    assert study({"storage": "~/studies"}).folder == Path("/home/somebody/studies/flowers")


def test_study_name__none_of_what_studies_share() -> None:
    """A study of that name wrote into the files of all."""
    names = {OPENINGS_NAME, OPENINGS_FOLDER, ARTIFACTS_NAME, CACHE_FOLDER}
    names |= {manifest_path(DataConfig(train="x"), Path()).parent.name}
    for name in (*names, "mlflow.db", "mlflow.db-wal", "MLArtifacts"):
        with pytest.raises(ValueError, match="that all studies of a storage share"):
            study_name(name)
    assert study_name("cache-2") == "cache-2"
