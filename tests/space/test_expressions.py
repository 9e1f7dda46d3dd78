"""Expressions of a search space: what they compute, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest

from drtune_ray.errors import ConfigError
from drtune_ray.space.expression_syntax import expression_problems
from drtune_ray.space.expressions import Expression, ExpressionError, UnknownFact
from drtune_ray.space.problems import Place

VALUES = {
    "method.bank_size": 512,
    "training.batch_size": 32,
    "optim.name": "sgd",
    "optim.momentum": 0.9,
    "optim.backbone_lr": 0.01,
    "method.calibration.rotation": True,
    "training.patience_epochs": None,
    "data.num_train": 300,
}


def expression(text: str) -> Expression:
    assert list(expression_problems(text, Place())) == []
    return Expression(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5 * method.bank_size / training.batch_size", 8.0),
        ("method.bank_size // 100 % 3", 2),
        ("-method.bank_size + +2 ** 3", -504),
        ("min(method.bank_size, data.num_train, 1000)", 300),
        ("max([1, 5, 3])", 5),
        ("round(method.bank_size / 3)", 171),
        ("round(optim.momentum / 7, 2)", 0.13),
        ("ceil(8.1) + floor(8.9)", 17),
        ("sqrt(16) * log(8, 2)", 12.0),
        ("'local' if training.batch_size == 32 else 'frozen'", "local"),
        ("1 if method.calibration.rotation else 2", 1),
        ("  method.bank_size  ", 512),
    ],
)
def test_evaluate(text: str, value: Any) -> None:
    found = expression(text).evaluate(VALUES)
    assert found == pytest.approx(value) if isinstance(value, float) else found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("optim.name == 'sgd' and optim.momentum > 0", True),
        ("optim.name != 'sgd' or optim.momentum > 0.95", False),
        ("not method.calibration.rotation", False),
        ("method.calibration.rotation == true", True),
        ("training.patience_epochs == null", True),
        ("training.patience_epochs != null and training.patience_epochs > 3", False),
        ("optim.name in ['sgd', 'adamw']", True),
        ("optim.name not in ('sgd', 'adamw')", False),
        ("1 < training.batch_size <= 32 < method.bank_size", True),
    ],
)
def test_holds(text: str, holds: bool) -> None:
    assert expression(text).holds(VALUES) is holds


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("optim.momentum > 0", False),
        ("not optim.momentum > 0", False),
        ("optim.momentum > 0 or optim.name == 'sgd'", True),
        ("optim.name == 'sgd' or optim.momentum > 0", True),
        ("optim.momentum > 0 or optim.name == 'adamw'", False),
        ("not (optim.momentum > 0 and optim.name == 'adamw')", True),
        ("optim.momentum > 0 and optim.name == 'sgd'", False),
        ("optim.name == 'sgd'", True),
    ],
)
def test_holds__an_inactive_setting_is_neither(text: str, holds: bool) -> None:
    assert expression(text).holds(VALUES, {"optim.momentum"}) is holds


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        ("method.bank_size <= 512", 0.0),
        ("method.bank_size <= data.num_train", 212 / 512),
        ("data.num_train >= method.bank_size", 212 / 512),
        ("method.bank_size < 512", 1e-6),  # differs by nothing, but does not hold
        ("-8 > -4", 0.5),
        ("0 > 0", 1e-6),
        ("1 <= data.num_train <= 150 <= 100", 0.5),
        ("optim.name == 'adamw'", 1.0),
        ("method.bank_size == 511", 1.0),
        ("method.bank_size <= 511 and optim.name == 'sgd'", 1.0),
        ("optim.name < 'a'", 1.0),
    ],
)
def test_violation(text: str, violation: float) -> None:
    assert expression(text).violation(VALUES) == pytest.approx(violation, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1 / (training.batch_size - 32)", "cannot be computed: division by zero"),
        (
            "1 + optim.name",
            "cannot be computed: arithmetic takes numbers",
        ),
        ("sqrt(-1)", "cannot be computed: math domain error"),
        ("(-8) ** 0.5", "cannot be computed: it gives (1.7"),
        ("1e300 * 1e300", "cannot be computed: it gives inf"),
        ("2.0 ** 2 ** 11", "cannot be computed: the exponent 2048 is above 100"),
        ("9 ** 99 ** 9", "cannot be computed: the exponent"),
        ("(9 ** 99) ** 99", "cannot be computed: Sorry! I don't want to evaluate"),
        ("'a' * 999999", "cannot be computed: arithmetic takes numbers"),
        ("'%0999999999d' % 1", "cannot be computed: arithmetic takes numbers"),
        ("[[1] * 99999] * 99999 == 1", "cannot be computed: arithmetic takes numbers"),
        ("round(7, -30000000)", "cannot be computed: round to -30000000 digits is beyond 100"),
        ("9 ** 99" + " * 9 ** 99" * 20, "cannot be computed: it gives a number above 1e308"),
        ("round(2 ** 99 " + "* 2 ** 99 " * 12 + ")", "cannot be computed: it gives a number above"),
        ("method.bank_size + 1", "gives 513, neither true nor false"),
    ],
)
def test_holds__cannot_be_computed(text: str, reason: str) -> None:
    with pytest.raises(ExpressionError, match=f"^{re.escape(f'{text!r} {reason}')}"):
        expression(text).holds(VALUES)


def test_evaluate__a_fact_before_the_images_were_read() -> None:
    with pytest.raises(
        UnknownFact, match=r"^data\.num_classes is not known before the images were read$"
    ):
        expression("8 * data.num_classes").evaluate(VALUES)
    assert issubclass(UnknownFact, ConfigError)


def test_reads() -> None:
    found = expression("min(method.bank_size, data.num_train) > 2 * training.batch_size")
    assert found.reads() == {"method.bank_size", "training.batch_size"}
    assert found.facts() == {"data.num_train"}


# What Python can but an expression may not. The exact messages lie in bad_spaces.
@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "optim.__class__",
        "optim.name.__class__",
        "method.bank_size.bit_length()",
        "(1).real",
        "'a'.upper()",
        "[x for x in [1, 2]]",
        "{1: 2}",
        "{1, 2}",
        "f'{optim.name}'",
        "lambda: 1",
        "(y := 1)",
        "optim.name[0]",
        "min(*[1, 2])",
        "max(1, 2, key=abs)",
        "open('x')",
        "eval('1')",
        "random()",
        "min",
        "1 if optim.name is 'sgd' else 2",
        "~training.batch_size",
        "training.batch_size << 2",
        "training.batch_size | 2",
        "b'x' == b'y'",
        "1j",
        "...",
        "x = 1",
        "1; 2",
        "yield 1",
        "",
        "   ",
        "1 +",
        "\0",
        "(" * 300 + ")" * 300,
        "-" * 400 + "1",
        "1" + " + 1" * 300,
    ],
)
def test_expression_problems__refused(text: str) -> None:
    problems = list(expression_problems(text, Place("space.yaml", 3)))
    assert problems
    assert all(str(problem).startswith("space.yaml:3: ") for problem in problems)


@pytest.mark.parametrize("text", ["rand()", "int('3')", "list((1, 2))", "optim.name.upper()"])
def test_evaluate__unchecked_it_is_still_fenced(text: str) -> None:
    with pytest.raises(ExpressionError, match="not defined"):
        Expression(text).evaluate(VALUES)


def test_expression_problems__everything_at_once() -> None:
    text = "method.bank_sise > sqr(2) and optim.name == 'sdg' and optim.name[0] == 's'"
    rules = [problem.rule for problem in expression_problems(text, Place())]
    assert sorted(rules) == [
        "expression-function",
        "expression-not-allowed",
        "expression-setting",
        "expression-word",
    ]
