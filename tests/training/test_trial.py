"""A trial's own decisions: its layers, its numbers' precision, what it takes from a checkpoint."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from drtune_ray.training import trial as trial_module
from drtune_ray.training.model import derived_seed
from drtune_ray.training.saving import trial_state
from drtune_ray.training.trial import Trial, _amp_dtype
from tests.small import prepared, small_trial, small_values, write_coloured

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def make_trial(tmp_path_factory, weights_file):
    storage = tmp_path_factory.mktemp("storage")
    images = write_coloured(storage / "images", per_class=4)

    def make(backbone: str = "test_nfnet", **changes: Any) -> Trial:
        values = small_values(images, weights_file, backbone) | changes
        config = small_trial(values | {"training.batch_size": 4, "data.views": 0})
        data, encoder, _ = prepared(config, storage)
        return Trial(config, data, encoder, CPU)

    return make


@pytest.mark.parametrize("backbone", ["test_efficientnet", "resnet18"])
def test_synchronised_batch_norm_keeps_what_a_layer_computes(make_trial, backbone, monkeypatch):
    """timm's BatchNorm layers hold an activation, which torch's own conversion loses."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = make_trial(backbone).method.downstream_encoder
    monkeypatch.setattr(trial_module, "is_distributed", lambda: True)
    converted = make_trial(
        backbone, **{"training.batch_norm": "synchronised"}
    ).method.downstream_encoder
    assert any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in converted.modules())
    with torch.inference_mode():
        assert torch.equal(converted.eval()(images), plain.eval()(images))


# ---- resuming where the processes or their devices are others


def state_of(trial: Trial) -> dict[str, Any]:
    trial.warm_up_bank()
    return trial_state(trial)


def test_a_checkpoint_of_a_cpu_is_resumed_on_a_cuda_device(make_trial):
    trial = make_trial()
    state = state_of(trial)
    assert "cuda" not in state["random"][0] and state["scaler"] == {}
    trial.device = torch.device("cuda")  # its tensors stay: only what is restored matters here
    trial.updater.scaler = torch.amp.GradScaler("cpu", enabled=True)
    torch.manual_seed(7)
    with (
        mock.patch("torch.cuda.set_rng_state") as restored,
        mock.patch("torch.cuda.manual_seed_all") as seeded,
    ):
        trial.load_state(state)
    restored.assert_not_called()
    seeded.assert_called_once_with(derived_seed(0, "training", 0, 0, 0) % 2**32)
    assert torch.equal(torch.get_rng_state(), state["random"][0]["cpu"])


def test_a_cuda_devices_random_state_and_scale_are_restored_on_one(make_trial):
    trial = make_trial()
    state = state_of(trial)
    on_device = torch.ByteTensor([1, 2, 3])
    state["random"][0]["cuda"] = on_device
    state["scaler"] = torch.amp.GradScaler("cpu", enabled=True, init_scale=8.0).state_dict()
    with mock.patch("torch.cuda.set_rng_state") as restored:
        trial.load_state(state)  # on a CPU: what it has not it does not need
        restored.assert_not_called()
        trial.device = torch.device("cuda")
        trial.updater.scaler = torch.amp.GradScaler("cpu", enabled=True)
        trial.load_state(state)
    restored.assert_called_once_with(on_device, torch.device("cuda"))
    assert trial.updater.scaler.get_scale() == 8.0


def test_a_rank_that_the_checkpoint_does_not_know_draws_numbers_of_its_own(make_trial):
    trial = make_trial()
    state = state_of(trial)
    state["random"] *= 2
    state["progress"] |= {"epochs_done": 1, "steps_done": 2}
    drawn = {}
    for rank in range(5):
        trial.group = mock.Mock(rank=rank)
        trial.load_state(state)
        drawn[rank] = torch.rand(4).tolist()
    assert drawn[0] == drawn[1]  # as this checkpoint was made
    assert len({tuple(numbers) for numbers in drawn.values()}) == 4
    torch.manual_seed(derived_seed(0, "training", 4, 1, 2) % 2**32)
    assert torch.rand(4).tolist() == drawn[4]


# ---- precision


@pytest.mark.parametrize("is_native", [True, False])
def test_bfloat16_is_taken_only_where_the_device_computes_it(monkeypatch, is_native):
    """torch counts devices that emulate it as well unless it is told not to."""
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or is_native,
    )
    expected = torch.bfloat16 if is_native else torch.float16
    assert _amp_dtype("auto", torch.device("cuda")) == expected
    assert _amp_dtype("auto", CPU) is None
