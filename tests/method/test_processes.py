"""Several processes equal one; their double here is threads (gloo is tested with the trainer)."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from drtune_ray.method import CETuning
from tests.method.reference import AUTHORS
from tests.method.tiny import (
    KEPT,
    assert_same,
    make_data,
    make_encoder,
    make_head,
    make_method,
    run_step,
    warmed_up,
)


class ThreadRank:
    """A `Collective` whose processes are threads: the double of `training.distributed`."""

    def __init__(self, rank, slots, barrier):
        self.rank, self.world_size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def sum(self, tensor):
        return torch.stack(self._exchange(tensor)).sum(0)

    def gather_rows(self, rows):
        return torch.cat(self._exchange(rows))

    def broadcast(self, tensor):
        return self._exchange(tensor)[0].clone()

    def _exchange(self, tensor):
        self._slots[self.rank] = tensor
        self._barrier.wait()
        tensors = list(self._slots)
        self._barrier.wait()
        return tensors


def run_ranks(num_ranks, run):
    """`run` (collective) on every rank at once; the results in order."""
    slots, barrier = [None] * num_ranks, threading.Barrier(num_ranks, timeout=20)

    def guarded(rank):
        try:
            return run(ThreadRank(rank, slots, barrier))
        except Exception:
            barrier.abort()
            raise

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(guarded, range(num_ranks)))


def mean_of(steps):
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


@pytest.mark.parametrize(
    "shares", [[(2, 2)] * 4, [(3, 1), (1, 3), (2, 1), (1, 1)], [(3, 0), (0, 2), (4, 0), (1, 0)]]
)
@pytest.mark.parametrize("options", [KEPT, AUTHORS, None], ids=["kept", "authors", "none"])
def test_two_ranks_equal_one_process(shares, options):
    """In mean loss, mean gradients and bank; a rank without rows runs a spare one."""
    images, labels = make_data(20)
    alone = warmed_up(bank_size=7, options=options, weight=0.7)
    expected, start = [], 0
    for share in shares:
        rows = slice(start, start + sum(share))
        expected.append(run_step(alone, images[rows], labels[rows]))
        start += sum(share)

    def run(collective):
        method = make_method(bank_size=7, options=options, collective=collective)
        if method.calibration is not None:
            method.calibration.collective = collective
        warm_images, warm_labels = make_data(8, seed=9)
        mine = slice(0, 5) if collective.rank == 0 else slice(5, 8)
        method.warm_up_bank(warm_images[mine], warm_labels[mine])
        steps, start = [], 0
        for share in shares:
            first = start + sum(share[: collective.rank])
            num_rows = share[collective.rank]
            rows = slice(first, first + num_rows) if num_rows else slice(0, 1)
            steps.append(run_step(method, images[rows], labels[rows], None, num_rows))
            start += sum(share)
        return steps, method.bank.state_dict()

    (steps_0, bank_0), (steps_1, bank_1) = run_ranks(2, run)
    for step_0, step_1, step in zip(steps_0, steps_1, expected, strict=True):
        assert_same(mean_of([step_0, step_1]), step, atol=1e-9)
    state = alone.bank.state_dict()
    for bank in (bank_0, bank_1):
        assert bank["_extra_state"] == state["_extra_state"]
        for name in ("pretrained", "downstream", "labels"):
            torch.testing.assert_close(bank[name], state[name], rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("share", [(2, 2), (3, 1), (4, 0)])
def test_ce_tuning_on_two_ranks_equals_one_process(share):
    images, labels = make_data(4)
    expected = run_step(CETuning(make_encoder(0), make_head()), images, labels)

    def run(collective):
        method = CETuning(make_encoder(0), make_head(), collective=collective)
        num_rows = share[collective.rank]
        first = sum(share[: collective.rank])
        rows = slice(first, first + num_rows) if num_rows else slice(0, 1)
        return run_step(method, images[rows], labels[rows], None, num_rows)

    assert_same(mean_of(run_ranks(2, run)), expected)
