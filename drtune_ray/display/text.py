"""Figures and names as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def percent(share: float | None) -> str:
    """0.8632 to "86.32 %"."""
    return "-" if share is None else f"{share:.2%}".replace("%", " %")


def duration(seconds: float) -> str:
    """The two largest of days, hours, minutes and seconds that are not zero."""
    minutes, seconds_left = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days} d {hours_left} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds_left} s" if minutes else f"{seconds_left} s"


def size(num_bytes: float) -> str:
    """1536 to "1.5 KiB"."""
    for unit in UNITS:
        if num_bytes < 1024 or unit == UNITS[-1]:
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def short(value: Any) -> str:
    """A setting's value; three digits of a number are enough to tell trials apart."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Each dotted path by its last part, or by as many as tell it from the others."""
    names = {}
    for path in paths:
        parts = path.split(".")
        for num_parts in range(1, len(parts) + 1):
            names[path] = ".".join(parts[-num_parts:])
            if sum(f".{other}".endswith(f".{names[path]}") for other in paths) == 1:
                break
    return names


def folded(name: str, width: int) -> list[str]:
    """A name over several lines: broken behind ``_`` and ``.``, wider only where it has neither."""
    lines = [""]
    for part in name.replace("_", "_ ").replace(".", ". ").split():
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return lines


def packed(segments: Iterable[str], width: int, gap: str = "   ") -> list[str]:
    """Segments over as few lines as hold them; none is broken."""
    lines: list[str] = []
    for segment in segments:
        if lines and len(lines[-1]) + len(gap) + len(segment) <= width:
            lines[-1] += gap + segment
        else:
            lines.append(segment)
    return lines
