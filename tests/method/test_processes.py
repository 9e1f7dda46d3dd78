"""Several processes equal one; their double here is threads (gloo is tested with the trainer)."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from drtune_ray.method import CETuning
from drtune_ray.method.collective import Collective, Shard
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


class ThreadRank(Collective):
    """A `Collective` whose processes are threads: the double of `training.distributed`."""

    def __init__(self, rank, slots, barrier):
        self.rank, self.world_size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def sum(self, tensor):
        return torch.stack(self._exchange(tensor)).sum(0)

    def gather_rows(self, rows, shares):
        assert len(rows) == shares[self.rank]
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


# Rows of each step in each process: uneven, and processes without any.
SHARES = {
    "even": [(2, 2)] * 4,
    "uneven": [(3, 1), (1, 3), (2, 1), (1, 1)],
    "one idle": [(3, 0), (0, 2), (4, 0), (1, 0)],
    "three": [(2, 1, 1), (0, 3, 1), (1, 1, 1), (0, 0, 2)],
    "four": [(1, 1, 1, 1), (2, 0, 1, 1), (0, 0, 0, 1), (3, 1, 0, 0)],
}
METHODS = {
    "kept": {"options": KEPT},
    "authors": {"options": AUTHORS},
    "plain means": {"options": KEPT | {"confidence_weighting": False}},
    "recentred": {"options": KEPT | {"translation": False, "recenter": True}},
    "mean": {"options": KEPT, "reduction": "mean"},
    "none": {"options": None},
}
NUM_WARM = 8


def blocks(num_rows, num_parts):
    bounds = [num_rows * at // num_parts for at in range(num_parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def run_alone(shares, bank_size, num_warm, **arguments):
    """What each step gives in one process, with the calibrated rows, and the bank at the end."""
    images, labels = make_data(sum(map(sum, shares)))
    method = warmed_up(num_warm, bank_size=bank_size, weight=0.7, **arguments)
    return _steps(method, [sum(share) for share in shares], images, labels), bank_of(method)


def run_together(shares, bank_size, num_warm, **arguments):
    """The same of every process; the last one's encoder turns only by its own gradients."""
    num_ranks = len(shares[0])
    images, labels = make_data(sum(map(sum, shares)))

    def run(collective):
        method = make_method(bank_size=bank_size, weight=0.7, collective=collective, **arguments)
        warm_images, warm_labels = make_data(num_warm, seed=9)
        parts = blocks(num_warm, num_ranks)
        mine = parts[collective.rank]
        counts = [part.stop - part.start for part in parts]
        method.warm_up(warm_images[mine], warm_labels[mine], None, counts)
        return _steps(method, shares, images, labels, collective.rank), bank_of(method)

    return run_ranks(num_ranks, run)


def _steps(method, shares, images, labels, rank=None):
    found, start, calibrated = [], 0, []
    if method.calibration is not None:
        method.calibration.register_forward_hook(lambda *call: calibrated.append(call[-1]))
    for share in shares:
        if rank is None:
            rows, counts, total = slice(start, start + share), None, share
        else:
            first = start + sum(share[:rank])
            rows = slice(first, first + share[rank]) if share[rank] else slice(0, 1)
            counts, total = share, sum(share)
        step = run_step(method, images[rows], labels[rows], None, counts)
        if calibrated:
            step["calibrated"] = calibrated.pop()
            step["rotation"] = method.calibration.applied_rotation.matrix()
        found.append(step)
        start += total
    return found


def bank_of(method):
    return dict(zip(("pretrained", "downstream", "labels"), method.bank.rows(), strict=True))


def differences(shares, bank_size=7, num_warm=NUM_WARM, **arguments):
    """{name: largest difference of a step, or of the bank} between one process and several."""
    expected, bank = run_alone(shares, bank_size, num_warm, **arguments)
    ranks = run_together(shares, bank_size, num_warm, **arguments)
    found = {}
    for at, step in enumerate(expected):
        parts = [steps[at] for steps, _ in ranks]
        if "calibrated" in step:
            rows = torch.cat([part.pop("calibrated") for part in parts])
            found[f"calibrated {at}"] = _gap(rows, step.pop("calibrated"))
        mean = mean_of(parts)
        assert mean.keys() == step.keys()
        found |= {f"{name} {at}": _gap(mean[name], step[name]) for name in step}
    for rank, (_, own) in enumerate(ranks):
        found |= {f"bank {name} of {rank}": _gap(own[name], bank[name]) for name in bank}
    return found


def _gap(found, expected):
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) if expected.numel() else 0.0


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("arguments", METHODS.values(), ids=METHODS)
def test_several_processes_equal_one(shares, arguments):
    """In loss, parts, gradients, R, calibrated rows, bank; one without rows runs a spare one."""
    found = differences(shares, **arguments)
    assert max(found.values()) < 1e-9, {k: v for k, v in found.items() if v >= 1e-9}


@pytest.mark.parametrize("bank_size, num_warm", [(1, 1), (2, 2), (3, 0), (30, 2), (5, 5)])
def test_banks_smaller_than_a_batch_or_than_the_processes_or_filling(bank_size, num_warm):
    found = differences(SHARES["four"], bank_size, num_warm, options=KEPT)
    assert max(found.values()) < 1e-9, {k: v for k, v in found.items() if v >= 1e-9}


@pytest.mark.parametrize("shares", [SHARES[name] for name in ("uneven", "one idle", "four")])
@pytest.mark.parametrize("arguments", METHODS.values(), ids=METHODS)
def test_the_comparison_sees_a_wrong_order(monkeypatch, shares, arguments):
    gather = ThreadRank.gather_rows

    def reversed_ranks(self, rows, counts):
        gathered = gather(self, rows, counts)
        # Only the rows of the bank: the exchange of a class's maxima knows no order.
        return torch.cat(gathered.split(counts)[::-1]) if rows.dim() == 2 else gathered

    monkeypatch.setattr(ThreadRank, "gather_rows", reversed_ranks)
    assert max(differences(shares, **arguments).values()) > 1e-3


@pytest.mark.parametrize("shares", [SHARES[name] for name in ("uneven", "one idle", "four")])
@pytest.mark.parametrize("arguments", METHODS.values(), ids=METHODS)
def test_the_comparison_sees_a_wrong_weighting(monkeypatch, shares, arguments):
    """Each process divides by its part of the rows as if these were divided evenly, from above."""

    from_above = property(lambda shard: -(-shard.num_rows // len(shard.shares)))
    monkeypatch.setattr(Shard, "divisor", from_above)
    assert max(differences(shares, **arguments).values()) > 1e-3


@pytest.mark.parametrize("share", [(2, 2), (3, 1), (4, 0), (2, 1, 1), (1, 0, 0, 3)])
def test_ce_tuning_on_several_processes_equals_one(share):
    images, labels = make_data(4)
    expected = run_step(CETuning(make_encoder(0), make_head()), images, labels)

    def run(collective):
        method = CETuning(make_encoder(0), make_head())
        method.collective = collective
        first = sum(share[: collective.rank])
        num_rows = share[collective.rank]
        rows = slice(first, first + num_rows) if num_rows else slice(0, 1)
        return run_step(method, images[rows], labels[rows], None, share)

    assert_same(mean_of(run_ranks(len(share), run)), expected)


@pytest.mark.parametrize("shares", [None, [2], [2, 1, 1], [5, 0]])
def test_processes_must_know_their_shares(shares):
    class Two(Collective):
        world_size = 2

    images, labels = make_data(4)
    method = make_method(collective=Two())
    message = "shares is needed with 2 processes" if shares is None else "shares must hold one"
    with pytest.raises(ValueError, match=message):
        method(images, labels, None, shares)
