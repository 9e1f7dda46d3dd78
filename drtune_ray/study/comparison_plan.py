"""The plan of a comparison: methods, their spaces, and a study for each with the same budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from drtune_ray.config.study import BudgetConfig, StudyConfig, study_name
from drtune_ray.errors import ConfigError
from drtune_ray.results.comparison.significance import seeds_to_decide
from drtune_ray.results.words import of_share
from drtune_ray.space.search_space import read_space, shipped_spaces
from drtune_ray.values import full_path

CE_TUNING, SUFFIX = "ce_tuning", "compare"
# Early stopping leaves room for more trials within the epochs of all methods.
TRIALS_BEYOND = 10
# The parts of DR-Tune, by their names in a comparison. All but CE-tuning search the settings of
# search_spaces/dr.yaml. [paper: Tables 6 and 7]
ABLATION = "ablation"
_PARTS = {
    "dr_rotation": {"rotation": True, "translation": False},
    "dr_translation": {"rotation": False, "translation": True, "confidence_weighting": False},
    "dr_weighted_translation": {
        "rotation": False,
        "translation": True,
        "confidence_weighting": True,
    },
    "dr_tune": {"rotation": True, "translation": True, "confidence_weighting": True},
}


@dataclass(frozen=True)
class Entry:
    """A method in a comparison.

    Attributes:
        method: `method.name`.
        calibration: Settings of `method.calibration` that differ from the study's.
        space: Search space; None for the shipped one of the method's name.
    """

    method: str
    calibration: Mapping[str, bool] = field(default_factory=dict)
    space: Any = None


@dataclass(frozen=True)
class Comparison:
    """A comparison of methods.

    Attributes:
        config: The study that all methods share.
        methods: `method.name` by the method's name in the comparison.
        studies: Study of each method.
        baselines: Name of CE-tuning with the same training images for each other method.
    """

    config: StudyConfig
    methods: dict[str, str]
    studies: dict[str, StudyConfig]
    baselines: dict[str, str]

    @property
    def folder(self) -> Path:
        """Folder of the comparison; those of its studies lie beside it."""
        return full_path(self.config.storage) / f"{self.config.name}-{SUFFIX}"

    @property
    def parts(self) -> tuple[Comparison, ...]:
        """The comparison of each fold: this one alone."""
        return (self,)

    def to_mapping(self) -> dict[str, object]:
        """Return methods and settings as plain values."""
        return {"methods": self.methods, "study": self.config.to_mapping()}


def planned(
    config: StudyConfig,
    methods: str,
    spaces: Iterable[str] = (),
    *,
    shares: str | None = None,
    has_seeds: bool = True,
) -> Comparison:
    """Plan a comparison.

    Args:
        config: The study that all methods share; its space is that of its own `method.name`.
        methods: Comma-separated methods, each with a name of its own as in ``NAME=METHOD`` or not;
            ``ablation`` stands for CE-tuning and the parts of DR-Tune.
        spaces: Search spaces of methods, as ``NAME=SPACE``; by default the shipped space of the
            method's name.
        shares: Comma-separated shares of the training images, each for all methods.
        has_seeds: Whether the number of seeds was given; else as few are taken as can decide.

    Raises:
        ConfigError: Naming every problem.
    """
    entries = _entries(methods)
    _give_spaces(entries, spaces)
    problems = [*_unfit(config)]
    if shares is not None and config.trial.data.train_share < 1:
        problems.append("data.train_share: --shares sets the shares of a comparison: leave it out")
    by_share = _by_share(entries, _shares(shares))
    baseline = next(name for name, entry in entries.items() if entry.method == CE_TUNING)
    baselines = {
        name: baseline if share is None else of_share(baseline, share)
        for name, (entry_name, share) in by_share.items()
        if entry_name != baseline
    }
    if not has_seeds:
        seeds = {"num_seeds": seeds_to_decide(len(baselines))}
        config = config.model_copy(update={"finalists": config.finalists.model_copy(update=seeds)})
    studies: dict[str, StudyConfig] = {}
    for name, (entry_name, share) in by_share.items():
        try:
            studies[name] = _study(config, name, entries[entry_name], share)
        except ConfigError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    of_methods = {name: entries[entry].method for name, (entry, _) in by_share.items()}
    return Comparison(config, of_methods, studies, baselines)


def _entries(text: str) -> dict[str, Entry]:
    """Return the methods by their names."""
    entries: dict[str, Entry] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        for name, entry in _named(part).items():
            if name in entries:
                raise ConfigError(
                    f"--methods has {name!r} twice: name one of them, as in other={entry.method}"
                )
            entries[name] = entry
    if len(entries) < 2:
        raise ConfigError(f"--methods needs at least two methods, but got {text!r}")
    if CE_TUNING not in [entry.method for entry in entries.values()]:
        raise ConfigError(
            f"--methods={text} lacks {CE_TUNING}, to which the others are compared: add it"
        )
    return entries


def _named(part: str) -> dict[str, Entry]:
    """Return the methods that a part of the list stands for, by their names."""
    name, _, method = part.partition("=")
    if part != ABLATION:
        return {name: Entry(method or name)}
    shipped = read_space("dr")["parameters"]
    space = {"parameters": {path: shipped[path] for path in shipped if path != "method.name"}}
    parts = {name: Entry("dr_tune", values, space) for name, values in _PARTS.items()}
    return {CE_TUNING: Entry(CE_TUNING), "dr": Entry("dr")} | parts


def _shares(text: str | None) -> list[float] | None:
    """Return the shares of the training images, largest first."""
    if text is None:
        return None
    shares = set()
    for part in text.split(","):
        try:
            shares.add(float(part))
        except ValueError:
            raise ConfigError(f"--shares={text}: {part!r} is not a number") from None
    if wrong := sorted(share for share in shares if not 0 < share <= 1):
        raise ConfigError(f"--shares={text}: {wrong[0]:g} is not a share above 0 and up to 1")
    return sorted(shares, reverse=True)


def _by_share(
    entries: Mapping[str, Entry], shares: Sequence[float] | None
) -> dict[str, tuple[str, float | None]]:
    """Return the entry and the share of each study, by its name in the comparison."""
    if shares is None:
        return {name: (name, None) for name in entries}
    return {of_share(name, share): (name, share) for share in shares for name in entries}


def _give_spaces(entries: dict[str, Entry], spaces: Iterable[str]) -> None:
    """Set the search spaces that were given."""
    for text in spaces:
        name, separator, space = text.partition("=")
        if not separator or name not in entries:
            raise ConfigError(
                f"--method-space={text!r} is not NAME=SPACE with one of the names {list(entries)}"
            )
        entries[name] = replace(entries[name], space=space)


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


def _study(config: StudyConfig, name: str, entry: Entry, share: float | None) -> StudyConfig:
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
        "space": entry.space or _own_space(config, entry.method),
        "reference_trials": [],
    }
    values["trial"]["method"]["name"] = entry.method
    values["trial"]["method"]["calibration"] |= entry.calibration
    if share is not None:
        values["trial"]["data"]["train_share"] = share
    return _content_checked(_same_epochs(StudyConfig.from_mapping(values)), entry.method)


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
