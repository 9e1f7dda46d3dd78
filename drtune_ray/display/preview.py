"""Show what a study will cost, to people and to programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from drtune_ray.display.text import counted, duration, size

if TYPE_CHECKING:
    from drtune_ray.preview.estimate import Preview
    from drtune_ray.preview.simulate import Spread


NAME_WIDTH = 12


def preview_lines(preview: Preview) -> Iterator[str]:
    """Return a dozen lines for people, and the notes."""
    config, found = preview.config, preview.measurement
    base, pace = found.trials[0], preview.paces[0]
    yield f"Preview of study {config.name!r}: {config.folder} (nothing was written there)"
    for note in preview.notes:
        yield f"  {note}"
    yield _line("Trials", _trials(preview))
    yield _line("Epochs", _epochs(preview))
    yield _line(
        "Step",
        f"{1000 * base.step_seconds:.0f} ms; an epoch {pace.epoch_seconds:.1f} s "
        f"({preview.steps_per_epoch:.4g} steps, validation, checkpoint): measured with 1 "
        f"process at a time, {counted(config.resources.cpus_per_worker, 'thread')} each",
    )
    if len(preview.paces) > 1:
        others = ", ".join(f"{other.epoch_seconds:.1f} s" for other in preview.paces[1:])
        yield _line("", f"an epoch of the reference trials that differ: {others}")
    total, fit = preview.seconds, preview.final_fit_seconds
    yield _line("Time", f"{_range(total, duration)}, {preview.trials_at_a_time} trials at a time")
    yield _line(
        "",
        f"of it {duration(preview.fixed_seconds)} to start and end, "
        f"{duration(preview.prepare_seconds)} to prepare images and features"
        + (f", {duration(fit)} at most for the final fit" if fit else ""),
    )
    on_device = f", {size(found.device_bytes)} on the GPU" if found.device_bytes else ""
    yield _line("Memory", f"{size(found.peak_bytes)} a worker{on_device}")
    yield _line(
        "Disk",
        f"{size(preview.checkpoint_bytes)} of checkpoints at most (one is "
        f"{size(base.checkpoint_bytes)}, best weights {size(base.best_bytes)}); "
        f"{size(preview.kept_bytes)} stay",
    )
    yield _line(
        "",
        f"{size(preview.table_bytes)} of prepared images and features, "
        f"{size(preview.new_table_bytes)} of them new",
    )
    yield _line("Machine", _machine(preview))


def preview_facts(preview: Preview) -> dict[str, Any]:
    """Return the figures for programs, as docs/json.md describes them."""
    found = preview.measurement
    names = ("num_trials", "search_epochs", "final_trials", "final_epochs", "epochs")
    return {
        "study": preview.config.name,
        "folder": str(preview.config.folder),
        "trials_at_a_time": preview.trials_at_a_time,
        **{name: asdict(preview.spread(name)) for name in names},
        "num_epochs": preview.config.trial.training.last_epoch,
        "step_seconds": found.trials[0].step_seconds,
        "steps_per_epoch": preview.steps_per_epoch,
        "epoch_seconds": [pace.epoch_seconds for pace in preview.paces],
        "begin_seconds": [pace.begin_seconds for pace in preview.paces],
        "measured_at_a_time": 1,
        "fixed_seconds": preview.fixed_seconds,
        "prepare_seconds": preview.prepare_seconds,
        "final_fit_seconds": preview.final_fit_seconds,
        "seconds": asdict(preview.seconds),
        "peak_bytes": found.peak_bytes,
        "device_bytes": found.device_bytes,
        "checkpoint_bytes": found.trials[0].checkpoint_bytes,
        "best_bytes": found.trials[0].best_bytes,
        "max_checkpoint_bytes": preview.checkpoint_bytes,
        "kept_bytes": preview.kept_bytes,
        "table_bytes": preview.table_bytes,
        "new_table_bytes": preview.new_table_bytes,
        "num_cpus": preview.machine.num_cpus,
        "num_gpus": preview.machine.num_gpus,
        "memory_bytes": preview.memory_bytes,
        "local_trials": preview.local_trials,
        "workers_in_memory": preview.workers_in_memory,
        "notes": list(preview.notes),
    }


def _trials(preview: Preview) -> str:
    config = preview.config
    num_given = len(config.reference_trials) + len(config.start_with)
    num_trials = preview.spread("num_trials")
    parts = [counted(len(config.reference_trials), "reference trial")]
    if config.start_with:
        parts.append(f"{len(config.start_with)} of your own")
    parts.append(f"{max(0.0, num_trials.mean - num_given):.4g} sampled")
    text = f"{_range(num_trials, _count)} ({', '.join(parts)})"
    if config.finalists.num_seeds:
        finals = preview.spread("final_trials")
        text += (
            f", then {_range(finals, _count)} trainings of finalists on "
            f"{counted(config.finalists.num_seeds, 'new seed')}"
        )
    return text


def _epochs(preview: Preview) -> str:
    config = preview.config
    scheduler = config.scheduler.name
    stopping = "without early stopping" if scheduler == "none" else f"with {scheduler}"
    most = config.trials * config.trial.training.last_epoch
    text = f"{_range(preview.spread('search_epochs'), _count)} in the search {stopping}"
    if scheduler != "none":
        text += f" ({most} without)"
    finals = preview.spread("final_epochs").mean
    text += f", {_count(finals)} of finalists" if finals else ""
    return text + (", and the final fit" if preview.final_fit_seconds else "")


def _machine(preview: Preview) -> str:
    machine, fits_memory = preview.machine, preview.workers_in_memory
    workers = preview.config.trial.training.max_workers
    text = (
        f"{machine.describe()}, {size(preview.memory_bytes)} of free memory: holds "
        f"{preview.local_trials} trials at a time"
    )
    num_processes = workers * min(preview.local_trials, preview.trials_at_a_time)
    if fits_memory < num_processes:
        workers_that_fit = counted(fits_memory, "worker")
        text += f", but memory for {workers_that_fit} only: lower resources.trials_at_a_time"
    return text


def _range(found: Spread, say: Callable[[float], str]) -> str:
    mean, low, high = say(found.mean), say(found.low), say(found.high)
    return mean if low == high else f"about {mean} ({low} to {high} in 9 of 10 cases)"


def _count(number: float) -> str:
    return f"{number:.0f}"


def _line(name: str, text: str) -> str:
    return f"  {name:<{NAME_WIDTH}}{text}"
