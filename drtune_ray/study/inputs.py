"""The inputs of a study or training, checked before the first trial."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from drtune_ray.config.inputs import DataConfig
from drtune_ray.config.study import ResourcesConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.report import image_changes, image_notes
from drtune_ray.data.sources import scan_images
from drtune_ray.data.splits import TRAIN, VALIDATION, Splits, make_splits, read_manifest
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.folders import source_location
from drtune_ray.storage.record import SPLITS_NAME
from drtune_ray.study.sizes import check_batch, check_feature_table
from drtune_ray.training.backbones import Backbone, load_backbone, normalization_note
from drtune_ray.training.dropping import check_drops
from drtune_ray.training.model import check_last_batch, check_layers, check_metrics, check_trial
from drtune_ray.training.weights_loading import KeyReport
from drtune_ray.values import digest


@dataclass(frozen=True)
class StudyInputs:
    """Checked inputs; nothing is written for them yet.

    Attributes:
        splits: Images and their splits.
        backbone: Pretrained encoder of the trial, or of the base of a study.
        key_report: How the weights matched the encoder.
        normalization_note: Normalization of the images, and who decided it.
        more: Encoders of other trials of the study, by `_encoder_key`.
        more_notes: Lines about the weights of these encoders, where they differ.
    """

    splits: Splits
    backbone: Backbone
    key_report: KeyReport
    normalization_note: str
    more: Mapping[str, Backbone] = field(default_factory=dict)
    more_notes: tuple[str, ...] = ()

    @property
    def weights_digest(self) -> str:
        """Hash of the weights of all encoders."""
        others = {key: backbone.digest for key, backbone in self.more.items()}
        return digest(self.backbone.digest, others) if others else self.backbone.digest

    def encoder_of(self, config: TrialConfig) -> Backbone:
        """Return the pretrained encoder of a trial."""
        return self.more.get(_encoder_key(config), self.backbone)

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return self.splits.count(TRAIN)

    def notes(self) -> tuple[str, ...]:
        """Return the lines about images and weights that precede the first trial."""
        images = image_notes(self.splits)
        return (self.summary(), *images, self.normalization_note, *self.more_notes)

    def summary(self) -> str:
        """Return a line about the images and the weights."""
        counts = f"{self.num_train} to train, {self.splits.count(VALIDATION)} to validate"
        sealed = len(self.splits.manifest) - self.num_train - self.splits.count(VALIDATION)
        return (
            f"{len(self.splits.classes)} classes; {counts}, {sealed} sealed for the test; "
            f"{self.backbone.name}: {self.key_report}"
        )


def check_inputs(
    config: TrialConfig,
    storage: Path,
    others: Sequence[Any] = (),
    resources: ResourcesConfig | None = None,
    objectives: Sequence[str] = (),
) -> StudyInputs:
    """Scan the images, split them and load the pretrained weights.

    Args:
        config: The trial, or the base of a study.
        storage: Folder that holds earlier manifests of the same images.
        others: Further checks, whose problems are reported together with these.
        resources: Resources of a worker; CPUs only by default.
        objectives: Objectives of a study.

    Raises:
        ConfigError: Naming every problem.
        EnvironmentProblem: If the weights cannot be fetched and nothing else is wrong.
    """
    problems: list[str] = []
    of_environment: list[EnvironmentProblem] = []

    def attempt(check: Any) -> Any:
        try:
            return check()
        except ConfigError as error:
            problems.extend(error.problems)
        except EnvironmentProblem as error:
            of_environment.append(error)
        return None

    attempt(lambda: check_storage(storage))
    splits = attempt(lambda: _splits(config.data, storage))
    for check in others:
        attempt(check)
    if splits is not None:
        gpus = (resources or ResourcesConfig()).worker_gpus(config.training.max_workers)
        problems.extend(check_trial(config, splits.count(TRAIN), on_gpus=gpus > 0))
        problems.extend(check_metrics(config, _validation_sizes(splits), objectives))
    too_large = check_batch(config)
    problems.extend(too_large)
    if not too_large:  # loading runs the encoder on an image
        loaded = attempt(lambda: load_backbone(config.backbone, config.data.image_size))
    if problems:
        raise ConfigError([*problems, *map(str, of_environment)])
    if of_environment:
        raise of_environment[0]
    backbone, report = loaded
    num_train = splits.count(TRAIN)
    problems = check_feature_table(config, num_train, backbone.num_features, storage)
    problems += check_last_batch(config, num_train, backbone)
    problems += check_layers(config, backbone)
    problems += check_drops(config.backbone, backbone)
    if problems:
        raise ConfigError(problems)
    note = normalization_note(config.backbone, backbone, report)
    return StudyInputs(splits, backbone, report, note)


def check_storage(storage: Path) -> None:
    """Check that the storage can be written to, without writing.

    Raises:
        ConfigError: If it is no folder and cannot become one.
    """
    there = next(path for path in (storage, *storage.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"storage={str(storage)!r}: {there} is a file; give another --storage")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"storage={str(storage)!r}: nothing can be written in {there}; give another --storage, "
            "or the right to write there"
        )


def check_encoders(checked: StudyInputs, configs: Iterable[TrialConfig]) -> StudyInputs:
    """Load the pretrained weights of further trials.

    Raises:
        ConfigError: Naming every problem that was found.
        EnvironmentProblem: If weights cannot be fetched.
    """
    more: dict[str, Backbone] = {}
    lines: list[str] = []
    problems: list[str] = []
    for config in configs:
        key = _encoder_key(config)
        try:
            if key not in more:
                more[key], report = load_backbone(config.backbone, config.data.image_size)
                note = normalization_note(config.backbone, more[key], report)
                lines.append(f"{more[key].name}: {report}; {note}")
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    known = f"{checked.backbone.name}: {checked.key_report}; {checked.normalization_note}"
    others = tuple(line for line in dict.fromkeys(lines) if line != known)  # one an image size
    return replace(checked, more=more, more_notes=others)


def _encoder_key(config: TrialConfig) -> str:
    return digest(config.backbone.name, config.backbone.weights, config.data.image_size)


def manifest_path(config: DataConfig, storage: Path) -> Path:
    """Return the file with the splits of a source: one for each source, its columns and quotas."""
    quotas = (config.train_per_class, config.validation_fraction, config.test_fraction)
    columns = (config.label_column, config.split_column, config.group_column)
    given: tuple[object, ...] = columns if any(columns) else ()  # as class folders had it before
    if config.folds is not None:
        given += ("folds", config.folds, config.fold, config.fold_seed)
    if config.train_share < 1:
        given += ("train_share", config.train_share)
    return storage / "splits" / f"{digest(source_location(config.train), *quotas, *given)}.parquet"


def _splits(config: DataConfig, storage: Path) -> Splits:
    former = read_manifest(manifest_path(config, storage))
    if former is None:  # all shares have the same validation and test images
        whole = config.model_copy(update={"train_share": 1.0})
        former = read_manifest(manifest_path(whole, storage))
    return make_splits(scan_images(config, former), config, former)


def _validation_sizes(splits: Splits) -> list[int]:
    """Return the number of validation images of each class."""
    counts = Counter(splits.rows(VALIDATION)["label"].to_pylist())
    return [counts[number] for number in range(len(splits.classes))]


def changed_images(folder: Path, splits: Splits) -> list[str]:
    """Return how the images differ from those that a study or training began with.

    Args:
        folder: Folder of the study or training.
        splits: Splits of the images now.
    """
    former = read_manifest(folder / SPLITS_NAME)
    return [] if former is None else image_changes(former, splits.manifest)
