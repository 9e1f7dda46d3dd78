"""The syntax of expressions: what is allowed, and problems whatever the values of settings."""

from __future__ import annotations

import ast
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from drtune_ray.config.section import unknown_name
from drtune_ray.space.problems import Place, Problem
from drtune_ray.space.settings import FACTS, normal_value, setting_paths

MAX_LENGTH, MAX_DEPTH = 500, 40
ALLOWED = (ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.IfExp, ast.List, ast.Tuple)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "round": round,
    "ceil": math.ceil,
    "floor": math.floor,
    "sqrt": math.sqrt,
    "log": math.log,
}
YAML_WORDS = {"true": True, "false": False, "null": None}
ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
OPERATORS = (
    *(ast.Not, ast.USub, ast.UAdd, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
    *(ast.Pow, ast.Eq, ast.NotEq, *ORDERS, ast.In, ast.NotIn),
)


def expression_problems(text: Any, place: Place) -> Iterator[Problem]:
    """Yield what is wrong with an expression, whatever the values of the settings."""
    if not isinstance(text, str) or not text.strip():
        yield Problem("expression-text", place, f"{text!r} must be an expression, as text")
        return
    if len(text) > MAX_LENGTH:
        yield _too_long(text, place)
        return
    try:
        parsed = parsed_expression(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = getattr(error, "msg", "it cannot be read")
        yield Problem("expression-syntax", place, f"{text!r} is not an expression: {reason}")
        return
    if depth_of(parsed) > MAX_DEPTH:
        yield _too_long(text, place)
        return
    yield from _tree_problems(tree_of(text), place)


def _too_long(text: str, place: Place) -> Problem:
    return Problem(
        "expression-size",
        place,
        f"the expression {text[:30]!r}... is too long: at most {MAX_LENGTH} characters and "
        f"{MAX_DEPTH} levels",
    )


def _tree_problems(node: ast.expr, place: Place) -> Iterator[Problem]:
    """Yield the problems of a tree; nothing below a node that is refused."""
    if isinstance(node, ast.Name):
        yield from _name_problems(node.id, place)
        return
    if isinstance(node, ast.Call):
        found = list(_call_problems(node, place))
        yield from found
        below: list[ast.expr] = [] if found else node.args
    elif _is_allowed(node):
        if isinstance(node, ast.Compare):
            yield from _literal_problems(node, place)
        below = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    else:
        yield _not_allowed(node, place)
        return
    for child in below:
        yield from _tree_problems(child, place)


def _is_allowed(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return node.value is None or isinstance(node.value, bool | int | float | str)
    operators: list[ast.AST] = [node.op] if isinstance(node, ast.BinOp | ast.UnaryOp) else []
    operators += node.ops if isinstance(node, ast.Compare) else []
    return isinstance(node, ALLOWED) and all(isinstance(each, OPERATORS) for each in operators)


def _call_problems(node: ast.Call, place: Place) -> Iterator[Problem]:
    name = ast.unparse(node.func)
    if name not in FUNCTIONS:
        yield Problem("expression-function", place, unknown_name("function", name, FUNCTIONS))
    elif node.keywords:
        yield _not_allowed(node, place)


def _name_problems(name: str, place: Place) -> Iterator[Problem]:
    valid = (*setting_paths(), *FACTS)
    if name not in valid:
        hint = "" if "." in name else f"; if it is a word, write it in quotes: '{name}'"
        yield Problem("expression-setting", place, unknown_name("setting", name, valid) + hint)


def _not_allowed(node: ast.expr, place: Place) -> Problem:
    return Problem(
        "expression-not-allowed",
        place,
        f"{ast.unparse(node)!r} cannot stand in an expression: it may have settings, numbers, "
        "words in quotes, + - * / // % **, comparisons, in, and, or, not, if-else and "
        + ", ".join(FUNCTIONS),
    )


def _literal_problems(node: ast.Compare, place: Place) -> Iterator[Problem]:
    """Yield words that a setting is compared with but can never have."""
    left = node.left
    for op, right in zip(node.ops, node.comparators, strict=True):
        if isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn):
            yield from _word_problems(left, right, place)
            yield from _word_problems(right, left, place)
        left = right


def _word_problems(setting: ast.expr, other: ast.expr, place: Place) -> Iterator[Problem]:
    if not isinstance(setting, ast.Name) or setting.id not in setting_paths():
        return
    items = other.elts if isinstance(other, ast.List | ast.Tuple) else [other]
    for item in items:
        if not isinstance(item, ast.Constant) or not isinstance(item.value, str | bool):
            continue
        value, problem = normal_value(setting.id, item.value)
        if problem is None and (value != item.value or type(value) is not type(item.value)):
            problem = f"{setting.id} is never {item.value!r}; write {value!r}"
        if problem:
            yield Problem("expression-word", place, problem)


@functools.lru_cache(maxsize=1024)
def tree_of(text: str) -> ast.expr:
    """Return the tree of an expression, for reading only.

    Raises:
        SyntaxError: If the text is not an expression.
    """
    tree: ast.expr = _Folder().visit(parsed_expression(text))
    return tree


def parsed_expression(text: str) -> ast.expr:
    """Return the tree that Python parses.

    Raises:
        SyntaxError: If the text is not an expression.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd comparisons are refused afterwards
        return ast.parse(text.strip(), mode="eval").body


def depth_of(tree: ast.AST) -> int:
    """Return the number of levels of a tree."""
    depth, level = 0, [tree]
    while level:
        depth += 1
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


def names_in(tree: ast.AST) -> frozenset[str]:
    """Return the names in a tree: settings, facts and functions."""
    return frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def settings_in(tree: ast.AST) -> frozenset[str]:
    """Return the settings in a tree."""
    return names_in(tree) & frozenset(setting_paths())


def literals_in(tree: ast.AST) -> frozenset[Any]:
    """Return the numbers and words in a tree."""
    return frozenset(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))


class _Folder(ast.NodeTransformer):
    """Replaces ``optim.name`` by a single name, and YAML's words by their values."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:  # noqa: N802
        whole: ast.expr = node
        while isinstance(whole, ast.Attribute):
            whole = whole.value
        return ast.Name(ast.unparse(node), ast.Load()) if isinstance(whole, ast.Name) else node

    def visit_Name(self, node: ast.Name) -> ast.expr:  # noqa: N802
        return ast.Constant(YAML_WORDS[node.id]) if node.id in YAML_WORDS else node
