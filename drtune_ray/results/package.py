"""The files by which others use a model: timm's names and configuration, a model card, checksums.

``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads the folder without this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from drtune_ray.config.metric import DEFAULT_METRIC, METRICS, Metric
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.views import Normalization
from drtune_ray.results.class_tables import weak_points
from drtune_ray.results.evaluation_record import sha256_of
from drtune_ray.results.words import counted
from drtune_ray.training.backbones import create_timm_model
from drtune_ray.training.model import classifier
from drtune_ray.values import printable, to_yaml

MODEL_CARD_NAME, SUMS_NAME = "README.md", "SHA256SUMS"
ENCODER, HEAD = "encoder.", "head."
TOLERANCE = 1e-4
NO_TIMM_LAYOUT = "its model of this name has no linear layer on the features as classifier"
PROBE_IMAGES = 2
NUM_WEAK = 5  # classes and confusions on the card


@dataclass(frozen=True)
class TimmLayout:
    """A classifier as timm builds it.

    Attributes:
        model: Module of timm with the weights, in eval mode.
        classifier: Name of its last layer, for example ``fc``.
    """

    model: nn.Module
    classifier: str

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weights under timm's names."""
        return {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}


def timm_layout(name: str, image_size: int, state: Mapping[str, Tensor]) -> TimmLayout | None:
    """Return a trained model as timm builds it; None if timm's gives other logits.

    Args:
        name: Name of the backbone in timm.
        image_size: S, side of the images in pixels.
        state: ``encoder.*`` and ``head.*`` tensors.
    """
    num_classes = len(state["head.bias"])
    model = create_timm_model(name, image_size, num_classes=num_classes).eval()
    last = getattr(model, "default_cfg", {}).get("classifier")
    if not isinstance(last, str):
        return None
    try:
        model.load_state_dict(to_timm(state, last))
    except RuntimeError:
        return None
    probe = torch.rand(PROBE_IMAGES, 3, image_size, image_size, generator=torch.Generator())
    with torch.inference_mode():
        wanted, found = classifier(name, image_size, dict(state))(probe), model(probe)
    is_same = wanted.shape == found.shape and torch.allclose(
        wanted, found, rtol=TOLERANCE, atol=TOLERANCE
    )
    return TimmLayout(model, last) if is_same else None


def to_timm(state: Mapping[str, Tensor], last: str) -> dict[str, Tensor]:
    """Return ``encoder.*`` and ``head.*`` tensors under timm's names."""
    return {
        f"{last}.{key.removeprefix(HEAD)}" if key.startswith(HEAD) else key.removeprefix(ENCODER): t
        for key, t in state.items()
    }


def from_timm(tensors: Mapping[str, Tensor], last: str) -> dict[str, Tensor]:
    """Return tensors under timm's names as ``encoder.*`` and ``head.*``."""
    heads = {f"{last}.{part}": f"{HEAD}{part}" for part in ("weight", "bias")}
    return {heads.get(key, f"{ENCODER}{key}"): tensor for key, tensor in tensors.items()}


def write_for_timm(
    folder: Path,
    layout: TimmLayout,
    classes: Sequence[str],
    normalization: Normalization,
    trial: TrialConfig,
) -> None:
    """Write the weights, and the configuration from which timm builds the model and transform."""
    model: Any = layout.model
    size = trial.data.image_size
    is_square = trial.data.evaluation_resize == "square"
    preprocessing = {
        "input_size": (3, size, size),
        "mean": normalization.mean,
        "std": normalization.std,
        "interpolation": normalization.interpolation,
        "crop_pct": 1.0 if is_square else trial.data.crop_fraction,
        "crop_mode": "squash" if is_square else "center",
    }
    config: dict[str, Any] = {"label_names": list(classes), "pretrained_cfg": preprocessing}
    is_fixed = model.pretrained_cfg.get("fixed_input_size")
    arguments = {"img_size": size} if is_fixed else {}
    save_for_hf(model, str(folder), config, arguments, safe_serialization=True)


def write_model_card(
    folder: Path,
    classes: Sequence[str],
    trial: TrialConfig,
    about: Mapping[str, Any],
    validation: Mapping[str, float],
    answers: Tensor | None,
    *,
    is_timm: bool,
) -> None:
    """Write a model card in the format of the Hugging Face hub.

    Args:
        folder: Folder of the model.
        classes: Class names in the order of the labels.
        trial: Configuration of the trial.
        about: Origin of the model and its measured accuracy.
        validation: Metrics of the weights on the validation images; empty if they were trained on.
        answers: Class and predicted class of each validation image, (N, 2); None if not known.
        is_timm: Whether timm loads the folder.
    """
    head = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "drtune-ray"],
    }
    lines = [
        f"---\n{to_yaml(head)}---",
        f"# {about.get('study') or about.get('training') or 'Classifier'}",
        f"A {trial.backbone.name} that tells {len(classes)} classes of images apart, fine-tuned "
        "and chosen by drtune-ray.",
        "## Accuracy",
        *_accuracy(about),
        *_validation(validation, answers, classes),
        "## Training",
        *_training(trial),
        "## Classes",
        ", ".join(f"`{name}`" for name in classes),
        "## Use",
        _USE_TIMM if is_timm else _USE_OURS,
        "## License",
        "The license of the pretrained weights and that of the training images apply; neither is "
        "recorded here.",
    ]
    (folder / MODEL_CARD_NAME).write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of each file, which ``sha256sum --check SHA256SUMS`` compares."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS_NAME)
    text = "".join(f"{sha256_of(folder / name)}  {name}\n" for name in names)
    (folder / SUMS_NAME).write_text(text)


_USE_TIMM = """\
Without drtune-ray, in the folder of this file:

```python
import json, timm, torch
from PIL import Image
model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
probabilities = model(transform(Image.open("image.jpg").convert("RGB"))[None]).softmax(1)[0]
print(json.load(open("config.json"))["label_names"][int(probabilities.argmax())])
```

With it: `drtune-ray predict FOLDER IMAGES...`, or `drtune_ray.load("FOLDER").predict(images)`."""
_USE_OURS = f"""\
`drtune-ray predict FOLDER IMAGES...`, or `drtune_ray.load("FOLDER").predict(images)`.
timm alone does not load it: {NO_TIMM_LAYOUT}."""


def _accuracy(about: Mapping[str, Any]) -> list[str]:
    lines = []
    metric = METRICS[about.get("metric", DEFAULT_METRIC)]
    if (mean := about.get(f"mean_{metric.measure}")) is not None:
        spread, num_seeds = about[f"spread_{metric.measure}"], len(about["seeds"])
        lines.append(
            f"- {_figure(metric, mean)} on the validation images: the mean of "
            f"{counted(num_seeds, 'training')} of this configuration with new seeds"
            + ("" if spread is None else f" (standard deviation {_figure(metric, spread)})")
        )
    if (shipped := about.get("val_accuracy")) is not None:
        lines.append(f"- {_percent(shipped)} on the validation images: these weights")
    lines.append(f"- Chosen by: {about.get('chosen', 'one training')}")
    lines.append(
        "- The validation images chose the model, and these figures are therefore too good; "
        "`drtune-ray evaluate` measures it on test images that chose nothing"
    )
    return ["\n".join(lines)]


def _validation(
    measured: Mapping[str, float], answers: Tensor | None, classes: Sequence[str]
) -> list[str]:
    """Return the section about the validation images; empty without such images."""
    found = {
        metric.label: measured[metric.measure]
        for metric in METRICS.values()
        if metric.measure in measured
    }
    if not found:
        return []
    lines = ["## Validation", "These weights on the validation images, which chose the model:"]
    lines.append("\n".join(f"- {label}: {value:.4f}" for label, value in found.items()))
    if answers is None:
        return lines
    weakest, confusions = weak_points(answers[:, 0].numpy(), answers[:, 1].numpy(), classes)
    table = [
        f"| {_cell(row.name)} | {row.support} | {row.recall or 0:.1%} | {row.f1 or 0:.1%} |"
        for row in weakest[:NUM_WEAK]
    ]
    head = ["| weakest classes | images | recall | F1 |", "|---|---|---|---|"]
    lines.append("\n".join([*head, *table]))
    if confusions:
        pairs = [
            f"| {_cell(pair.true)} | {_cell(pair.predicted)} | {pair.num_images} |"
            for pair in confusions[:NUM_WEAK]
        ]
        head = ["| class | most often confused with | images |", "|---|---|---|"]
        lines.append("\n".join([*head, *pairs]))
    return lines


def _cell(name: str) -> str:
    return printable(name).replace("|", "\\|")


def _training(trial: TrialConfig) -> list[str]:
    method, training = trial.method, trial.training
    settings = {
        "method": method.name,
        "images": Path(trial.data.train).name if trial.data.train else None,
        "image size": trial.data.image_size,
        "epochs": training.epochs,
        "batch size": training.batch_size,
        "learning rate": f"{trial.optim.backbone_lr:g}",
        "seed": trial.seed,
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in settings.items() if value is not None)
    return [f"{lines}\n\n`model.yaml` holds every setting."]


def _figure(metric: Metric, value: float) -> str:
    if metric is METRICS[DEFAULT_METRIC]:
        return _percent(value)
    return f"{metric.label} {_percent(value) if metric.is_share else f'{value:.4f}'}"


def _percent(share: float) -> str:
    return f"{share:.1%}"
