"""The accuracy on the test split, and its record in a study's folder."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drtune_ray.folders import LocalFolder
from drtune_ray.results.class_tables import ClassTables

RESULT_NAME = "test-result.json"
WEIGHTS_NAME = "model.safetensors"  # of a winner
TWO_SIDED_95 = 1.959964


@dataclass(frozen=True)
class Accuracy:
    """Number of correct predictions among images, with the 95 % Wilson interval."""

    num_correct: int
    num_images: int

    @classmethod
    def of(cls, tables: ClassTables) -> Accuracy:
        """Return the accuracy that tables were made from."""
        return cls(tables.num_images - len(tables.mistakes), tables.num_images)

    @property
    def share(self) -> float:
        """Accuracy, 0 to 1."""
        return self.num_correct / self.num_images

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound: Wilson, "Probable inference", JASA 1927."""
        n, z = self.num_images, TWO_SIDED_95
        centre = (self.share + z * z / (2 * n)) / (1 + z * z / n)
        spread = self.share * (1 - self.share) / n + z * z / (4 * n * n)
        half = z / (1 + z * z / n) * math.sqrt(spread)
        return centre - half, centre + half


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation on the test split.

    Attributes:
        test: Accuracy on the test images.
        validation: Accuracy measured again on the validation images, to show that the model is
            the recorded one; None if it was trained on these images.
        recorded_validation: Validation accuracy that the study recorded, 0 to 1; None if the
            model was trained on these images.
        num_openings: Number of openings of this test split, including this one.
        time_ms: Time of the opening, in milliseconds since 1970.
        is_recorded: Whether it is the recorded result of an earlier call.
        tables: Class table, confusions, calibration and misclassified test images; None in a record
            of an earlier version.
    """

    test: Accuracy
    validation: Accuracy | None
    recorded_validation: float | None
    num_openings: int
    time_ms: int
    is_recorded: bool = False
    tables: ClassTables | None = None

    def to_mapping(self) -> dict[str, Any]:
        """Return everything as plain values, with the interval of the test accuracy."""
        measured = {"accuracy": self.test.share, "interval": list(self.test.interval)}
        return dict(
            vars(self),
            test=asdict(self.test) | measured,
            validation=asdict(self.validation) if self.validation else None,
            tables=self.tables.to_mapping() if self.tables else None,
        )


def write_result(folder: Path, weights: Path, found: Evaluation) -> None:
    """Record an evaluation in the folder of its study or training.

    Args:
        folder: Folder of the study or training.
        weights: File with the weights that were evaluated.
        found: The evaluation.
    """
    content = {
        "weights_sha256": sha256_of(weights),
        "test_accuracy": asdict(found.test),
        "validation_accuracy": asdict(found.validation) if found.validation else None,
        "recorded_validation": found.recorded_validation,
        "num_openings": found.num_openings,
        "time_ms": found.time_ms,
        "tables": found.tables.to_mapping() if found.tables else None,
    }
    LocalFolder(folder).write(RESULT_NAME, json.dumps(content).encode())


def read_result(folder: Path, weights: Path) -> Evaluation | None:
    """Return the recorded evaluation of these weights; None if there is none that can be read.

    Args:
        folder: Folder of the study or training.
        weights: File with the weights of its present winner.
    """
    try:
        content = json.loads((folder / RESULT_NAME).read_bytes())
        is_of_these = content.pop("weights_sha256") == sha256_of(weights)
        return _evaluation(**content) if is_of_these else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _evaluation(
    test_accuracy: dict[str, int],
    validation_accuracy: dict[str, int] | None,
    tables: dict[str, Any] | None = None,
    **rest: Any,
) -> Evaluation:
    validation = Accuracy(**validation_accuracy) if validation_accuracy else None
    known = ClassTables.from_mapping(tables) if tables else None
    return Evaluation(Accuracy(**test_accuracy), validation, **rest, is_recorded=True, tables=known)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
