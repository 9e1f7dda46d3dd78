"""Format figures and names for people."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from typing import IO

from drtune_ray.results.words import by as by
from drtune_ray.results.words import counted as counted
from drtune_ray.results.words import duration as duration
from drtune_ray.results.words import figure as figure
from drtune_ray.results.words import percent as percent
from drtune_ray.results.words import short as short
from drtune_ray.results.words import short_names as short_names
from drtune_ray.results.words import size as size


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
