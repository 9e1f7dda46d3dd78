"""The report as one HTML file: its style, its data and one copy of Plotly's script.

The page loads nothing: its policy allows the two scripts by their hashes, styles, and pictures that
lie in the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any

from drtune_ray.results.report import html
from drtune_ray.results.report.content import Content
from drtune_ray.results.report.figure import Figure
from drtune_ray.results.report.sections import Section, sections


def report_page(content: Content) -> str:
    """Return the report as HTML."""
    written = f"{datetime.fromtimestamp(content.written_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"
    footer = f"Written {written} ({content.state})."
    return page("Report of a drtune-ray study", content.name, sections(content), footer)


def page(kind: str, name: str, parts: list[Section], footer: str) -> str:
    """Return sections as a whole page of HTML, which loads nothing.

    Args:
        kind: What the page is.
        name: What it is about.
        parts: The sections.
        footer: Last line.
    """
    figures = [part for section in parts for part in section.parts if isinstance(part, Figure)]
    data = _script_json({figure.key: _plain(figure) for figure in figures})
    drawing = (files("drtune_ray.results.report") / "draw.js").read_text(encoding="utf-8")
    body = (
        '<a class="skip" href="#result">Skip to the result</a>'
        f"{_header(kind, name, parts)}<main>{''.join(map(_section, parts))}</main>"
        f"<footer><p>{html.text(footer)}</p></footer>"
        "<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>"
        f'<script type="application/json" id="figures">{data}</script>'
        f"<script>{plotly_script()}</script><script>{drawing}</script>"
    )
    return html.document(f"{name}: report", _head(plotly_script(), drawing), body)


@cache
def plotly_script() -> str:
    """Return Plotly's script, which draws the figures in the browser."""
    path = files("plotly") / "package_data" / "plotly.min.js"
    return path.read_text(encoding="utf-8")


def _head(*scripts: str) -> str:
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {hashes}"
    )
    return (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{html.style()}</style>"
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _script_json(values: Any) -> str:
    """Return JSON that cannot end the script element that holds it."""
    return json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _plain(figure: Figure) -> dict[str, Any]:
    layout = figure.layout | {"height": figure.height}
    return {"data": list(figure.data), "layout": layout}


def _header(kind: str, name: str, parts: list[Section]) -> str:
    links = (f'<a href="#{part.key}">{html.text(part.title)}</a>' for part in parts)
    items = "".join(f"<li>{link}</li>" for link in links)
    return (
        f'<header><p class="kind">{html.text(kind)}</p>'
        f"<h1>{html.text(name)}</h1></header>"
        f'<nav aria-label="Sections"><ul>{items}</ul></nav>'
    )


def _section(section: Section) -> str:
    return (
        f'<section id="{section.key}" aria-labelledby="{section.key}-title">'
        f'<h2 id="{section.key}-title">{html.text(section.title)}</h2>'
        f"{''.join(_grouped(section))}</section>"
    )


def _grouped(section: Section) -> list[str]:
    """Return the parts; small figures that follow each other stand side by side."""
    found = []
    for is_small, parts in groupby(section.parts, key=_is_small):
        shown = [part if isinstance(part, str) else _figure(part) for part in parts]
        found += [f'<div class="grid">{"".join(shown)}</div>'] if is_small else shown
    return found


def _is_small(part: str | Figure) -> bool:
    return isinstance(part, Figure) and part.is_small


def _figure(figure: Figure) -> str:
    name = html.text(f"{figure.title}. {figure.caption}")
    width = f"min-width:{figure.min_width}px;" if figure.min_width else ""
    table = ""
    if figure.table is not None and figure.table.rows:
        shown = html.table(figure.table.headers, figure.table.rows)
        table = html.folded("As a table", shown)
    return (
        f'<figure><h3>{html.text(figure.title)}</h3><div class="scroll" tabindex="0" role="img" '
        f'aria-label="{name}"><div class="plot" id="{html.text(figure.key)}" '
        f'style="{width}height:{figure.height}px"></div></div>'
        f"<figcaption>{html.text(figure.caption)}</figcaption>{table}</figure>"
    )
