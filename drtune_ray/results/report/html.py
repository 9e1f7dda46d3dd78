"""Pieces of HTML; every text from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from drtune_ray.values import printable

Cell = str | int | float | None


def text(value: object) -> str:
    """Return a text for HTML, also for an attribute in double quotes."""
    return escape(printable(str(value)))


def paragraphs(lines: Iterable[str]) -> str:
    """Return one paragraph a line."""
    return "".join(f"<p>{prose(line)}</p>" for line in lines)


def prose(line: str) -> str:
    """Return a sentence for HTML, in which no line ends between a number and its %."""
    return text(line).replace(" %", "&nbsp;%")


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    title: str = "",
    *,
    is_aligned: bool = True,
) -> str:
    """Return a table that scrolls where it is too wide.

    Args:
        headers: Names of the columns; the first one names the rows.
        rows: Cells; None is empty.
        title: What the table shows.
        is_aligned: Whether numbers are set to the right.
    """
    rows = list(rows)
    first = rows[0] if rows and is_aligned else []
    head = "".join(
        _header(name, at > 0 and at < len(first) and _is_number(first[at]))
        for at, name in enumerate(headers)
    )
    caption = f"<caption>{text(title)}</caption>" if title else ""
    body = "".join(_row(row, is_aligned) for row in rows)
    name = text(title or headers[0])
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table>{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(cells: Sequence[Cell], is_aligned: bool) -> str:
    first, *rest = cells
    data = "".join(_data(cell) if is_aligned else f"<td>{_cell(cell)}</td>" for cell in rest)
    return f'<tr><th scope="row">{_cell(first)}</th>{data}</tr>'


def _header(name: str, is_number: bool) -> str:
    kind = ' class="number"' if is_number else ""
    return f'<th scope="col"{kind}>{text(name)}</th>'


def _data(cell: Cell) -> str:
    return (
        f'<td class="number">{_cell(cell)}</td>' if _is_number(cell) else f"<td>{_cell(cell)}</td>"
    )


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, int | float) or str(cell)[:1].isdigit() or cell == "-"


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    return text(f"{cell:.4g}" if isinstance(cell, float) else cell)


def facts(values: Mapping[str, str]) -> str:
    """Return names and values as a list of terms."""
    pairs = (f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in values.items())
    return f'<dl class="facts">{"".join(pairs)}</dl>'


def folded(summary: str, content: str) -> str:
    """Return content that a click or the Enter key unfolds."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def style() -> str:
    """Return the style of all pages, light and dark."""
    return (files("drtune_ray.results.report") / "style.css").read_text(encoding="utf-8")


def document(title: str, head: str, body: str) -> str:
    """Return a whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title>{head}</head><body>{body}</body></html>\n"
    )
