from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from drtune_ray.config.metric import METRICS
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import CheckpointError
from drtune_ray.training.checkpoint import (
    IDENTITY,
    MAGIC,
    TrialFolder,
    check_best,
    read_checkpoint,
    recorded_identity,
    trial_identity,
    write_checkpoint,
)


def state(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    return {
        "encoder": {"weight": torch.randn(5, 3, generator=generator)},
        "random_state": generator.get_state(),
        "labels": torch.arange(number),
        "progress": {"epoch": number, "losses": [0.1, float("inf")], "outcome": None},
        "names": ("cat", "dog"),
    }


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    else:
        assert found == expected
        assert type(found) is type(expected)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> TrialFolder:
    return TrialFolder(tmp_path / "trials" / "00007")


# ---- one file


def test_write_checkpoint__round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.ckpt"
    write_checkpoint(path, state(3))
    assert_same(read_checkpoint(path), state(3))
    assert names_in(path.parent) == ["a.ckpt"]
    content = path.read_bytes()
    payload = content[len(MAGIC) + 65 :]
    assert content.startswith(MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n")


def test_write_checkpoint__failed_writer_leaves_the_former_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, state(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, state(2))
    assert_same(read_checkpoint(path), state(1))
    assert names_in(tmp_path) == ["a.ckpt"]  # a full disk is not made fuller


def test_write_checkpoint__two_writers_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two nodes that lost sight of each other may write the same epoch at the same time.
    path, replace = tmp_path / "a.ckpt", Path.replace

    def replace_after_the_other(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        write_checkpoint(path, state(2))
        return self.replace(target)

    monkeypatch.setattr(Path, "replace", replace_after_the_other)
    write_checkpoint(path, state(1))
    assert_same(read_checkpoint(path), state(1))
    assert names_in(tmp_path) == ["a.ckpt"]


def test_write_checkpoint__is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append("fsync")
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        calls.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_checkpoint(tmp_path / "a.ckpt", state(1))
    assert calls == ["fsync", "replace", "fsync"]  # file, name, folder


def damaged(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    return {
        "last byte missing": content[:-1],
        "half": content[:middle],
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "in the checksum": content[:30] + b"!" + content[31:],
        "header only": content[: len(MAGIC)],
        "more behind": content + b"\0",
    }[how]


@pytest.mark.parametrize(
    "how",
    ["last byte missing", "half", "one bit", "in the checksum", "header only", "more behind"],
)
def test_read_checkpoint__torn(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, state(2))
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == (f"checkpoint {path} is torn (its checksum differs): remove it")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 of torch.save", MAGIC[:-1], b"\0" * 500])
def test_read_checkpoint__foreign(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == f"{path} is not a drtune-ray checkpoint: remove it"


def test_read_checkpoint__torch_file(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(state(1), path)
    with pytest.raises(CheckpointError, match="is not a drtune-ray checkpoint"):
        read_checkpoint(path)


def test_read_checkpoint__missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a.ckpt")
    assert str(caught.value) == (
        f"cannot read checkpoint {tmp_path}/a.ckpt: No such file or directory"
    )


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def test_read_checkpoint__runs_no_code(tmp_path: Path) -> None:
    # A sound checksum says who wrote the bytes down, not who chose them.
    write_checkpoint(tmp_path / "a.ckpt", {"attack": Attack()})
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_read_checkpoint__holds_a_mapping(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.ckpt", [1, 2])  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        read_checkpoint(tmp_path / "a.ckpt")


# ---- a trial's folder


def stamped(number: int, identity: str | None = None) -> dict[str, Any]:
    """What a folder gives back of `state(number)`."""
    return state(number) | {"trial": identity}


def test_trial_folder__empty_and_missing(folder: TrialFolder) -> None:
    assert folder.newest() is None
    assert folder.begin("mine") is None
    folder.drop_resumable()
    assert not folder.path.exists()
    folder.path.mkdir(parents=True)
    assert folder.newest() is None


def test_trial_folder__newest_two_are_kept(folder: TrialFolder) -> None:
    points = [(0, 3), (1, 0), (1, 12), (2, 0), (10, 0), (10, 5)]
    for number, (epoch, step) in enumerate(points):
        folder.save(state(number), epoch, step)
        assert_same(folder.newest(), stamped(number))
        assert len(names_in(folder.path)) == min(number + 1, 2)
    assert names_in(folder.path) == [
        "epoch-00010-step-0000000.ckpt",
        "epoch-00010-step-0000005.ckpt",
    ]


def test_trial_folder__best_is_apart(folder: TrialFolder) -> None:
    folder.save_best(state(9))
    for number in range(4):
        folder.save(state(number), number, 0)
    folder.save_best(state(8))
    assert_same(read_checkpoint(folder.best), stamped(8))
    assert_same(folder.newest(), stamped(3))
    folder.drop_resumable()
    assert names_in(folder.path) == ["best.ckpt"]
    assert folder.newest() is None
    assert_same(read_checkpoint(folder.best), stamped(8))


@pytest.mark.parametrize("when", ["begin", "drop_resumable"])
def test_trial_folder__leftovers_of_killed_writers_are_removed(
    folder: TrialFolder, when: str
) -> None:
    folder.save(state(1), 1, 0)
    for name in (".epoch-00002-step-0000000.ckpt.0a1b.tmp", ".best.ckpt.2c3d.tmp"):
        (folder.path / name).write_bytes(MAGIC + b"half")
    assert_same(folder.newest(), stamped(1))
    if when == "begin":
        folder.begin("mine")
    else:
        folder.drop_resumable()
    assert [name for name in names_in(folder.path) if name.endswith(".tmp")] == []


def test_write_checkpoint__killed_writer_leaves_what_begin_removes(folder: TrialFolder) -> None:
    """A real kill -9 between the first byte and the name."""
    script = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from drtune_ray.training.checkpoint import TrialFolder\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "TrialFolder(Path(sys.argv[1])).save({'weight': torch.zeros(9)}, 2, 0)\n"
    )
    folder.begin("mine")
    folder.save(state(1), 1, 0)
    killed = subprocess.run([sys.executable, "-c", script, str(folder.path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(names_in(folder.path)) == 2
    assert_same(folder.begin("mine"), stamped(1, "mine"))
    assert names_in(folder.path) == ["epoch-00001-step-0000000.ckpt"]


@pytest.mark.parametrize("how", ["half", "one bit"])
def test_trial_folder__torn_newest_falls_back_and_says_so(
    folder: TrialFolder, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    folder.save(state(1), 1, 0)
    folder.save(state(2), 2, 0)
    torn = folder.path / "epoch-00002-step-0000000.ckpt"
    torn.write_bytes(damaged(torn.read_bytes(), how))
    with caplog.at_level(logging.WARNING):
        assert_same(folder.newest(), stamped(1))
    assert [record.getMessage() for record in caplog.records] == [
        f"checkpoint {torn} is torn (its checksum differs); the one before it is used"
    ]


def test_trial_folder__going_on_after_a_torn_one(folder: TrialFolder) -> None:
    folder.save(state(1), 1, 0)
    folder.save(state(2), 2, 500)
    (folder.path / "epoch-00002-step-0000500.ckpt").write_bytes(MAGIC)
    # The trial goes on from epoch 1 and saves at an earlier step than the torn one's.
    folder.save(state(3), 2, 100)
    assert_same(folder.newest(), stamped(3))


def test_trial_folder__all_torn_starts_again(
    folder: TrialFolder, caplog: pytest.LogCaptureFixture
) -> None:
    for epoch in (1, 2):
        folder.save(state(epoch), epoch, 0)
    for path in folder.path.iterdir():
        path.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert folder.newest() is None
    assert len(caplog.records) == 2


def test_trial_folder__foreign_checkpoint_is_refused_by_name(
    folder: TrialFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.begin("mine")
    folder.save(state(1), 1, 0)
    other = TrialFolder(folder.path.with_name("00008"))
    other.begin("another")
    for epoch in (4, 5):
        other.save(state(epoch), epoch, 0)
        name = f"epoch-{epoch:05d}-step-0000000.ckpt"
        (other.path / name).rename(folder.path / name)
    with caplog.at_level(logging.WARNING):
        assert_same(folder.begin("mine"), stamped(1, "mine"))
    assert [record.getMessage() for record in caplog.records] == [
        f"checkpoint {folder.path}/epoch-{epoch:05d}-step-0000000.ckpt belongs to another trial or "
        "configuration; the one before it is used"
        for epoch in (5, 4)
    ]
    # Of later epochs by their names: they would push out those that are saved next.
    folder.save(state(2), 2, 0)
    assert_same(folder.begin("mine"), stamped(2, "mine"))


def test_trial_folder__starting_over_after_torn_ones_keeps_what_it_saves(
    folder: TrialFolder,
) -> None:
    folder.begin("mine")
    for epoch in (8, 9):
        folder.save(state(epoch), epoch, 0)
    for path in folder.path.iterdir():
        path.write_bytes(b"")
    assert folder.begin("mine") is None
    folder.save(state(1), 0, 3)
    assert_same(folder.begin("mine"), stamped(1, "mine"))


def test_trial_folder__does_not_start_over_because_of_a_disk_that_cannot_be_read(
    folder: TrialFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.begin("mine")
    folder.save(state(1), 1, 0)

    def broken(self: Path) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", broken)
        with pytest.raises(OSError, match="Input/output error"):
            folder.begin("mine")
    assert_same(folder.begin("mine"), stamped(1, "mine"))


# ---- whose it is


def identity(values: dict[str, Any], *of_what: str) -> str:
    base = {"data": {"train": "images"}}
    return trial_identity(TrialConfig.from_mapping(base).with_values(values), *of_what)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.workers", 3),
        ("data.train", "/mnt/images"),
        ("data.cache_limit_gib", 1.0),
        ("backbone.weights", "/mnt/weights.pth"),
        ("backbone.weights_key", "ema"),
        ("backbone.allow_missing", True),
        ("training.save_every_seconds", 5.0),
    ],
)
def test_trial_identity__places_and_workers_may_change(path: str, value: Any) -> None:
    assert identity({path: value}, "00007") == identity({}, "00007")


def test_trial_identity__is_that_of_checkpoints_from_before_settings_were_added() -> None:
    assert identity({}, "00007") == "2242e8fc8c8027b4"  # as the package wrote it before


def test_trial_identity__all_that_decides_results_is_in_it() -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({}, "00007"),
        ({}, "00008"),
        ({"seed": 1}, "00007"),
        ({"training.epochs": 99}, "00007"),
        ({"training.batch_size": 16}, "00007"),
        ({"method.calibration.rotation_rank": 5}, "00007"),
        ({"data.views": 3}, "00007"),
        ({"backbone.mean": [0.4, 0.4, 0.4], "backbone.std": [0.2, 0.2, 0.2]}, "00007"),
    ]
    assert len({identity(*change) for change in changes}) == len(changes)


# ---- the weights that are handed over


ACCURACY, F1 = METRICS["val_accuracy"], METRICS["macro_f1"]


def best_of(identity: str, accuracy: float) -> dict[str, Any]:
    record = {"epoch": 2, "metrics": {"best_val_accuracy": accuracy}}
    return {"model": {}, "record": record, IDENTITY: identity}


def test_check_best__the_right_ones(tmp_path: Path) -> None:
    check_best(best_of("mine", 0.75), tmp_path, "mine", ACCURACY, 0.75)
    check_best(best_of("mine", 0.75), tmp_path, None, ACCURACY, 0.75)
    without_validation = best_of("mine", 0.75) | {"record": {"epoch": 2, "metrics": {}}}
    check_best(without_validation, tmp_path, "mine", ACCURACY, None)
    by_f1 = {"record": {"epoch": 2, "metrics": {"best_val_macro_f1": 0.5}}}
    check_best(best_of("mine", 0.75) | by_f1, tmp_path, "mine", F1, 0.5)


@pytest.mark.parametrize(
    ("best", "reason"),
    [
        (best_of("other", 0.75), "they are of another trial or configuration"),
        (best_of("mine", 0.5), "their validation accuracy is 0.5, and 0.75 is recorded"),
        (best_of("mine", 0.75) | {"record": {"metrics": {}}}, "their validation accuracy is nan"),
        ({"method": {}, IDENTITY: "mine"}, "it is another kind of checkpoint"),
    ],
)
def test_check_best__others_are_refused(tmp_path: Path, best: dict[str, Any], reason: str) -> None:
    path = tmp_path / "best.ckpt"
    with pytest.raises(CheckpointError) as caught:
        check_best(best, path, "mine", ACCURACY, 0.75)
    assert str(caught.value).startswith(
        f"{path} does not hold the weights of its trial's best epoch: {reason}"
    )
    assert "; bring the right file back from MLflow (checkpoint/best.ckpt" in str(caught.value)


def test_recorded_identity__of_a_configuration_that_lacks_a_newer_setting() -> None:
    config = TrialConfig.from_mapping({"data": {"train": "images"}})
    former = config.to_mapping()
    del former["optim"]["momentum"]
    assert recorded_identity(config.to_mapping(), "a") == trial_identity(config, "a")
    assert recorded_identity(former, "a") != trial_identity(config, "a")
