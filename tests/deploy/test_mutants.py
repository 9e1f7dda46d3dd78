"""A wrong field in any manifest makes a check fail: each leaf is dropped, renamed and retyped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.deploy.checks import rule_problems
from tests.deploy.manifests import KUSTOMIZED, RENDERS, Object, applied, kustomized, rendered
from tests.deploy.mutants import Mutant, leaves, mutants_of, mutated
from tests.deploy.schemas import problems_of

SURVIVORS = Path(__file__).parent / "survivors.yaml"
# What a rule raises where it looks for something that is not there: its test fails as well.
BREAKS = (AssertionError, AttributeError, LookupError, StopIteration, TypeError, ValueError)

Around = tuple[Object, ...]


def manifests() -> Iterator[tuple[str, Around, Object]]:
    """The overlay, everything that is there, and an object of it."""
    for folder in KUSTOMIZED:
        for one in kustomized(folder):
            yield folder.split("/")[-1], kustomized(folder), one
    for render in RENDERS:
        for one in rendered(render):
            yield render.overlay, applied(render), one


def mutants() -> Iterator[tuple[str, Around, Object, Mutant]]:
    """A leaf that several manifests share is changed in the first of them."""
    seen = set()
    for overlay, around, one in manifests():
        values = dict(leaves(one))
        name = "" if one["kind"] == "RayJob" else one["metadata"]["name"]
        for mutant in mutants_of(one):
            identity = (mutant, name, repr(values[mutant.path]))
            if identity not in seen:
                seen.add(identity)
                yield overlay, around, one, mutant


def is_noticed(overlay: str, around: Around, one: Object, mutant: Mutant) -> bool:
    changed = mutated(one, mutant)
    if next(problems_of(changed), None):
        return True
    objects = tuple(changed if other is one else other for other in around)
    try:
        return next(rule_problems(objects, overlay), None) is not None
    except BREAKS:
        return True


def test_mutants__each_is_noticed_or_survives_for_a_reason() -> None:
    listed = yaml.safe_load(SURVIVORS.read_text())
    assert all(isinstance(reason, str) and reason for reason in listed.values())
    num_mutants, survivors = 0, set()
    for overlay, around, one, mutant in mutants():
        num_mutants += 1
        if not is_noticed(overlay, around, one, mutant):
            survivors.add(str(mutant))
    assert num_mutants > 3000
    assert sorted(survivors - set(listed)) == [], "no check notices these"
    assert sorted(set(listed) - survivors) == [], "these are noticed now: take them off the list"
