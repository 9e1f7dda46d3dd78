"""One training on Ray Train's workers, with its retries."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray.train
from ray.exceptions import RayActorError, RayError
from ray.train.torch import TorchTrainer

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.failures import failure_from
from drtune_ray.execution.interrupts import saving_when_interrupted
from drtune_ray.execution.placement_groups import remove_orphans
from drtune_ray.execution.ray_state import end_actor, train_controllers
from drtune_ray.execution.ray_train.trainer import build_trainer, logger, point_failed
from drtune_ray.execution.ray_train.worker_group import train_environment
from drtune_ray.execution.run_context import RunContext
from drtune_ray.execution.session import scratch_folder
from drtune_ray.tracking.events import MetricsRecorded, RunKey, Sink, StepsRecorded
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.model import ANOTHER_BATCH
from drtune_ray.training.reports import ONE_IMAGE, OUT_OF_MEMORY, EpochRecord

# Failures of a single training within one epoch. In a study, Tune counts them.
MAX_FAILURES = 2
CONTROLLER_END_SECONDS = 1.0


def fit(
    run: RunContext, config: TrialConfig, tables: Tables, folder: TrialFolder, *, key: RunKey
) -> dict[str, Any]:
    """Train one configuration on Ray Train, or resume it from its newest checkpoint.

    A training that the machine breaks is resumed from the last save, unless it fails repeatedly
    within one epoch.

    Args:
        run: Run of the study or training.
        config: Configuration to train, with its workers.
        tables: Tables of images and features.
        folder: Folder for its checkpoints.
        key: Run under which the epochs are recorded.

    Returns:
        The last result.

    Raises:
        EnvironmentProblem: If the workers failed more often than they are retried.
    """

    def start() -> TorchTrainer:
        return build_trainer(
            config,
            run.worker_context({config.tables_key: tables}),
            run.resources,
            folder,
            name=folder.path.name,
            scratch=scratch,
            queue=queue,
        )

    wait = run.resource_wait(config.training)

    def on_turn() -> None:
        run.artifacts.check_lease()
        wait.check()
        run.check_disk()

    with (
        _listening(run.emit, key) as (queue, epochs),
        scratch_folder(run.scratch) as scratch,
        controllers_ended(),
        saving_when_interrupted(run.study_id, lambda: [folder.path.name], run.on_interrupt),
        train_environment(run.resources, config.training),
    ):
        return _fit_until_it_ends(start, folder, epochs, on_turn)


def advice(outcome: str, config: TrialConfig) -> str:
    """Return what to do about a configuration that cannot be trained."""
    if outcome == OUT_OF_MEMORY:
        return (
            f"the GPU's memory does not hold this training: lower "
            f"training.batch_size={config.training.batch_size} or "
            f"data.image_size={config.data.image_size}, or add workers"
        )
    if outcome == ONE_IMAGE:
        return (
            f"training.batch_norm={config.training.batch_norm} cannot normalise a batch of one "
            f"image: {ANOTHER_BATCH}"
        )
    return (
        f"training {outcome}: lower optim.backbone_lr={config.optim.backbone_lr} or "
        f"method.head_lr_multiplier={config.method.head_lr_multiplier}"
    )


def _fit_until_it_ends(
    start: Callable[[], TorchTrainer],
    folder: TrialFolder,
    epochs: _Epochs,
    on_turn: Callable[[], None],
) -> dict[str, Any]:
    num_failures, num_emitted = 0, 0
    while True:
        try:
            result: dict[str, Any] = _fit_in_thread(start(), on_turn).return_value
            return result
        except (ray.train.TrainingFailedError, RayActorError) as error:  # the latter: controller
            if point := point_failed(error):
                return point.result()
            num_failures = num_failures + 1 if epochs.num_emitted == num_emitted else 1
            num_emitted = epochs.num_emitted
            failure = failure_from(error, folder.path)
            if num_failures > MAX_FAILURES:
                raise EnvironmentProblem(
                    f"the workers failed {num_failures} times within one epoch, last: "
                    f"{failure.outcome} ({failure.error}). Nothing that was saved is lost: the "
                    "same command resumes the training"
                ) from error
            logger.warning("training resumes from its last save: %s", failure.error)
            remove_orphans()  # they would compete with the next workers


class _Epochs:
    """Emits each epoch once: restarted workers send earlier epochs again."""

    def __init__(self, emit: Sink, key: RunKey) -> None:
        self._emit, self._key = emit, key
        self.num_emitted = 0

    def listen(self, queue: Any) -> None:
        # The queue of a run that was given up ends with its process or its cluster.
        with contextlib.suppress(RayError):
            while (records := queue.get()) is not None:
                for record in records:
                    if record.epoch > self.num_emitted:
                        self._emit_epoch(record)
                        self.num_emitted = record.epoch

    def _emit_epoch(self, record: EpochRecord) -> None:
        self._emit(MetricsRecorded(self._key, record.epoch, record.metrics, record.time_ms))
        first = (record.epoch - 1) * len(record.steps) + 1
        self._emit(StepsRecorded(self._key, first, record.steps, record.time_ms))


@contextlib.contextmanager
def _listening(emit: Sink, key: RunKey) -> Iterator[tuple[Any, _Epochs]]:
    """Emit the epochs that workers put into a queue; the listening thread ends with the block."""
    queue, epochs = _queue_here(), _Epochs(emit, key)
    listener = threading.Thread(target=epochs.listen, args=(queue,), daemon=True)
    listener.start()
    try:
        yield queue, epochs
    except BaseException:
        # Ray crashes if it shuts down while a thread waits for it.
        with contextlib.suppress(Exception):  # a cluster whose head is gone
            queue.shutdown(force=True)
        listener.join(timeout=CONTROLLER_END_SECONDS)
        raise
    queue.put(None)
    listener.join(timeout=30)
    queue.shutdown()


def _queue_here() -> Any:
    """Create a queue on this node, since a worker's node may be lost at any time."""
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


def _fit_in_thread(trainer: TorchTrainer, on_turn: Callable[[], None]) -> Any:
    """Call ``trainer.fit()`` in a thread: on the main one, Ray exits with code 0 on Ctrl-C."""
    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:  # raised again on the main thread
            outcome.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
        on_turn()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@contextlib.contextmanager
def controllers_ended() -> Iterator[None]:
    """End the training's Ray Train controllers if the block fails; they would train on unused."""
    former = train_controllers()
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # a cluster whose head is gone ends them itself
            _end(train_controllers() - former)
        raise


def _end(controllers: set[str]) -> None:
    for controller in controllers:
        end_actor(controller)
    deadline = time.monotonic() + CONTROLLER_END_SECONDS
    while time.monotonic() < deadline and (train_controllers() & controllers or remove_orphans()):
        time.sleep(0.1)
