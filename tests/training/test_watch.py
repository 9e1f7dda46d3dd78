from __future__ import annotations

import pytest
import torch

from drtune_ray.training.distributed import ProcessGroup
from drtune_ray.training.step_signals import LAG, StepSignals


def test_on_a_cpu_a_broken_step_is_known_at_once() -> None:
    watch = StepSignals(ProcessGroup())
    for _ in range(3):
        watch.add(torch.tensor(True))
        assert not watch.has_diverged()
    watch.add(torch.tensor(False))
    assert watch.has_diverged()
    watch.add(torch.tensor(True))
    assert watch.has_diverged()  # and never forgotten


def test_a_wish_to_save_is_settled_once() -> None:
    signals = StepSignals(ProcessGroup())
    for wish, expected in [(False, False), (True, True), (False, False)]:
        signals.add(torch.tensor(True), wish)
        assert signals.take_save() is expected
        assert not signals.take_save()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_an_accelerator_it_is_known_a_few_steps_later_or_when_waited_for() -> None:
    watch = StepSignals(ProcessGroup())
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch.add(torch.ones((), device="cuda") < 0)
        assert not watch.has_diverged()
        for _ in range(LAG):
            watch.add(torch.ones((), device="cuda") > 0)
        assert watch.has_diverged()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    other = StepSignals(ProcessGroup())
    other.add(torch.ones((), device="cuda") < 0)
    assert other.has_diverged(wait=True)
