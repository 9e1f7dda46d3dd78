"""Figures and names as people read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from drtune_ray.config.metric import DEFAULT_METRIC, METRICS, Metric

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
# Names of methods in texts; one of a user's own is shown as it is.
METHODS = {
    "dr_tune": "DR-Tune",
    "ce_tuning": "CE-tuning",
    "dr": "DR",
    "dr_tune_l2_sp": "DR-Tune with L2-SP",
    "dr_tune_bss": "DR-Tune with BSS",
    "linear_probe": "linear probe",
    "bitfit": "BitFit",
    "l2_sp": "L2-SP",
    "bss": "BSS",
    "ldifs": "LDIFS",
    "lp_ft": "LP-FT",
    "wise_ft": "WiSE-FT",
    "spd": "SPD",
    "ftp": "FTP",
    "scl": "SCL",
}
# Parts of DR-Tune in a comparison's ablation, beside `dr` and `dr_tune`. [paper: Tables 6 and 7]
ABLATION = {
    "dr_rotation": "DR with rotation",
    "dr_translation": "DR with translation",
    "dr_weighted_translation": "DR with weighted translation",
}
OF_SHARE = re.compile(r"(.+)-([0-9.]+)pct")


def title(name: str) -> str:
    """Return the name of a method in a comparison for people."""
    if found := OF_SHARE.fullmatch(name):
        return f"{title(found[1])} at {found[2]} %"
    return (METHODS | ABLATION).get(name, name)


def of_share(name: str, share: float) -> str:
    """Return the name of a method that gets a share of the training images."""
    return f"{name}-{100 * share:g}pct"


def without_share(name: str) -> str:
    """Return the name of a method without the share of its training images."""
    found = OF_SHARE.fullmatch(name)
    return found[1] if found else name


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def percent(share: float | None) -> str:
    """Format a fraction as a percentage: 0.8632 becomes "86.32 %"."""
    return "-" if share is None else f"{share:.2%}".replace("%", " %")


def figure(metric: Metric, value: float | None) -> str:
    """Format a value of a metric: as a percentage, or with four decimals where it is no share."""
    return percent(value) if metric.is_share or value is None else f"{value:.4f}"


def by(metric: Metric) -> str:
    """Return a note on what a value is of; empty for the accuracy, which needs none."""
    return "" if metric is METRICS[DEFAULT_METRIC] else f" ({metric.label})"


def noun(metric: Metric) -> str:
    """Return a short name of a metric, where the text says that it is of the validation images."""
    return metric.label.removesuffix(" on the validation images").replace("validation ", "")


def form(metric: Metric, digits: int = 2) -> str:
    """Return the format of a metric's values, which Python and d3 (of Plotly) share.

    Args:
        metric: The metric.
        digits: Decimals of a percentage; a plain number has two more.
    """
    return f".{digits}%" if metric.is_share else f".{digits + 2}f"


def duration(seconds: float) -> str:
    """Format a duration by its two largest units of days, hours, minutes and seconds."""
    minutes, seconds_left = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days} d {hours_left} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds_left} s" if minutes else f"{seconds_left} s"


def energy(joules: float) -> str:
    """Format an energy: 7200 becomes "2.0 Wh"."""
    hours = joules / 3600
    return f"{hours:.1f} Wh" if hours < 1000 else f"{hours / 1000:.1f} kWh"


def size(num_bytes: float) -> str:
    """Format a number of bytes: 1536 becomes "1.5 KiB"."""
    for unit in UNITS:
        if num_bytes < 1024 or unit == UNITS[-1]:
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def short(value: Any) -> str:
    """Format the value of a setting, with three significant digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Map each dotted path to its shortest suffix that is unique."""
    names = {}
    for path in paths:
        parts = path.split(".")
        for num_parts in range(1, len(parts) + 1):
            names[path] = ".".join(parts[-num_parts:])
            if sum(f".{other}".endswith(f".{names[path]}") for other in paths) == 1:
                break
    return names
