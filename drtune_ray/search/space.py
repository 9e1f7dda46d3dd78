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
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from drtune_ray.config import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.section import unknown_path_problem
from drtune_ray.values import flattened, read_yaml

if TYPE_CHECKING:
    import optuna

BANK_SIZE = "method.bank_size"
KINDS = ("float", "int", "choice")
# Images, splits, views, features and weights are prepared once for all trials of a study.
SHARED_GROUPS = ("data", "backbone", "seed")
SHARED_PATHS = ("training.epochs", "training.workers")
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
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not self.bounds[0] <= value <= self.bounds[1]:
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
        paths = [str(path) for path in declared]
        for number, (path, body) in enumerate(zip(paths, declared.values(), strict=True)):
            try:
                parameter = _read_parameter(path, body)
                _check_parameter(parameter, base, paths[number:])
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

    def optuna_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return dict(values)

    def violations(self, config: TrialConfig, facts: Mapping[str, float]) -> dict[str, float]:
        return {}

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
    """A parameter of the right form; whether it makes sense is checked afterwards."""
    if problem := unknown_path_problem(TrialConfig, path):
        raise ConfigError(f"search space: {problem}")
    kinds = [kind for kind in KINDS if isinstance(body, Mapping) and kind in body]
    if len(kinds) != 1:
        raise ConfigError(
            f"search space: {path} needs exactly one of {list(KINDS)}, but got {body!r}; "
            f"write for example {path}: {{float: [0.1, 1.0]}}"
        )
    kind = kinds[0]
    extra = set(body) - {kind, "log", "step", "when"}
    if extra:
        raise ConfigError(
            f"search space: unknown key {sorted(extra)[0]!r} in {path}; valid are "
            f"{[kind, 'log', 'step', 'when']}"
        )
    given, log, when = body[kind], body.get("log", False), body.get("when") or {}
    if not isinstance(log, bool):
        raise ConfigError(f"search space: {path} needs log: true or false, but got {log!r}")
    if not isinstance(when, Mapping):
        raise ConfigError(
            f"search space: {path} needs when: {{PATH: VALUE}}, but got when={when!r}"
        )
    conditions = tuple((str(key), value) for key, value in when.items())
    if kind == "choice":
        if not isinstance(given, list) or not given:
            raise ConfigError(f"search space: {path} needs a list of values, but got {given!r}")
        return Parameter(path, "choice", values=tuple(given), when=conditions)
    if not isinstance(given, list) or len(given) != 2:
        raise ConfigError(f"search space: {path} needs [low, high], but got {given!r}")
    bounds = tuple(_number(path, "[low, high]", end, given) for end in given)
    step = (
        None
        if body.get("step") is None
        else _number(path, "a number as step", body["step"], body["step"])
    )
    named: Literal["float", "int"] = "int" if kind == "int" else "float"
    return Parameter(path, named, (bounds[0], bounds[1]), (), log, step, conditions)


def _number(path: str, what: str, value: Any, shown: Any) -> float:
    """A finite number; YAML reads 1e-4 as text, which is taken for the number it is."""
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number):
        raise ConfigError(f"search space: {path} needs {what}, but got {shown!r}")
    return number


def _check_parameter(parameter: Parameter, base: TrialConfig, not_before: list[str]) -> None:
    """Refuse what makes no sense; `not_before` are this path and those declared later."""
    problems = _range_problems(parameter)
    path = parameter.path
    if path not in flattened(base.to_mapping()):
        problems.append(f"{path} is a group of settings: search a setting below it")
    elif path.split(".")[0] in SHARED_GROUPS or path in SHARED_PATHS:
        problems.append(
            f"{path} is shared by all trials of a study, which prepares it once: set it in the "
            "trial and run one study for each value"
        )
    for condition, value in parameter.when:
        problems += _condition_problems(path, condition, value, base, not_before)
    if not problems:
        for value in parameter.ends():
            try:
                base.with_values({path: value})
            except ConfigError as error:
                problems.extend(error.problems)
    if problems:
        raise ConfigError(f"search space: {problem}" for problem in problems)


def _range_problems(parameter: Parameter) -> list[str]:
    path, (low, high), step = parameter.path, parameter.bounds, parameter.step
    problems = []
    if low > high:
        problems.append(f"{path} has an empty range: low <= high must hold in [{low}, {high}]")
    if parameter.log and low <= 0:
        problems.append(f"{path} is logarithmic: low > 0 must hold, but got low={low}")
    if parameter.log and step is not None:
        problems.append(f"{path} has both log and step: choose one")
    if parameter.kind == "int" and any(end != int(end) for end in parameter.bounds):
        problems.append(f"{path} is an int: both bounds must be whole, got [{low}, {high}]")
    if step is not None and (step <= 0 or (parameter.kind == "int" and step != int(step))):
        problems.append(f"{path} needs a step above 0, whole for an int, but got step={step:g}")
    elif step is not None and not problems and not parameter.holds(high):
        problems.append(
            f"{path} does not end on a step: {high:g} is not {low:g} plus a multiple of {step:g}"
        )
    return problems


def _condition_problems(
    path: str, condition: str, value: Any, base: TrialConfig, not_before: list[str]
) -> list[str]:
    if problem := unknown_path_problem(TrialConfig, condition):
        return [problem]
    if condition in not_before:
        return [f"{path} depends on {condition}, which must be declared before it"]
    try:
        taken = flattened(base.with_values({condition: value}).to_mapping()).get(condition)
    except ConfigError as error:
        return list(error.problems)
    if taken != value or isinstance(taken, bool) != isinstance(value, bool):
        return [f"{path} never applies: {condition} is never {value!r}; write {taken!r}"]
    return []


def _clamp(parameter: Parameter, highest: int) -> Parameter:
    if parameter.kind == "choice":
        values = tuple(dict.fromkeys(min(value, highest) for value in parameter.values))
        return replace(parameter, values=values)
    low, high = (min(end, highest) for end in parameter.bounds)
    if parameter.step:
        high = low + (high - low) // parameter.step * parameter.step
    return replace(parameter, bounds=(low, high))
