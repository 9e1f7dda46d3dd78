"""Load and energy of the machine that runs the command, as system metrics of its run in MLflow.

CPU, memory and GPUs are sampled by MLflow's own monitors, so that its page of system metrics shows
them under their usual names. Energy is added: MLflow records GPU power at moments, devices count
energy exactly.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pynvml

from drtune_ray.tracking.events import MetricsRecorded, Sink
from drtune_ray.tracking.spool import Spool
from drtune_ray.tracking.writer import BackgroundWriter, Recorder

logger = logging.getLogger(__name__)
PERIOD_SECONDS = 30.0
SHORTEST_SECONDS = 1.0  # of the last sample: the load of a moment says nothing
PREFIX = "system/"
CPU_ENERGY, GPU_ENERGY = f"{PREFIX}cpu_energy_joules", f"{PREFIX}gpu_energy_joules"
POWERCAP = Path("/sys/class/powercap")
Counters = dict[str, tuple[float, float]]  # by device: joules, and the largest value, or infinity


@contextmanager
def watched_writer(spool: Spool, recorder: Recorder) -> Iterator[BackgroundWriter]:
    """Send the events of a run in the background, samples of the machine among them."""
    with BackgroundWriter(spool, recorder) as writer, MachineWatch(writer.emit, spool):
        yield writer


class MachineWatch:
    """Samples the machine in a thread of its own, until closed.

    A sample has the means of its period, and the energy of the period. Its step is its number in
    the run, counted on by a command that resumes.

    Args:
        emit: Takes the events.
        spool: Spool of the run, which holds the samples of earlier commands.
        period_seconds: Time between two samples.
        powercap: Folder in which Linux shows the energy counters of CPUs.
    """

    def __init__(
        self,
        emit: Sink,
        spool: Spool,
        period_seconds: float = PERIOD_SECONDS,
        powercap: Path = POWERCAP,
    ) -> None:
        self._emit, self._period = emit, period_seconds
        self._step = 1 + max(map(_step, spool.events.events(MetricsRecorded.kind)), default=0)
        self._readers: dict[str, Callable[[], Counters]] = {
            CPU_ENERGY: lambda: cpu_counters(powercap),
            GPU_ENERGY: gpu_counters,
        }
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="machine", daemon=True)

    def __enter__(self) -> MachineWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._sample_until_closed()
        except Exception:  # an observer; the run continues
            logger.warning("system metrics are no longer recorded", exc_info=True)

    def _sample_until_closed(self) -> None:
        monitors = _monitors()
        last = {name: read() for name, read in self._readers.items()}
        started, is_closing = time.monotonic(), False
        while not is_closing:
            is_closing = self._closing.wait(self._period)
            if time.monotonic() - started < min(self._period, SHORTEST_SECONDS):
                return
            started = time.monotonic()
            metrics: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                metrics |= {PREFIX + k: float(v) for k, v in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            for name, read in self._readers.items():
                now = read()
                if now.keys() & last[name].keys():
                    metrics[name] = used(last[name], now)
                last[name] = now
            self._emit(MetricsRecorded(None, self._step, metrics))
            self._step += 1


def _step(event: Any) -> int:
    is_sample = event.number is None and any(name.startswith(PREFIX) for name in event.metrics)
    return int(event.step) if is_sample else 0


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics import cpu_monitor, gpu_monitor

    kinds: list[Any] = [cpu_monitor.CPUMonitor, gpu_monitor.GPUMonitor]
    psutil.cpu_percent()  # the load is that since the last call of this thread
    found = []
    for kind in kinds:
        with suppress(RuntimeError):  # no GPU of NVIDIA
            found.append(kind())
    return found


def used(before: Counters, after: Counters) -> float:
    """Return the joules between two readings of the same counters, over all devices.

    A counter that is smaller than before began anew at 0 once.
    """
    joules = 0.0
    for device in before.keys() & after.keys():
        (start, _), (end, largest) = before[device], after[device]
        if end < start:
            end += largest
        joules += max(0.0, end - start)
    return joules


def cpu_counters(powercap: Path = POWERCAP) -> Counters:
    """Return the energy of each CPU package, where Linux shows it to this user."""
    found = {}
    for folder in sorted(powercap.glob("intel-rapl:*")):  # AMD's too
        with suppress(OSError, ValueError):
            if (folder / "name").read_text().startswith("package"):  # others are parts of it
                energy = int((folder / "energy_uj").read_text()) / 1e6
                largest = int((folder / "max_energy_range_uj").read_text()) / 1e6
                found[folder.name] = energy, largest
    return found


def gpu_counters() -> Counters:
    """Return the energy of each GPU of NVIDIA since its driver was loaded."""
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        return dict(_gpu_counters(range(pynvml.nvmlDeviceGetCount())))
    return {}


def _gpu_counters(indices: Iterable[int]) -> Iterable[tuple[str, tuple[float, float]]]:
    for index in indices:
        with suppress(pynvml.NVMLError):  # before Volta
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            energy = pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3
            yield f"gpu{index}", (energy, float("inf"))
