"""Metrics of predictions for images whose classes are known, without those of the sealed split."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.kinds.recognize import find_images
from drtune_ray.data.sources import content_hash
from drtune_ray.errors import DrtuneError
from drtune_ray.results.class_tables import ClassTables, class_tables
from drtune_ray.results.evaluate import StudyImages
from drtune_ray.results.predict import Prediction


def labels_below(folders: Iterable[str], classes: Sequence[str]) -> dict[str, int]:
    """Return the class of each image in folders of class folders, by its full path.

    Args:
        folders: Paths; those that are no folders of class folders have no labels.
        classes: Class names of the model; images of other classes are left out.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    labels = {}
    for folder in filter(os.path.isdir, folders):
        try:
            found = find_images(DataConfig(train=folder))
        except DrtuneError:
            continue
        root = os.path.abspath(folder)
        for image in found.images:
            if image.label in numbers:
                labels[os.path.join(root, image.path)] = numbers[image.label]
    return labels


class Measured:
    """Collects the predictions of labelled images.

    Args:
        labels: Class of each image by its full path.
        classes: Class names of the model.
        study: Images of the model's study; None if they are not known.
    """

    def __init__(
        self, labels: Mapping[str, int], classes: Sequence[str], study: StudyImages | None
    ) -> None:
        self._labels, self._classes, self._study = labels, tuple(classes), study
        self._true: list[int] = []
        self._paths: list[str] = []
        self._probabilities: list[NDArray[np.float32]] = []
        self.num_sealed = self.num_used = self.num_unlabelled = 0

    @property
    def is_study_known(self) -> bool:
        """Whether it is known which images the model's study used and sealed."""
        return self._study is not None

    def watched(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """Yield predictions as they are; keep what the metrics need."""
        for each in predictions:
            self._take(each)
            yield each

    def tables(self) -> ClassTables | None:
        """Return metrics and tables; None without a labelled image."""
        if not self._true:
            return None
        return class_tables(self._true, np.stack(self._probabilities), self._classes, self._paths)

    def _take(self, prediction: Prediction) -> None:
        path = prediction.image
        label = None if path is None else self._labels.get(os.path.abspath(path))
        if path is None or label is None:
            self.num_unlabelled += 1
            return
        if self._study is not None:
            known = content_hash(Path(path).read_bytes())
            if known in self._study.sealed:
                self.num_sealed += 1
                return
            self.num_used += known in self._study.used
        self._true.append(label)
        self._paths.append(path)
        ordered = [prediction.probabilities[name] for name in self._classes]
        self._probabilities.append(np.array(ordered, dtype=np.float32))
