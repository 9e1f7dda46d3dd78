"""The comparison of methods: a search for each, the best again on fresh seeds, one opening.

Every method has a study of its own, with the same images, splits, budget, sampler, early stopping
and seeds; `status`, `report` and `ui` work on it as on any study.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from drtune_ray.config.study import StudyConfig
from drtune_ray.data.kinds.recognize import open_images
from drtune_ray.errors import ConfigError, NoTrialCompleted
from drtune_ray.execution.interrupts import signals_as_interrupt
from drtune_ray.folders import files_as_problem, open_folder
from drtune_ray.method.diagnostics import DR_GRADIENT_SHARE
from drtune_ray.results.comparison.answers import StoredAnswers, read_answers, write_answers
from drtune_ray.results.comparison.compared import compare
from drtune_ray.results.comparison.picture import write_page
from drtune_ray.results.comparison.result import ComparisonResult, MethodRuns, read_result
from drtune_ray.results.evaluate import check_unopened, evaluate_models
from drtune_ray.results.trials import TrialSummary, config_of
from drtune_ray.results.winner import Winner, read_winner
from drtune_ray.results.words import title
from drtune_ray.search.finalists import best_finalist
from drtune_ray.space.search_space import SearchSpace
from drtune_ray.storage.artifacts import StudyArtifacts
from drtune_ray.storage.driver_lock import driver_lock
from drtune_ray.storage.record import SPLITS_NAME, TRIALS_FOLDER, WINNER_NAME
from drtune_ray.study.checks import check_study, space_content
from drtune_ray.study.comparison_plan import Comparison
from drtune_ray.study.comparison_record import ComparisonRecord, is_recorded
from drtune_ray.study.result import StudyResult
from drtune_ray.training.checkpoint import check_best, read_checkpoint, trial_folder
from drtune_ray.training.model import classifier
from drtune_ray.values import digest, full_path

RunStudy = Callable[[StudyConfig, Mapping[str, str]], StudyResult]


@files_as_problem()
def run_comparison(
    comparison: Comparison,
    run: RunStudy,
    *,
    again: bool = False,
    on_method: Callable[[str, int], None] = lambda study, number: None,
    tags: Mapping[str, str] | None = None,
) -> ComparisonResult:
    """Run a comparison, or resume it; a finished one is returned as it was recorded.

    Args:
        comparison: The comparison.
        run: Runs or resumes a study, with tags for its run in MLflow.
        again: Open the test split although it was opened before.
        on_method: Called with the name and number, from 1, of a method's study before it.
        tags: Tags of the comparison's run in MLflow.

    Raises:
        ConfigError: If the input is invalid, or the test split was opened before.
        EnvironmentProblem: If the machine cannot run a trial or another process is at it.
        NoTrialCompleted: If no configuration of a method completed on all seeds.
        KeyboardInterrupt: If interrupted; the same call resumes.
    """
    folder = comparison.folder
    known = read_result(folder)
    if read_answers(folder) is None or not is_recorded(comparison):
        check_comparison(comparison, again=again)
    with driver_lock(folder), signals_as_interrupt():
        record = ComparisonRecord(comparison, tags)
        try:
            results = {}
            for number, (name, study) in enumerate(comparison.studies.items(), 1):
                on_method(study.name, number)
                results[name] = run(study, record.tags())
            found = _compared(comparison, results, known, again=again)
        except BaseException as error:
            record.end("INTERRUPTED" if isinstance(error, KeyboardInterrupt) else "FAIL", {})
            raise
        return replace(found, num_unsent=record.finish(found))


def check_comparison(comparison: Comparison, *, again: bool) -> None:
    """Check all studies and the test split before anything is spent.

    Raises:
        ConfigError: If the input is invalid, or the test split was opened before.
        EnvironmentProblem: If the machine cannot run a trial.
    """
    problems: list[str] = []
    manifests = {}
    for name, study in comparison.studies.items():
        try:
            manifests[name] = check_study(study)[0].splits.manifest
        except ConfigError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(_shared_once(problems, len(comparison.studies)))
    storage, artifacts = full_path(comparison.config.storage), _artifacts(comparison.config)
    seals = {check_unopened(m, storage, artifacts, again=again).seal for m in manifests.values()}
    if len(seals) > 1:
        raise ConfigError(
            f"the test images of {', '.join(manifests)} are not the same, since earlier studies "
            f"in {storage} had fewer images: use another --storage"
        )


def _shared_once(problems: Sequence[str], number: int) -> list[str]:
    """Return the problems, those that all studies have without the methods' names."""
    texts = [problem.partition(": ")[2] for problem in problems]
    shared = {text for text in texts if texts.count(text) == number}
    return list(
        dict.fromkeys(t if t in shared else p for p, t in zip(problems, texts, strict=True))
    )


def _artifacts(config: StudyConfig) -> Any:
    return open_folder(config.artifacts) if config.artifacts else None


def _compared(
    comparison: Comparison,
    results: Mapping[str, StudyResult],
    known: ComparisonResult | None,
    *,
    again: bool,
) -> ComparisonResult:
    """Return the result, after opening the test split for models that were not compared yet."""
    finals = {name: _finals(name, result) for name, result in results.items()}
    methods = {
        name: _method_runs(
            comparison.methods[name], _sampled(comparison.studies[name]), result, finals[name]
        )
        for name, result in results.items()
    }
    content = {
        name: [(run.number, run.best_value) for run in finals[name]] for name in sorted(finals)
    }
    models = digest(content, sorted(result.study_id for result in results.values()))
    if known is not None and known.models == models:
        return replace(known, was_done=True)
    answers = read_answers(comparison.folder)
    if answers is None or answers.models != models:
        answers = _answers(comparison, finals, models, again=again)
    correct = {
        name: np.stack([answers.correct[_key(name, run)] for run in finals[name]])
        for name in results
    }
    found = ComparisonResult(
        comparison.config.name,
        comparison.folder,
        models,
        methods,
        compare(correct, comparison.baselines),
        answers.num_openings,
        answers.time_ms,
    )
    write_page(found)
    found.write()
    return found


def _key(name: str, run: TrialSummary) -> str:
    return f"{name}, seed {run.config['seed']}"


def _finals(name: str, result: StudyResult) -> tuple[TrialSummary, ...]:
    """Return the runs of a method's best finalist, by seed."""
    best = best_finalist(result.finalists)
    if best is None:
        raise NoTrialCompleted(
            f"{title(name)}: no configuration completed on every fresh seed; the same command with "
            "a higher --trials searches on, or lower the learning rates of its space"
        )
    return tuple(sorted(best.runs, key=lambda run: int(run.config["seed"])))


def _sampled(study: StudyConfig) -> tuple[str, ...]:
    """Return the paths of the settings that a study searches, without constants."""
    space = SearchSpace.from_mapping(space_content(study), study.trial)
    return tuple(parameter.path for parameter in space.parameters if parameter.is_sampled)


def _method_runs(
    method: str, paths: tuple[str, ...], result: StudyResult, finals: Sequence[TrialSummary]
) -> MethodRuns:
    searched = result.searched_trials
    seconds = sum(run.seconds or 0.0 for run in finals)
    return MethodRuns(
        method,
        str(result.folder),
        paths,
        {path: value for path, value in result.settings.items() if path in paths},
        len(searched),
        sum(trial.num_epochs for trial in searched),
        sum(trial.seconds or 0.0 for trial in searched),
        seconds / max(1, sum(run.num_epochs for run in finals)),
        tuple(int(run.config["seed"]) for run in finals),
        tuple(float(run.best_value or 0.0) for run in finals),
        tuple(run.number for run in finals),
        config_of(finals[0]).data.train_share,
        _dr_gradient_share(result.epochs_path, [run.number for run in finals]),
    )


def _dr_gradient_share(epochs: Path, runs: Sequence[int]) -> float | None:
    """Return the median over the epochs of the runs; None where none recorded it."""
    found = pq.read_table(epochs) if epochs.exists() else pa.table({})
    if DR_GRADIENT_SHARE not in found.column_names:
        return None
    of_runs = found.filter(pc.field("number").isin(list(runs)))
    values = of_runs[DR_GRADIENT_SHARE].drop_null().to_numpy()
    return float(np.median(values)) if len(values) else None


def _answers(
    comparison: Comparison,
    finals: Mapping[str, Sequence[TrialSummary]],
    models: str,
    *,
    again: bool,
) -> StoredAnswers:
    """Open the test split for all final runs, and keep their answers."""
    config, loaders = comparison.config, {}
    for name, runs in finals.items():
        study = comparison.studies[name]
        for run in runs:  # lost or damaged weights leave the split sealed
            loaders[_key(name, run)] = _loader(study, run, _weights(study, run))
    opened = evaluate_models(
        loaders,
        comparison.folder,
        next(iter(comparison.studies.values())).folder / SPLITS_NAME,
        open_images(config.trial.data),
        full_path(config.storage),
        artifacts=_artifacts(config),
        again=again,
    )
    found = StoredAnswers(
        models, opened.correct, opened.hashes, opened.num_openings, opened.time_ms
    )
    write_answers(comparison.folder, found)
    return found


def _weights(study: StudyConfig, run: TrialSummary) -> Path:
    """Return the file with the weights of a final run.

    Raises:
        ConfigError: If it is missing, damaged, or holds other weights.
    """
    artifacts = StudyArtifacts(study.artifacts, study.folder)
    folder = trial_folder(study.folder / TRIALS_FOLDER, run.number, artifacts.trials)
    with suppress(FileNotFoundError):
        folder.fetch_best()
    if not folder.best.exists():
        raise ConfigError(
            f"{folder.best} is missing, the weights of a final run: bring it back from a backup, "
            f"or delete {study.folder} and repeat the command, which runs that method again"
        )
    check_best(read_checkpoint(folder.best), folder.best, None, run.metric, run.best_value)
    return folder.best


def _loader(study: StudyConfig, run: TrialSummary, weights: Path) -> Callable[[], Winner]:
    """Return what loads the model of a final run."""

    def load() -> Winner:
        trial, state = config_of(run), read_checkpoint(weights)["model"]
        model = classifier(trial.backbone.name, trial.data.image_size, state)
        return replace(read_winner(study.folder / WINNER_NAME), model=model, trial=trial)

    return load
