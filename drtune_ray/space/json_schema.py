"""The JSON Schema of a search space: editors check names, kinds and bounds with it.

search_spaces/schema.json holds it; the shipped spaces name that file in their first line.
"""

from __future__ import annotations

import json
from typing import Any

from drtune_ray.config.trial import TrialConfig
from drtune_ray.space.parameters import CATEGORIES, KINDS, RANGES
from drtune_ray.space.parsing import CONSTRAINTS, OPTIONS, PARAMETERS
from drtune_ray.space.settings import FACTS, restriction_of, setting_paths

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NUMBERS = ("integer", "number")
NOT_OF_VALUES = ("title", "default", "description")  # of a setting, not of a value
EXPRESSION = {
    "type": "string",
    "minLength": 1,
    "description": "Python's arithmetic and comparisons, over settings and the facts "
    + ", ".join(FACTS),
}
OPTION_SCHEMAS: dict[str, dict[str, Any]] = {
    "log": {"type": "boolean", "description": "Draw uniformly in the logarithm."},
    "step": {
        "type": "number",
        "exclusiveMinimum": 0,
        "description": "Distance between neighbouring values.",
    },
    "when": {"$ref": "#/$defs/condition"},
}


def space_schema() -> dict[str, Any]:
    """Return the schema of a search space, made from the schema of `TrialConfig`.

    It covers single values; rules between settings are checked when the space is read.
    """
    trial = TrialConfig.model_json_schema()
    parameters = {}
    for path in setting_paths():
        restriction = restriction_of(path)
        kinds = KINDS if restriction is None else restriction.kinds
        if kinds:
            parameters[path] = _parameter(_setting(trial, path), kinds)
    return {
        "$schema": DIALECT,
        "title": "drtune-ray search space",
        "type": "object",
        "additionalProperties": False,
        "required": [PARAMETERS],
        "properties": {
            PARAMETERS: {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": False,
                "properties": parameters,
            },
            CONSTRAINTS: {"type": "array", "items": {"$ref": "#/$defs/expression"}},
        },
        "$defs": {
            "expression": EXPRESSION,
            "condition": {
                "description": "When the parameter applies: values of settings, or an expression.",
                "anyOf": [
                    {
                        "type": "object",
                        "minProperties": 1,
                        "propertyNames": {"enum": list(setting_paths())},
                    },
                    {"$ref": "#/$defs/expression"},
                ],
            },
        },
    }


def schema_text() -> str:
    """Return the content of search_spaces/schema.json."""
    return json.dumps(space_schema(), indent=1) + "\n"


def _setting(trial: dict[str, Any], path: str) -> dict[str, Any]:
    """Return pydantic's schema of one setting."""
    node = trial
    for key in path.split("."):
        if "$ref" in node:
            node = trial["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        node = node["properties"][key]
    return node


def _parameter(setting: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    value = {key: part for key, part in setting.items() if key not in NOT_OF_VALUES}
    numbers = [part for part in setting.get("anyOf", [setting]) if part.get("type") in NUMBERS]
    contents: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        if kind in RANGES and numbers and (kind == "int" or numbers[0]["type"] == "number"):
            bound = {key: part for key, part in numbers[0].items() if key not in NOT_OF_VALUES}
            bound["type"] = "integer" if kind == "int" else "number"
            contents[kind] = {"type": "array", "items": bound, "minItems": 2, "maxItems": 2}
        elif kind in CATEGORIES:
            contents[kind] = {"type": "array", "items": value, "minItems": 1, "uniqueItems": True}
        elif kind == "constant":
            contents[kind] = value
        elif kind == "expression":
            contents[kind] = {"$ref": "#/$defs/expression"}
    text = " ".join(setting["description"].split())
    options = [option for option in OPTION_SCHEMAS if any(option in OPTIONS[k] for k in contents)]
    return {
        "description": f"{text} Default: {json.dumps(setting.get('default'))}",
        "type": "object",
        "additionalProperties": False,
        "properties": contents | {option: OPTION_SCHEMAS[option] for option in options},
        "oneOf": [
            {
                "required": [kind],
                "properties": {o: False for o in options if o not in OPTIONS[kind]},
            }
            for kind in contents
        ],
    }
