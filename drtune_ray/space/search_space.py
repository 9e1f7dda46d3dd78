"""The declarative search space: from YAML to Optuna's define-by-run, and from a trial back.

    parameters:
      method.bank_size: {int: [64, 4096], log: true}
      method.calibration.rotation: {choice: [true, false]}
      method.calibration.rotation_interval:
        {int: [1, 50], log: true, when: {method.calibration.rotation: true}}
    constraints:
      - training.batch_size <= method.bank_size

Keys are paths of `TrialConfig`; docs/search-space.md describes all kinds, conditions and rules.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drtune_ray.config.section import unknown_name
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.space.expressions import Expression, ExpressionError
from drtune_ray.space.parameters import Parameter, in_order, resolve
from drtune_ray.space.parsing import CONSTRAINTS, PARAMETERS, read_content
from drtune_ray.space.problems import Problem, refuse
from drtune_ray.space.settings import NUM_CLASSES, NUM_TRAIN
from drtune_ray.space.validation import SpaceCheck, cycle_problem
from drtune_ray.values import flattened, read_yaml

if TYPE_CHECKING:
    import optuna


BANK_SIZE = "method.bank_size"
SUFFIX = ".yaml"


class _Outside(Exception):
    """A configuration lies outside of the space."""


@dataclass(frozen=True)
class SearchSpace:
    """The settings that a study varies.

    Attributes:
        parameters: Parameters, each after those that it depends on, otherwise as declared.
        constraints: Expressions that should be true in a trial.
        base: Configuration that the space was checked on.
        facts: Known facts about the images, see `FACTS`; empty before `clamped`.
    """

    parameters: tuple[Parameter, ...]
    constraints: tuple[Expression, ...] = ()
    base: TrialConfig | None = field(default=None, compare=False, repr=False)
    facts: Mapping[str, int] = field(default_factory=dict, compare=False)

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any], base: TrialConfig) -> SearchSpace:
        """Parse a space and check it on the configuration that it varies.

        Args:
            content: Plain content of YAML; messages name the line if it comes from `read_space`.
            base: The trial of the study.

        Raises:
            ConfigError: If anything is wrong; it names every problem, see docs/search-space.md.
        """
        space, problems = examined(content, base)
        refuse(problems)
        return space

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values from which `from_mapping` makes an equal space."""
        plain: dict[str, Any] = {PARAMETERS: {p.path: p.to_plain() for p in self.parameters}}
        if self.constraints:
            plain[CONSTRAINTS] = [constraint.text for constraint in self.constraints]
        return plain

    def clamped(
        self, num_train: int, num_classes: int | None = None
    ) -> tuple[SearchSpace, list[str]]:
        """Return the space on images that were read, and sentences about what they change.

        Bank sizes are cut to the number of training images; expressions can use the facts.

        Args:
            num_train: Number of training images.
            num_classes: Number of classes.

        Raises:
            ConfigError: If a constraint can no longer hold, or an expression has no valid value.
        """
        facts = {NUM_TRAIN: num_train}
        if num_classes is not None:
            facts[NUM_CLASSES] = num_classes
        parameters, notes = [], []
        for parameter in self.parameters:
            clamped = _clamp(parameter, num_train) if parameter.path == BANK_SIZE else parameter
            if clamped != parameter:
                notes.append(
                    f"{BANK_SIZE} is searched up to {num_train}, the number of training images: a "
                    "larger bank would hold images twice"
                )
            parameters.append(clamped)
        base = self.base and self.base.with_values(
            {BANK_SIZE: min(self.base.method.bank_size, num_train)}
        )
        space = replace(self, parameters=tuple(parameters), base=base, facts=facts)
        problems = space._problems()
        # It may apply with other images, so the space is not refused.
        unused = [problem for problem in problems if problem.rule == "never-applies"]
        refuse(problem for problem in problems if problem not in unused)
        return space, [*notes, *(problem.sentence for problem in unused)]

    def suggest(self, trial: optuna.Trial, base: TrialConfig) -> TrialConfig:
        """Return `base` with a value for every active parameter: from Optuna, or computed.

        Raises:
            ConfigError: If an expression has no valid value at this point.
        """
        resolved = resolve(self.parameters, self._values(base), lambda p: p.suggest(trial))
        return base.with_values(resolved.taken)

    def locate(self, config: TrialConfig, base: TrialConfig) -> dict[str, Any] | None:
        """Return the values in Optuna that turn `base` into `config`; None if it lies outside.

        Keys are the names in the Optuna study, see `Parameter.name`. Constraints do not matter.
        """
        wanted = flattened(config.to_mapping())

        def wanted_value(parameter: Parameter) -> Any:
            value = wanted[parameter.path]
            if not parameter.holds(value):
                raise _Outside
            return value

        try:
            found = resolve(self.parameters, self._values(base), wanted_value)
        except (_Outside, ExpressionError):
            return None
        if any(found.values[path] != value for path, value in wanted.items()):
            return None
        sampled = (p for p in self.parameters if p.is_sampled and p.path in found.taken)
        return {p.name: p.stored(found.taken[p.path]) for p in sampled}

    def active(self, config: TrialConfig) -> tuple[str, ...]:
        """Return the paths of the parameters whose conditions are true in a configuration.

        Any configuration is accepted: a condition that cannot be computed counts as false.
        """
        values, inactive = self._values(config), set[str]()
        for parameter in self.parameters:
            try:
                holds = parameter.when.holds(values, inactive)
            except ExpressionError:
                holds = False
            if not holds:
                inactive.add(parameter.path)
        return tuple(p.path for p in self.parameters if p.path not in inactive)

    def violations(self, config: TrialConfig) -> dict[str, float]:
        """Return how far a configuration is from each constraint, by the constraint's text.

        0.0 if it holds and above 0 if it does not, the form of Optuna's constraints; see
        `Expression.violation`.

        Raises:
            ConfigError: If a constraint cannot be computed, or uses a fact before `clamped`.
        """
        values = self._values(config)
        return {constraint.text: constraint.violation(values) for constraint in self.constraints}

    def _values(self, config: TrialConfig) -> dict[str, Any]:
        return flattened(config.to_mapping()) | dict(self.facts)

    def _problems(self) -> list[Problem]:
        if self.base is None:
            return []
        check = SpaceCheck(self.parameters, self.constraints, self.base, self.facts)
        return list(check.problems())


def examined(content: Mapping[str, Any], base: TrialConfig) -> tuple[SearchSpace, list[Problem]]:
    """Return the part of a space that could be parsed, and everything that is wrong with it."""
    reading = read_content(content)
    parameters, cycles = in_order(reading.parameters)
    problems = [*reading.problems, *map(cycle_problem, cycles)]
    broken = reading.broken | {parameter.path for cycle in cycles for parameter in cycle}
    check = SpaceCheck(parameters, reading.constraints, base, {}, frozenset(broken))
    problems += check.problems()
    return SearchSpace(tuple(parameters), tuple(reading.constraints), base), problems


def read_space(name_or_file: str) -> dict[str, Any]:
    """Return the content of a YAML file or of a shipped space, with its lines.

    Args:
        name_or_file: Path that ends in .yaml or .yml, or the name of a shipped space.

    Raises:
        ConfigError: If there is no such file or space.
    """
    if Path(name_or_file).suffix in (SUFFIX, ".yml"):
        return read_yaml(Path(name_or_file), with_lines=True)
    shipped = shipped_spaces()
    if name_or_file in shipped:
        return read_yaml(shipped[name_or_file], with_lines=True)
    raise ConfigError(f"space {name_or_file!r} is neither a YAML file nor one of {sorted(shipped)}")


def shipped_spaces() -> dict[str, Path]:
    """Return the names and files of the spaces that come with the package."""
    installed = Path(str(importlib.resources.files("drtune_ray") / "search_spaces"))
    checkout = Path(__file__).parents[2] / "search_spaces"
    folder = installed if installed.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def _clamp(parameter: Parameter, highest: int) -> Parameter:
    if parameter.expression is not None:
        if NUM_TRAIN in parameter.expression.facts():  # the space cuts it by itself
            return parameter
        text = f"min({NUM_TRAIN}, {parameter.expression.text})"
        return replace(parameter, expression=replace(parameter.expression, text=text))
    if parameter.values:
        values = tuple(dict.fromkeys(min(value, highest) for value in parameter.values))
        return replace(parameter, values=values)
    low, high = (min(end, highest) for end in parameter.bounds)
    if parameter.step:
        high = low + (high - low) // parameter.step * parameter.step
    return replace(parameter, bounds=(low, high))


def start_points(
    space: SearchSpace, given: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], ...]:
    """Return the values of the points to start with, by their names in the Optuna study.

    Args:
        space: Space on images that were read.
        given: Values of each point, by dotted path or nested; the sampler draws the others.

    Raises:
        ConfigError: If a value is not one of the space; it names every such value.
    """
    sampled = {p.path: p for p in space.parameters if p.is_sampled}
    points, problems = [], []
    for number, values in enumerate(given, 1):
        point = {}
        for path, value in flattened(values).items():
            if path not in sampled:
                problems.append(
                    f"start_with, point {number}: {unknown_name('parameter', path, sampled)} "
                    "(what the space does not search belongs in trial)"
                )
            elif not sampled[path].holds(value):
                parameter = sampled[path]
                problems.append(
                    f"start_with, point {number}: {path}={value!r} is not in the search space: "
                    f"{parameter.to_plain()}"
                )
            else:
                point[sampled[path].name] = sampled[path].stored(value)
        points.append(point)
    if problems:
        raise ConfigError(problems)
    return tuple(points)
