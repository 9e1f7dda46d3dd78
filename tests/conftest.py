"""Fixtures shared by all tests: tiny images and the configurations that name them."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from drtune_ray.config.trial import TrialConfig
from drtune_ray.values import nested
from tests.scheduling import order_groups, use_one_thread

pytest_plugins = ["tests.ray_fixtures"]

# Ray gives its workers the niceness 15: beside the other process of the test run they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")

HERE = Path.cwd()
WriteImages = Callable[..., Path]
MakeTrial = Callable[..., TrialConfig]


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Accept the setting of pytest-timeout where it is not installed (make test-gpu)."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "unused")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Divide the tests among the workers."""
    order_groups(items)


def pytest_collection_finish() -> None:
    """Set torch up where a test module has imported it."""
    use_one_thread()


@pytest.fixture(autouse=True)
def nothing_in_the_current_folder() -> Iterator[None]:
    """MLflow, asked without an address, writes there: no call of the project may."""
    yield
    assert not [name for name in ("mlflow.db", "mlruns", "mlartifacts") if (HERE / name).exists()]


@pytest.fixture
def write_images(tmp_path: Path) -> WriteImages:
    """Write class folders of noise: ``write_images({"cat": 6, "dog": 6})``."""

    def write(counts: Mapping[str, int], folder: str = "images", side: int = 24) -> Path:
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        for name, number in counts.items():
            (root / name).mkdir(exist_ok=True)
            for index in range(number):
                noise_image(f"{name}/{index}", side).save(root / name / f"{index:03d}.png")
        return root

    return write


@pytest.fixture
def class_folder(write_images: WriteImages) -> Path:
    """Two classes of ten PNG images each."""
    return write_images({"cat": 10, "dog": 10})


@pytest.fixture
def make_trial() -> MakeTrial:
    """A trial from dotted paths: ``make_trial({"training.epochs": 2})``."""

    def make(values: Mapping[str, Any] | None = None, preset: str | None = None) -> TrialConfig:
        paths = {"data.train": "images"} | dict(values or {})
        return TrialConfig.from_mapping(nested(paths), preset=preset)

    return make


def noise_image(name: str, side: int) -> Image.Image:
    """An image of its own for each name."""
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of weights for a tiny timm model, classifier of five classes included."""
    import safetensors.torch
    import timm
    import torch

    folder = tmp_path_factory.mktemp("weights")

    def write(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = timm.create_model(name, num_classes=5)
            safetensors.torch.save_file(model.state_dict(), path)
        return path

    return write


@pytest.fixture
def killed(tmp_path: Path, weights_file: Any) -> Iterator[Any]:
    """Make studies; whatever happens, their processes are gone afterwards."""
    from tests.survival import Killed

    made: list[Killed] = []

    def make(folder: Path = tmp_path, kind: type[Killed] = Killed, **changes: Any) -> Killed:
        made.append(kind(folder, weights_file, **changes))
        return made[-1]

    yield make
    for study in made:
        study.end()


@pytest.fixture(scope="session")
def unreachable_hub() -> None:
    """Skips where timm's hub answers: what happens without it cannot be seen there."""
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=3).close()
    except urllib.error.HTTPError:
        pytest.skip("the model hub answers")
    except OSError:
        return
    pytest.skip("the model hub answers")
