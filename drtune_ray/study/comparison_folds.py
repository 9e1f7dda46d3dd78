"""The comparison of methods by cross-validation: a comparison for each fold.

Each fold has searches of its own, so that its test images choose nothing; its test split is opened
once. The folds' training images overlap, which the corrected resampled t-test takes into account
(Nadeau and Bengio 2003).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from drtune_ray.data.splits import TRAIN, read_manifest
from drtune_ray.errors import ConfigError
from drtune_ray.execution.interrupts import signals_as_interrupt
from drtune_ray.folders import files_as_problem
from drtune_ray.results.comparison.compared import compare_folds
from drtune_ray.results.comparison.picture import write_page
from drtune_ray.results.comparison.result import ComparisonResult, MethodRuns, read_result
from drtune_ray.storage.driver_lock import driver_lock
from drtune_ray.storage.record import SPLITS_NAME
from drtune_ray.study.comparison import RunStudy, check_comparison, run_comparison
from drtune_ray.study.comparison_plan import Comparison
from drtune_ray.study.comparison_record import ComparisonRecord, is_recorded
from drtune_ray.study.folds_plan import FoldedComparison
from drtune_ray.values import digest


@files_as_problem()
def run_folds(
    folded: FoldedComparison,
    run: RunStudy,
    *,
    again: bool = False,
    on_method: Callable[[str, int], None] = lambda study, number: None,
) -> ComparisonResult:
    """Run a comparison by cross-validation, or resume it; see `run_comparison`.

    Args:
        folded: The comparison.
        run: Runs or resumes a study, with tags for its run in MLflow.
        again: Open test splits although they were opened before.
        on_method: Called with the name and number, from 1, of a study before it.

    Raises:
        ConfigError: If the input is invalid, or a test split was opened before.
        EnvironmentProblem: If the machine cannot run a trial or another process is at it.
        NoTrialCompleted: If no configuration of a method completed in a fold.
        KeyboardInterrupt: If interrupted; the same call resumes.
    """
    if not is_recorded(folded):
        for part in folded.parts:  # one method is enough to see the images of a fold
            first = dict([next(iter(part.studies.items()))])
            check_comparison(replace(part, studies=first), again=again)
    with driver_lock(folded.folder), signals_as_interrupt():
        record = ComparisonRecord(folded)
        try:
            found = []
            for number, part in enumerate(folded.parts):
                said = partial(_say, on_method, number * len(part.studies))
                tags = record.tags()
                found.append(run_comparison(part, run, again=again, on_method=said, tags=tags))
            result = _compared(folded, found)
        except BaseException as error:
            record.end("INTERRUPTED" if isinstance(error, KeyboardInterrupt) else "FAIL", {})
            raise
        num_unsent = record.finish(result) + sum(each.num_unsent for each in found)
        return replace(result, num_unsent=num_unsent)


def _say(on_method: Callable[[str, int], None], start: int, study: str, number: int) -> None:
    on_method(study, start + number)


def _compared(folded: FoldedComparison, found: Sequence[ComparisonResult]) -> ComparisonResult:
    models, known = digest([each.models for each in found]), read_result(folded.folder)
    if known is not None and known.models == models:
        return replace(known, was_done=True)
    accuracies = {
        name: [each.compared.scores[name].mean for each in found] for name in folded.methods
    }
    num_train = np.mean([_num_train(part) for part in folded.parts])
    num_test = np.mean([each.compared.num_images for each in found])
    (baseline,) = found[0].compared.baselines
    result = ComparisonResult(
        folded.config.name,
        folded.folder,
        models,
        {name: _runs([each.methods[name] for each in found]) for name in folded.methods},
        compare_folds(accuracies, baseline, float(num_train), float(num_test)),
        sum(each.num_openings for each in found),
        max(each.time_ms for each in found),
    )
    write_page(result)
    result.write()
    return result


def _num_train(part: Comparison) -> int:
    path = next(iter(part.studies.values())).folder / SPLITS_NAME
    manifest = read_manifest(path)
    if manifest is None:
        raise ConfigError(f"{path} is missing: repeat the command to write it again")
    return int(manifest["split"].to_pylist().count(TRAIN))


def _runs(folds: Sequence[MethodRuns]) -> MethodRuns:
    """Return search and final runs of a method over the folds, with a value for each."""
    settings: Mapping[str, object] = {
        f"fold {number}: {path}": value
        for number, fold in enumerate(folds, 1)
        for path, value in fold.settings.items()
    }
    return replace(
        folds[0],
        settings=dict(settings),
        num_trials=sum(fold.num_trials for fold in folds),
        search_epochs=sum(fold.search_epochs for fold in folds),
        search_seconds=sum(fold.search_seconds for fold in folds),
        epoch_seconds=float(np.mean([fold.epoch_seconds for fold in folds])),
        dr_gradient_share=_median([fold.dr_gradient_share for fold in folds]),
        seeds=tuple(range(1, len(folds) + 1)),
        val_values=tuple(float(np.mean(fold.val_values)) for fold in folds),
        runs=tuple(fold.runs[0] for fold in folds),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
