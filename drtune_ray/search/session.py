"""Joining or starting Ray, quietly, and leaving it as it was found."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drtune_ray.config import ResourcesConfig
from drtune_ray.errors import EnvironmentProblem

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of users must keep their meaning
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C must leave trials unfinished, not stopped
    "TUNE_WARN_THRESHOLD_S": "30",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Train's controller looks at its workers every two seconds unless told otherwise.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
}

# Workers hold their CPUs in a placement group of their own; a CPU for the process that waits for
# them would be lost. A cluster may declare this resource; where it does not, a small share does.
TRIAL_DRIVER = "trial_driver"
DRIVER_CPUS = 0.01
MAX_LOCAL_DRIVERS = 1000


@dataclass(frozen=True)
class Capacity:
    """What the cluster has in all, and whether it declares `TRIAL_DRIVER`."""

    num_cpus: float
    num_gpus: float
    has_trial_drivers: bool

    def driver_resources(self) -> dict[str, float]:
        """What a process takes that only waits for the workers of a trial."""
        return {TRIAL_DRIVER: 1.0} if self.has_trial_drivers else {"CPU": DRIVER_CPUS}


def set_environment() -> None:
    """Settings that Ray reads when it is imported; what the user set stays."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Workers may import the package from a checkout that is not installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)


@contextmanager
def ray_session(*, with_dashboard: bool = False) -> Iterator[Capacity]:
    """Join the cluster of ``RAY_ADDRESS``, or start one on this machine and stop it afterwards.

    Args:
        with_dashboard: Start the State API too, which cleans up after nested Ray Train workers.

    Raises:
        EnvironmentProblem: If the cluster cannot be reached.
    """
    set_environment()
    import ray

    joined = ray.is_initialized()
    try:
        if not joined and os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, logging_level="ERROR")
        elif not joined:
            ray.init(
                num_cpus=len(os.sched_getaffinity(0)),
                resources={TRIAL_DRIVER: float(MAX_LOCAL_DRIVERS)},
                include_dashboard=with_dashboard,
                log_to_driver=False,
                logging_level="ERROR",
            )
    except (ConnectionError, RuntimeError) as error:
        raise EnvironmentProblem(f"Ray cannot be started or reached: {error}") from None
    try:
        total = ray.cluster_resources()
        # Ray takes SIGTERM for itself when it starts.
        with signals_as_interrupt():
            yield Capacity(total.get("CPU", 0.0), total.get("GPU", 0.0), TRIAL_DRIVER in total)
    finally:
        if not joined:
            ray.shutdown()


def trials_that_fit(workers: int, resources: ResourcesConfig, capacity: Capacity) -> int:
    """How many trials of so many workers the cluster can hold at a time.

    Raises:
        EnvironmentProblem: If not even one fits, with the numbers.
    """
    cpus: float = resources.cpus_per_worker * workers
    gpus = resources.gpus_per_worker * workers
    if workers > 1:
        cpus += capacity.driver_resources().get("CPU", 0.0)
    if cpus > capacity.num_cpus or gpus > capacity.num_gpus:
        raise EnvironmentProblem(
            f"a trial takes {cpus:g} CPUs and {gpus:g} GPUs ({workers} workers with "
            f"{resources.cpus_per_worker} CPUs and {resources.gpus_per_worker:g} GPUs each) but "
            f"there are {capacity.num_cpus:g} CPUs and {capacity.num_gpus:g} GPUs: lower "
            "training.workers, resources.cpus_per_worker or resources.gpus_per_worker"
        )
    fitting = int(capacity.num_cpus // cpus)
    return min(fitting, int(capacity.num_gpus // gpus)) if gpus else fitting


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """SIGTERM and Ctrl-C both become KeyboardInterrupt and leave a resumable study.

    Whatever error an interruption causes on its way, it is an interruption that is reported.
    """
    was_interrupted = False

    def interrupt(signum: int, frame: Any) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        raise KeyboardInterrupt

    try:
        former = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are the caller's
        yield
        return
    try:
        yield
    except Exception as error:
        if was_interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards, and cleared first if a driver was killed."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
