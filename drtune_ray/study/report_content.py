"""What the report of a study says, gathered from its folder without changing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import drtune_ray
from drtune_ray.config.metric import METRICS
from drtune_ray.config.study import StudyConfig
from drtune_ray.data.kinds.recognize import open_images
from drtune_ray.errors import DrtuneError
from drtune_ray.folders import open_folder
from drtune_ray.results.evaluate import openings_of
from drtune_ray.results.evaluation_record import WEIGHTS_NAME, read_result
from drtune_ray.results.pareto import pareto_front
from drtune_ray.results.report.content import Content
from drtune_ray.results.report.history import COMPLETED, ends, kind_of, read_history
from drtune_ray.results.report.predictions import Predictions, read_predictions, validation_rows
from drtune_ray.results.report.settings import importances, read_axes, setting_values
from drtune_ray.results.report.verdict import Candidate, choose_rival, verdict
from drtune_ray.results.trials import TrialSummary, best_first, summaries
from drtune_ray.results.winner import ABOUT_NAME
from drtune_ray.search.finalists import Finalist, best_finalist, finalists
from drtune_ray.search.objectives import direction
from drtune_ray.storage.record import (
    SPLITS_NAME,
    SPOOL_NAME,
    WINNER_NAME,
    Record,
)
from drtune_ray.storage.stored_trials import stored_trials
from drtune_ray.study.status import DONE, FAILED
from drtune_ray.tracking.events import (
    Event,
    MetricsRecorded,
    RunFinished,
    RunStarted,
    now_ms,
)
from drtune_ray.tracking.spool import EVENTS_NAME, Spool


def gather(record: Record, *, state: str, with_images: bool = True) -> Content:
    """Gather what the report says; reads only.

    Args:
        record: The study.
        state: State of the study, as `Status.state`.
        with_images: Whether to include pictures of misclassified images.
    """
    config, notes = StudyConfig.from_mapping(record.config), list[str]()
    metric = METRICS[config.trial.training.metric]
    frozen = stored_trials(record, notes)
    trials = summaries(frozen)
    is_finished = state in (DONE, FAILED)
    chosen = finalists(trials, config.finalists)
    best = best_finalist(chosen)
    leader = best.source if best else _leader(trials, is_finished)
    rows = validation_rows(record.folder / SPLITS_NAME)
    axes = read_axes(frozen, trials)
    directions = {str(name): direction(name) for name in config.objectives}
    predictions, why = _predictions(record, config, is_finished, with_images)
    return Content(
        name=record.folder.name,
        metric=metric,
        state=state,
        written_ms=now_ms(),
        num_trials=config.trials,
        num_epochs=config.trial.training.last_epoch,
        num_images=len(rows),
        verdict=verdict(
            _candidate(leader, chosen),
            _candidate(_rival(leader, trials, chosen), chosen),
            len(rows),
            sum(kind_of(t) == COMPLETED for t in trials if not t.is_final),
            is_finished=is_finished,
            outcomes=[f"{number} {outcome}" for _, outcome, number in ends(trials)],
        ),
        leader=leader,
        settings=_settings(leader, [axis.path for axis in axes]),
        trials=trials,
        finalists=tuple(Candidate(f.source, f.values) for f in chosen if f.runs),
        history=read_history(frozen, trials, _events(record)),
        axes=axes,
        importances=importances(frozen, axes, metric),
        objectives=directions,
        front=pareto_front(frozen, list(directions.values())),
        predictions=predictions,
        why_no_predictions=why,
        evaluation=read_result(record.folder, record.folder / WINNER_NAME / WEIGHTS_NAME),
        openings=tuple(_openings(record, notes)),
        facts=_facts(record, config),
        notes=tuple(notes),
    )


def _leader(trials: Sequence[TrialSummary], is_finished: bool) -> TrialSummary | None:
    """Return the best completed trial of the search; before the end one that still may count."""
    ranked = best_first(trial for trial in trials if not trial.is_final)
    if ranked or is_finished:
        return next(iter(ranked), None)
    able = [t for t in trials if t.state == "RUNNING" and t.best_value is not None]
    return max(able, key=lambda t: (t.score, -t.number), default=None)


def _rival(
    leader: TrialSummary | None, trials: Sequence[TrialSummary], chosen: Sequence[Finalist]
) -> TrialSummary | None:
    """Return what the leader is compared with: a finalist where finalists decided."""
    if leader is None:
        return None
    complete = sorted((f for f in chosen if f.is_complete), key=lambda f: -f.score)
    if any(f.source.number == leader.number for f in complete):
        others = [finalist.source for finalist in complete]
    else:
        others = best_first(trial for trial in trials if not trial.is_final)
    return choose_rival(leader, others)


def _candidate(trial: TrialSummary | None, chosen: Sequence[Finalist]) -> Candidate | None:
    if trial is None:
        return None
    found = (f.values for f in chosen if f.source.number == trial.number and f.is_complete)
    return Candidate(trial, next(found, ()))


def _settings(leader: TrialSummary | None, paths: Sequence[str]) -> dict[str, Any]:
    if leader is None:
        return {}
    used = setting_values(leader)
    return {path: used[path] for path in paths if path in used}


def _events(record: Record) -> Sequence[Event]:
    folder = record.folder / SPOOL_NAME
    if not (folder / EVENTS_NAME).is_file():  # a spool makes its folder
        return []
    kinds = (RunStarted.kind, MetricsRecorded.kind, RunFinished.kind)
    return list(Spool(folder).events.events(*kinds))


def _openings(record: Record, notes: list[str]) -> list[dict[str, Any]]:
    artifacts = open_folder(record.artifacts) if record.artifacts else None
    try:
        return openings_of(record.folder, record.folder.parent, artifacts)
    except DrtuneError as error:
        notes.append(f"The openings of the test split cannot be read: {error}")
        return []


def _predictions(
    record: Record, config: StudyConfig, is_finished: bool, with_images: bool
) -> tuple[Predictions | None, str]:
    """Return the winner's predictions, or why there are none."""
    winner = record.folder / WINNER_NAME
    if not (winner / ABOUT_NAME).exists():
        return None, "There is no model yet." if not is_finished else "The study has no model."
    try:
        found = read_predictions(
            winner,
            record.folder / SPLITS_NAME,
            open_images(config.trial.data),
            with_pictures=with_images,
        )
    except DrtuneError as error:
        return None, f"The winner cannot be applied to the validation images here: {error}"
    if found is None:
        return None, "The model was trained on the validation images too: only the test split can "
        "measure it."
    return found, ""


def _facts(record: Record, config: StudyConfig) -> dict[str, str]:
    return {
        "backbone": config.trial.backbone.name,
        "sampler": config.sampler.name,
        "early stopping": config.scheduler.name,
        "seed": str(config.seed),
        "drtune-ray": drtune_ray.__version__,
        "study id": record.study_id,
    }
