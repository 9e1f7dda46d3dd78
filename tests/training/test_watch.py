from __future__ import annotations

import pytest
import torch

from drtune_ray.training.distributed import ProcessGroup
from drtune_ray.training.watch import LAG, FiniteWatch


def test_on_a_cpu_a_broken_step_is_known_at_once() -> None:
    watch = FiniteWatch(ProcessGroup())
    for _ in range(3):
        watch.add(torch.tensor(True))
        assert not watch.has_diverged()
    watch.add(torch.tensor(False))
    assert watch.has_diverged()
    watch.add(torch.tensor(True))
    assert watch.has_diverged()  # and never forgotten


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_an_accelerator_it_is_known_a_few_steps_later_or_when_waited_for() -> None:
    watch = FiniteWatch(ProcessGroup())
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch.add(torch.ones((), device="cuda") < 0)
        assert not watch.has_diverged()
        for _ in range(LAG):
            watch.add(torch.ones((), device="cuda") > 0)
        assert watch.has_diverged()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    other = FiniteWatch(ProcessGroup())
    other.add(torch.ones((), device="cuda") < 0)
    assert other.has_diverged(wait=True)
