"""The plan of a comparison: methods, their spaces, and a study for each with the same budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drtune_ray.config.study import BudgetConfig, StudyConfig, study_name
from drtune_ray.errors import ConfigError
from drtune_ray.results.comparison.significance import seeds_to_decide
from drtune_ray.space.search_space import read_space, shipped_spaces
from drtune_ray.values import full_path

CE_TUNING, SUFFIX = "ce_tuning", "compare"
# Early stopping leaves room for more trials within the epochs of all methods.
TRIALS_BEYOND = 10


@dataclass(frozen=True)
class Comparison:
    """A comparison of methods.

    Attributes:
        config: The study that all methods share.
        methods: `method.name` by the method's name in the comparison.
        studies: Study of each method.
    """

    config: StudyConfig
    methods: dict[str, str]
    studies: dict[str, StudyConfig]

    @property
    def folder(self) -> Path:
        """Folder of the comparison; those of its studies lie beside it."""
        return full_path(self.config.storage) / f"{self.config.name}-{SUFFIX}"

    @property
    def baseline(self) -> str:
        """Name of CE-tuning in the comparison."""
        return next(name for name, method in self.methods.items() if method == CE_TUNING)


def planned(
    config: StudyConfig,
    methods: str,
    spaces: Iterable[str] = (),
    *,
    has_seeds: bool = True,
) -> Comparison:
    """Plan a comparison.

    Args:
        config: The study that all methods share; its space is that of its own `method.name`.
        methods: Comma-separated methods, each with a name of its own as in ``NAME=METHOD`` or not.
        spaces: Search spaces of methods, as ``NAME=SPACE``; by default the shipped space of the
            method's name.
        has_seeds: Whether the number of seeds was given; else as few are taken as can decide.

    Raises:
        ConfigError: Naming every problem.
    """
    named = _methods(methods)
    given = _given_spaces(spaces, named)
    problems = [*_unfit(config)]
    if not has_seeds:
        seeds = {"num_seeds": seeds_to_decide(len(named) - 1)}
        config = config.model_copy(update={"finalists": config.finalists.model_copy(update=seeds)})
    studies: dict[str, StudyConfig] = {}
    for name, method in named.items():
        try:
            studies[name] = _study(config, name, method, given.get(name))
        except ConfigError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return Comparison(config, named, studies)


def _methods(text: str) -> dict[str, str]:
    """Return the methods by their names."""
    named: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, method = part.partition("=")
        if name in named:
            raise ConfigError(
                f"--methods has {name!r} twice: name one of them, as in other={method or name}"
            )
        named[name] = method or name
    if len(named) < 2:
        raise ConfigError(f"--methods needs at least two methods, but got {text!r}")
    if CE_TUNING not in named.values():
        raise ConfigError(
            f"--methods={text} lacks {CE_TUNING}, to which the others are compared: add it"
        )
    return named


def _given_spaces(spaces: Iterable[str], named: Mapping[str, str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for text in spaces:
        name, separator, space = text.partition("=")
        if not separator or name not in named:
            raise ConfigError(
                f"--method-space={text!r} is not NAME=SPACE with one of the names {list(named)}"
            )
        given[name] = space
    return given


def _unfit(config: StudyConfig) -> Iterable[str]:
    """Yield what of a study would treat methods differently, or has no meaning for them."""
    if config.start_with:
        yield "start_with: points of one space do not fit the methods' spaces: leave it out"
    if config.warm_start:
        yield "warm_start: every method begins its search without earlier trials: leave it out"
    if config.final_fit.images != "none":
        yield "final_fit: a comparison ships no model: leave it out"
    if not config.finalists.num_seeds:
        yield "finalists.num_seeds=0: the methods are compared on fresh seeds: give at least 1"


def _study(config: StudyConfig, name: str, method: str, space: str | None) -> StudyConfig:
    """Return the study of a method."""
    full_name = f"{config.name}-{name}"
    try:
        study_name(full_name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if name == SUFFIX:
        raise ConfigError(f"{name!r} is the comparison's own folder: give the method another name")
    values = config.to_mapping() | {
        "name": full_name,
        "space": space or _own_space(config, method),
        "reference_trials": [],
    }
    values["trial"]["method"]["name"] = method
    return _content_checked(_same_epochs(StudyConfig.from_mapping(values)), method)


def _own_space(config: StudyConfig, method: str) -> Any:
    """Return the space of a method: the study's for its own method, else the shipped one."""
    if method == config.trial.method.name:
        return config.space
    if method in shipped_spaces():
        return method
    raise ConfigError(
        f"there is no search_spaces/{method}.yaml: give --method-space NAME=FILE with a space for "
        f"{method}"
    )


def _content_checked(study: StudyConfig, method: str) -> StudyConfig:
    """Return a study with its space written out, which must leave the method as it is.

    Raises:
        ConfigError: If it varies the method or the pretrained encoder.
    """
    content = read_space(study.space) if isinstance(study.space, str) else study.space
    parameters = content.get("parameters") or {}
    problems = []
    if parameters.get("method.name", {"constant": method}) != {"constant": method}:
        problems.append(f"the space varies method.name: leave it out, since {method} is compared")
    problems += [
        f"the space varies {path}: all methods start from the same weights, leave it out"
        for path in ("backbone.name", "backbone.weights")
        if path in parameters
    ]
    if problems:
        raise ConfigError(problems)
    return study.model_copy(update={"space": content})


def _same_epochs(study: StudyConfig) -> StudyConfig:
    """Return a study that trains as many epochs as its trials would without early stopping."""
    if study.budget.max_epochs is not None or study.scheduler.name == "none":
        return study
    most = study.trials * study.trial.training.last_epoch
    budget = BudgetConfig(**study.budget.model_dump() | {"max_epochs": most})
    return study.model_copy(update={"budget": budget, "trials": TRIALS_BEYOND * study.trials})
