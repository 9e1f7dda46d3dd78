"""The built-in demo study: real images and real ImageNet weights, without a download from a hub."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from drtune_ray.config.demo_weights import DEMO_BACKBONE
from drtune_ray.config.study import StudyConfig
from drtune_ray.errors import ConfigError
from drtune_ray.folders import atomic_write
from drtune_ray.space.search_space import read_space
from drtune_ray.study.inputs import check_storage

DEMO_NAME = "demo"
IMAGE_SCALE = 4  # enlarges the 8 x 8 originals so that people can read them


def write_digits(folder: Path) -> Path:
    """Write scikit-learn's 1797 handwritten digits as class folders of PNG files.

    Args:
        folder: Receives ``0/ ... 9/``; existing files are kept.

    Raises:
        ConfigError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the demo needs scikit-learn: pip install 'drtune-ray[demo]'") from None
    from PIL import Image

    digits = load_digits()
    for number, (picture, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        if not path.exists():
            pixels = (picture * 255 / 16).round().astype("uint8")
            side = pixels.shape[0] * IMAGE_SCALE
            image = Image.fromarray(pixels).resize((side, side))
            atomic_write(path, partial(image.save, format="PNG"), is_durable=False)
    return folder


def demo_config(storage: Path, seed: int = 0) -> StudyConfig:
    """Write the demo's images under the storage and return the configuration of its study."""
    check_storage(storage)
    data = write_digits(storage / "demo-data" / "digits")
    return StudyConfig.from_mapping(
        {
            "name": DEMO_NAME if seed == 0 else f"{DEMO_NAME}-seed-{seed}",
            "storage": str(storage),
            "trials": 12,
            "seed": seed,
            "finalists": {"num_seeds": 0},
            "space": read_space("quick"),
            "trial": {
                "seed": seed,
                "data": {
                    "train": str(data),
                    "train_per_class": 10,
                    # Half of the remaining images each. No flip: a mirrored digit is no digit.
                    "validation_fraction": 0.2,
                    "test_fraction": 0.2,
                    "image_size": 48,
                    "horizontal_flip": 0.0,
                    "crop_scale_min": 0.6,
                    "crop_fraction": 1.0,
                    "view_seed": seed,
                },
                "backbone": {"name": DEMO_BACKBONE, "weights": "demo"},
                "training": {"epochs": 12, "batch_size": 32},
            },
            "resources": {"trials_at_a_time": 2, "cpus_per_worker": 1},
        }
    )
