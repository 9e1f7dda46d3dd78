"""Weights files and backbones as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from drtune_ray.training.backbone_list import BackboneFacts
from drtune_ray.training.weights_check import WeightsCheck
from drtune_ray.values import printable

NUM_NAMES = 8  # of a list


def weights_lines(check: WeightsCheck) -> Iterator[str]:
    """Yield what a weights file is and how it fits."""
    report = check.report
    is_known = report.num_matched > 0 and not report.is_by_order
    layout = report.layout or ("names of timm" if is_known else "unknown names")
    yield f"{check.path}: {layout}{f', {report.role}' if report.role else ''}"
    if report.wrappers:
        yield f"wrapped in: {', '.join(report.wrappers)}"
    yield (
        f"{check.backbone} at {check.image_size} pixels: {report.num_matched} tensors matched "
        f"{'by position' if report.is_by_order else 'by name'}, "
        f"{report.matched_share:.1%} of the encoder"
    )
    if report.is_by_order and not report.layout:
        yield "WARNING: matched by position ALONE, because the names in the file are unknown"
    for what, names in (
        ("missing", report.missing),
        ("wrong shape", report.wrong_shape),
        ("head dropped", report.head),
        ("unexpected", report.unexpected),
        ("resized to the image size", report.resized),
        ("one channel spread over three", report.spread),
    ):
        if names:
            yield f"{what}: {len(names)} ({_listed(names)})"
    if report.others:
        yield f"taken from {report.taken}; backbone.weights_key takes {_listed(report.others)}"
    yield check.normalization


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - NUM_NAMES} more" if len(names) > NUM_NAMES else ""
    return ", ".join(printable(name) for name in names[:NUM_NAMES]) + more


def weights_facts(check: WeightsCheck) -> dict[str, Any]:
    """Return a check of weights as plain values."""
    return {
        "file": str(check.path),
        "backbone": check.backbone,
        "image_size": check.image_size,
        "report": check.report.facts(),
        "normalization": check.normalization,
        "problem": None if check.problem is None else str(check.problem),
    }


HEADER = f"{'name':<44} {'size':>5} {'parameters':>11} {'D':>6} {'GMACs':>8}  weights"


def backbone_line(facts: BackboneFacts) -> str:
    """Return a line of the table under `HEADER`."""
    if facts.problem:
        return f"{facts.name:<44} cannot be built: {facts.problem}"
    millions = f"{facts.num_parameters / 1e6:.1f} M"
    width = "-" if facts.num_features is None else str(facts.num_features)
    gmacs = "-" if facts.gmacs is None else f"{facts.gmacs:.2f}"
    weights = ", ".join(facts.weights) or "none"
    sizes = f"{facts.image_size:>5} {millions:>11} {width:>6} {gmacs:>8}"
    return f"{facts.name:<44} {sizes}  {weights}"


def backbone_values(facts: BackboneFacts) -> dict[str, Any]:
    """Return a backbone as plain values."""
    return asdict(facts)
