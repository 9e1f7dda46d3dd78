"""Plan and result of a study or training, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drtune_ray.display.tables import tables_lines
from drtune_ray.display.text import Command, counted, duration, figure, percent, short

if TYPE_CHECKING:
    from drtune_ray.results.evaluation_record import Evaluation
    from drtune_ray.results.trials import TrialSummary
    from drtune_ray.study.result import StudyPlan, StudyResult
    from drtune_ray.study.training_run import TrainingResult


FINALISTS = "finalists"
NAME_WIDTH = 32


def plan_lines(plan: StudyPlan) -> Iterator[str]:
    """Yield lines that describe the plan."""
    config = plan.config
    trial = config.trial
    if plan.part == FINALISTS:
        yield (
            f"Finalists: {counted(plan.num_trials, 'training')} on "
            f"{counted(config.finalists.num_seeds, 'new seed')} to the last epoch, "
            f"{plan.trials_at_a_time} at a time"
        )
    else:
        yield f"Study {config.name!r}: {config.folder}"
        for note in plan.notes:
            yield f"  {note}"
        given = counted(len(config.reference_trials), "reference trial")
        if config.start_with:
            given = f"{counted(len(config.start_with), 'start point')} and {given}"
        yield (
            f"  {counted(config.trials, 'trial')} ({given} first), {plan.trials_at_a_time} at a "
            f"time, {counted(config.resources.cpus_per_worker, 'CPU')} a worker; up to "
            f"{trial.training.last_epoch} epochs, {config.scheduler.name} early stopping, "
            f"{config.sampler.name} sampler, seed {config.seed}"
        )
    if plan.num_done:
        yield f"  {counted(plan.num_done, 'trial')} already finished: resuming"


def result_lines(result: StudyResult, program: str) -> Iterator[str]:
    """Yield the winner, the reference trials, and the next commands.

    Args:
        result: The result.
        program: Command line name of this program.
    """
    if result.was_done:
        yield "This study is already done; nothing was left to run."
    if result.end is not None:
        yield f"The search ended: {result.end}."
    winner = result.winner
    yield f"\nBest of {len(result.searched_trials)} trials: trial {winner.label}"
    for path, value in result.settings.items():
        yield f"  {path} = {short(value)}"
    yield ""
    yield from _finalists(result) if result.finalists else _maximum(result)
    for trial in result.references:
        outcome = "" if trial.state == "COMPLETE" else f"  {trial.outcome}"
        yield _figure(f"reference trial {trial.label}", trial, trial.best_value) + outcome
    yield from _pareto_front(result)
    yield ""
    if result.final_fit is not None:
        yield from _final_fit(result.final_fit)
    yield from _ways_on(result.folder, result.num_unsent, program)
    if not result.was_done:
        yield f"Took {duration(result.seconds)}."


def _maximum(result: StudyResult) -> Iterator[str]:
    trials = result.searched_trials
    num_completed = sum(trial.state == "COMPLETE" for trial in trials)
    winner = result.winner
    yield (
        f"{_name(winner)} (the winner's is the best of {num_completed} completed trials, "
        "one seed each,\nand therefore optimistic; the test split is not)"
    )
    yield _figure(f"best trial {winner.label}", winner, winner.best_value)


def _finalists(result: StudyResult) -> Iterator[str]:
    num_seeds = result.finalists[0].num_seeds
    yield (
        f"{_name(result.winner)} of the finalists on {counted(num_seeds, 'new seed')}, with the "
        "value of the search"
    )
    for finalist in result.finalists:
        name = f"trial {finalist.source.label}"
        source, metric = finalist.source, finalist.source.metric
        seen = f"  (search: {figure(metric, source.best_value)})"
        if not finalist.is_complete:
            yield f"  {name:<{NAME_WIDTH}} completed on only {len(finalist.runs)}{seen}"
            continue
        spread = "" if finalist.spread is None else f" +- {figure(metric, finalist.spread)}"
        is_winner = source.number == result.winner.number
        mark = "  winner" if is_winner else ""
        yield f"{_figure(name, source, finalist.mean)}{spread}{seen}{mark}"
    shipped = result.shipped
    if shipped.finalist is None:
        yield "No finalist completed on every seed: the winner is the search's best, which is"
        yield "optimistic; the test split is not."
    else:
        yield (
            "The winner is chosen by this mean, not by the search's best of "
            f"{len(result.searched_trials)} trials."
        )
        if not result.is_fitted_again:
            yield (
                f"The weights are those of seed {shipped.config['seed']} "
                f"({figure(shipped.metric, shipped.best_value)})."
            )
    yield "Trials of the search, one seed each:"


def _final_fit(fit: Mapping[str, Any]) -> Iterator[str]:
    if fit["outcome"] != "completed":
        yield f"The final fit {fit['outcome']}: the weights are those of the winner's best seed.\n"
        return
    yield (
        f"The weights are those of the final fit: trial {fit['trial']}'s configuration, seed "
        f"{fit['seed']}, trained on\n{fit['num_images']} images, training and validation together, "
        f"to epoch {fit['epoch']}. Only the test split can still measure it.\n"
    )


def _pareto_front(result: StudyResult) -> Iterator[str]:
    if not result.pareto_front:
        return
    yield ""
    yield "Pareto front (no trial is better in everything):"
    for trial in result.pareto_front:
        values = "  ".join(f"{name} {value:.4g}" for name, value in trial.objectives.items())
        yield f"  {'trial ' + trial.label:<{NAME_WIDTH}} {values}"


def _figure(name: str, trial: TrialSummary, value: float | None) -> str:
    return f"  {name:<{NAME_WIDTH}} {figure(trial.metric, value):>9}"


def _name(trial: TrialSummary) -> str:
    """Return the metric that chooses, as a line begins with it."""
    label = trial.metric.label
    return label[:1].upper() + label[1:]


def training_lines(result: TrainingResult, program: str) -> Iterator[str]:
    """Yield the result of a single training and the next commands."""
    yield "This training is already done." if result.was_done else "Done."
    value = figure(result.metric, result.value)
    yield f"Best {result.metric.label} {value} ({result.outcome})"
    if result.metric.measure != "val_accuracy":
        yield f"Validation accuracy of that epoch {percent(result.val_accuracy)}"
    yield from _ways_on(result.folder, result.num_unsent, program)


def evaluation_lines(found: Evaluation) -> Iterator[str]:
    """Yield the result on the test split, just measured or as recorded."""
    low, high = found.test.interval
    yield (
        f"Test accuracy {percent(found.test.share)} ({found.test.num_correct} of "
        f"{found.test.num_images} images; 95 % interval {percent(low)} to {percent(high)})"
    )
    if found.validation is None:
        yield "This model was trained on the validation images too."
    else:
        yield (
            f"Validation accuracy measured again: {percent(found.validation.share)}; recorded: "
            f"{percent(found.recorded_validation)}"
        )
    if found.tables is not None:
        yield from tables_lines(found.tables)
        yield ""
    times = "for the first time" if found.num_openings == 1 else f"{found.num_openings} times"
    yield f"This test split was opened {times}."
    if found.is_recorded:
        yield "This is the recorded result; add --again to open the split once more."
        if found.tables is None:
            yield "It is of an earlier version, which recorded no class table."


def _ways_on(folder: Path, num_unsent: int, program: str) -> Iterator[str]:
    if num_unsent:
        yield f"{num_unsent} events have not reached MLflow; send them with"
        yield Command(f"  {program} sync {folder}")
    yield Command(f"Output folder:            {folder}")
    yield Command(f"Open the MLflow UI:       {program} ui {folder}")
    yield Command(f"Test the winner:          {program} evaluate {folder}")
    yield Command(f"Classify images:          {program} predict {folder} IMAGES...")


def plan_facts(plan: StudyPlan) -> dict[str, Any]:
    """Return a plan for programs."""
    return {
        "study": plan.config.name,
        "folder": str(plan.config.folder),
        "part": plan.part,
        "num_trials": plan.num_trials,
        "num_done": plan.num_done,
        "trials_at_a_time": plan.trials_at_a_time,
        "num_epochs": plan.config.trial.training.last_epoch,
        "searched": list(plan.searched),
        "notes": list(plan.notes),
    }


def result_facts(result: StudyResult) -> dict[str, Any]:
    """Return the result of a study for programs."""
    return {
        "exit_code": 0,
        "reason": "done",
        "folder": str(result.folder),
        "study_id": result.study_id,
        "winner": result.winner.to_mapping(),
        "shipped": result.shipped.to_mapping(),
        "finalists": [
            {
                "trial": finalist.source.number,
                "values": list(finalist.values),
                "mean": finalist.mean if finalist.runs else None,
                "spread": finalist.spread,
                "is_complete": finalist.is_complete,
            }
            for finalist in result.finalists
        ],
        "final_fit": result.final_fit,
        "pareto_front": [trial.number for trial in result.pareto_front],
        "end": result.end,
        "references": [trial.to_mapping() for trial in result.references],
        "searched": list(result.searched),
        "settings": result.settings,
        "num_trials": len(result.searched_trials),
        "num_unsent": result.num_unsent,
        "was_done": result.was_done,
        "seconds": result.seconds,
    }


def training_facts(result: TrainingResult) -> dict[str, Any]:
    """Return the result of a training for programs."""
    return {
        "exit_code": 0,
        "reason": "done",
        "folder": str(result.folder),
        "metric": result.metric.measure,
        result.metric.best: result.value,
        "val_accuracy": result.val_accuracy,
        "outcome": result.outcome,
        "num_unsent": result.num_unsent,
        "was_done": result.was_done,
    }
