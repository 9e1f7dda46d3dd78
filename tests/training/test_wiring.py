"""Every setting of a trial, at another value than its default, against what the built objects hold.

A setting without a case here fails the first test: one that reaches nothing could be searched over
without effect.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from drtune_ray.config.study import ResourcesConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.method import CETuning
from drtune_ray.study.inputs import check_inputs
from drtune_ray.training.layers import layer_numbers
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.model import generator
from drtune_ray.training.reports import COMPLETED, PATIENCE, EpochReport, SavePoint
from drtune_ray.training.trial import Trial
from drtune_ray.values import flattened
from tests.small import BACKBONE, NORM_FREE, prepared, small_trial, small_values, write_coloured

CPU = torch.device("cpu")
PER_CLASS, STEPS = 16, 4  # 30 images to train in batches of 8


class Built:
    """A trial and what it is made of."""

    def __init__(self, config: TrialConfig, storage: Path) -> None:
        self.config, self.storage = config, storage
        self.data, self.backbone, self.tables = prepared(config, storage)
        self.maker: Any = self.data._maker

    @cached_property
    def trial(self) -> Trial:
        return Trial(self.config, self.data, self.backbone, CPU)

    @property
    def method(self) -> Any:
        return self.trial.method

    @property
    def group(self) -> dict[str, Any]:
        """The optimiser's group of the backbone's matrices."""
        return self.trial.optimizer.param_groups[0]

    @property
    def layers(self) -> set[int]:
        """Numbers of the backbone's layers."""
        return set(layer_numbers(self.method.downstream_encoder).values())

    def rate_after(self, num_steps: int) -> float:
        """Factor of the learning rates."""
        return float(self.trial.schedule.lr_lambdas[0](num_steps))

    def balanced_weights(self) -> list[float]:
        counts = Counter(self.data.train.labels.tolist())
        assert len(set(counts.values())) > 1
        return [len(self.data.train) / (len(counts) * counts[c]) for c in sorted(counts)]

    def drawn_by_class(self) -> list[int]:
        """How often each class is drawn in an epoch."""
        labels, number = self.data.train.labels, len(self.data.train)
        rows = [row % number for batch in self.trial.batches.rows(0) for row in batch]
        return list(Counter(labels[rows].tolist()).values())

    def events(self) -> list[Any]:
        return list(train_epochs(self.config, self.data, self.backbone, num_threads=1))

    def refuses(self, **changes: Any) -> bool:
        """Whether the inputs are refused with other settings."""
        with pytest.raises(ConfigError):
            prepared(self.config.with_values(changes), self.storage)
        return True


Check = Callable[[Built], bool]


@dataclass
class Case:
    """A value that is not the default, what must hold then, and other settings it needs."""

    value: Any
    check: Check
    changes: dict[str, Any] = field(default_factory=dict)


def held(name: str, value: Any) -> Case:
    """A setting of the calibration that is held under a name."""
    return Case(value, lambda built: getattr(built.method.calibration, name) == value)


def transform(composed: Any, kind: str) -> Any:
    """The step of timm's transform whose class has this name."""
    (found,) = [step for step in composed.transforms if type(step).__name__ == kind]
    return found


def makes_the_views(check: Check) -> Check:
    """Check the maker of views, and that the tables hold what it makes."""

    def both(built: Built) -> bool:
        ((pixels, _),) = built.data.training_batches([[5]], 1)
        made = built.data.train.training_view(built.maker, 5, 1)
        ((evaluated, _),) = built.data.validation_batches([[2]])
        seen = built.data.validation.evaluation_view(built.maker, 2)
        same = torch.equal(pixels[0], torch.tensor(made))
        return same and torch.equal(evaluated[0], torch.tensor(seen)) and check(built)

    return both


def rates(encoder: nn.Module, name: str) -> list[float]:
    """The rates of the modules that drop something."""
    return [float(getattr(m, name)) for m in encoder.modules() if hasattr(m, name)]


def trains_batch_norm(built: Built) -> bool:
    next(built.trial.steps())
    encoder = built.method.downstream_encoder
    modes = {layer.training for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d)}
    return modes == {True}


def num_workers_of_ray(built: Built) -> bool:
    from drtune_ray.execution.ray_train.trainer import build_trainer

    context, folder = SimpleNamespace(study_id="a"), SimpleNamespace(path=built.storage)
    trainer = build_trainer(
        built.config,
        context,  # type: ignore[arg-type]
        ResourcesConfig(),
        folder,  # type: ignore[arg-type]
        name="a",
        scratch=built.storage,
    )
    return trainer.scaling_config.num_workers == 2


def is_flat(built: Built, num_epochs: int) -> bool:
    """Whether the rates of these first epochs are the full ones."""
    return {built.rate_after(step) for step in range(num_epochs * STEPS)} == {1.0}


def rows_at_once(built: Built) -> list[int]:
    """Numbers of images that run together in the first step."""
    seen: list[int] = []
    encoder = built.method.downstream_encoder
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    next(built.trial.steps())
    return seen


def first_weights(built: Built) -> torch.Tensor:
    weight = torch.empty(3, 256)
    return nn.init.normal_(weight, std=0.01, generator=generator(3, "head"))


def with_average(folder: Path) -> str:
    """A file with the weights, and others that it calls their average."""
    state = safetensors.torch.load_file(folder / f"{BACKBONE}.safetensors")
    doubled = {name: 2 * tensor for name, tensor in state.items()}
    torch.save({"model": state, "model_ema": doubled}, folder / "average.pt")
    return str(folder / "average.pt")


def changed_weights(folder: Path, name: str, change: Callable[[Any], None]) -> str:
    state = safetensors.torch.load_file(folder / f"{BACKBONE}.safetensors")
    change(state)
    path = folder / name
    if path.suffix == ".pt":
        torch.save({"first": {k: v + 1 for k, v in state.items()}, "second": state}, path)
    else:
        safetensors.torch.save_file(state, path)
    return str(path)


def stem(built: Built) -> torch.Tensor:
    return built.method.downstream_encoder.state_dict()["conv_stem.weight"]


def original_stem(built: Built) -> torch.Tensor:
    folder = Path(built.config.backbone.weights).parent
    return safetensors.torch.load_file(folder / f"{BACKBONE}.safetensors")["conv_stem.weight"]


def manifest(built: Built) -> dict[str, list[Any]]:
    """The columns of the table of splits."""
    return check_inputs(built.config, built.storage).splits.manifest.to_pydict()


def has_another_test_split_than(**values: Any) -> Check:
    """Check that the test split is another one than with these settings of the images."""

    def check(built: Built) -> bool:
        data = built.config.data.model_copy(update=values)
        other = Built(built.config.model_copy(update={"data": data}), built.storage)
        found = [
            {h for h, split in zip(m["content_hash"], m["split"], strict=True) if split == "test"}
            for m in (manifest(built), manifest(other))
        ]
        return bool(found[0]) and found[0] != found[1]

    return check


def write_list(folder: Path, images: Path) -> Path:
    """A list of the images whose other columns say something else."""
    shutil.copytree(images, folder / "copies")
    lines = ["path,label,copied,animal,part,patient"]
    for at, path in enumerate(sorted(images.rglob("*.png"))):
        name = path.relative_to(images).as_posix()
        part = ("train", "train", "val", "test")[at % 4]
        animal, patient = ("cat", "dog")[at % 2], f"{path.parent.name} {at % 4}"
        lines.append(f"images/{name},{path.parent.name},copies/{name},{animal},{part},{patient}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


def patients_are_whole(rows: dict[str, list[Any]]) -> bool:
    """Whether the images of each patient, every fourth of a class, are in one split."""
    splits: dict[tuple[str, int], set[str]] = {}
    for path, split in zip(rows["path"], rows["split"], strict=True):
        splits.setdefault((Path(path).parent.name, int(Path(path).stem) % 4), set()).add(split)
    return len(splits) == 12 and all(len(found) == 1 for found in splits.values())


LISTED = {"data.train": "list"}
STEPPED = {"optim.schedule": "step", "training.epochs": 20}
CALIBRATION = {
    "rotation": held("rotation", False),
    "rotation_interval": held("rotation_interval", 7),
    "rotation_solver": held("rotation_solver", "svd"),
    "rotation_rank": Case(5, lambda b: b.method.calibration.rotation_left.shape == (256, 5)),
    "rotation_shrinkage": held("rotation_shrinkage", 0.3),
    "rotation_kept": held("rotation_kept", False),
    "rotation_restarts_each_epoch": held("restart_each_epoch", True),
    "proper_rotation": held("proper_rotation", True),
    "recenter": held("recenter", False),
    "normalize": held("normalize", False),
    "translation": held("translation", False),
    "confidence_weighting": held("confidence_weighting", False),
    "confidence_temperature": held("confidence_temperature", 0.7),
    "similarity": held("similarity", "dot"),
}
METHOD = {
    "name": Case("ce_tuning", lambda b: isinstance(b.method, CETuning)),
    "regularization_weight": Case(0.25, lambda b: b.method.regularization_weight == 0.25),
    "reduction": Case("mean", lambda b: b.method.reduction == "mean"),
    "bank_size": Case(17, lambda b: b.method.bank.pretrained.shape == (17, 256)),
    "head_lr_multiplier": Case(
        3.0,
        lambda b: [group["lr"] for group in b.trial.optimizer.param_groups] == [0.02, 3.0 * 0.02],
    ),
    **{
        name: Case(
            value,
            lambda b, part=part, held=held, value=value: (
                getattr(b.method.penalties[part], held) == value
            ),
            {"method.name": part},
        )
        for name, value, part, held in (
            ("l2_sp_weight", 0.5, "l2_sp", "weight"),
            ("l2_sp_head_weight", 0.25, "l2_sp", "head_weight"),
            ("bss_weight", 0.5, "bss", "weight"),
            ("bss_num_values", 3, "bss", "num_values"),
        )
    },
    "spd_weight": Case(0.5, lambda b: b.method.weight == 0.5, {"method.name": "spd"}),
    "ftp_annealing": Case(0.5, lambda b: b.method.annealing == 0.5, {"method.name": "ftp"}),
    "scl_weight": Case(
        0.75,
        lambda b: (b.method.penalties["scl"].weight, b.method.cross_entropy_weight) == (0.75, 0.25),
        {"method.name": "scl"},
    ),
    "scl_temperature": Case(
        0.5, lambda b: b.method.penalties["scl"].temperature == 0.5, {"method.name": "scl"}
    ),
    "ldifs_weight": Case(3.0, lambda b: b.method.weight == 3.0, {"method.name": "ldifs"}),
    "probe_share": Case(0.3, lambda b: b.method.probe_epochs == 1, {"method.name": "lp_ft"}),
    **{f"calibration.{name}": case for name, case in CALIBRATION.items()},
}
OPTIM = {
    "name": Case("adamw", lambda b: type(b.trial.optimizer) is torch.optim.AdamW),
    "layer_decay": Case(0.5, lambda b: b.group["lr"] == 0.02 * 0.5 ** len(b.layers)),
    "backbone_lr": Case(0.5, lambda b: b.group["lr"] == 0.5),
    "weight_decay": Case(0.25, lambda b: b.group["weight_decay"] == 0.25),
    "momentum": Case(0.5, lambda b: b.group["momentum"] == 0.5),
    "nesterov": Case(True, lambda b: b.group["nesterov"] is True),
    "clip_norm": Case(0.25, lambda b: b.trial.updater.clip_norm == 0.25),
    "schedule": Case("constant", lambda b: b.rate_after(11) == 1.0),
    "warmup_epochs": Case(1.0, lambda b: b.rate_after(0) == 1 / (STEPS + 1)),
    "step_epochs": Case(2, lambda b: b.rate_after(2 * STEPS) == 0.1 and is_flat(b, 2), STEPPED),
    "step_gamma": Case(0.5, lambda b: b.rate_after(5 * STEPS) == 0.5, STEPPED),
}
TRAINING = {
    "epochs": Case(5, lambda b: b.rate_after(5 * STEPS) == 0.0 < b.rate_after(5 * STEPS - 1)),
    "stop_epoch": Case(
        1, lambda b: [event.outcome for event in b.events()] == [COMPLETED], {"training.epochs": 3}
    ),
    "batch_size": Case(5, lambda b: [len(rows) for rows in b.trial.batches.rows(0)] == [5] * 6),
    "workers": Case(2, num_workers_of_ray),
    "accumulation_steps": Case(2, lambda b: rows_at_once(b) == [4, 4]),
    "ema_decay": Case(0.5, lambda b: b.trial.updater.average is b.trial.average is not None),
    "compile": Case(True, lambda b: b.method.downstream_encoder._compiled_call_impl is not None),
    "batch_norm": Case("local", trains_batch_norm),
    "drop_last": Case(True, lambda b: [len(r) for r in b.trial.batches.rows(0)] == [8] * 3),
    "metric": Case(
        "log_loss",
        lambda b: "best_val_loss" in b.events()[-1].record.metrics,
        {"training.epochs": 1},
    ),
    "patience_epochs": Case(
        1,
        lambda b: [event.outcome for event in b.events()] == [None, PATIENCE],
        {"optim.backbone_lr": 1e-9},
    ),
    "label_smoothing": Case(0.25, lambda b: b.method.label_smoothing == 0.25),
    "class_weights": Case(
        "balanced",
        lambda b: b.method.class_weights.tolist() == pytest.approx(b.balanced_weights()),
        {"data.train": "other"},
    ),
    "mixup": Case(0.25, lambda b: b.trial.mixing._mix.mixup_alpha == 0.25),
    "cutmix": Case(0.75, lambda b: b.trial.mixing._mix.cutmix_alpha == 0.75),
    "precision": Case(
        "float64",
        lambda b: (
            {p.dtype for p in b.method.parameters()} == {torch.float64}
            and b.trial.batches.images(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)).dtype
            == torch.float64
        ),
    ),
    "save_every_seconds": Case(
        1e-9,
        lambda b: [type(event) for event in b.events()] == [*[SavePoint] * STEPS, EpochReport],
        {"training.epochs": 1},
    ),
}
DATA = {
    "train": Case("other", lambda b: b.data.classes == ("cat", "dog")),
    "image_column": Case(
        "copied", lambda b: all(path.startswith("copies/") for path in manifest(b)["path"]), LISTED
    ),
    "label_column": Case("animal", lambda b: b.data.classes == ("cat", "dog"), LISTED),
    "split_column": Case("part", lambda b: len(b.data.validation) == 12, LISTED),
    "group_column": Case("patient", lambda b: patients_are_whole(manifest(b)), LISTED),
    "skip_bad": Case(
        True,
        lambda b: len(b.data.train.labels) == 29 and b.refuses(**{"data.skip_bad": False}),
        {"data.train": "bad"},
    ),
    "train_per_class": Case(4, lambda b: len(b.data.train) == 3 * 4),
    "validation_fraction": Case(0.5, lambda b: len(b.data.validation) == 3 * PER_CLASS / 2),
    "test_fraction": Case(
        0.5, lambda b: len(b.data.train) + len(b.data.validation) == 3 * PER_CLASS / 2
    ),
    "train_share": Case(0.5, lambda b: len(b.data.train) == 3 * 5),
    "folds": Case(3, lambda b: manifest(b)["split"].count("test") == PER_CLASS),
    "fold": Case(1, has_another_test_split_than(fold=0), {"data.folds": 4}),
    "fold_seed": Case(1, has_another_test_split_than(fold_seed=0), {"data.folds": 4}),
    "image_size": Case(
        48,
        makes_the_views(
            lambda b: (
                b.backbone.image_size == 48
                and b.data.train.training_view(b.maker, 0, 0).shape == (3, 48, 48)
            )
        ),
    ),
    "views": Case(3, lambda b: [b.data.view_of_epoch(e) for e in range(-1, 4)] == [2, 0, 1, 2, 0]),
    "view_seed": Case(9, makes_the_views(lambda b: b.maker._seed == 9)),
    "crop_scale_min": Case(
        0.7,
        makes_the_views(
            lambda b: (
                transform(b.maker._augment, "RandomResizedCropAndInterpolation").scale == (0.7, 1.0)
            )
        ),
    ),
    "horizontal_flip": Case(
        0.125,
        makes_the_views(lambda b: transform(b.maker._augment, "RandomHorizontalFlip").p == 0.125),
    ),
    "augmentation": Case(
        "trivial_augment",
        makes_the_views(lambda b: transform(b.maker._augment, "TrivialAugmentWide") is not None),
    ),
    "augmentation_magnitude": Case(
        21,
        makes_the_views(lambda b: transform(b.maker._augment, "RandAugment").magnitude == 21),
        {"data.augmentation": "rand_augment"},
    ),
    "random_erasing": Case(
        0.125, makes_the_views(lambda b: transform(b.maker._augment, "RandomErasing").p == 0.125)
    ),
    "sampling": Case(
        "class_balanced",
        lambda b: max(b.drawn_by_class()) - min(b.drawn_by_class()) <= 1,
        {"data.train": "other"},
    ),
    "crop_fraction": Case(
        0.5, makes_the_views(lambda b: transform(b.maker._evaluate, "Resize").size == 64)
    ),
    "evaluation_resize": Case(
        "square",
        makes_the_views(lambda b: transform(b.maker._evaluate, "Resize").size == (36, 36)),
    ),
    "loader_workers": Case(
        1, lambda b: b.data.training_batches([[0]], 0)._num_workers == 1, {"data.views": 0}
    ),
    "cache_limit_gib": Case(0.0, lambda b: b.tables.views is None and b.tables.evaluation is None),
}
NORMALIZATION = {"backbone.mean": [0.1, 0.2, 0.3], "backbone.std": [0.4, 0.5, 0.6]}
BACKBONE_CASES = {
    "name": Case(
        NORM_FREE,
        lambda b: type(b.method.downstream_encoder).__name__ == "NormFreeNet",
        {"backbone.weights": NORM_FREE},
    ),
    "weights": Case("doubled", lambda b: torch.equal(stem(b), 2 * original_stem(b))),
    "weights_key": Case(
        "second", lambda b: torch.equal(stem(b), original_stem(b)), {"backbone.weights": "parts"}
    ),
    "weights_format": Case(  # whose trained encoder goes before its average
        "infomin", lambda b: torch.equal(stem(b), original_stem(b)), {"backbone.weights": "average"}
    ),
    "frozen_layers": Case(1, lambda b: not b.method.downstream_encoder.bn1.weight.requires_grad),
    "frozen_patterns": Case(
        ["bn1.*"], lambda b: not b.method.downstream_encoder.bn1.weight.requires_grad
    ),
    "allow_missing": Case(
        True,
        lambda b: b.refuses(**{"backbone.allow_missing": False}),
        {"backbone.weights": "without a bias"},
    ),
    "drop_path": Case(
        0.5,
        lambda b: max(rates(b.method.downstream_encoder, "drop_prob")) == 0.5,
        {"backbone.name": NORM_FREE, "backbone.weights": NORM_FREE},
    ),
    "dropout": Case(0.5, lambda b: b.method.downstream_encoder.drop_rate == 0.5),
    "mean": Case(
        NORMALIZATION["backbone.mean"],
        lambda b: b.trial.normalizer._mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3]),
        NORMALIZATION,
    ),
    "std": Case(
        NORMALIZATION["backbone.std"],
        lambda b: b.trial.normalizer._std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6]),
        NORMALIZATION,
    ),
}
SECTIONS = {
    "data": DATA,
    "backbone": BACKBONE_CASES,
    "method": METHOD,
    "optim": OPTIM,
    "training": TRAINING,
}
CASES = {
    **{f"{section}.{name}": c for section, cases in SECTIONS.items() for name, c in cases.items()},
    "seed": Case(3, lambda b: torch.equal(b.method.head.weight.detach(), first_weights(b))),
}


@pytest.fixture(scope="module")
def build(tmp_path_factory, weights_file):
    """Build the trial of some settings; inputs are named by a word."""
    folder = tmp_path_factory.mktemp("wiring")
    images = write_coloured(folder / "images")
    base = small_values(images, weights_file)
    weights = Path(base["backbone.weights"]).parent
    for name in ("cat", "dog"):
        (folder / "other" / name).mkdir(parents=True)
    shutil.copytree(images, folder / "bad")
    (folder / "bad" / "red" / "00.png").write_bytes(b"no picture")
    for at, path in enumerate(sorted(images.rglob("*.png"))[:16]):
        content = path.read_bytes()
        (folder / "other" / ("cat", "dog")[at % 3 == 0] / path.name).write_bytes(content)
    listed = str(write_list(folder, images))
    words = {
        "data.train": {"other": str(folder / "other"), "bad": str(folder / "bad"), "list": listed},
        "backbone.weights": {
            NORM_FREE: str(weights_file(NORM_FREE)),
            "doubled": changed_weights(
                weights, "doubled.safetensors", lambda s: s["conv_stem.weight"].mul_(2)
            ),
            "parts": changed_weights(weights, "parts.pt", lambda s: None),
            "average": with_average(weights),
            "without a bias": changed_weights(
                weights, "without.safetensors", lambda s: s.pop("blocks.0.0.bn1.bias")
            ),
        },
    }

    def make(changes: dict[str, Any]) -> Built:
        values = base | changes
        for path, meanings in words.items():
            values[path] = meanings.get(values[path], values[path])
        return Built(small_trial(values), folder / "storage")

    return make


def defaults() -> dict[str, Any]:
    return flattened(TrialConfig.from_mapping({"data": {"train": "images"}}).to_mapping())


def test_every_setting_has_a_case_of_another_value() -> None:
    assert CASES.keys() == defaults().keys()
    assert [path for path, value in defaults().items() if CASES[path].value == value] == []


@pytest.mark.parametrize("path", CASES)
def test_a_setting_reaches_what_is_built(build, path: str) -> None:
    case = CASES[path]
    assert case.check(build(case.changes | {path: case.value}))


# Their inputs are refused at the default.
REFUSED = {"data.skip_bad", "backbone.allow_missing", "backbone.name"}


@pytest.mark.parametrize("path", sorted(CASES.keys() - REFUSED))
def test_the_comparison_fails_at_another_value(build, path: str) -> None:
    """A comparison that holds anyway would compare nothing."""
    case = CASES[path]
    changes = {name: value for name, value in case.changes.items() if name not in NORMALIZATION}
    base = build(changes)
    try:
        holds = case.check(base)
    except (AssertionError, ValueError, AttributeError, TypeError):
        holds = False
    assert not holds


def test_names_of_ratios_are_resolved(build) -> None:
    ratio = 19 / 8
    built = build(
        {
            "method.regularization_weight": "bank_over_batch",
            "method.head_lr_multiplier": "one_plus_bank_over_batch",
        }
    )
    assert built.method.regularization_weight == ratio
    assert built.trial.optimizer.param_groups[-1]["lr"] == (1 + ratio) * 0.02
