"""What the plan reports of weights, before anything is computed with them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from drtune_ray.errors import ConfigError
from drtune_ray.execution.capacity import Capacity, Node
from drtune_ray.study.resolve import study_request, trial_request
from drtune_ray.study.result import StudyPlan
from drtune_ray.study.run import run_study
from drtune_ray.study.training_run import run_training
from drtune_ray.tracking.events import Event

CLUSTER = Capacity((Node(2, 0),), is_local=True)
LINES = [
    "2 classes; 12 to train, 4 to validate, 4 sealed for the test; test_vit: all of the encoder's "
    "weights loaded, matched by name; 2 tensors of the file unused (head.bias, head.weight); taken "
    "from ema, not from model (backbone.weights_key=model takes that instead)",
    "images per class: cat 10, dog 10",
    "normalization: mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5], timm's for test_vit.r160_in1k, "
    "since the file records none: set backbone.mean and backbone.std if it was trained with others",
]


class Nowhere:
    """A recorder that forgets, in place of MLflow."""

    def record(self, event: Event) -> None:
        pass

    def record_metrics(self, events: object) -> None:
        pass

    def lacks_study(self) -> bool:
        return False


@pytest.fixture(autouse=True)
def no_cluster_and_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drtune_ray.study.run._cluster", lambda config: nullcontext(CLUSTER))
    ready = "drtune_ray.study.training_run.ready_cluster"
    monkeypatch.setattr(ready, lambda *arguments, **options: nullcontext(CLUSTER))
    for module in ("driver", "training_run"):
        name = f"drtune_ray.study.{module}.build_recorder"
        monkeypatch.setattr(name, lambda *arguments: Nowhere())


@pytest.fixture
def flags(
    tmp_path: Path,
    class_folder: Path,
    weights_file: Callable[[str], Path],
) -> dict[str, object]:
    """Flags for weights that are not finite: the tables fail."""
    from safetensors.torch import load_file

    state = load_file(weights_file("test_vit"))
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()}
    torch.save({"model": state, "ema": broken}, tmp_path / "both.pth")
    return {
        "data_folder": str(class_folder),
        "backbone": "test_vit",
        "weights": str(tmp_path / "both.pth"),
        "image_size": 32,
    }


def test_study__the_plan_comes_before_the_tables(tmp_path: Path, flags: dict[str, object]) -> None:
    config, _ = study_request(None, [], flags | {"storage": str(tmp_path / "storage")})
    plans: list[StudyPlan] = []
    with pytest.raises(ConfigError, match="features that are not finite"):
        run_study(config, on_plan=plans.append)
    assert [list(plan.notes[:3]) for plan in plans] == [LINES]


def test_training__its_inputs_are_reported_first(tmp_path: Path, flags: dict[str, object]) -> None:
    config, _, _ = trial_request(None, [], flags)
    lines: list[str] = []
    with pytest.raises(ConfigError, match="features that are not finite"):
        run_training(config, "plants", tmp_path / "storage", on_plan=lines.extend)
    assert lines == LINES
