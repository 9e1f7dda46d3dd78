"""A check of a source of images as text, JSON and one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from drtune_ray.data.check import Finding, SourceCheck
from drtune_ray.results.report import html
from drtune_ray.values import printable

NUM_CLASSES = 100  # with pictures in the page
STYLE = """img{margin:2px;vertical-align:top}
.error{color:var(--impossible)}.warning{color:var(--stopped)}"""


def check_lines(check: SourceCheck) -> Iterator[str]:
    """Yield a table of the classes, facts and findings."""
    yield check.location
    splits = _splits(check)
    width = max((len(printable(name)) for name in check.counts), default=5)
    yield "  ".join([f"{'class':<{width}}", *(f"{split:>10}" for split in splits)])
    for name, counts in check.counts.items():
        yield "  ".join([f"{printable(name):<{width}}", *(f"{n:>10}" for n in counts.values())])
    for what, value in check.facts.items():
        yield f"{what}: {value}"
    for finding in check.findings:
        yield f"{finding.level}: {finding.text}"
    if not check.findings:
        yield "nothing to correct"


def check_facts(check: SourceCheck) -> dict[str, Any]:
    """Return the check as plain values."""
    return {
        "source": check.location,
        "classes": check.counts,
        "facts": check.facts,
        "findings": [
            {"level": f.level, "text": f.text, "pictures": [printable(p) for p in f.paths]}
            for f in check.findings
        ],
    }


def check_page(check: SourceCheck) -> str:
    """Return one self-contained HTML page, pictures included."""
    body = [f"<h1>{html.text(check.location)}</h1>", _table(check)]
    body.append(html.paragraphs(f"{what}: {value}" for what, value in check.facts.items()))
    body += [_finding(check, finding) for finding in check.findings]
    for name, paths in list(check.examples.items())[:NUM_CLASSES]:
        body += [f"<h2>{html.text(name)}</h2>", _pictures(check, paths)]
    return html.document(check.location, f"<style>{html.style()}{STYLE}</style>", "".join(body))


def prepared_lines(manifest: Mapping[str, Any], out: Path) -> Iterator[str]:
    """Yield what was written to a folder of shards."""
    for split, counts in manifest["images"].items():
        yield f"{split}: {sum(counts.values())} images of {len(counts)} classes"
    yield f"{len(manifest['shards'])} shards in {out}: drtune-ray tune --data {out}"


def _splits(check: SourceCheck) -> list[str]:
    return list(next(iter(check.counts.values()), {}))


def _table(check: SourceCheck) -> str:
    rows: list[list[html.Cell]] = [
        [name, *counts.values()] for name, counts in check.counts.items()
    ]
    return html.table(["class", *_splits(check)], rows)


def _finding(check: SourceCheck, finding: Finding) -> str:
    text = f'<p class="{finding.level}">{finding.level}: {html.text(finding.text)}</p>'
    return text + _pictures(check, finding.paths)


def _pictures(check: SourceCheck, paths: tuple[str, ...]) -> str:
    shown = ((html.text(path), check.thumbnail(path)) for path in paths)
    return "".join(f'<img src="{uri}" title="{name}">' for name, uri in shown if uri)
