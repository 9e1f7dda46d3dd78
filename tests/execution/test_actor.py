"""The resident actor keeps process and data, and nothing of a former trial."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from drtune_ray.config.trial import TrialConfig
from drtune_ray.execution import guard as guard_module
from drtune_ray.execution.resident_actor import TrialActor
from drtune_ray.execution.worker_context import WorkerContext
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.reports import COMPLETED, DIVERGED, ONE_IMAGE, OUT_OF_MEMORY
from tests.small import prepared, small_trial, small_values, write_coloured


def actor(context: WorkerContext, number: int, config: TrialConfig) -> TrialActor:
    """An actor without Ray around it."""
    made = TrialActor.__new__(TrialActor)
    made.setup(task(number, config), context)
    return made


def task(number: int, config: TrialConfig) -> dict[str, Any]:
    return {"number": number, "trial": json.dumps(config.to_mapping())}


def run_to_end(made: TrialActor) -> list[dict[str, Any]]:
    results = [made.step()]
    while not results[-1]["done"]:
        results.append(made.step())
    return results


def train_third(context: WorkerContext, configs: list[TrialConfig]) -> list[dict[str, Any]]:
    made = actor(context, 0, configs[0])
    run_to_end(made)
    for number, config in enumerate(configs[1:], start=1):
        assert made.reset_config(task(number, config))
        results = run_to_end(made)
    return results


@pytest.fixture
def context(tmp_path: Path, weights_file) -> tuple[WorkerContext, dict[str, Any]]:
    values = small_values(write_coloured(tmp_path / "images"), weights_file)
    trial = small_trial(values)
    _, _, tables = prepared(trial, tmp_path)
    place = WorkerContext(
        {trial.tables_key: tables.to_mapping()},
        tmp_path / "trials",
        1,
        "cpu",
        study_id="s",
        hang_seconds=60,
    )
    return place, values


def test_an_actor_that_is_not_told_to_step_leaves_the_trial_alone(context):
    """Tune gives the trial of an actor that starts slowly to another one."""
    place, values = context
    folder = place.folder(0).path
    folder.mkdir(parents=True)
    (folder / ".epoch-00001-step-0000000.ckpt.0a.tmp").write_bytes(b"being written by the other")
    made = actor(place, 0, small_trial(values))
    assert made.reset_config(task(1, small_trial(values)))
    run_to_end(made)
    assert [path.name[-7:] for path in folder.iterdir()] == [".0a.tmp"]
    assert made.reset_config(task(0, small_trial(values)))
    made.step()
    assert not list(folder.glob("*.tmp"))


def test_third_trial_equals_the_same_trial_in_a_fresh_process(context, tmp_path):
    """After a diverged trial and one of another K: the same losses and weights, bit for bit."""
    place, values = context
    wanted = small_trial(values)
    diverged = small_trial(values | {"optim.backbone_lr": 1e20})
    other = small_trial(values | {"method.bank_size": 7, "training.batch_norm": "local"})
    results = train_third(place, [diverged, other, wanted])
    assert results[-1]["outcome"] == COMPLETED

    fresh = tmp_path / "fresh"
    script = (
        "import sys, json, pickle\n"
        "from tests.execution.test_actor import actor, run_to_end\n"
        "place, config = pickle.load(open(sys.argv[1], 'rb'))\n"
        "run_to_end(actor(place, 2, config))\n"
    )
    import pickle
    from dataclasses import replace

    (tmp_path / "task").write_bytes(pickle.dumps((replace(place, trials_folder=fresh), wanted)))
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "task")],
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    states = [TrialFolder(folder / "00002").newest() for folder in (place.trials_folder, fresh)]
    assert states[0] is not None and states[1] is not None
    histories = [[record["steps"] for record in state["progress"]["history"]] for state in states]
    assert histories[0] == histories[1]
    for key, tensor in states[0]["method"].items():
        other_tensor = states[1]["method"][key]
        assert torch.equal(tensor, other_tensor) if torch.is_tensor(tensor) else True, key


def test_what_the_point_causes_comes_back_as_a_result(context, monkeypatch):
    place, values = context
    made = actor(place, 0, small_trial(values | {"optim.backbone_lr": 1e20}))
    (result,) = run_to_end(made)
    assert (result["outcome"], result["epoch"], result["history"]) == (DIVERGED, 0, "[]")

    def exhausted() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    made.reset_config(task(1, small_trial(values)))
    first = made.step()
    made._epochs = exhausted()
    last = made.step()
    assert (last["outcome"], last["done"]) == (OUT_OF_MEMORY, True)
    assert last["history"] == first["history"]


def test_a_batch_of_one_image_is_a_result_of_the_point(context):
    """A search reaches such batch sizes, of which only the base's is checked before."""
    place, values = context
    one = values | {"training.batch_norm": "local", "training.batch_size": 1}
    (result,) = run_to_end(actor(place, 0, small_trial(one)))
    assert (result["outcome"], result["epoch"]) == (ONE_IMAGE, 0)


def test_a_machine_failure_is_an_exception(context):
    place, values = context
    made = actor(place, 0, small_trial(values))

    def broken() -> Any:
        raise OSError("No space left on device")
        yield

    made._epochs = broken()
    with pytest.raises(OSError, match="No space left on device"):
        made.step()


def test_a_killed_trial_goes_on_and_tells_the_epochs_nobody_heard_of(context):
    place, values = context
    config = small_trial(values)
    first = actor(place, 4, config)
    first.step()  # its result is never read
    first._settle()  # the next epoch writes it; then the process dies
    result = actor(place, 4, config).step()
    assert result["epoch"] == 2
    assert [record["epoch"] for record in json.loads(result["history"])] == [1, 2]


def test_a_process_that_must_leave_between_two_epochs_writes_the_checkpoint_first(
    context, monkeypatch
):
    place, values = context
    made = actor(place, 6, small_trial(values))
    made.step()
    assert TrialFolder(place.trials_folder / "00006").newest() is None
    told = threading.Event()
    told.set()
    monkeypatch.setattr(guard_module, "_told_to_leave", told)
    with pytest.raises(guard_module.Preempted):
        made.step()
    state = TrialFolder(place.trials_folder / "00006").newest()
    assert state is not None and state["progress"]["epochs_done"] == 1


def test_killed_between_two_epochs_a_trial_repeats_the_one_that_was_not_written(context):
    place, values = context
    config = small_trial(values)
    first, again = (actor(place, 5, config).step() for _ in range(2))
    assert (first["epoch"], again["epoch"]) == (1, 1)
    of_first, of_again = (json.loads(result["history"])[0]["metrics"] for result in (first, again))
    drop = {"seconds"}
    assert {k: v for k, v in of_first.items() if k not in drop} == {
        k: v for k, v in of_again.items() if k not in drop
    }
