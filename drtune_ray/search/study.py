"""run_study: a search from its configuration to its winner; the same call resumes it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from drtune_ray.config import StudyConfig, TrialConfig, flattened, reference_config
from drtune_ray.data.dataset import Tables
from drtune_ray.data.store import TableStore
from drtune_ray.errors import NoTrialCompleted
from drtune_ray.results.trials import TrialSummary, best_trial, summary, write_trials
from drtune_ray.results.winner import write_winner
from drtune_ray.search.actor import Workplace
from drtune_ray.search.callback import StudyCallback, run_finished
from drtune_ray.search.identity import (
    DONE_NAME,
    JOURNAL_NAME,
    RECORD_FILE,
    SCRATCH_NAME,
    SPLITS_NAME,
    SPOOL_NAME,
    STUDY,
    TRIALS_FOLDER,
    TRIALS_NAME,
    WINNER_NAME,
    deciding_values,
    driver_lease,
    open_record,
)
from drtune_ray.search.prepare import (
    Checked,
    check_device,
    check_inputs,
    data_root,
    prepare,
    write_manifest,
)
from drtune_ray.search.scheduler import StudyASHA
from drtune_ray.search.searcher import RESULT_STATES, Reference, StudySearch, build_sampler
from drtune_ray.search.session import (
    Capacity,
    ray_session,
    scratch_folder,
    signals_as_interrupt,
    trials_that_fit,
)
from drtune_ray.search.space import SearchSpace, read_space
from drtune_ray.search.trainables import tune_trainable
from drtune_ray.tracking.events import Event, FilesReady, RunFinished, RunStarted, Sink
from drtune_ray.tracking.mlflow_recorder import build_recorder
from drtune_ray.tracking.spool import BackgroundWriter, Spool

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


def run_study(
    config: StudyConfig,
    *,
    observer: Sink | None = None,
    on_plan: Callable[[StudyPlan], None] = lambda plan: None,
) -> StudyResult:
    """Search, or go on searching, and name the winner.

    Everything is checked before the first trial. Where a study of this name exists, its
    unfinished trials are resumed first, then new ones follow up to ``config.trials``.

    Args:
        config: The study.
        observer: Takes the events of the run as they happen.
        on_plan: Called with a `StudyPlan` before the first trial.

    Raises:
        ConfigError: For bad input, or a name taken by another configuration.
        EnvironmentProblem: If the machine cannot run a trial or another process drives the study.
        NoTrialCompleted: If all trials ran and none completed.
        KeyboardInterrupt: When interrupted; the study can be resumed by the same call.
    """
    check_device(config.resources)
    checked, space, references, notes = _check(config)
    # As it must be found again from any working directory.
    trial = config.trial.with_values({"data.train": str(data_root(config.trial.data))})
    config = config.model_copy(update={"space": _space_content(config), "trial": trial})
    values = config.to_mapping()
    deciding = deciding_values(values, checked.splits.content_digest(), checked.backbone.digest)
    with driver_lease(config.folder), signals_as_interrupt():
        record = open_record(config.folder, STUDY, values, deciding, config.tracking)
        write_manifest(checked.splits, config.folder / SPLITS_NAME)
        driver = _Driver(config, record.study_id, checked, space, references, notes)
        return driver.run(observer, on_plan)


def _check(
    config: StudyConfig,
) -> tuple[Checked, SearchSpace, tuple[Reference, ...], tuple[str, ...]]:
    found: list[SearchSpace] = []
    checked = check_inputs(
        config.trial,
        Path(config.storage).expanduser().resolve(),
        [lambda: found.append(SearchSpace.from_mapping(_space_content(config), config.trial))],
    )
    space, notes = found[0].clamped(checked.num_train)
    highest = checked.num_train
    references = []
    for name in config.reference_trials:
        trial = reference_config(config.trial, name)
        size = min(trial.method.bank_size, highest)
        references.append(Reference(name, trial.with_values({"method.bank_size": size})))
    return checked, space, tuple(references), (checked.summary(), *notes)


def _space_content(config: StudyConfig) -> dict[str, Any]:
    return read_space(config.space) if isinstance(config.space, str) else config.space


class _Driver:
    """One run of a study in this process."""

    def __init__(
        self,
        config: StudyConfig,
        study_id: str,
        checked: Checked,
        space: SearchSpace,
        references: tuple[Reference, ...],
        notes: tuple[str, ...],
    ) -> None:
        self.config, self.study_id, self.folder = config, study_id, config.folder
        self.checked, self.space, self.references = checked, space, references
        self.notes, self.started = notes, time.monotonic()
        self.storage = Path(config.storage).expanduser().resolve()
        self.study = open_optuna_study(self.folder, study_id)
        self.base = config.trial.with_values(
            {"method.bank_size": min(config.trial.method.bank_size, checked.num_train)}
        )

    def run(self, observer: Sink | None, on_plan: Callable[[StudyPlan], None]) -> StudyResult:
        if self._is_done():
            return self._result(Spool(self.folder / SPOOL_NAME).num_unsent(), was_done=True)
        spool = Spool(self.folder / SPOOL_NAME)
        recorder = build_recorder(self.config.tracking, self.storage, self.study_id)
        limit = self.config.trial.data.cache_limit_gib
        with BackgroundWriter(spool, recorder) as writer, TableStore(self.storage, limit) as store:
            self._emit = _fan_out(writer.emit, observer, self._free_disk)
            self._tell_start()
            try:
                device = "cuda" if self.config.resources.gpus_per_worker else "cpu"
                tables = prepare(self.checked, self.config.trial, store, device)
                if len(self._finished()) < self.config.trials:
                    self._search(tables, device, on_plan)
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

    def _search(self, tables: Tables, device: str, on_plan: Callable[[StudyPlan], None]) -> None:
        nested = self.config.trial.training.max_workers > 1
        with ray_session(with_dashboard=nested) as capacity:
            resources, workers = self.config.resources, self.config.trial.training.max_workers
            fitting = trials_that_fit(workers, resources, capacity)
            at_a_time = min(resources.trials_at_a_time or fitting, fitting)
            num_done = len(self._finished())
            on_plan(StudyPlan(self.config, num_done, at_a_time, self._searched(), self.notes))
            self._tune(tables, at_a_time, device, capacity)

    def _tune(self, tables: Tables, at_a_time: int, device: str, capacity: Capacity) -> None:
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
            device,
        )
        scheduler = None
        if self.config.scheduler.name == "asha":
            scheduler = StudyASHA(
                self.config.scheduler, self.base.training.epochs, search.reference_numbers
            )
            scheduler.refill(self.study.get_trials(deepcopy=False))
        # Tune's own folder is disposable: Optuna's storage and ours hold everything.
        with scratch_folder(self.folder / SCRATCH_NAME) as scratch:
            tuner = tune.Tuner(
                tune_trainable(self.config, workplace, capacity),
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
                    callbacks=[StudyCallback(self.study, self._emit)],
                    failure_config=tune.FailureConfig(max_failures=MAX_MACHINE_FAILURES),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    verbose=0,
                ),
            )
            tuner.fit()

    def _tell_start(self) -> None:
        # Its trials carry their own settings; the base and the space stand in study.yaml.
        params = flattened(self.config.model_dump(mode="json", exclude={"trial", "space"}))
        tags = {"mlflow.note.content": f"drtune-ray study in {self.folder}"}
        self._emit(RunStarted(None, self.config.name, params, tags))
        self._emit(FilesReady(None, str(self.folder / RECORD_FILE), "study"))
        for trial in self.study.get_trials(deepcopy=False):
            if not trial.state.is_finished():
                continue
            # Told again because a killed driver may not have come to it; twice changes nothing.
            self._emit(run_finished(trial))

    def _tell_interruption(self) -> None:
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING:
                self._emit(RunFinished(trial.number, "INTERRUPTED", "interrupted", {}, {}))
        self._emit(RunFinished(None, "INTERRUPTED", "interrupted", {}, {}))

    def _finish(self, tables: Tables) -> StudyResult:
        trials = self._summaries()
        write_trials(list(trials), self.folder / TRIALS_NAME)
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
        (self.folder / DONE_NAME).write_text(str(len(self._finished())))
        return self._result(0, was_done=False)

    def _write_winner(self, winner: TrialSummary, tables: Tables) -> None:
        write_winner(
            self.folder / WINNER_NAME,
            self._trial_folder(winner.number) / "best.ckpt",
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
            best = self._trial_folder(trial.number) / "best.ckpt"
            self._emit(FilesReady(trial.number, str(best), "checkpoint"))

    def _free_disk(self, event: Event) -> None:
        """A finished trial keeps its best weights only."""
        if isinstance(event, RunFinished) and event.state != "INTERRUPTED":
            if event.number is not None:
                from drtune_ray.training.checkpoint import TrialFolder

                TrialFolder(self._trial_folder(event.number)).drop_resumable()

    def _trial_folder(self, number: int) -> Path:
        return self.folder / TRIALS_FOLDER / f"{number:05d}"

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


def open_optuna_study(folder: Path, study_id: str) -> optuna.Study:
    """The Optuna study of a folder, made if there is none."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL_NAME))),
        study_name=study_id,
        direction="maximize",
        pruner=optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


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
