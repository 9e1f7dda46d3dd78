"""What a trial takes on this machine, by training for seconds in processes of their own.

`measured` starts as many of them as trials run side by side, since these share memory bandwidth,
and has them begin at the same moment. Each trains the given configurations one after another, as
a resident actor does: its peak memory is that of such an actor.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.training.backbones import Backbone, read_backbone
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.trial import Trial

MAX_SECONDS = 12.0  # of training one configuration; a step that was begun is finished
MIN_STEPS, MAX_EPOCHS = 3, 6
READY = "ready"


@dataclass(frozen=True)
class Workload:
    """What a measuring process is given.

    Attributes:
        tables: Plain values of `Tables`.
        trials: Plain values of the configurations, which all read these tables.
        num_threads: torch's.
        device: ``cpu`` or ``cuda``.
    """

    tables: dict[str, Any]
    trials: list[dict[str, Any]]
    num_threads: int
    device: str


@dataclass(frozen=True)
class Measured:
    """One configuration; seconds are those of one process among those that ran beside it.

    Attributes:
        begin_seconds: Building the trial and warming up its bank.
        step_seconds: Mean of a step, without the first ones.
        validation_seconds: Of a pass over the validation images of the tables.
        save_seconds: Of a checkpoint and the best weights.
        checkpoint_bytes: Of a checkpoint.
        best_bytes: Of the best weights.
    """

    begin_seconds: float
    step_seconds: float
    validation_seconds: float
    save_seconds: float
    checkpoint_bytes: float
    best_bytes: float


@dataclass(frozen=True)
class Measurement:
    """All of them.

    Attributes:
        trials: In the order in which they were given.
        start_seconds: From starting a process until it could begin to train.
        peak_bytes: Largest resident memory of a process; tables that it maps are in it.
        device_bytes: Largest memory of torch on a CUDA device; 0 on CPUs.
        num_processes: How many were measured side by side.
    """

    trials: tuple[Measured, ...]
    start_seconds: float
    peak_bytes: float
    device_bytes: float
    num_processes: int


def measured(workload: Workload, num_processes: int) -> Measurement:
    """Measure in several processes at the same time; means of their seconds, most of their bytes.

    Raises:
        EnvironmentProblem: If one cannot train, with what it said last.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="drtune-preview-")))
        (folder / "workload.json").write_text(json.dumps(asdict(workload)))
        started = time.monotonic()
        processes = [
            stack.enter_context(_process(folder, index, workload)) for index in range(num_processes)
        ]
        for index, process in enumerate(processes):
            if _line(process) != READY:
                raise _failure(folder, index)
        start_seconds = time.monotonic() - started
        for process in processes:
            _pipe(process.stdin).write("go\n")
            _pipe(process.stdin).flush()
        answers = [_line(process) for process in processes]
        for index, answer in enumerate(answers):
            if not answer:
                raise _failure(folder, index)
    found = [json.loads(answer) for answer in answers]
    return Measurement(
        tuple(_mean([one["trials"][at] for one in found]) for at in range(len(workload.trials))),
        start_seconds,
        max(one["peak_bytes"] for one in found),
        max(one["device_bytes"] for one in found),
        num_processes,
    )


@contextmanager
def _process(folder: Path, index: int, workload: Workload) -> Iterator[subprocess.Popen[str]]:
    """A measuring process, which is gone afterwards."""
    environment = {"OMP_NUM_THREADS": str(workload.num_threads)} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if workload.device == "cuda" and "CUDA_VISIBLE_DEVICES" not in os.environ:
        environment["CUDA_VISIBLE_DEVICES"] = str(index % max(1, torch.cuda.device_count()))
    command = [sys.executable, "-m", __name__, str(folder), str(index)]
    with (
        (folder / f"{index}.log").open("w") as log,
        subprocess.Popen(  # nosec B603 # this interpreter, this module, a folder of ours
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def _line(process: subprocess.Popen[str]) -> str:
    return _pipe(process.stdout).readline().strip()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _failure(folder: Path, index: int) -> EnvironmentProblem:
    said = (folder / f"{index}.log").read_text().strip().splitlines()
    reason = said[-1] if said else "it ended without a word, as a process that lacks memory does"
    return EnvironmentProblem(f"the base configuration cannot be trained here: {reason}")


def _mean(of_one: Sequence[Mapping[str, float]]) -> Measured:
    return Measured(**{key: statistics.fmean(one[key] for one in of_one) for key in of_one[0]})


def main(folder: Path, index: int) -> None:
    """The measuring process: says that it is ready, waits for a line, trains, answers in JSON."""
    # As a trial's process does: its seconds and its memory count.
    import ray.tune  # noqa: F401

    workload = Workload(**json.loads((folder / "workload.json").read_text()))
    torch.set_num_threads(workload.num_threads)
    tables, device = Tables.from_mapping(workload.tables), torch.device(workload.device)
    backbone = read_backbone(tables.backbone)
    print(READY, flush=True)
    sys.stdin.readline()
    found = []
    for at, values in enumerate(workload.trials):
        config = TrialConfig.from_mapping(values)
        data = TrainingData(tables, config.data, backbone.normalization.interpolation)
        where = TrialFolder(folder / f"{index}-{at}")
        found.append(asdict(_measure(config, data, backbone, device, where)))
    device_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = {"trials": found, "peak_bytes": peak_bytes, "device_bytes": device_bytes}
    print(json.dumps(answer), flush=True)


def _measure(
    config: TrialConfig,
    data: TrainingData,
    backbone: Backbone,
    device: torch.device,
    folder: TrialFolder,
) -> Measured:
    watch = _Watch(device)
    trial = Trial(config, data, backbone, device)
    trial.warm_up_bank()
    begin_seconds, started = watch.lap(), time.monotonic()
    steps: list[list[float]] = []
    validation, saves = [], []
    while len(steps) < min(MAX_EPOCHS, config.training.last_epoch):
        steps.append([])
        is_over = False
        for _ in trial.steps():
            steps[-1].append(watch.lap())
            is_over = time.monotonic() - started > MAX_SECONDS
            if is_over and sum(map(len, steps)) >= MIN_STEPS:
                break
        trial.finish_epoch()
        validation.append(watch.lap())
        if not trial.progress.history:  # it diverged at once: nothing to save, and no best epoch
            break
        trial.is_best = True  # so that the best weights are written too
        trial.save(folder)
        saves.append(watch.lap())
        if is_over or trial.progress.outcome is not None:
            break
    return Measured(
        begin_seconds,
        statistics.fmean(_settled(steps)),
        min(validation),
        statistics.median(saves or [0.0]),
        float(max((p.stat().st_size for p in folder.path.glob("epoch-*")), default=0)),
        float(folder.best.stat().st_size if folder.best.exists() else 0),
    )


def _settled(steps: list[list[float]]) -> list[float]:
    """Seconds of the steps without those in which torch settles: the first epoch, or its half."""
    whole = [second for epoch in steps[1:] for second in epoch]
    if len(whole) >= MIN_STEPS:
        return whole
    every = [second for epoch in steps for second in epoch]
    return every[len(every) // 2 :]


class _Watch:
    """Seconds between laps, with what the device still had to do."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._last = device, time.monotonic()

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        before, self._last = self._last, time.monotonic()
        return self._last - before


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
