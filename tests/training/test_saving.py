"""Checkpoints of an epoch are written while the next one trains, and nothing depends on when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from drtune_ray.folders import LocalFolder
from drtune_ray.training.checkpoint import TrialFolder, copied, read_checkpoint
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.reports import EpochReport, SavePoint
from drtune_ray.values import to_yaml
from tests.small import prepared, small_trial, small_values, write_coloured

ROOT = Path(__file__).parents[2]
ENDED = "epoch-00003-step-0000000.ckpt"


class LateFolder(TrialFolder):
    """Encodes a state only after the next epoch has begun."""

    def save(self, state: dict[str, Any], epoch: int, step: int) -> None:
        if epoch == 1:
            time.sleep(0.5)  # an epoch takes a tenth of a second
        super().save(state, epoch, step)


class HeldFolder(LocalFolder):
    """A disk that writes a resumable checkpoint only when it may."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.may_write, self.begun = threading.Event(), threading.Event()
        self.error: OSError | None = None

    def write(self, name: str, *parts: Any) -> None:
        if name.startswith("epoch-"):
            self.begun.set()
            assert self.may_write.wait(60)
            if self.error is not None:
                raise self.error
        super().write(name, *parts)


@pytest.fixture(scope="module")
def values(tmp_path_factory, weights_file) -> dict[str, Any]:
    images = write_coloured(tmp_path_factory.mktemp("coloured"))
    return small_values(images, weights_file) | {"optim.name": "adamw", "optim.backbone_lr": 0.001}


@pytest.fixture(scope="module")
def start(tmp_path_factory, values):
    config = small_trial(values)
    data, backbone, _ = prepared(config, tmp_path_factory.mktemp("storage"))

    def begin(**options: Any) -> Any:
        return train_epochs(config, data, backbone, num_threads=1, **options)

    return begin


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory) -> dict[str, Any]:
    """State at the end of a trial whose checkpoints were all written at once."""
    folder = TrialFolder(tmp_path_factory.mktemp("unbroken"))
    for event in start():
        event.save(folder)
        event.settle()
    return read_checkpoint(folder.path / ENDED)


@pytest.fixture
def held(tmp_path: Path) -> tuple[TrialFolder, HeldFolder]:
    disk = HeldFolder(tmp_path / "held")
    return TrialFolder(disk.path, disk), disk


def assert_equal_but_for_times(found: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected.keys() - {"seconds", "time_ms", "epoch_seconds"}:
            assert_equal_but_for_times(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for at, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal_but_for_times(*pair, f"{path}/{at}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
        assert found.stride() == expected.stride(), path
    else:
        assert found == expected, path


def test_the_next_epoch_trains_while_a_checkpoint_is_written(start, held) -> None:
    folder, disk = held
    reached: list[str] = []

    def requested() -> bool:
        # Called at every step: while the disk holds the checkpoint of the epoch before.
        if disk.begun.is_set() and not disk.may_write.is_set():
            reached.append("a step")
            disk.may_write.set()
        return False

    events = start(save_requested=requested)
    next(events).save(folder)
    assert not disk.begun.is_set()  # a trial that is stopped now need not have written it
    assert folder.best.exists()  # the report promises these weights
    next(events)
    assert reached == ["a step"]
    assert LocalFolder(disk.path).names() == ["best.ckpt", "epoch-00001-step-0000000.ckpt"]


def test_a_checkpoint_holds_the_epoch_that_it_is_named_after(start, tmp_path, unbroken) -> None:
    """Though it is written after more steps."""
    folder = LateFolder(tmp_path / "late")
    events = start()
    next(events).save(folder)
    next(events).save(folder)
    state = read_checkpoint(folder.path / "epoch-00001-step-0000000.ckpt")
    assert state["progress"]["epochs_done"] == len(state["progress"]["history"]) == 1
    events = start(resume=state)
    resumed = TrialFolder(tmp_path / "resumed")
    for event in events:
        event.save(resumed)
    found = read_checkpoint(resumed.path / ENDED)
    assert_equal_but_for_times(found, unbroken)


def test_the_end_and_save_points_wait_for_the_disk(start, tmp_path: Path, unbroken) -> None:
    folder = TrialFolder(tmp_path)
    requests = iter([False] * 5 + [True] + [False] * 20)
    for event in start(save_requested=lambda: next(requests)):
        event.save(folder)
        if isinstance(event, SavePoint):
            assert (tmp_path / "epoch-00001-step-0000002.ckpt").exists()
        elif event.outcome is not None:
            assert (tmp_path / ENDED).exists()
    assert isinstance(event, EpochReport)
    assert_equal_but_for_times(read_checkpoint(tmp_path / ENDED), unbroken)


@pytest.mark.parametrize("at", ["the end of the next epoch", "a save point", "a stop"])
def test_an_error_of_the_disk_reaches_the_trial(start, held, at: str) -> None:
    folder, disk = held
    disk.error = OSError(28, "No space left on device")
    disk.may_write.set()
    is_point = at == "a save point"
    events = start(save_requested=lambda: is_point and disk.begun.is_set())
    next(events).save(folder)
    event = next(events)
    with pytest.raises(OSError, match="No space left"):
        events.close() if at == "a stop" else event.save(folder)


def test_settle_writes_what_was_left_for_later(start, tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path)
    report = next(start())
    report.save(folder)
    assert folder.newest() is None
    report.settle()
    state = folder.newest()
    assert state is not None and state["progress"]["epochs_done"] == 1
    report.settle()  # once
    assert [path.name for path in sorted(tmp_path.glob("epoch-*"))] == [
        "epoch-00001-step-0000000.ckpt"
    ]


def test_copied__later_steps_change_nothing_and_strides_stay() -> None:
    weight = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {"a": {"weight": weight, "step": torch.tensor(1.0)}, "epoch": 3, "names": ["x"]}
    before = weight.clone()
    kept = copied(state)
    weight.zero_()
    state["a"]["step"] += 1  # type: ignore[index]
    assert torch.equal(kept["a"]["weight"], before)
    assert kept["a"]["weight"].stride() == weight.stride()
    assert (kept["a"]["step"].item(), kept["epoch"], kept["names"]) == (1.0, 3, ["x"])


KILLED = """
import os, signal, sys, time
from pathlib import Path
from drtune_ray.folders import LocalFolder
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.loop import train_epochs
from drtune_ray.values import read_yaml
from tests.small import prepared, small_trial

class Torn(LocalFolder):
    def write(self, name, *parts):
        if name == "epoch-00002-step-0000000.ckpt":
            # Half of it is in the temporary file when the process is gone.
            with (self.path / f".{name}.x.tmp").open("wb") as file:
                file.write(parts[0] + bytes(parts[1][:1000]))
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        super().write(name, *parts)

path = Path(sys.argv[1])
config = small_trial(read_yaml(path / "values.yaml"))
data, backbone, _ = prepared(config, path / "storage")
folder = TrialFolder(path / "trial", Torn(path / "trial"))
folder.begin("a trial")
for event in train_epochs(config, data, backbone, num_threads=1):
    event.save(folder)
"""


def test_killed_while_it_writes_a_trial_resumes_exactly(
    values, start, unbroken, tmp_path: Path
) -> None:
    (tmp_path / "values.yaml").write_text(to_yaml(values))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = TrialFolder(tmp_path / "trial")
    names = sorted(path.name for path in folder.path.iterdir())
    assert names == [
        ".epoch-00002-step-0000000.ckpt.x.tmp",
        "best.ckpt",
        "epoch-00001-step-0000000.ckpt",
    ]
    for event in start(resume=folder.begin("a trial")):
        event.save(folder)
    assert_equal_but_for_times(
        read_checkpoint(folder.path / ENDED), unbroken | {"trial": "a trial"}
    )
