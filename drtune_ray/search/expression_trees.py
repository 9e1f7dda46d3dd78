"""The syntax trees of expressions: parsed once, with one name for each setting."""

from __future__ import annotations

import ast
import functools
import warnings
from collections.abc import Iterator

from drtune_ray.search.settings import setting_paths

YAML_WORDS = {"true": True, "false": False, "null": None}
ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
# None of these turns around within a range, so that extremes lie at the ends of ranges.
MONOTONE = (
    *(ast.Compare, ast.BinOp, ast.UnaryOp, ast.Call, ast.Name, ast.Constant, ast.Load),
    *(*ORDERS, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.UAdd),
)


@functools.lru_cache(maxsize=1024)
def tree_of(text: str) -> ast.expr:
    """The tree of an expression, for reading only.

    Raises:
        SyntaxError: If it is no expression.
    """
    tree: ast.expr = _Folder().visit(parsed_expression(text))
    return tree


def parsed_expression(text: str) -> ast.expr:
    """The tree as Python has it.

    Raises:
        SyntaxError: If it is no expression.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd comparisons, which are refused afterwards
        return ast.parse(text.strip(), mode="eval").body


def depth_of(tree: ast.AST) -> int:
    """Number of levels of a tree."""
    depth, level = 0, [tree]
    while level:
        depth += 1
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


def names_in(tree: ast.AST) -> frozenset[str]:
    """The names in a tree: settings, facts and functions."""
    return frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def settings_in(tree: ast.AST) -> frozenset[str]:
    """The settings in a tree."""
    return names_in(tree) & frozenset(setting_paths())


def comparisons(tree: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Each setting that is compared with an operand free of settings, with this operand."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare) or len(node.ops) != 1:
            continue
        sides = (node.left, node.comparators[0])
        for side, other in (sides, sides[::-1]):
            if isinstance(side, ast.Name) and settings_in(side) and not settings_in(other):
                yield side.id, other


class _Folder(ast.NodeTransformer):
    """Makes one name of ``optim.name``, and values of YAML's words."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:  # noqa: N802
        whole: ast.expr = node
        while isinstance(whole, ast.Attribute):
            whole = whole.value
        return ast.Name(ast.unparse(node), ast.Load()) if isinstance(whole, ast.Name) else node

    def visit_Name(self, node: ast.Name) -> ast.expr:  # noqa: N802
        return ast.Constant(YAML_WORDS[node.id]) if node.id in YAML_WORDS else node
