"""Format figures and names for people."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import IO, Any

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Command(str):
    """A line with a command, which is never wrapped, so that it can be copied."""


def wrapped(line: str, stream: IO[str]) -> str:
    """Break a line between words if it is too long for the terminal that it is printed to."""
    if isinstance(line, Command) or not stream.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return "\n".join(_broken(part, width) for part in line.split("\n"))


def _broken(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(
        line,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def percent(share: float | None) -> str:
    """Format a fraction as a percentage: 0.8632 becomes "86.32 %"."""
    return "-" if share is None else f"{share:.2%}".replace("%", " %")


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


def folded(name: str, width: int) -> list[str]:
    """Wrap a name after ``_`` and ``.``; a part without either may exceed the width."""
    lines = [""]
    for part in name.replace("_", "_ ").replace(".", ". ").split():
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return lines


def packed(segments: Iterable[str], width: int, gap: str = "   ") -> list[str]:
    """Join segments into as few lines as possible without breaking a segment."""
    lines: list[str] = []
    for segment in segments:
        if lines and len(lines[-1]) + len(gap) + len(segment) <= width:
            lines[-1] += gap + segment
        else:
            lines.append(segment)
    return lines
