"""The declarative search space: YAML to Optuna's define-by-run, and back from a configuration.

    parameters:
      method.bank_size: {int: [64, 4096], log: true}
      method.calibration.rotation: {choice: [true, false]}
      method.calibration.rotation_interval:
        {int: [1, 50], log: true, when: {method.calibration.rotation: true}}

Keys are paths of `TrialConfig`. ``float`` and ``int`` take [low, high], with ``log`` or ``step``;
``choice`` takes values. A parameter with ``when`` is searched only where all its conditions hold.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from drtune_ray.config import (
    TrialConfig,
    flattened,
    read_yaml,
    unknown_path_problem,
)
from drtune_ray.errors import ConfigError

if TYPE_CHECKING:
    import optuna

BANK_SIZE = "method.bank_size"
KINDS = ("float", "int", "choice")
SUFFIX = ".yaml"


@dataclass(frozen=True)
class Parameter:
    """One searched path of `TrialConfig`.

    Attributes:
        path: Dotted.
        kind: Of the values.
        bounds: Lowest and highest value of ``float`` and ``int``.
        values: Of ``choice``.
        log: Whether steps are taken in the logarithm.
        step: Distance of neighbouring values, from the lowest on.
        when: Values that other paths must have.
    """

    path: str
    kind: Literal["float", "int", "choice"]
    bounds: tuple[float, float] = (0.0, 0.0)
    values: tuple[Any, ...] = ()
    log: bool = False
    step: float | None = None
    when: tuple[tuple[str, Any], ...] = ()

    def is_active(self, config: Mapping[str, Any]) -> bool:
        """Whether the conditions hold in a flat configuration."""
        return all(config.get(path) == value for path, value in self.when)

    def ends(self) -> tuple[Any, ...]:
        """The values that must make a valid trial: both ends, or every choice."""
        if self.kind == "choice":
            return self.values
        return tuple(int(end) if self.kind == "int" else end for end in self.bounds)

    def suggest(self, trial: optuna.Trial) -> Any:
        """Ask Optuna for a value."""
        low, high = self.bounds
        if self.kind == "choice":
            return trial.suggest_categorical(self.path, self.values)
        if self.kind == "int":
            return trial.suggest_int(
                self.path, int(low), int(high), log=self.log, step=int(self.step or 1)
            )
        return trial.suggest_float(self.path, low, high, log=self.log, step=self.step)

    def holds(self, value: Any) -> bool:
        """Whether a value lies in the range."""
        if self.kind == "choice":
            return value in self.values
        if isinstance(value, str | bool) or not self.bounds[0] <= value <= self.bounds[1]:
            return False
        distance = (value - self.bounds[0]) / (self.step or 1)
        is_on_step = abs(distance - round(distance)) < 1e-9
        return is_on_step if self.step or self.kind == "int" else True


@dataclass(frozen=True)
class SearchSpace:
    """Parameters in the order of their declaration; conditions look back only."""

    parameters: tuple[Parameter, ...]

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any], base: TrialConfig) -> SearchSpace:
        """Read a space and check it against the configuration that it varies.

        Raises:
            ConfigError: Naming every problem: an unknown key, an empty range, a logarithm of a
                bound that is not positive, a value that makes no valid trial.
        """
        problems = [
            f"unknown key {key!r} in the search space: it has the one key 'parameters'"
            for key in content
            if key != "parameters"
        ]
        declared = content.get("parameters")
        if not isinstance(declared, Mapping) or not declared:
            raise ConfigError(
                [*problems, "the search space needs 'parameters': a mapping of paths to ranges"]
            )
        parameters: list[Parameter] = []
        for path, body in declared.items():
            try:
                parameter = _read_parameter(str(path), body)
                _check_parameter(parameter, base)
                parameters.append(parameter)
            except ConfigError as error:
                problems.extend(error.problems)
        if problems:
            raise ConfigError(problems)
        return cls(tuple(parameters))

    def clamped(self, num_train: int) -> tuple[SearchSpace, list[str]]:
        """Cut bank sizes to the number of training images, with sentences that say so."""
        parameters, notes = [], []
        for parameter in self.parameters:
            clamped = _clamp(parameter, num_train) if parameter.path == BANK_SIZE else parameter
            if clamped != parameter:
                notes.append(
                    f"{BANK_SIZE} is searched up to {num_train}, the number of training images: a "
                    "larger bank would hold images twice"
                )
            parameters.append(clamped)
        return SearchSpace(tuple(parameters)), notes

    def suggest(self, trial: optuna.Trial, base: TrialConfig) -> TrialConfig:
        """`base` with a value from Optuna for every active parameter."""
        config = flattened(base.to_mapping())
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.is_active(config):
                values[parameter.path] = config[parameter.path] = parameter.suggest(trial)
        return base.with_values(values)

    def locate(self, config: TrialConfig, base: TrialConfig) -> dict[str, Any] | None:
        """The parameter values with which `base` becomes `config`; None if it lies outside."""
        wanted, found = flattened(config.to_mapping()), flattened(base.to_mapping())
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if not parameter.is_active(wanted):
                continue
            if not parameter.holds(wanted[parameter.path]):
                return None
            values[parameter.path] = found[parameter.path] = wanted[parameter.path]
        return values if found == wanted else None


def read_space(name_or_file: str) -> dict[str, Any]:
    """The content of a space: a shipped one by name, or a YAML file.

    Raises:
        ConfigError: If there is neither.
    """
    if Path(name_or_file).suffix in (SUFFIX, ".yml"):
        return read_yaml(Path(name_or_file))
    shipped = shipped_spaces()
    if name_or_file in shipped:
        return read_yaml(shipped[name_or_file])
    raise ConfigError(f"space {name_or_file!r} is neither a YAML file nor one of {sorted(shipped)}")


def shipped_spaces() -> dict[str, Path]:
    """Names and files of the spaces that come with the package."""
    installed = Path(str(importlib.resources.files("drtune_ray") / "search_spaces"))
    checkout = Path(__file__).parents[2] / "search_spaces"
    folder = installed if installed.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def _read_parameter(path: str, body: Any) -> Parameter:
    if problem := unknown_path_problem(TrialConfig, path):
        raise ConfigError(f"search space: {problem}")
    kinds = [kind for kind in KINDS if isinstance(body, Mapping) and kind in body]
    if len(kinds) != 1:
        raise ConfigError(
            f"search space: {path} needs exactly one of {list(KINDS)}, but got {body!r}; "
            f"write for example {path}: {{float: [0.1, 1.0]}}"
        )
    extra = set(body) - {kinds[0], "log", "step", "when"}
    if extra:
        raise ConfigError(
            f"search space: unknown key {sorted(extra)[0]!r} in {path}; valid are "
            f"{[kinds[0], 'log', 'step', 'when']}"
        )
    given = body[kinds[0]]
    when = tuple((body.get("when") or {}).items())
    if kinds[0] == "choice":
        if not isinstance(given, list) or not given:
            raise ConfigError(f"search space: {path} needs a list of values, but got {given!r}")
        return Parameter(path, "choice", values=tuple(given), when=when)
    is_pair = isinstance(given, list) and len(given) == 2
    if not is_pair or not all(isinstance(end, int | float) for end in given):
        raise ConfigError(f"search space: {path} needs [low, high], but got {given!r}")
    kind: Literal["float", "int"] = "int" if kinds[0] == "int" else "float"
    bounds = (float(given[0]), float(given[1]))
    return Parameter(path, kind, bounds, (), bool(body.get("log")), body.get("step"), when)


def _check_parameter(parameter: Parameter, base: TrialConfig) -> None:
    problems = []
    if parameter.path not in flattened(base.to_mapping()):
        problems.append(f"{parameter.path} is a group of settings: search a setting below it")
    low, high = parameter.bounds
    if low > high:
        problems.append(
            f"{parameter.path} has an empty range: low <= high must hold in [{low}, {high}]"
        )
    if parameter.log and low <= 0:
        problems.append(f"{parameter.path} is logarithmic: low > 0 must hold, but got low={low}")
    if parameter.log and parameter.step:
        problems.append(f"{parameter.path} has both log and step: choose one")
    if parameter.kind == "int" and any(end != int(end) for end in parameter.bounds):
        problems.append(
            f"{parameter.path} is an int: both bounds must be whole, got [{low}, {high}]"
        )
    problems += [
        problem
        for path, _ in parameter.when
        if (problem := unknown_path_problem(TrialConfig, path))
    ]
    if not problems:
        for value in parameter.ends():
            try:
                base.with_values({parameter.path: value})
            except ConfigError as error:
                problems.extend(error.problems)
    if problems:
        raise ConfigError(f"search space: {problem}" for problem in problems)


def _clamp(parameter: Parameter, highest: int) -> Parameter:
    if parameter.kind == "choice":
        values = tuple(dict.fromkeys(min(value, highest) for value in parameter.values))
        return replace(parameter, values=values)
    low, high = parameter.bounds
    return replace(parameter, bounds=(min(low, highest), min(high, highest)))
