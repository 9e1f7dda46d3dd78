"""Several gloo processes train as one does: the bank is global, losses and weights are equal."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from drtune_ray.training.checkpoint import TrialFolder, read_checkpoint
from drtune_ray.training.distributed import ProcessGroup, any_process, gather_objects
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.watch import FiniteWatch
from tests.small import NORM_FREE, prepared, small_trial, small_values, write_coloured

pytestmark = pytest.mark.ddp

CASES = {
    # 28 images: batches of 9, 9, 9 and 1, so that one of two ranks has no row in the last.
    "a rank without rows": {"training.batch_size": 9},
    "odd last batch": {"training.batch_size": 11},
    "filling bank, live features": {"data.views": 0, "method.bank_size": 23},
    "K above N": {"method.bank_size": 400},
    "authors' reduction": {
        "method.reduction": "mean",
        "optim.backbone_lr": 0.005,
        "method.calibration.rotation_solver": "svd",
        "method.calibration.proper_rotation": True,
    },
    "rank above the rows": {"method.calibration.rotation_rank": 32},
    "ce_tuning": {"method.name": "ce_tuning", "training.batch_size": 9},
    "frozen BatchNorm": {"backbone.name": "test_efficientnet", "training.batch_size": 9},
}


def _join(rank: int, world_size: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


Job = tuple[dict[str, Any], Path]  # settings, folder of the trial


def _train(values: dict[str, Any], storage: Path, folder: Path) -> None:
    config = small_trial(values)
    data, backbone, _ = prepared(config, storage)
    for event in train_epochs(config, data, backbone, num_threads=1):
        event.save(TrialFolder(folder))


def _train_all(rank: int, world_size: int, port: int, jobs: list[Job], storage: Path) -> None:
    _join(rank, world_size, port)
    _check_collectives(rank)
    for values, folder in jobs:
        _train(values, storage, folder)
    dist.destroy_process_group()


def _check_collectives(rank: int) -> None:
    group = ProcessGroup()
    rows = torch.arange(3 * rank, dtype=torch.float64).unsqueeze(1)  # 0 rows and 3 rows
    assert group.gather_rows(rows).squeeze(1).tolist() == [0.0, 1.0, 2.0]
    assert group.gather_rows(rows + rank)[:1].tolist() == [[1.0]]
    assert group.sum(torch.tensor([float(rank + 1)])).item() == 3.0
    assert group.broadcast(torch.tensor([float(rank + 5)])).item() == 5.0
    assert gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    watch = FiniteWatch(group)
    watch.add(torch.tensor(True))
    assert not watch.has_diverged()
    watch.add(torch.tensor(rank == 0))  # broken on the other alone
    assert watch.has_diverged()
    assert any_process(rank == 1, torch.device("cpu"))
    assert not any_process(False, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, weights_file) -> Path:
    """Every case trained by one process and by two; both pairs of folders below one folder."""
    folder = tmp_path_factory.mktemp("distributed")
    images = write_coloured(folder / "images")
    jobs: list[Job] = []
    for name, changes in CASES.items():
        backbone = changes.get("backbone.name", NORM_FREE)
        precise = {"training.precision": "float64", "training.epochs": 5}
        values = small_values(images, weights_file, backbone) | precise | changes
        prepared(small_trial(values), folder)  # once, not by each process
        _train(values, folder, folder / "alone" / name)
        jobs.append((values, folder / "together" / name))
    mp.spawn(_train_all, (2, _free_port(), jobs, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(trained, name):
    folders = [trained / run / name for run in ("alone", "together")]
    alone, together = (TrialFolder(folder).newest() for folder in folders)
    assert alone is not None and together is not None
    histories = [state["progress"]["history"] for state in (alone, together)]
    steps = [[step for record in history for step in record["steps"]] for history in histories]
    assert len(steps[0]) == len(steps[1]) >= 15
    for one, two in zip(*steps, strict=True):
        assert one == pytest.approx(two, abs=1e-10)
    for state in (alone, together):  # only their product R is unique
        factors = [
            state["method"].pop(f"calibration.rotation_{s}", None) for s in ("left", "right")
        ]
        if factors[1] is not None:
            state["method"]["R"] = factors[0] @ factors[1].T
    for key, tensor in alone["method"].items():
        other = together["method"][key]
        if torch.is_tensor(tensor) and tensor.is_floating_point():
            torch.testing.assert_close(tensor, other, atol=1e-10, rtol=0, msg=key)
        else:  # labels, order and position of the bank
            assert torch.equal(tensor, other) if torch.is_tensor(tensor) else tensor == other
    accuracies = [[record["metrics"]["val_accuracy"] for record in h] for h in histories]
    assert accuracies[0] == accuracies[1]
    best = [read_checkpoint(folder / "best.ckpt")["record"]["epoch"] for folder in folders]
    assert best[0] == best[1]
