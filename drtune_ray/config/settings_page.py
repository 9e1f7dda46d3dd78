"""Descriptions of the settings, from the texts under their fields, and the page that lists them.

``python -m drtune_ray.config.settings_page > docs/settings.md`` writes the page again.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from drtune_ray.config.study import StudyConfig

INTRODUCTION = """\
# Settings

Written by `python -m drtune_ray.config.settings_page > docs/settings.md` from the texts under the
fields of `drtune_ray/config`.

A study file (`drtune-ray tune STUDY.yaml`) holds these settings; a trial file (`drtune-ray train
TRIAL.yaml`) holds those of `trial` without that prefix, and `resources`. `--set` takes the paths of
either, for a study those of its trial without the prefix too. `preset: paper` or `preset: authors`
in the trial starts from other defaults: [presets.md](presets.md). A command fits some defaults to
the machine (backbone, image size, epochs, batch size, trials, CPUs and GPUs) and prints them first.

Sources: equations and sections are those of DR-Tune (ICCV 2023,
<https://arxiv.org/abs/2308.12058>), with K = min(`bank_size`, number of training images) and
B = `batch_size`; "authors' code" is GitHub weeknan/DR-Tune, commit ef9a7b1. A setting without a
source is drtune-ray's own; options of the samplers are Optuna's.
"""
SAMPLERS = """\
## Options of the samplers

Keys of `sampler.options` for the sampler of that name, as Optuna 5 names them; `null` leaves an
option to Optuna.
"""
HEADER = "| setting | type | default | what it sets | source |\n|---|---|---|---|---|"
SOURCE = re.compile(r"\s*\[([^][]+)\]$")
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def field_at(section: type[BaseModel], path: str) -> FieldInfo:
    """Return the field at a dotted path."""
    *groups, leaf = path.split(".")
    for group in groups:
        section = _group(section, group) or section
    return section.model_fields[leaf]


def described(field: FieldInfo) -> tuple[str, str]:
    """Return what a field sets, in sentences, and its source, empty where it has none."""
    text = " ".join((field.description or "").split())
    source = SOURCE.search(text)
    return SOURCE.sub("", text), source[1] if source else ""


def summary(field: FieldInfo) -> str:
    """Return the first sentence about a field, and the one about its default."""
    first, *others = re.split(r"(?<=\.) (?=[A-Z])", described(field)[0])
    return " ".join([first, *(other for other in others if other.startswith("Default:"))])


def default_text(field: FieldInfo) -> str:
    """Return a field's default as YAML shows it, or an empty text where a value is required."""
    return "" if field.is_required() else json.dumps(field.default).strip('"')


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the words that a field accepts, if it accepts a list of words and nothing else."""
    is_literal = get_origin(field.annotation) is Literal
    return get_args(field.annotation) if is_literal else ()


def settings_page() -> str:
    """Return the content of docs/settings.md."""
    from drtune_ray.config.sampler_options import SAMPLER_OPTIONS  # not for ``--help``

    options = [setting_table(section, f"### {name}") for name, section in SAMPLER_OPTIONS.items()]
    return "\n".join([INTRODUCTION, *_tables(StudyConfig, ""), SAMPLERS, *options])


def _tables(section: type[BaseModel], path: str) -> Iterator[str]:
    yield setting_table(section, f"## {path or 'Study'}", path)
    for name in section.model_fields:
        if inner := _group(section, name):
            yield from _tables(inner, f"{path}.{name}".strip("."))


def _group(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Return the section that a field holds, or None where it holds a value."""
    annotation = section.model_fields[name].annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def setting_table(section: type[BaseModel], heading: str, path: str = "") -> str:
    """Return a heading, a section's docstring and the table of its settings, groups left out."""
    prefix = f"{path}." if path else ""
    schemas = section.model_json_schema().get("properties", {})
    rows = []
    for name, field in section.model_fields.items():
        if _group(section, name) is None:
            cells = _type(schemas[name]), _code(default_text(field)), *described(field)
            rows.append(f"| `{prefix}{name}` | {' | '.join(cells)} |")
    table = ["", HEADER, *rows] if rows else []
    return "\n".join([heading, "", inspect.cleandoc(section.__doc__ or ""), *table, ""])


def _type(schema: dict[str, Any]) -> str:
    """Return the values that a setting accepts, from its JSON Schema."""
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(map(_code, choices))
    if "prefixItems" in schema:
        return f"[{', '.join(map(_type, schema['prefixItems']))}]"
    if "items" in schema:
        return f"list: {_type(schema['items'])}"
    bounds = [f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema]
    kind = {"object": "mapping"}.get(schema["type"], schema["type"])
    return " ".join([kind, ", ".join(bounds)]).strip()


def _code(text: str) -> str:
    return f"`{text}`" if text else "required"


if __name__ == "__main__":
    print(settings_page(), end="")
