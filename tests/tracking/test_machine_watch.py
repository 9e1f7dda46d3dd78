"""Load and energy of the machine, read from counters in files as Linux shows them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from drtune_ray.tracking.events import Event
from drtune_ray.tracking.machine_watch import (
    CPU_ENERGY,
    MachineWatch,
    cpu_counters,
    gpu_counters,
    used,
)
from drtune_ray.tracking.spool import Spool


def write_counter(folder: Path, name: str, microjoules: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("262143328850\n")


def test_cpu_counters__packages_alone_and_only_what_can_be_read(tmp_path: Path) -> None:
    write_counter(tmp_path / "intel-rapl:0", "package-0", 5_000_000)
    write_counter(tmp_path / "intel-rapl:1", "package-1", 7_500_000)
    write_counter(tmp_path / "intel-rapl:0:0", "core", 4_000_000)  # a part of package-0
    write_counter(tmp_path / "intel-rapl:2", "psys", 20_000_000)  # all of it
    write_counter(tmp_path / "intel-rapl:3", "package-3", 1)
    (tmp_path / "intel-rapl:3" / "energy_uj").unlink()
    assert cpu_counters(tmp_path) == {
        "intel-rapl:0": (5.0, pytest.approx(262143.32885)),
        "intel-rapl:1": (7.5, pytest.approx(262143.32885)),
    }
    assert cpu_counters(tmp_path / "missing") == {}


@pytest.mark.parametrize(
    ("before", "after", "joules"),
    [
        ({"a": (10.0, 100.0), "b": (1.0, 100.0)}, {"a": (15.0, 100.0), "b": (3.0, 100.0)}, 7.0),
        ({"a": (95.0, 100.0)}, {"a": (3.0, 100.0)}, 8.0),
        ({"a": (10.0, 100.0)}, {"a": (12.0, 100.0), "new": (50.0, 100.0)}, 2.0),
    ],
    ids=["two-devices", "began-anew", "another-device"],
)
def test_used__sums_what_each_counter_grew(before, after, joules) -> None:
    assert used(before, after) == pytest.approx(joules)


def test_machine_watch__samples_until_closed_and_counts_on(tmp_path: Path) -> None:
    spool, counter = Spool(tmp_path / "spool"), tmp_path / "powercap" / "intel-rapl:0"
    seen: list[Event] = []
    more = threading.Condition()

    def emit(event: Event) -> None:
        spool.append(event)
        with more:
            seen.append(event)
            more.notify_all()

    def wait_for(number: int) -> None:
        with more:
            assert more.wait_for(lambda: len(seen) >= number, 60)

    write_counter(counter, "package-0", 1_000_000)
    with MachineWatch(emit, spool, 0.1, counter.parent):
        wait_for(1)
        write_counter(counter, "package-0", 4_500_000)
        wait_for(3)
    with MachineWatch(emit, spool, 0.1, counter.parent):
        wait_for(len(seen) + 1)
    assert [event.step for event in seen] == list(range(1, len(seen) + 1))
    assert all(event.number is None for event in seen)
    assert sum(event.metrics[CPU_ENERGY] for event in seen) == pytest.approx(3.5)
    for event in seen:
        assert 0 <= event.metrics["system/cpu_utilization_percentage"] <= 100
        assert 0 < event.metrics["system/system_memory_usage_percentage"] < 100


def test_machine_watch__a_run_that_ends_at_once_has_no_sample(tmp_path: Path) -> None:
    seen: list[Event] = []
    with MachineWatch(seen.append, Spool(tmp_path / "spool")):
        pass
    assert seen == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_gpu_counters__none_without_a_gpu() -> None:
    assert gpu_counters() == {}
