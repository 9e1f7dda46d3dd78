"""One run of a study in this process: from what was checked to the winner."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from drtune_ray.config import StudyConfig, TrialConfig
from drtune_ray.data.dataset import Tables
from drtune_ray.data.store import TableStore
from drtune_ray.errors import ConfigError, NoTrialCompleted
from drtune_ray.results.trials import CONFIG, TrialSummary, best_trial, summary, write_trials
from drtune_ray.results.winner import write_winner
from drtune_ray.search.actor import Workplace
from drtune_ray.search.callback import StudyCallback, run_finished, run_started
from drtune_ray.search.failures import (
    clear_stacks,
    lost_processes_are_failures,
)
from drtune_ray.search.identity import (
    DONE_NAME,
    RECORD_FILE,
    SCRATCH_NAME,
    SPOOL_NAME,
    TRIALS_FOLDER,
    TRIALS_NAME,
    WINNER_NAME,
)
from drtune_ray.search.interruption import saving_when_interrupted
from drtune_ray.search.lifeline import ProgressWatch
from drtune_ray.search.nodes import trial_demand, trials_that_fit
from drtune_ray.search.prepare import (
    Checked,
    manifest_path,
    prepare,
    preparing_device,
)
from drtune_ray.search.reaper import Reaper
from drtune_ray.search.scheduler import StudyASHA
from drtune_ray.search.searcher import RESULT_STATES, Reference, StudySearch, build_sampler
from drtune_ray.search.servers import (
    StudyArtifacts,
    as_problem,
)
from drtune_ray.search.session import scratch_folder
from drtune_ray.search.shared import Cluster
from drtune_ray.search.space import SearchSpace
from drtune_ray.search.trainables import tune_trainable
from drtune_ray.search.waiting import ResourceWait, WaitCallback, giving_up
from drtune_ray.tracking.events import Event, FilesReady, RunFinished, RunStarted, Sink
from drtune_ray.tracking.mlflow_recorder import build_recorder
from drtune_ray.tracking.spool import BackgroundWriter, Spool
from drtune_ray.training.checkpoint import TrialFolder, trial_folder
from drtune_ray.values import flattened

logger = logging.getLogger(__name__)

MAX_MACHINE_FAILURES = 2


@dataclass(frozen=True)
class StudyResult:
    """What a study came to.

    Attributes:
        folder: Where it lies.
        study_id: Marks its runs in MLflow.
        trials: All of them, by number.
        winner: The completed trial with the best validation accuracy: a maximum over the
            completed trials, each trained on one seed.
        num_unsent: Events that the tracking server has not taken yet.
        was_done: Whether there was nothing left to run.
        searched: Paths that the search space varies.
        seconds: How long this run took.
    """

    folder: Path
    study_id: str
    trials: tuple[TrialSummary, ...]
    winner: TrialSummary
    num_unsent: int
    was_done: bool
    searched: tuple[str, ...]
    seconds: float

    @property
    def references(self) -> tuple[TrialSummary, ...]:
        """The reference trials."""
        return tuple(trial for trial in self.trials if trial.reference)


@dataclass(frozen=True)
class StudyPlan:
    """Told to the observer before the first trial starts."""

    config: StudyConfig
    num_done: int
    trials_at_a_time: int
    searched: tuple[str, ...]
    notes: tuple[str, ...]


class StudyDriver:
    """One run of a study in this process.

    Args:
        config: The study.
        study: Its trials.
        artifacts: What outlives this machine's disk.
        checked: Images, splits and weights that were seen to work.
        space: What to search.
        references: Trials to run first.
        notes: Sentences for the plan.
        cluster: Where the trials run; None where the study is done.
    """

    def __init__(
        self,
        config: StudyConfig,
        study: optuna.Study,
        artifacts: StudyArtifacts,
        checked: Checked,
        space: SearchSpace,
        references: tuple[Reference, ...],
        notes: tuple[str, ...],
        cluster: Cluster | None,
    ) -> None:
        self.cluster = cluster
        self.config, self.study_id, self.folder = config, study.study_name, config.folder
        self.study, self.artifacts = study, artifacts
        self.checked, self.space, self.references = checked, space, references
        self.notes, self.started = notes, time.monotonic()
        self._is_interruption_told = False
        self.storage = Path(config.storage).expanduser().resolve()
        self.base = config.trial.with_values(
            {"method.bank_size": min(config.trial.method.bank_size, checked.num_train)}
        )

    def run(
        self,
        observer: Sink | None,
        on_plan: Callable[[StudyPlan], None],
        is_restored: bool,
    ) -> StudyResult:
        """Prepare, search and finish; nothing of it where the study is done.

        Args:
            observer: Takes the events of the run as they happen.
            on_plan: Called before the first trial.
            is_restored: Whether the study was brought back from artifacts.
        """
        if self._is_done():
            return self._result(Spool(self.folder / SPOOL_NAME).num_unsent(), was_done=True)
        spool = Spool(self.folder / SPOOL_NAME)
        recorder = build_recorder(self.config.tracking, self.storage, self.study_id)
        limit = self.config.trial.data.cache_limit_gib
        with (
            self.artifacts.unsent_kept(spool),
            BackgroundWriter(spool, recorder) as writer,
            TableStore(self.storage, limit, self.artifacts.shelf) as store,
        ):
            self._writer = writer
            self._emit = _fan_out(writer.emit, observer, self._free_disk)
            self._tell_start(is_restored)
            try:
                tables = self._prepare(store)
                self.artifacts.keep_shared(manifest_path(self.config.trial.data, self.storage))
                if len(self._finished()) < self.config.trials:
                    self._search(tables, on_plan)
                result = self._finish(tables)
            except NoTrialCompleted:
                raise  # said already
            except BaseException:  # whatever it was, no run may stay RUNNING
                self._tell_interruption()
                raise
        return replace(result, num_unsent=spool.num_unsent())

    def _is_done(self) -> bool:
        """Whether an earlier run came to its very end with as many trials."""
        done, num_finished = self.folder / DONE_NAME, len(self._finished())
        return (
            num_finished >= self.config.trials
            and done.exists()
            and done.read_text() == str(num_finished)
        )

    def _prepare(self, store: TableStore) -> Tables:
        device = "cpu"
        if self.cluster is not None:
            device, notes = preparing_device(self.config.resources, self.cluster.capacity)
            self.notes += notes
        return prepare(self.checked, self.config.trial, store, device)

    def _search(self, tables: Tables, on_plan: Callable[[StudyPlan], None]) -> None:
        if self.cluster is None:
            raise ConfigError(
                f"{self.folder / DONE_NAME} says that the study is done, but it holds only "
                f"{len(self._finished())} of {self.config.trials} trials: remove that file"
            )
        resources, training = self.config.resources, self.config.trial.training
        demand = trial_demand(training, resources)
        at_a_time = trials_that_fit(demand, resources, self.cluster.capacity)
        num_done = len(self._finished())
        on_plan(StudyPlan(self.config, num_done, at_a_time, self._searched(), self.notes))
        wait = ResourceWait(demand, resources.wait_seconds, self.cluster.on_notice)
        self._tune(tables, at_a_time, self.cluster, wait)

    def _tune(self, tables: Tables, at_a_time: int, cluster: Cluster, wait: ResourceWait) -> None:
        from ray import tune

        search = StudySearch(
            self.study,
            self.space,
            self.base,
            self.references,
            self.config.trials,
            partial(build_sampler, self.config.sampler, self.config.seed),
        )
        workplace = Workplace(
            tables.to_mapping(),
            self.folder / TRIALS_FOLDER,
            self.config.resources.cpus_per_worker,
            "cuda" if self.config.resources.worker_gpus(1) else "cpu",
            self.artifacts.trials,
            self.artifacts.shelf,
            token=cluster.token,
            study_id=self.study_id,
            hang_seconds=self.config.resources.hang_seconds,
        )
        scheduler = None
        if self.config.scheduler.name == "asha":
            scheduler = StudyASHA(
                self.config.scheduler, self.base.training.epochs, search.reference_numbers
            )
            scheduler.refill(self.study.get_trials(deepcopy=False))
        watch = None
        if self.config.trial.training.max_workers == 1:
            watch = ProgressWatch(self.study_id, workplace.hang_seconds)
        callback = StudyCallback(
            search, self._emit, workplace.trials_folder, watch, lambda: self._writer.disk_error
        )
        callbacks = [callback, WaitCallback(wait)]
        if watch is None:
            callbacks.append(Reaper(lambda number: self._trial_folder(number).drop_resumable()))
        # Our callback tells a trial's error in one line, and Tune's own files are not needed.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        # Tune's own folder is disposable: Optuna's storage and ours hold everything.
        with scratch_folder(self.folder / SCRATCH_NAME) as scratch:
            tuner = tune.Tuner(
                tune_trainable(self.config, workplace, cluster.capacity),
                tune_config=tune.TuneConfig(
                    search_alg=search,
                    scheduler=scheduler,
                    num_samples=-1,
                    max_concurrent_trials=at_a_time,
                    reuse_actors=self.config.trial.training.max_workers == 1,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(scratch),
                    callbacks=callbacks,
                    failure_config=tune.FailureConfig(max_failures=MAX_MACHINE_FAILURES),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    verbose=0,
                ),
            )
            with (
                giving_up(),
                lost_processes_are_failures(),
                saving_when_interrupted(
                    self.study_id, lambda: callback.running, self._tell_interruption
                ),
            ):
                tuner.fit()
                search.check_storage()

    def _tell_start(self, is_restored: bool) -> None:
        # Its trials carry their own settings; the base and the space stand in study.yaml.
        params = flattened(self.config.model_dump(mode="json", exclude={"trial", "space"}))
        tags = {"mlflow.note.content": f"drtune-ray study in {self.folder}"}
        self._emit(RunStarted(None, self.config.name, params, tags))
        self._emit(FilesReady(None, str(self.folder / RECORD_FILE), "study"))
        for trial in self.study.get_trials(deepcopy=False):
            if not trial.state.is_finished():
                continue
            if is_restored:  # what the lost spool held
                trial_config = json.loads(trial.user_attrs.get(CONFIG, "{}"))
                self._emit(run_started(trial, trial_config))
            # Told again because a killed driver may not have come to it; twice changes nothing.
            self._emit(run_finished(trial))

    def _tell_interruption(self) -> None:
        if self._is_interruption_told:
            return
        self._is_interruption_told = True
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING:
                self._emit(RunFinished(trial.number, "INTERRUPTED", "interrupted", {}, {}))
        self._emit(RunFinished(None, "INTERRUPTED", "interrupted", {}, {}))

    def _finish(self, tables: Tables) -> StudyResult:
        trials = self._summaries()
        write_trials(list(trials), self.folder / TRIALS_NAME)
        self.artifacts.keep(TRIALS_NAME)
        self._emit(FilesReady(None, str(self.folder / TRIALS_NAME), "trials"))
        try:
            winner = best_trial(trials)
        except NoTrialCompleted:
            self._emit(RunFinished(None, "FAIL", "no trial completed", {}, {}))
            raise
        self._write_winner(winner, tables)
        self._emit(FilesReady(None, str(self.folder / WINNER_NAME), WINNER_NAME))
        self._keep_top_checkpoints(trials)
        assert winner.best_val_accuracy is not None
        self._emit(
            RunFinished(
                None,
                "COMPLETE",
                "completed",
                {"best_val_accuracy": winner.best_val_accuracy},
                {"drtune.winner": str(winner.number)},
            )
        )
        self.artifacts.keep(WINNER_NAME)
        (self.folder / DONE_NAME).write_text(str(len(self._finished())))
        self.artifacts.keep(DONE_NAME)
        return self._result(0, was_done=False)

    def _write_winner(self, winner: TrialSummary, tables: Tables) -> None:
        write_winner(
            self.folder / WINNER_NAME,
            self._best_weights(winner.number),
            tables.backbone,
            tables.classes,
            TrialConfig.from_mapping(winner.config),
            {
                "study": self.config.name,
                "study_id": self.study_id,
                "trial": winner.number,
                "val_accuracy": winner.best_val_accuracy,
                "chosen": "maximum validation accuracy over the completed trials, one seed each",
            },
        )

    def _keep_top_checkpoints(self, trials: Sequence[TrialSummary]) -> None:
        ranked = sorted(
            (t for t in trials if t.state == TrialState.COMPLETE.name),
            key=lambda t: (-(t.best_val_accuracy or 0.0), t.number),
        )
        for trial in ranked[: self.config.tracking.num_top_checkpoints]:
            best = self._best_weights(trial.number)
            self._emit(FilesReady(trial.number, str(best), "checkpoint"))

    def _best_weights(self, number: int) -> Path:
        with as_problem(self.artifacts.uri):
            return self._trial_folder(number).fetch_best()

    def _free_disk(self, event: Event) -> None:
        """A finished trial keeps its best weights only."""
        if isinstance(event, RunFinished) and event.state != "INTERRUPTED":
            if event.number is not None:
                folder = self._trial_folder(event.number)
                folder.drop_resumable()
                has_failed = event.state == TrialState.FAIL.name
                clear_stacks(folder.path, has_failed=has_failed)

    def _trial_folder(self, number: int) -> TrialFolder:
        return trial_folder(self.folder / TRIALS_FOLDER, number, self.artifacts.trials)

    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=RESULT_STATES)

    def _summaries(self) -> tuple[TrialSummary, ...]:
        return tuple(summary(trial) for trial in self.study.get_trials(deepcopy=False))

    def _result(self, num_unsent: int, *, was_done: bool) -> StudyResult:
        trials = self._summaries()
        return StudyResult(
            self.folder,
            self.study_id,
            trials,
            best_trial(trials),
            num_unsent,
            was_done,
            self._searched(),
            time.monotonic() - self.started,
        )

    def _searched(self) -> tuple[str, ...]:
        return tuple(parameter.path for parameter in self.space.parameters)


def _fan_out(*sinks: Sink | None) -> Sink:
    """Every observer gets every event; one that fails does not stop the study."""

    def emit(event: Event) -> None:
        for sink in sinks:
            if sink is None:
                continue
            try:
                sink(event)
            except Exception:  # observers never steer a run
                logger.warning("an observer failed on %s", event.kind, exc_info=True)

    return emit
