"""Class tables as text, for few classes and for many."""

from __future__ import annotations

import numpy as np

from drtune_ray.display.tables import tables_lines
from drtune_ray.results.class_tables import class_tables


def test_tables_lines__of_few_classes() -> None:
    shares = [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.9, 0.05, 0.05]]
    found = class_tables([0, 1, 1], shares, ["cat", "dog", "a\nnewt"], ["a.png", "b.png", "c.png"])
    lines = list(tables_lines(found))
    assert lines[0] == (
        "Balanced accuracy 75.00 %, macro F1 66.67 %, AUROC 0.5000, log loss 1.1919, expected "
        "calibration error 46.67 %"
    )
    assert lines[2:5] == [
        "  class  images  precision    recall       F1",
        "  cat         1    50.00 %  100.00 %  66.67 %",
        "  dog         2   100.00 %   50.00 %  66.67 %",
    ]
    assert lines[5] == "1 class(es) without images do not enter the means."
    assert lines[7:12] == [
        "Images by class (rows) and predicted class (columns):",
        "           cat  dog  a\\nnewt",
        "  cat        1    0        0",
        "  dog        1    1        0",
        "  a\\nnewt    0    0        0",
    ]
    assert lines[13:] == [
        "1 of 3 images are misclassified:",
        "  c.png: dog, predicted cat (90.00 %)",
    ]


def test_tables_lines__of_many_classes_are_few() -> None:
    labels = np.arange(400) % 100
    shares = np.full((400, 100), 0.001)
    predicted = np.where(labels < 50, (labels + 1) % 100, labels)
    shares[np.arange(400), predicted] = 0.5
    lines = list(tables_lines(class_tables(labels.tolist(), shares, [f"c{i}" for i in range(100)])))
    assert "The 20 weakest of 100 classes (--json has all):" in lines
    assert "Most confused of 50 pairs of classes:" in lines
    assert "200 of 400 images are misclassified, the 20 most confident:" in lines
    assert "  c0   as   c1  4  100.00 %" in lines
    assert len(lines) < 75
