"""A study's plan and result, and a training's: for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drtune_ray.display.text import duration, percent
from drtune_ray.values import flattened

if TYPE_CHECKING:
    from drtune_ray.search.driver import StudyPlan, StudyResult
    from drtune_ray.search.single import TrainingResult


def plan_lines(plan: StudyPlan) -> Iterator[str]:
    """What is going to be done."""
    config = plan.config
    trial = config.trial
    yield f"Study {config.name!r}: {config.folder}"
    for note in plan.notes:
        yield f"  {note}"
    yield (
        f"  {config.trials} trials ({len(config.reference_trials)} reference trials first), "
        f"{plan.trials_at_a_time} at a time, {config.resources.cpus_per_worker} CPU(s) a worker; "
        f"up to {trial.training.epochs} epochs, {config.scheduler.name} early stopping, "
        f"{config.sampler.name} sampler, seed {config.seed}"
    )
    if plan.num_done:
        yield f"  {plan.num_done} trials were finished before: going on"


def result_lines(result: StudyResult, program: str) -> Iterator[str]:
    """The winner, the reference trials, and where everything lies.

    Args:
        result: The result.
        program: How this program is called from here.
    """
    if result.was_done:
        yield "This study is done; nothing was left to run."
    winner = result.winner
    num_completed = sum(trial.state == "COMPLETE" for trial in result.trials)
    yield f"\nBest of {len(result.trials)} trials: trial {winner.label}"
    values = flattened(winner.config)
    for path in result.searched:
        if winner.reference is None or path in values:
            yield f"  {path} = {values[path]}"
    yield (
        f"\nValidation accuracy (the winner's is the maximum of {num_completed} completed trials, "
        "one seed each:\nit flatters; the test split does not)"
    )
    yield f"  {'best trial ' + winner.label:<32} {percent(winner.best_val_accuracy):>9}"
    for trial in result.references:
        name = f"reference trial {trial.label}"
        outcome = "" if trial.state == "COMPLETE" else f"  {trial.outcome}"
        yield f"  {name:<32} {percent(trial.best_val_accuracy):>9}{outcome}"
    yield ""
    yield from _ways_on(result.folder, result.num_unsent, program)
    if not result.was_done:
        yield f"Took {duration(result.seconds)}."


def training_lines(result: TrainingResult, program: str) -> Iterator[str]:
    """As :func:`result_lines`, for a single training."""
    yield "This training was done before." if result.was_done else "Done."
    yield f"Best validation accuracy {percent(result.val_accuracy)} ({result.outcome})"
    yield from _ways_on(result.folder, result.num_unsent, program)


def _ways_on(folder: Path, num_unsent: int, program: str) -> Iterator[str]:
    if num_unsent:
        yield (
            f"{num_unsent} events have not reached MLflow; send them with\n"
            f"  {program} sync {folder}"
        )
    yield f"Everything lies in        {folder}"
    yield f"Open the MLflow UI:       {program} ui {folder}"
    yield f"Test the winner:          {program} evaluate {folder}"


def plan_facts(plan: StudyPlan) -> dict[str, Any]:
    """A plan for programs."""
    return {
        "study": plan.config.name,
        "folder": str(plan.config.folder),
        "num_trials": plan.config.trials,
        "num_done": plan.num_done,
        "trials_at_a_time": plan.trials_at_a_time,
        "num_epochs": plan.config.trial.training.epochs,
        "searched": list(plan.searched),
        "notes": list(plan.notes),
    }


def result_facts(result: StudyResult) -> dict[str, Any]:
    """A study's result for programs."""
    return {
        "exit_code": 0,
        "reason": "done",
        "folder": str(result.folder),
        "study_id": result.study_id,
        "winner": vars(result.winner),
        "references": [vars(trial) for trial in result.references],
        "searched": list(result.searched),
        "num_trials": len(result.trials),
        "num_unsent": result.num_unsent,
        "was_done": result.was_done,
        "seconds": result.seconds,
    }


def training_facts(result: TrainingResult) -> dict[str, Any]:
    """A training's result for programs."""
    return {
        "exit_code": 0,
        "reason": "done",
        "folder": str(result.folder),
        "best_val_accuracy": result.val_accuracy,
        "outcome": result.outcome,
        "num_unsent": result.num_unsent,
        "was_done": result.was_done,
    }
