"""What a study will cost: simulated epochs, budgets, finalists, sizes; and a real preview."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drtune_ray.config.study import StudyConfig
from drtune_ray.data.table_store import TableStore
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.capacity import Demand
from drtune_ray.preview import measure
from drtune_ray.preview.estimate import SIDE_BY_SIDE, Preview, _paces_of_trials, _slowdown
from drtune_ray.preview.measure import Measured, Measurement, measured
from drtune_ray.preview.sample import planned_tables, prepared_sample
from drtune_ray.preview.simulate import (
    ORDER_CORRELATION,
    Pace,
    Simulated,
    Spread,
    random_curves,
    simulated,
    simulated_studies,
    spread,
)
from drtune_ray.search.proposals import FixedTrial
from drtune_ray.study.inputs import check_inputs
from drtune_ray.study.machine import Machine
from drtune_ray.study.tables import prepare
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.reports import COMPLETED, EpochReport, SavePoint
from drtune_ray.values import nested, to_yaml
from tests.execution.test_scheduler import CURVES
from tests.small import prepared, small_trial, small_values, write_coloured

COMMAND = Path(sys.executable).with_name("drtune-ray")
NO_FINALS = {"finalists.num_seeds": 0}


def study(values: dict[str, Any]) -> StudyConfig:
    given = {"name": "s", "trial.data.train": "images", "reference_trials": ()}
    return StudyConfig.from_mapping(nested(given | values))


def run(
    config: StudyConfig, curves: list[list[float]], at_a_time: int = 1, seconds_before: float = 0.0
) -> Simulated:
    paces = [Pace(0.5, 1.0)] * len(curves)
    generator = np.random.default_rng(0)
    return simulated(config, np.array(curves), paces, at_a_time, generator, seconds_before)


def test_asha_by_hand_with_a_reference_that_runs_to_its_end():
    # As in test_scheduler.py: the trials after the reference get 4, 1, 4, 2 and 4 epochs.
    asha = {"scheduler.min_epochs": 1, "scheduler.reduction_factor": 2}
    config = study({"trials": 6, "reference_trials": ("default",)} | asha | NO_FINALS)
    found = run(config, [CURVES[number] for number in range(6)])
    assert found == Simulated(6, 19, 6 * 0.5 + 19, 0, 0, 0.0)


def test_the_users_own_points_come_before_the_references():
    given = {"start_with": ({"a": 1},), "reference_trials": ("default",), "trials": 3}
    asha = {"scheduler.min_epochs": 1, "scheduler.reduction_factor": 2}
    config = study(given | asha | NO_FINALS)
    # Number 1 is the reference: the worst, and not stopped; number 2 is stopped at its rung.
    assert run(config, [[0.9, 0.9], [0.1, 0.1], [0.2, 0.3]]).search_epochs == 2 + 2 + 1


def test_trials_run_side_by_side():
    config = study({"trials": 3, "scheduler.name": "none"} | NO_FINALS)
    found = run(config, [[0.1, 0.2]] * 3, at_a_time=2)
    assert (found.search_epochs, found.search_seconds) == (6, 5.0)


@pytest.mark.parametrize(("max_epochs", "epochs"), [(4, 5), (5, 6), (7, 8)])
def test_a_budget_of_epochs_ends_those_that_run_at_their_next_epoch(max_epochs, epochs):
    values = {"trials": 4, "scheduler.name": "none", "budget.max_epochs": max_epochs}
    found = run(study(values | NO_FINALS), [[0.1, 0.2, 0.3]] * 4, at_a_time=2)
    assert found.search_epochs == epochs
    assert found.num_trials == (2 if max_epochs == 4 else found.num_trials)


def test_a_budget_of_seconds_counts_what_was_over_before():
    values = {"trials": 4, "scheduler.name": "none", "budget.max_seconds": 4.0}
    found = run(study(values | NO_FINALS), [[0.1, 0.2, 0.3]] * 4, seconds_before=2.0)
    assert (found.num_trials, found.search_epochs, found.search_seconds) == (1, 2, 2.5)


@pytest.mark.parametrize(
    ("of_ce_tuning", "num_finalists"), [(0.1, 3), (0.75, 2)], ids=["it is added", "it is among"]
)
def test_finalists_are_the_best_and_ce_tuning_on_each_seed(of_ce_tuning, num_finalists):
    values = {
        "trials": 4,
        "scheduler.name": "none",
        "reference_trials": ("ce_tuning",),
        "finalists.num_configurations": 2,
        "finalists.num_seeds": 3,
    }
    found = run(study(values), [[of_ce_tuning] * 2, [0.8] * 2, [0.7] * 2, [0.6] * 2], at_a_time=2)
    assert found.final_trials == 3 * num_finalists
    assert found.final_epochs == 2 * found.final_trials
    assert found.final_seconds == 2.5 * -(-found.final_trials // 2)


def test_without_a_scheduler_nothing_varies():
    config = study({"trials": 5, "trial.training.epochs": 3, "scheduler.name": "none"} | NO_FINALS)
    found = simulated_studies(config, [Pace(0.0, 1.0)] * 5, 2)
    assert spread([one.epochs for one in found]) == Spread(15.0, 15.0, 15.0)


@pytest.mark.parametrize("name", ["asha", "median"])
def test_early_stopping_saves_epochs_and_the_same_seed_gives_the_same(name):
    config = study({"trials": 12, "trial.training.epochs": 9, "scheduler.name": name} | NO_FINALS)
    found = simulated_studies(config, [Pace(0.0, 1.0)] * 12, 2)
    epochs = spread([one.epochs for one in found])
    assert 12 * 2 < epochs.low <= epochs.mean <= epochs.high < 12 * 9
    assert found == simulated_studies(config, [Pace(0.0, 1.0)] * 12, 2)


def test_curves_rise_and_keep_most_of_their_order():
    curves = random_curves(5000, 4, np.random.default_rng(0))
    assert (np.diff(curves, axis=1) >= 0).all()
    assert np.corrcoef(curves[:, 1], curves[:, 3])[0, 1] == pytest.approx(
        ORDER_CORRELATION, abs=0.1
    )


# ---- tables


def test_planned_tables_are_those_that_are_prepared(tmp_path, weights_file):
    values = small_values(write_coloured(tmp_path / "images"), weights_file)
    trial, storage = small_trial(values), tmp_path / "storage"
    checked = check_inputs(trial, storage)
    planned = planned_tables(checked, [trial], storage, "cpu")
    assert not any(table.exists for table in planned)
    with TableStore(storage, trial.data.cache_limit_gib) as store:
        prepare(checked, trial, store, "cpu")
    written = {path.name: path for path in (storage / "cache").iterdir() if path.is_file()}
    assert {t.name for t in planned} == {n for n in written if not n.endswith(".seal")}
    for table in planned:
        assert table.num_bytes == pytest.approx(written[table.name].stat().st_size, abs=2**16)
    assert all(table.exists for table in planned_tables(checked, [trial], storage, "cpu"))


def test_sizes_by_hand_and_another_view_seed_shares_what_it_can(tmp_path, weights_file):
    values = small_values(write_coloured(tmp_path / "images"), weights_file)
    trial = small_trial(values)
    checked = check_inputs(trial, tmp_path)
    configs = [trial, trial.with_values({"data.view_seed": 1})]
    tables = planned_tables(checked, configs, tmp_path, "cpu")
    sizes = [(table.kind, table.num_bytes) for table in tables if table.kind == "features"]
    assert sizes == [("features", 2 * checked.num_train * 256 * 4)] * 2
    assert [t.num_bytes for t in tables if t.kind == "views"] == [
        2 * checked.num_train * 3 * 32 * 32
    ] * 2
    assert sum(table.kind == "evaluation" for table in tables) == 1


def test_pixels_without_room_are_not_planned(tmp_path, weights_file):
    values = small_values(write_coloured(tmp_path / "images"), weights_file)
    trial = small_trial(values | {"data.cache_limit_gib": 0.0})
    kinds = {
        t.kind for t in planned_tables(check_inputs(trial, tmp_path), [trial], tmp_path, "cpu")
    }
    assert kinds == {"images", "backbone", "features"}


def test_a_sample_says_what_a_row_takes(tmp_path, weights_file):
    values = small_values(write_coloured(tmp_path / "images"), weights_file)
    trial = small_trial(values)
    checked = check_inputs(trial, tmp_path)
    sample = prepared_sample(checked, [trial], tmp_path / "t", "cpu", with_pixels=True)
    assert sample.num_train == checked.num_train  # so few are all taken
    tables = planned_tables(checked, [trial], tmp_path, "cpu")
    assert sample.seconds(tables) == pytest.approx(
        sum(sample.row_seconds[table.kind] * table.num_rows for table in tables)
    )
    with TableStore(tmp_path, 1.0) as store:
        prepare(checked, trial, store, "cpu")
    assert sample.seconds(planned_tables(checked, [trial], tmp_path, "cpu")) == 0.0


# ---- trials


@pytest.fixture
def measured_with(tmp_path, weights_file):
    """Measure one small trial with these settings."""

    def run(settings: dict[str, Any], threads: int = 1, slowdown: float = 1.0) -> Measured:
        values = small_values(write_coloured(tmp_path / "images"), weights_file)
        trial = small_trial(values | settings)
        tables = prepared(trial, tmp_path / "storage")[2]
        return measured([trial], tables, threads, "cpu", slowdown).trials[0]

    return run


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_sizes_are_those_of_the_files_of_a_trial(measured_with, tmp_path, weights_file, precision):
    settings = {"training.precision": precision, "training.epochs": 1}
    found = measured_with(settings)
    trial = small_trial(small_values(tmp_path / "images", weights_file) | settings)
    data, backbone, _ = prepared(trial, tmp_path / "storage")
    folder = TrialFolder(tmp_path / "trial")
    for report in train_epochs(trial, data, backbone):
        report.save(folder)
    (checkpoint,) = folder.path.glob("epoch-*")
    assert found.checkpoint_bytes == pytest.approx(checkpoint.stat().st_size, rel=0.01)
    # The file's own bytes, about 300 a tensor, count in weights as small as these.
    assert 0 <= folder.best.stat().st_size - found.best_bytes < 2**16


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_what_a_training_takes_by_hand(measured_with, monkeypatch):
    clock = Clock()

    def save(folder: TrialFolder) -> None:
        clock.now += 0.5
        folder.save({}, 1, 1)

    def two_epochs(*_: object, **__: object) -> Iterator[EpochReport | SavePoint]:
        clock.now += 7.0  # builds the trial and fills its bank
        for seconds, validation_seconds, outcome in ((0.5, 4.0, None), (0.25, 3.0, COMPLETED)):
            for _step in range(4):
                clock.now += seconds
                yield SavePoint(0, 0, save, lambda: None)
            clock.now += validation_seconds
            yield EpochReport(None, (), None, outcome, save, lambda: None)

    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "train_epochs", two_epochs)
    found = measured_with({}, slowdown=2.0)
    assert found.begin_seconds == 2 * (7.0 + 0.5 - 0.25)  # less a settled step
    assert (found.step_seconds, found.validation_seconds) == (2 * 0.25, 2 * 3.0)
    assert found.save_seconds == 2 * 0.5


def test_threads_are_those_of_before(measured_with):
    before = torch.get_num_threads()
    measured_with({"training.epochs": 1}, threads=before + 1)
    assert torch.get_num_threads() == before


def test_a_training_that_takes_long_is_cut_and_its_validation_derived(measured_with, monkeypatch):
    monkeypatch.setattr(measure, "MAX_SECONDS", 0.0)
    found = measured_with({"training.batch_size": 4})
    assert found.validation_seconds == pytest.approx(
        measure.VALIDATION_SHARE * found.step_seconds * 9 / 4  # 9 images
    )
    assert min(found.save_seconds, found.checkpoint_bytes, found.best_bytes) > 0


def test_a_training_that_diverges_at_once_is_measured(measured_with):
    found = measured_with({"optim.backbone_lr": 1e30})
    assert min(found.step_seconds, found.save_seconds, found.checkpoint_bytes) > 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"), "9 bytes"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_what_cannot_be_trained_here_is_refused(measured_with, monkeypatch, error, reason):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(measure, "train_epochs", fail)
    with pytest.raises(EnvironmentProblem, match=f"cannot be trained here: .*{reason}$") as caught:
        measured_with({})
    assert caught.value.exit_code == 3


def test_what_exceeds_the_free_memory_is_an_error_not_the_end_of_the_process(monkeypatch):
    monkeypatch.setattr(measure, "free_memory", lambda: 2**26)
    with measure._memory_limit(is_wanted=True):
        torch.empty(2**24, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.empty(2**30, dtype=torch.uint8)
    torch.empty(2**30, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("gpus", "num_trials", "num_workers", "slowdown"),
    [
        (0, 1, 1, 1.0),
        (0, 2, 1, SIDE_BY_SIDE),
        (0, 1, 2, SIDE_BY_SIDE),
        (0.5, 1, 1, 1.0),
        (0.5, 4, 1, 2.0),
        (0.3, 2, 1, 2.0),
        (1, 2, 1, SIDE_BY_SIDE),
    ],
)
def test_workers_slow_each_other_down(gpus, num_trials, num_workers, slowdown):
    assert _slowdown(Demand(num_workers, 1, gpus), num_trials) == slowdown


def test_a_size_that_the_system_does_not_report_is_refused(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 7 kB\n")
    assert measure.reported_bytes(str(tmp_path / "meminfo"), "MemTotal") == 7 * 1024
    with pytest.raises(EnvironmentProblem, match="meminfo does not report MemAvailable"):
        measure.reported_bytes(str(tmp_path / "meminfo"), "MemAvailable")


# ---- the whole


def test_references_have_paces_of_their_own_and_other_trials_the_base_s(make_trial):
    base = make_trial({})
    other = base.with_values({"method.name": "ce_tuning"})
    references = [FixedTrial("default", base), FixedTrial("ce_tuning", other)]
    config = study({"trials": 4, "reference_trials": ("default", "ce_tuning")})
    paces = [Pace(1.0, 2.0), Pace(3.0, 4.0)]
    found = _paces_of_trials(config, [base, other], paces, references)
    assert found == [paces[i] for i in (0, 1, 0, 0)]


@pytest.fixture
def preview() -> Preview:
    config = study({"trials": 4, "tracking.num_top_checkpoints": 3})
    return Preview(
        config,
        trials_at_a_time=2,
        studies=(Simulated(4, 20, 30.0, 2, 10, 12.0), Simulated(4, 30, 50.0, 2, 10, 12.0)),
        measurement=Measurement((Measured(1.0, 0.25, 0.5, 0.125, 3000.0, 1000.0),), 2**30, 0),
        paces=(Pace(1.5, 1.625),),
        steps_per_epoch=4.0,
        fixed_seconds=10.0,
        prepare_seconds=5.0,
        final_fit_seconds=3.0,
        tables=(),
        machine=Machine(2, 0),
        memory_bytes=3 * 2**30,
        local_trials=2,
        notes=("a note",),
    )


def test_totals(preview):
    assert preview.seconds.mean == 40 + 12 + 10 + 5 + 3
    assert preview.checkpoint_bytes == 6 * 1000 + 2 * 2 * 3000
    assert preview.kept_bytes == (6 + 3 + 2) * 1000
    assert preview.workers_in_memory == 3


def test_lines_for_people(preview):
    from drtune_ray.display.preview import preview_lines

    title, note, *lines = preview_lines(preview)
    assert title.startswith("Preview of study 's': ")
    assert note == "  a note"
    assert lines == [
        "  Trials      4 (0 reference trials, 4 sampled), then 2 trainings of finalists on 2 new "
        "seeds",
        "  Epochs      about 25 (20 to 30 in 9 of 10 cases) in the search with asha (40 without), "
        "10 of finalists, and the final fit",
        "  Step        250 ms; an epoch 1.6 s (4 steps, validation, checkpoint): measured with 1 "
        "process at a time, 1 thread each",
        "  Time        about 1 min 10 s (1 min 1 s to 1 min 19 s in 9 of 10 cases), 2 trials at a "
        "time",
        "              of it 10 s to start and end, 5 s to prepare images and features, 3 s at "
        "most for the final fit",
        "  Memory      1.0 GiB a worker",
        "  Disk        17.6 KiB of checkpoints at most (one is 2.9 KiB, best weights 1000 B); "
        "10.7 KiB stay",
        "              0 B of prepared images and features, 0 B of them new",
        "  Machine     2 CPUs, no GPU, 3.0 GiB of free memory: holds 2 trials at a time",
    ]


def test_facts_are_documented(preview):
    from drtune_ray.display.preview import preview_facts

    documented = (Path(__file__).parents[2] / "docs/json.md").read_text()
    assert [key for key in preview_facts(preview) if f"`{key}`" not in documented] == []


def drtune_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(
        [str(COMMAND), *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.slow
def test_a_preview_of_small_images(tmp_path, weights_file):
    values = small_values(write_coloured(tmp_path / "images"), weights_file)
    content = {
        "name": "small",
        "storage": str(tmp_path / "studies"),
        "trials": 5,
        "trial": nested(values | {"training.epochs": 4}),
        "resources": {"trials_at_a_time": 2},
        "finalists": {"num_seeds": 1},
    }
    file = tmp_path / "study.yaml"
    file.write_text(to_yaml(content))
    done = drtune_ray("preview", str(file), "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["kind"] == "preview"
    assert found["num_trials"] == {"mean": 5.0, "low": 5.0, "high": 5.0}
    assert 5 * 2 <= found["search_epochs"]["low"] <= found["search_epochs"]["high"] <= 5 * 4
    assert 8 <= found["final_epochs"]["low"] <= found["final_epochs"]["high"] <= 12
    assert found["steps_per_epoch"] == 4
    assert len(found["epoch_seconds"]) == 3  # default, as the base; CE-tuning and authors
    assert 0 < found["step_seconds"] < found["epoch_seconds"][0] < found["seconds"]["low"]
    assert found["checkpoint_bytes"] > found["best_bytes"] > 0
    assert 2**27 < found["peak_bytes"] < 2**33
    assert not (tmp_path / "studies").exists()
