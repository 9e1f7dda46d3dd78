"""What the package refuses, read from it: sentences in its source, its settings, its options."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import drtune_ray

PACKAGE = Path(drtune_ray.__file__).parent
REFUSALS = ("ConfigError", "CheckpointError")
# Calls within which a string is not said of bad input: other exit codes, logs, errors that are
# caught on their way.
SAID_OTHERWISE = (
    "AttributeError",
    "ConnectionError",
    "DrtuneError",
    "EnvironmentProblem",
    "NoTrialCompleted",
    "RuntimeError",
    "logger.warning",
)
VALIDATORS = re.compile(r"@model_validator|\b(Before|After)Validator\(")


@dataclass(frozen=True)
class Rule:
    """Something that is refused.

    Attributes:
        where: File and function, setting or command.
        pattern: Is found in what is said of it, and of it alone.
        sample: Of a sentence, with some value in each place.
        words: A part of the pattern that needs no regular expression to be looked for.
    """

    where: str
    pattern: str
    sample: str = ""
    words: str = ""

    def is_met_by(self, text: str) -> bool:
        return self.words in text and re.search(self.pattern, text) is not None


# ---- sentences


class _Sentences(ast.NodeVisitor):
    """Strings of two words or more, docstrings and other talk apart, each with its function."""

    def __init__(self) -> None:
        self.found: list[tuple[str, list[str]]] = []
        self._names: list[str] = []

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        self._names.append(node.name)
        self.generic_visit(node)
        self._names.pop()

    visit_ClassDef = visit_FunctionDef

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        if name == "unknown_name":
            self._keep(["unknown ", *_parts(node.args[0]), " ", ""])
        elif name not in SAID_OTHERWISE:
            self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "help":  # of an option
            self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._keep(_parts(node))

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._keep(_parts(node))

    def _keep(self, parts: list[str]) -> None:
        text = " ".join(parts)
        if len(re.findall(r"[A-Za-z]{2,}", text)) > 1 and " " in text.strip():
            self.found.append((".".join(self._names), parts))


def _parts(node: ast.expr) -> list[str]:
    """The words of a string; an empty one stands for each value in it."""
    if isinstance(node, ast.JoinedStr):
        return [v.value if isinstance(v, ast.Constant) else "" for v in node.values]
    return [str(node.value)] if isinstance(node, ast.Constant) else [""]


def sentence_rules(source: str, name: str) -> list[Rule]:
    """A rule for each sentence of a module."""
    visitor = _Sentences()
    visitor.visit(ast.parse(source))
    return [
        Rule(
            f"{name}:{function}",
            "".join(re.escape(part) or ".*?" for part in parts),
            "".join(part or "x" for part in parts),
            max(parts, key=len),
        )
        for function, parts in visitor.found
    ]


def refuses(source: str) -> bool:
    """Whether a module refuses input."""
    return any(_refusals(ast.parse(source))) or VALIDATORS.search(source) is not None


def _refusals(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in REFUSALS:
            yield node


def wordless(source: str, name: str) -> set[str]:
    """Functions of a module that refuse without a sentence of their own, such as with a list."""
    found = set()
    for function in ast.walk(ast.parse(source)):
        for call in _refusals(function) if isinstance(function, ast.FunctionDef) else ():
            visitor = _Sentences()
            visitor.generic_visit(call)
            if not visitor.found:
                found.add(f"{name}:{function.name}")
    return found


# ---- settings

TYPES = {
    "int": "input should be a valid integer",
    "float": "input should be a valid number",
    "bool": "input should be a valid boolean",
    "str": "input should be a valid string",
    "dict": "it must be a mapping of settings",
    "tuple": "it must be a list",
    "literal": "input should be '",
}
BOUNDS = {
    "gt": "greater than",
    "ge": "greater than or equal to",
    "lt": "less than",
    "le": "less than or equal to",
}


def setting_rules(schema: Any, path: str = "") -> Iterator[Rule]:
    """A rule for each type, bound, choice and key of a section, from pydantic's own schema.

    What functions refuse is found in their source.
    """
    kind = schema["type"]
    if kind == "model":
        prefix = f"{path}." if path else ""
        yield Rule(path, f"unknown key '{re.escape(prefix)}\\w+'")
        if path:
            yield _setting_rule(path, TYPES["dict"])
        for name, field in _fields(schema).items():
            yield from setting_rules(field["schema"], prefix + name)
    elif kind == "union":
        for member in schema["choices"]:
            yield from setting_rules(member, path)
    elif kind in ("default", "nullable", "function-after"):
        yield from setting_rules(schema["schema"], path)
    elif kind != "function-before":  # which says all by itself
        yield from _value_rules(schema, path)


def _value_rules(schema: Any, path: str) -> Iterator[Rule]:
    yield _setting_rule(path, TYPES[schema["type"]])
    if schema["type"] == "float":
        yield _setting_rule(path, "input should be a finite number")
    for key, words in BOUNDS.items():
        if key in schema:
            yield _setting_rule(path, f"input should be {words} {schema[key]:g}")
    for item in schema.get("items_schema", ()):
        yield from setting_rules(item, f"{path}[0]")


def _setting_rule(path: str, reason: str) -> Rule:
    return Rule(
        path, rf"(?m:^(drtune-ray: )?{re.escape(path)}=.*? is not valid: .*?{reason})", "", reason
    )


def _fields(schema: Any) -> dict[str, Any]:
    inner = schema["schema"]
    while inner["type"] != "model-fields":
        inner = inner["schema"]
    fields: dict[str, Any] = inner["fields"]
    return fields


# ---- options


ANY_NUMBER = -1  # of values, to click
NUMBERS = (click.types.IntParamType, click.types.FloatParamType)


def option_rules(group: click.Group, path: str = "drtune-ray") -> Iterator[Rule]:
    """A rule for each option, argument and number of a command line."""
    yield _option_rule(path, "No such command ")
    yield _option_rule(path, "No such option ")
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from option_rules(command, f"{path} {name}")
        else:
            yield from _command_rules(command, f"{path} {name}")


def _command_rules(command: click.Command, path: str) -> Iterator[Rule]:
    context = click.Context(command)
    yield _option_rule(path, "No such option ")
    if all(parameter.nargs != ANY_NUMBER for parameter in command.params):
        yield _option_rule(path, "Got unexpected extra argument ")
    for parameter in command.params:
        if parameter.required:
            is_argument = isinstance(parameter, click.Argument)
            kind = "argument" if is_argument else "option"
            name = parameter.make_metavar(context) if is_argument else parameter.opts[0]
            yield _option_rule(path, f"Missing {kind} '{name}'")
        if isinstance(parameter.type, NUMBERS):
            yield _option_rule(path, f"Invalid value for '{parameter.opts[0]}': ")


def _option_rule(path: str, message: str) -> Rule:
    return Rule(path, rf"^Usage: {path} \[OPTIONS\](?s:.*)\nError: {re.escape(message)}")


# ---- what a rule lacks


def without_example(rules: list[Rule], texts: list[str]) -> list[Rule]:
    """Rules that no message shows."""
    return [rule for rule in rules if not any(map(rule.is_met_by, texts))]
