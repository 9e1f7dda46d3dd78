"""One run of a study in this process: from the checked inputs to the winner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from drtune_ray.config.metric import METRICS
from drtune_ray.config.study import StudyConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables
from drtune_ray.data.table_store import TableStore
from drtune_ray.errors import ConfigError, NoTrialCompleted
from drtune_ray.execution.capacity import Cluster
from drtune_ray.execution.failures import clear_stacks
from drtune_ray.execution.ray_tune.run import TuneRun
from drtune_ray.execution.ray_tune.schedulers import build_scheduler
from drtune_ray.execution.ray_tune.searcher import StudySearch
from drtune_ray.execution.run_context import RunContext
from drtune_ray.results.epochs import write_epochs
from drtune_ray.results.events import run_finished, run_started, search_history
from drtune_ray.results.pareto import pareto_front
from drtune_ray.results.trials import (
    RESULT_STATES,
    TrialSummary,
    best_trial,
    config_of,
    is_searched,
    is_trained,
    summaries,
    write_trials,
)
from drtune_ray.results.used_settings import unused_settings
from drtune_ray.results.winner import read_about
from drtune_ray.search.budget import Budget
from drtune_ray.search.finalists import Finalist, best_finalist, finalists, repetitions
from drtune_ray.search.objectives import OF_CLASSIFIERS
from drtune_ray.search.outcomes import Outcomes
from drtune_ray.search.proposals import FinalistProposals, FixedTrial, SearchProposals
from drtune_ray.search.samplers import build_sampler
from drtune_ray.search.warm_start import add_earlier_trials
from drtune_ray.space.search_space import SearchSpace, start_points
from drtune_ray.storage.artifacts import StudyArtifacts
from drtune_ray.storage.record import (
    DONE_NAME,
    EPOCHS_NAME,
    RECORD_FILE,
    REPORT_NAME,
    SPOOL_NAME,
    TRIALS_FOLDER,
    TRIALS_NAME,
    WINNER_NAME,
    Record,
    write_done,
)
from drtune_ray.study.inputs import StudyInputs, manifest_path
from drtune_ray.study.record_start import inputs_written, study_started
from drtune_ray.study.registration import model_ready
from drtune_ray.study.report import ARTIFACT as REPORT_ARTIFACT
from drtune_ray.study.report import write_final_report
from drtune_ray.study.result import FINALISTS, SEARCH, StudyPlan, StudyResult
from drtune_ray.study.tables import prepare_all, preparing_device, table_variants
from drtune_ray.study.winner import WinnerWriter, is_finished
from drtune_ray.tracking.events import (
    Event,
    FilesReady,
    MetricsRecorded,
    RunFinished,
    Sink,
    fan_out,
)
from drtune_ray.tracking.machine_watch import watched_writer
from drtune_ray.tracking.mlflow_recorder import build_recorder
from drtune_ray.tracking.spool import Spool
from drtune_ray.tracking.writer import send_rest
from drtune_ray.training.backbones import read_backbone
from drtune_ray.training.checkpoint import trial_folder
from drtune_ray.training.complexity import complexity
from drtune_ray.values import flattened, full_path


class StudyDriver:
    """One run of a study in this process.

    Args:
        config: The study.
        study: Optuna study with its trials.
        artifacts: Files that outlive this machine's disk.
        checked: Checked images, splits and weights.
        space: Search space.
        references: Reference trials, which run first.
        notes: Sentences for the plan.
        cluster: Cluster for the trials; None where the study is done.
    """

    def __init__(
        self,
        config: StudyConfig,
        study: optuna.Study,
        artifacts: StudyArtifacts,
        checked: StudyInputs,
        space: SearchSpace,
        references: tuple[FixedTrial, ...],
        notes: tuple[str, ...],
        cluster: Cluster | None,
    ) -> None:
        self.cluster = cluster
        self.config, self.study_id, self.folder = config, study.study_name, config.folder
        self.study, self.artifacts = study, artifacts
        self.checked, self.space, self.references = checked, space, references
        self.notes, self.started = notes, time.monotonic()
        self._is_interruption_told = self._is_exhausted = False
        self._end: str | None = None
        self.storage = full_path(config.storage)
        self.base = config.trial.with_values(
            {"method.bank_size": min(config.trial.method.bank_size, checked.num_train)}
        )

    def learn_from(
        self,
        earlier: Sequence[tuple[Record, Sequence[FrozenTrial]]],
        deciding: Mapping[str, Any],
    ) -> None:
        """Add the trials of earlier studies for the sampler; see `add_earlier_trials`."""
        notes = add_earlier_trials(self.study, earlier, deciding, self.space, self.base)
        self.notes += notes

    def run(
        self,
        observer: Sink | None,
        on_plan: Callable[[StudyPlan], None],
        is_restored: bool,
        tags: Mapping[str, str],
    ) -> StudyResult:
        """Search, train the finalists and write the winner; return at once if the study is done.

        Args:
            observer: Takes the events of the run as they happen.
            on_plan: Called before the first trial of the search and of the finalists.
            is_restored: Whether the study was downloaded from artifacts.
            tags: Further tags of its run in MLflow.
        """
        spool = Spool(self.folder / SPOOL_NAME)
        recorder = build_recorder(self.config.tracking, self.storage, self.study_id)
        if is_finished(self.config, self._num_ended()):
            with self.artifacts.unsent_kept(spool):  # of a driver that was killed at its end
                num_unsent = send_rest(spool, recorder)
            fitted = read_about(self.folder / WINNER_NAME).get("final_fit")
            return replace(self._result(num_unsent, was_done=True), final_fit=fitted)
        limit = self.config.trial.data.cache_limit_gib
        with (
            self.artifacts.unsent_kept(spool),
            watched_writer(spool, recorder) as writer,
            TableStore(self.storage, limit, self.artifacts.shelf) as store,
        ):
            self._writer, self._store, self._spool = writer, store, spool
            self._emit = fan_out(writer.emit, observer, self._free_disk, self._chart)
            self._tell_start(is_restored, tags)
            try:
                self._search(on_plan)
                self._run_finalists(on_plan)
                result = self._finish()
            except NoTrialCompleted:
                raise  # said already
            except BaseException:  # whatever it was, no run may stay RUNNING
                self._tell_interruption()
                raise
        return replace(result, num_unsent=spool.num_unsent())

    def _search(self, on_plan: Callable[[StudyPlan], None]) -> None:
        """Run trials until the budget ends the search."""
        budget, proposals = self._search_proposals()
        if not proposals.has_next():
            return
        device = self._preparing_device()
        known = [t for t in self.study.get_trials(deepcopy=False) if is_searched(t)]
        num_done = sum(trial.state in RESULT_STATES for trial in known)
        tune_run = TuneRun(self.config, self._run_context())
        self._plan(on_plan, SEARCH, self.config.trials, num_done, tune_run)
        variants = table_variants(self.space, self.base)
        tables = self._prepare([*variants, *(r.config for r in self.references)], device)
        scheduler = build_scheduler(
            self.config.scheduler,
            self.base.training.last_epoch,
            proposals.reference_numbers,
            METRICS[self.config.objectives[0]],
        )
        if scheduler is not None:
            scheduler.refill(known)
        try:
            outcomes = Outcomes(self.study, budget, self.config.objectives, self._costs(tables))
            search = StudySearch(proposals, outcomes)
            tune_run.run(search, tables, scheduler=scheduler, budget=budget)
        finally:
            budget.keep_time()
        self._end, self._is_exhausted = proposals.end, proposals.is_exhausted

    def _search_proposals(self) -> tuple[Budget, SearchProposals]:
        """Return the limits of the search, and the trials that it still has to run."""
        metric = METRICS[self.config.objectives[0]]
        budget = Budget(self.config.trials, self.config.budget, self.study, metric=metric)
        return budget, SearchProposals(
            self.study,
            self.space,
            self.base,
            self.references,
            budget,
            partial(build_sampler, self.config.sampler, self.config.seed),
            start_with=start_points(self.space, self.config.start_with),
        )

    def _run_finalists(self, on_plan: Callable[[StudyPlan], None]) -> None:
        """Train the finalists on the new seeds that are still missing."""
        chosen = self._finalists(self._summaries())
        wanted = repetitions(chosen)
        proposals = FinalistProposals(self.study, wanted)
        if not proposals.has_next():
            return
        device = self._preparing_device()
        tune_run = TuneRun(self.config, self._run_context())
        num_done = sum(len(finalist.runs) for finalist in chosen)
        self._plan(on_plan, FINALISTS, len(wanted), num_done, tune_run)
        tables = self._prepare([repetition.config for repetition in wanted], device)
        outcomes = Outcomes(self.study, None, self.config.objectives, self._costs(tables))
        tune_run.run(StudySearch(proposals, outcomes), tables)

    def _costs(self, tables: Mapping[str, Tables]) -> dict[str, dict[str, float]]:
        """Return the costs of the tables' classifiers, if an objective needs them."""
        if not OF_CLASSIFIERS.keys() & set(self.config.objectives):
            return {}
        num_classes, cpu = len(self.checked.splits.classes), torch.device("cpu")
        return {
            key: complexity(read_backbone(found.backbone), num_classes, cpu)
            for key, found in tables.items()
        }

    def _plan(
        self,
        on_plan: Callable[[StudyPlan], None],
        part: str,
        num_trials: int,
        num_done: int,
        tune_run: TuneRun,
    ) -> None:
        notes = self.notes if part == SEARCH else ()
        at_a_time, searched = tune_run.trials_at_a_time, self._searched()
        on_plan(StudyPlan(self.config, part, num_trials, num_done, at_a_time, searched, notes))

    def _run_context(self) -> RunContext:
        if self.cluster is None:
            raise ConfigError(
                f"{self.folder / DONE_NAME} says that the study is done, but something is left to "
                "run: remove that file"
            )
        return RunContext(
            self.folder,
            self.study_id,
            self.config.resources,
            self.artifacts,
            self.cluster,
            self._emit,
            disk_error=lambda: self._writer.disk_error,
            on_interrupt=self._tell_interruption,
        )

    def _preparing_device(self) -> str:
        """Return the device for the frozen features; the plan reports it where it is slow."""
        if self.cluster is None:
            return "cpu"
        device, notes = preparing_device(self.config.resources, self.cluster.capacity)
        self.notes += tuple(note for note in notes if note not in self.notes)
        return device

    def _prepare(self, configs: Iterable[TrialConfig], device: str) -> dict[str, Tables]:
        """Prepare the tables that these trials read; return them by `TrialConfig.tables_key`."""
        tables = prepare_all(self.checked, configs, self._store, device)
        self.artifacts.keep_shared(manifest_path(self.config.trial.data, self.storage))
        return tables

    def _tell_start(self, is_restored: bool, tags: Mapping[str, str]) -> None:
        started = study_started(self.config, self.checked, list(self._searched()))
        self._emit(replace(started, tags={**started.tags, **tags}))
        self._emit(FilesReady(None, str(self.folder / RECORD_FILE), "study"))
        self._emit(inputs_written(self.folder, self.checked))
        for trial in self.study.get_trials(deepcopy=False):
            if not trial.state.is_finished() or not is_trained(trial):
                continue
            if is_restored:  # what the lost spool held
                self._writer.emit(run_started(trial))
            # Sent again because a killed driver may not have sent it; twice changes nothing.
            self._emit(run_finished(trial))
        for point in search_history(self.study.get_trials(deepcopy=False)):
            self._writer.emit(point)

    def _chart(self, event: Event) -> None:
        """Add a trial that ended to the charts of the study's run."""
        if isinstance(event, RunFinished) and isinstance(event.number, int):
            points = list(search_history(self.study.get_trials(deepcopy=False)))
            for point in points[-1:]:
                self._writer.emit(point)

    def _tell_interruption(self) -> None:
        if self._is_interruption_told:
            return
        # The study first: a database that is away must not keep it RUNNING.
        self._emit(RunFinished(None, "INTERRUPTED", "interrupted", {}, {}))
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING:
                self._emit(RunFinished(trial.number, "INTERRUPTED", "interrupted", {}, {}))
        # Last: a second interruption may cut this off, and twice changes nothing.
        self._is_interruption_told = True

    def _finish(self) -> StudyResult:
        """Choose the winner, write it, and record that the study is done."""
        trials = self._summaries()
        write_trials(list(trials), self.folder / TRIALS_NAME)
        frozen, events = self.study.get_trials(deepcopy=False), self._spool.events
        epochs = events.events(MetricsRecorded.kind)
        write_epochs(frozen, epochs, self.folder / EPOCHS_NAME)
        self.artifacts.keep(TRIALS_NAME, EPOCHS_NAME)
        for name in (TRIALS_NAME, EPOCHS_NAME):
            self._emit(FilesReady(None, str(self.folder / name), "trials"))
        try:
            result = self._result(0, was_done=False)
        except NoTrialCompleted:
            self._report(has_winner=False)
            self._emit(RunFinished(None, "FAIL", "no trial completed", {}, {}))
            raise
        handover = WinnerWriter(self.config, self.checked, self._store, self._run_context())
        result = handover.write_winner(result)
        about = result.about()
        self._emit(FilesReady(None, str(self.folder / WINNER_NAME), WINNER_NAME))
        self._emit(model_ready(self.folder))
        handover.keep_top_checkpoints(trials)
        self._report(has_winner=True)
        named = (result.winner.metric.best, f"mean_{result.winner.metric.measure}")
        metrics: dict[str, float] = {key: about[key] for key in named if key in about}
        tags = {
            "drtune.winner": str(result.winner.number),
            "drtune.shipped": "final fit" if result.is_fitted_again else str(result.shipped.number),
            "drtune.chosen": str(about["chosen"]),
        }
        self._emit(RunFinished(None, "COMPLETE", "completed", metrics, tags))
        handover.run.check_disk()
        self.artifacts.keep(WINNER_NAME)
        if self._is_exhausted or not self._search_proposals()[1].has_next():
            write_done(self.config, self._num_ended())
            self.artifacts.keep(DONE_NAME)
        # Otherwise the machine failed trials, which the same command runs again.
        return result

    def _report(self, *, has_winner: bool) -> None:
        """Write the report; the study does not depend on it."""
        if write_final_report(self.folder, has_winner=has_winner):
            self.artifacts.keep(REPORT_NAME)
            self._emit(FilesReady(None, str(self.folder / REPORT_NAME), REPORT_ARTIFACT))

    def _free_disk(self, event: Event) -> None:
        """Delete the resumable checkpoints of a trial that has finished."""
        if isinstance(event, RunFinished) and event.state != "INTERRUPTED":
            if isinstance(event.number, int):
                folder = trial_folder(
                    self.folder / TRIALS_FOLDER, event.number, self.artifacts.trials
                )
                folder.drop_resumable()
                has_failed = event.state == TrialState.FAIL.name
                clear_stacks(folder.path, has_failed=has_failed)

    def _num_ended(self) -> int:
        """Return the number of trials with a result, repetitions of finalists included."""
        trials = self.study.get_trials(deepcopy=False, states=RESULT_STATES)
        return sum(map(is_trained, trials))

    def _summaries(self) -> tuple[TrialSummary, ...]:
        return summaries(self.study.get_trials(deepcopy=False))

    def _finalists(self, trials: Sequence[TrialSummary]) -> tuple[Finalist, ...]:
        return finalists(trials, self.config.finalists)

    def _result(self, num_unsent: int, *, was_done: bool) -> StudyResult:
        trials = self._summaries()
        chosen = self._finalists(trials)
        best = best_finalist(chosen)
        winner = best.source if best else best_trial(trials)
        return StudyResult(
            self.folder,
            self.study_id,
            trials,
            chosen,
            winner,
            best.best_run if best else winner,
            self._pareto_front(trials),
            self._end,
            num_unsent,
            was_done,
            self._searched(),
            self._settings(winner),
            time.monotonic() - self.started,
        )

    def _pareto_front(self, trials: Sequence[TrialSummary]) -> tuple[TrialSummary, ...]:
        """Return the Pareto front of the search, without the repetitions of finalists."""
        by_number = {trial.number: trial for trial in trials}
        front = pareto_front(self.study.get_trials(deepcopy=False), self.study.directions)
        return tuple(by_number[number] for number in front)

    def _settings(self, trial: TrialSummary) -> dict[str, Any]:
        """Return the searched settings that this trial uses, with its values."""
        config, values = config_of(trial), flattened(trial.config)
        unused = unused_settings(config)
        return {path: values[path] for path in self.space.active(config) if path not in unused}

    def _searched(self) -> tuple[str, ...]:
        return tuple(parameter.path for parameter in self.space.parameters)
