from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from drtune_ray.errors import CheckpointError
from drtune_ray.training.checkpoint import (
    MAGIC,
    TrialFolder,
    read_checkpoint,
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
    with pytest.raises(Exception, match="Weights only load failed"):
        read_checkpoint(tmp_path / "a.ckpt")


# ---- a trial's folder


def test_trial_folder__empty_and_missing(folder: TrialFolder) -> None:
    assert folder.newest() is None
    folder.drop_resumable()
    assert not folder.path.exists()
    folder.path.mkdir(parents=True)
    assert folder.newest() is None


def test_trial_folder__newest_two_are_kept(folder: TrialFolder) -> None:
    points = [(0, 3), (1, 0), (1, 12), (2, 0), (10, 0), (10, 5)]
    for number, (epoch, step) in enumerate(points):
        folder.save(state(number), epoch, step)
        assert_same(folder.newest(), state(number))
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
    assert_same(read_checkpoint(folder.best), state(8))
    assert_same(folder.newest(), state(3))
    folder.drop_resumable()
    assert names_in(folder.path) == ["best.ckpt"]
    assert folder.newest() is None
    assert_same(read_checkpoint(folder.best), state(8))


def test_trial_folder__leftover_of_a_killed_writer_is_ignored(folder: TrialFolder) -> None:
    folder.save(state(1), 1, 0)
    for name in (".epoch-00002-step-0000000.ckpt.tmp", ".best.ckpt.tmp"):
        (folder.path / name).write_bytes(MAGIC + b"half")
    assert_same(folder.newest(), state(1))
    folder.save(state(2), 2, 0)  # the same name again
    assert_same(folder.newest(), state(2))
    assert ".epoch-00002-step-0000000.ckpt.tmp" not in names_in(folder.path)


@pytest.mark.parametrize("how", ["half", "one bit"])
def test_trial_folder__torn_newest_falls_back_and_says_so(
    folder: TrialFolder, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    folder.save(state(1), 1, 0)
    folder.save(state(2), 2, 0)
    torn = folder.path / "epoch-00002-step-0000000.ckpt"
    torn.write_bytes(damaged(torn.read_bytes(), how))
    with caplog.at_level(logging.WARNING):
        assert_same(folder.newest(), state(1))
    assert [record.getMessage() for record in caplog.records] == [
        f"checkpoint {torn} is torn (its checksum differs): remove it; the one before it is used"
    ]


def test_trial_folder__going_on_after_a_torn_one(folder: TrialFolder) -> None:
    folder.save(state(1), 1, 0)
    folder.save(state(2), 2, 500)
    (folder.path / "epoch-00002-step-0000500.ckpt").write_bytes(MAGIC)
    # The trial goes on from epoch 1 and saves at an earlier step than the torn one's.
    folder.save(state(3), 2, 100)
    assert_same(folder.newest(), state(3))


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
