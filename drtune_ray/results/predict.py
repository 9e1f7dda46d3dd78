"""Predictions of a trained model for new images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from drtune_ray.data.pixels import UndecodableImageError, WhiteValues, decode, rgb_of
from drtune_ray.errors import ConfigError, EnvironmentProblem, first_line
from drtune_ray.results.inference import BATCH_ROWS, Classifier
from drtune_ray.results.places import local_folder, open_model

ImageLike = str | Path | bytes | Image.Image | NDArray[np.uint8]
ONE_IMAGE = (str, Path, bytes, Image.Image, np.ndarray)


@dataclass(frozen=True)
class Prediction:
    """The classes of one image.

    Attributes:
        image: Path of the image; None where it had none.
        label: Most probable class.
        probability: Probability of `label`, 0 to 1.
        probabilities: Probability of each class, most probable first.
    """

    image: str | None
    label: str
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Unreadable:
    """An image without a prediction.

    Attributes:
        image: Path of the image; None where it had none.
        reason: Why it cannot be read.
    """

    image: str | None
    reason: str


class Model:
    """A trained model that classifies images.

    Attributes:
        classes: Class names in the order of the model's outputs.
        about: Its origin and its measured accuracy, as plain values.
        folder: Its folder; None for an exported file and a model in MLflow.
    """

    def __init__(self, classifier: Classifier, folder: Path | None) -> None:
        self.folder = folder
        self._classifier = classifier
        self.classes = classifier.winner.classes
        self.about: dict[str, Any] = classifier.winner.about

    def predict(self, images: ImageLike | Iterable[ImageLike]) -> list[Prediction]:
        """Classify images.

        Args:
            images: Paths, bytes of image files, PIL images, or uint8 arrays of shape (H, W, 3) or
                (H, W); one of them or several.

        Raises:
            ConfigError: Naming each image that cannot be read.
        """
        wanted = [images] if isinstance(images, ONE_IMAGE) else images
        found = list(self.stream(wanted))
        if unreadable := [each for each in found if isinstance(each, Unreadable)]:
            raise ConfigError(f"{each.image or 'an image'}: {each.reason}" for each in unreadable)
        return [each for each in found if isinstance(each, Prediction)]

    def stream(self, images: Iterable[ImageLike]) -> Iterator[Prediction | Unreadable]:
        """Yield the prediction for each image in turn, or why it cannot be read.

        Args:
            images: Paths, bytes, PIL images or arrays, as `predict` takes them; read a batch
                ahead.
        """
        open_image: Callable[[ImageLike], Image.Image | Exception]
        open_image = partial(_open, whites=self._classifier.winner.whites)
        for batch, logits in self._classifier.logits(images, open_image):
            rows = iter(logits.softmax(1).tolist())
            for image, error in batch:
                if error is not None:
                    yield Unreadable(_name(image), str(error))
                else:
                    yield self._prediction(_name(image), next(rows))

    def _prediction(self, name: str | None, probabilities: list[float]) -> Prediction:
        pairs = zip(self.classes, probabilities, strict=True)
        ranked = dict(sorted(pairs, key=lambda pair: -pair[1]))
        label = next(iter(ranked))
        return Prediction(name, label, ranked[label], ranked)


def load(
    model: str | Path,
    *,
    storage: str | Path = "./drtune-studies",
    tracking_uri: str | None = None,
    device: str | None = None,
    batch_size: int = BATCH_ROWS,
) -> Model:
    """Load a trained model.

    Args:
        model: Name of a study or training, its folder, a model's folder (``winner``), a file that
            `export` wrote, or MLflow's URI such as ``models:/flowers@champion``.
        storage: Folder of the studies, for a name.
        tracking_uri: MLflow's tracking URI, for its URIs; by default that of the environment, else
            the store in the folder of the studies.
        device: Device such as ``cpu`` or ``cuda:1``; by default a GPU where there is one.
        batch_size: Number of images that go through the model at a time.

    Raises:
        ConfigError: If there is no such model or device.
        EnvironmentProblem: If the model is damaged, or this machine has no such device.
    """
    _check_device(device)
    winner = open_model(str(model), str(storage), tracking_uri)
    folder = local_folder(str(model), str(storage))
    return Model(Classifier(winner, device, batch_size), folder)


def _check_device(name: str | None) -> None:
    if name is None:
        return
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name!r} is not a device: give cpu, cuda or cuda:1") from None
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentProblem(
            f"this machine has no device {name} ({first_line(error)}): give cpu, or leave it out"
        ) from None


def _name(image: ImageLike) -> str | None:
    return str(image) if isinstance(image, str | Path) else None


def _open(image: ImageLike, whites: WhiteValues) -> Image.Image | Exception:
    try:
        if isinstance(image, Image.Image):
            return rgb_of(image, whites)
        if isinstance(image, np.ndarray):
            return _from_array(image)
        if isinstance(image, bytes):
            return decode(image, whites)
        path = Path(image)
        if path.exists() and not path.is_file():  # reading a pipe would wait for a writer
            return OSError("a folder, a pipe or a device")
        return decode(path.read_bytes(), whites)
    except OSError as error:
        return OSError(f"not readable ({error.strerror or error})")
    except UndecodableImageError as error:
        return UndecodableImageError(f"no image that Pillow decodes ({error})")
    except ValueError as error:
        return error


def _from_array(array: NDArray[Any]) -> Image.Image:
    is_shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not is_shaped or 0 in array.shape:
        raise ValueError(
            f"an array must be uint8 of shape (H, W, 3) or (H, W), but is {array.dtype} of shape "
            f"{array.shape}"
        )
    return Image.fromarray(array).convert("RGB")
