"""What a classifier gets right and wrong on labelled images, class by class.

A class without images has no recall, F1 or AUROC, one never predicted no precision: None, which is
null in JSON. The means over classes take those that have images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drtune_ray.config.metric import NUM_BINS


@dataclass(frozen=True)
class ClassRow:
    """One class.

    Attributes:
        name: Name of the class.
        support: Number of its images.
        precision: Share of the images predicted as this class that belong to it; None if none was.
        recall: Share of its images that were predicted as it; None without images.
        f1: Harmonic mean of precision and recall; None without images.
    """

    name: str
    support: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class ReliabilityBin:
    """Images whose largest probability lies in one interval, open at its lower end.

    Attributes:
        lower: Lower end, 0 to 1.
        upper: Upper end, 0 to 1.
        num_images: Number of images.
        confidence: Mean of the largest probability; None without images.
        accuracy: Share of correct predictions; None without images.
    """

    lower: float
    upper: float
    num_images: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Confusion:
    """Images of one class that were predicted as another.

    Attributes:
        true: Name of their class.
        predicted: Name of the predicted class.
        num_images: Number of these images.
        share: Share of the class's images.
    """

    true: str
    predicted: str
    num_images: int
    share: float


@dataclass(frozen=True)
class Mistake:
    """An image whose class was not the most probable one.

    Attributes:
        row: Position of the image among those given, from 0.
        true: Name of its class.
        predicted: Name of the most probable class.
        probability: Probability of the predicted class, 0 to 1.
        path: Path of the image; None where it has none.
    """

    row: int
    true: str
    predicted: str
    probability: float
    path: str | None = None


@dataclass(frozen=True)
class ClassTables:
    """Metrics and tables of a classifier on labelled images.

    Attributes:
        num_images: N, number of images.
        accuracy: Share of correct predictions.
        balanced_accuracy: Mean recall of the classes.
        macro_f1: Mean F1 of the classes.
        auroc: Mean over the classes of the area under the ROC curve of one class against the rest,
            for two classes that of the second; None if no class has images beside another's.
        log_loss: Mean negative logarithm of the probability of the true class.
        calibration_error: Expected calibration error in 15 bins of confidence.
        classes: The classes in the order of the model's outputs.
        matrix: Number of images by true (row) and predicted class (column).
        bins: Reliability diagram.
        mistakes: All misclassified images, the most confident first.
    """

    num_images: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    auroc: float | None
    log_loss: float
    calibration_error: float
    classes: tuple[ClassRow, ...]
    matrix: tuple[tuple[int, ...], ...]
    bins: tuple[ReliabilityBin, ...]
    mistakes: tuple[Mistake, ...]

    def confusions(self) -> list[Confusion]:
        """Return the pairs of classes that were confused, the most images first."""
        return _confusions(self.classes, self.matrix)

    def weakest(self) -> list[ClassRow]:
        """Return the classes that have images, the lowest F1 first."""
        return _weakest(self.classes)

    def to_mapping(self) -> dict[str, Any]:
        """Return everything as plain values that JSON takes."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ClassTables:
        """Return what `to_mapping` wrote.

        Raises:
            TypeError: If it is something else.
        """
        tables: dict[str, Any] = {
            "classes": tuple(ClassRow(**row) for row in values["classes"]),
            "matrix": tuple(tuple(counts) for counts in values["matrix"]),
            "bins": tuple(ReliabilityBin(**each) for each in values["bins"]),
            "mistakes": tuple(Mistake(**each) for each in values["mistakes"]),
        }
        return cls(**(dict(values) | tables))


def class_tables(
    labels: Sequence[int],
    probabilities: ArrayLike,
    names: Sequence[str],
    paths: Sequence[str | None] | None = None,
) -> ClassTables:
    """Measure a classifier.

    Args:
        labels: Class of each image (N), as its position in `names`; at least one image.
        probabilities: Probability of each class for each image (N, C).
        names: Class names in the order of the columns (C).
        paths: Path of each image (N), for the mistakes.

    Raises:
        ValueError: If there is no image, or a probability is not finite.
    """
    from sklearn import metrics  # only now: `status` reads recorded tables, and starts fast

    true = np.asarray(labels, dtype=np.int64)
    shares = np.asarray(probabilities, dtype=np.float64)
    shares = shares / shares.sum(1, keepdims=True)  # float32 sums to 1 within 1e-7
    predicted = shares.argmax(1)
    confidence, is_right = shares.max(1), predicted == true
    numbers, seen = list(range(len(names))), sorted(set(true.tolist()))
    averaged = {"labels": seen, "average": "macro", "zero_division": 0.0}
    bins = _bins(confidence, is_right)
    return ClassTables(
        num_images=len(true),
        accuracy=float(is_right.mean()),
        balanced_accuracy=float(metrics.recall_score(true, predicted, **averaged)),
        macro_f1=float(metrics.f1_score(true, predicted, **averaged)),
        auroc=_auroc(true, shares),
        log_loss=float(metrics.log_loss(true, shares, labels=numbers)),
        calibration_error=_calibration_error(bins, len(true)),
        classes=_rows(true, predicted, names),
        matrix=_matrix(true, predicted, len(names)),
        bins=bins,
        mistakes=_mistakes(true, predicted, confidence, names, paths or [None] * len(true)),
    )


def weak_points(
    true: NDArray[np.int64], predicted: NDArray[np.int64], names: Sequence[str]
) -> tuple[list[ClassRow], list[Confusion]]:
    """Return the classes with images, the lowest F1 first, and confusions, the most images first.

    Args:
        true: Class of each image (N), as its position in `names`.
        predicted: Predicted class of each image (N).
        names: Class names.
    """
    rows = _rows(true, predicted, names)
    return _weakest(rows), _confusions(rows, _matrix(true, predicted, len(names)))


def _confusions(rows: Sequence[ClassRow], matrix: Sequence[Sequence[int]]) -> list[Confusion]:
    pairs = [
        Confusion(rows[i].name, rows[j].name, count, count / rows[i].support)
        for i, counts in enumerate(matrix)
        for j, count in enumerate(counts)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair.num_images)


def _weakest(rows: Sequence[ClassRow]) -> list[ClassRow]:
    seen = [row for row in rows if row.f1 is not None]
    return sorted(seen, key=lambda row: row.f1 or 0.0)


def _rows(
    true: NDArray[np.int64], predicted: NDArray[np.int64], names: Sequence[str]
) -> tuple[ClassRow, ...]:
    from sklearn.metrics import precision_recall_fscore_support

    numbers = list(range(len(names)))
    precision, recall, f1, support = precision_recall_fscore_support(
        true, predicted, labels=numbers, zero_division=0.0
    )
    is_predicted = np.bincount(predicted, minlength=len(names)) > 0
    return tuple(
        ClassRow(
            name,
            int(support[i]),
            float(precision[i]) if is_predicted[i] else None,
            float(recall[i]) if support[i] else None,
            float(f1[i]) if support[i] else None,
        )
        for i, name in enumerate(names)
    )


def _matrix(
    true: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int
) -> tuple[tuple[int, ...], ...]:
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(true, predicted, labels=list(range(num_classes)))
    return tuple(tuple(counts) for counts in matrix.tolist())


def _auroc(true: NDArray[np.int64], shares: NDArray[np.float64]) -> float | None:
    """Mean AUROC of one class against the rest, over the classes with images of both kinds."""
    from sklearn.metrics import roc_auc_score

    columns = [1] if shares.shape[1] == 2 else range(shares.shape[1])
    areas = [
        roc_auc_score(true == column, shares[:, column])
        for column in columns
        if 0 < (true == column).sum() < len(true)
    ]
    return float(np.mean(areas)) if areas else None


def _bins(
    confidence: NDArray[np.float64], is_right: NDArray[np.bool_]
) -> tuple[ReliabilityBin, ...]:
    """Bins as the training's validation cuts them."""
    numbers = np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(numbers, minlength=NUM_BINS)
    confidences = np.bincount(numbers, confidence, NUM_BINS)
    hits = np.bincount(numbers, is_right, NUM_BINS)
    return tuple(
        ReliabilityBin(
            i / NUM_BINS,
            (i + 1) / NUM_BINS,
            int(count),
            float(confidences[i] / count) if count else None,
            float(hits[i] / count) if count else None,
        )
        for i, count in enumerate(counts)
    )


def _calibration_error(bins: Sequence[ReliabilityBin], num_images: int) -> float:
    """Guo et al., "On calibration of modern neural networks", 2017, equation 3."""
    gaps = (
        each.num_images * abs((each.confidence or 0.0) - (each.accuracy or 0.0)) for each in bins
    )
    return sum(gaps) / num_images


def _mistakes(
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    confidence: NDArray[np.float64],
    names: Sequence[str],
    paths: Sequence[str | None],
) -> tuple[Mistake, ...]:
    wrong = np.flatnonzero(predicted != true)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")]
    return tuple(
        Mistake(int(i), names[true[i]], names[predicted[i]], float(confidence[i]), paths[i])
        for i in worst
    )
