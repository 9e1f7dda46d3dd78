"""What of a study may be deleted: files that neither its result nor its resuming needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from drtune_ray.config.study import STUDY, StudyConfig
from drtune_ray.data.table_store import CACHE_FOLDER, TableStore
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.folders import files_as_problem
from drtune_ray.results.trials import TrialSummary, best_first
from drtune_ray.search.finalists import finalists
from drtune_ray.storage.driver_lock import driver_lock, driver_of
from drtune_ray.storage.record import (
    DONE_NAME,
    SCRATCH_NAME,
    TRIALS_FOLDER,
    Record,
    find_study,
    read_record,
)
from drtune_ray.study.status import read_trials
from drtune_ray.training.checkpoint import folder_name

ENDED = ("COMPLETE", "PRUNED")


@dataclass(frozen=True)
class Removable:
    """Files of one kind that may be deleted.

    Attributes:
        what: Their kind, for people.
        paths: Files and folders.
        num_bytes: Their size in bytes.
    """

    what: str
    paths: tuple[Path, ...]
    num_bytes: int


@files_as_problem()
def removable_files(name_or_folder: str, storage: str, *, cache: bool) -> tuple[Removable, ...]:
    """Return what may be deleted of a study or training.

    Args:
        name_or_folder: Name of the study under the storage, or its folder.
        storage: Folder of the studies.
        cache: Whether to include the prepared tables, which all studies of the storage share.

    Raises:
        ConfigError: If there is no such study.
        EnvironmentProblem: If a process drives it.
    """
    record = read_record(find_study(name_or_folder, storage))
    driver, is_alive = driver_of(record, [])
    if is_alive:
        raise EnvironmentProblem(
            f"study {record.folder.name!r} is being run by {driver}: wait for it or end it first"
        )
    folders, later = _trial_folders(record)
    kinds = {
        f"checkpoints of {len(folders)} trials that can no longer win": folders,
        f"checkpoints of {len(later)} final fits or repetitions of such trials": later,
        "Ray's temporary files": [record.folder / SCRATCH_NAME],
    }
    if cache:
        shared = f"prepared images and features in {record.folder.parent / CACHE_FOLDER}"
        kinds[shared] = [record.folder.parent / CACHE_FOLDER]
    found = (_removable(what, paths) for what, paths in kinds.items())
    return tuple(each for each in found if each.num_bytes)


@files_as_problem()
def clean(name_or_folder: str, storage: str, *, cache: bool) -> tuple[Removable, ...]:
    """Delete what :func:`removable_files` returns, and return it.

    Tables that another process uses are kept.

    Raises:
        ConfigError: If there is no such study.
        EnvironmentProblem: If a process drives it.
    """
    folder = find_study(name_or_folder, storage)
    found = removable_files(name_or_folder, storage, cache=cache)
    with driver_lock(folder):
        for path in (path for each in found for path in each.paths):
            if path.name == CACHE_FOLDER and path.parent == folder.parent:
                with TableStore(folder.parent, 0.0) as store:
                    store.keep_limit()
            else:
                shutil.rmtree(path)
    return found


def _trial_folders(record: Record) -> tuple[list[Path], list[Path]]:
    """Return the folders of weights that can no longer become the winner's.

    First those of trials, then those of the trainings after the search, `final-fit-00003` and
    `again-00003`: each is of the configuration of the trial that it names.
    """
    trials = record.folder / TRIALS_FOLDER
    if record.kind != STUDY:
        return [trials / folder_name(0)] if (record.folder / DONE_NAME).exists() else [], []
    found = read_trials(record.folder)
    kept = _candidates(StudyConfig.from_mapping(record.config), found)
    ended = [folder_name(t.number) for t in found if t.state in ENDED and t.number not in kept]
    later = [path for name in ended for path in sorted(trials.glob(f"*-{name}"))]
    return [trials / name for name in ended], later


def _candidates(config: StudyConfig, trials: Sequence[TrialSummary]) -> set[int]:
    """Return the trials that may win, even if the study is continued with more trials."""
    chosen = finalists(trials, config.finalists)
    searched = best_first(trial for trial in trials if not trial.is_final)
    best = searched[: max(1, config.finalists.num_configurations)]
    repeated = [trial for trial in trials if trial.is_final]
    return {t.number for t in (*best, *(finalist.source for finalist in chosen), *repeated)}


def _removable(what: str, paths: Iterable[Path]) -> Removable:
    there = tuple(path for path in paths if path.is_dir())
    sizes = (f.stat().st_size for path in there for f in path.rglob("*") if f.is_file())
    return Removable(what, there, sum(sizes))
