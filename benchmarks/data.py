"""Time an epoch of images beside torchvision's ImageFolder and DataLoader with the same transforms.

    .venv/bin/python benchmarks/data.py              # 1,000 JPEGs, about five minutes
    .venv/bin/python benchmarks/data.py --images 300
    .venv/bin/python benchmarks/data.py --memory     # private memory at 1,000 and 20,000 images

JPEGs of 500 x 375 pixels with the texture of photographs, views of 224 x 224, batches of 64, all in
one process. Seconds are of the processor, which other programs on the machine hardly change, as
medians over epochs that take turns:

ceiling      the transforms alone, on decoded pictures
torchvision  ImageFolder and DataLoader: read, decode, transform
views: 0     the study's own loader: read from the Arrow table, decode, transform with a seed
views: 1     the study's own loader: pixels that were written once
preparation  what a study does before its first epoch, once an image: read, examine, hash, write

A ratio above 1 is faster than what stands beside it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from report import describe_machine
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.cache import read_images, write_array, write_images
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.data.kinds.recognize import open_images
from drtune_ray.data.pixels import decode
from drtune_ray.data.sources import scan_images
from drtune_ray.data.splits import make_splits
from drtune_ray.data.views import ViewMaker

WIDTH, HEIGHT, BATCH, TURNS, CLASSES = 500, 375, 64, 3, 10
INTERPOLATION = "bicubic"
FEW, MANY = 1_000, 20_000


def write_jpegs(folder: Path, number: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """Write JPEGs in class folders: smooth shapes with fine texture, all different."""
    random = np.random.default_rng(0)
    for at in range(number):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        fine = random.normal(0, 12, (size[1], size[0], 1))
        pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + fine
        place = folder / f"class-{at % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(place / f"{at:06d}.jpg", quality=90)


def settings(folder: Path, views: int) -> DataConfig:
    return DataConfig(train=str(folder), views=views)


def prepare(folder: Path, path: Path) -> None:
    """Do what a study does before its first epoch, without frozen features."""
    config = settings(folder, 0)
    write_images(make_splits(scan_images(config), config), open_images(config), path)


def processor_seconds(act: Callable[[], Any]) -> float:
    before = time.process_time()
    act()
    return time.process_time() - before


def compare(folder: Path, number: int) -> None:
    """Print the images a second of each way, and the ratios."""
    table, pixels = folder.parent / "images.arrow", folder.parent / "views.arrow"
    few = folder.parent / "few"
    write_jpegs(few, BATCH)
    prepare(few, folder.parent / "few.arrow")  # the first starts what a process starts once
    preparation = processor_seconds(lambda: prepare(folder, table))
    rows, _ = read_images(table)
    maker = ViewMaker(settings(folder, 0), INTERPOLATION)
    transform = maker._augment
    order = torch.randperm(len(rows)).tolist()
    batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    write_array(pixels, (rows.training_view(maker, row, 0)[None] for row in range(len(rows))))
    classes = tuple(f"class-{k}" for k in range(CLASSES))
    live, cached = (
        TrainingData(
            Tables(classes, table, table, views, None, None),
            settings(folder, int(views is not None)),
            INTERPOLATION,
        )
        for views in (None, pixels)
    )
    decoded = [decode(path.read_bytes()) for path in sorted(folder.rglob("*.jpg"))[:BATCH]]
    repeats = len(rows) // len(decoded)
    folders = DataLoader(ImageFolder(str(folder), transform), batch_size=BATCH, shuffle=True)
    # Each way with the number of images that one call takes.
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "ceiling": (
            lambda: [transform(picture) for _ in range(repeats) for picture in decoded],
            repeats * len(decoded),
        ),
        "torchvision": (lambda: list(map(len, folders)), number),
        "views: 0": (lambda: list(map(len, live.training_batches(batches, 1))), len(rows)),
        "views: 1": (lambda: list(map(len, cached.training_batches(batches, 0))), len(rows)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, (way, images) in ways.items():
            found = processor_seconds(way) / images
            if turn:  # the first is no measurement
                seconds[name].append(found)
    each = {name: statistics.median(found) for name, found in seconds.items()}
    for name, found in each.items():
        print(f"{name:<14}{1 / found:8.0f} images a second of one core")
    print(f"{'preparation':<14}{number / preparation:8.0f} images a second of one core, once")
    print(f"views: 0 / ceiling      {each['ceiling'] / each['views: 0']:6.2f}")
    print(f"views: 0 / torchvision  {each['torchvision'] / each['views: 0']:6.2f}")
    print(f"views: 1 / torchvision  {each['torchvision'] / each['views: 1']:6.2f}")
    first = preparation / number + each["views: 0"]
    print(
        f"first epoch with the preparation / torchvision, seconds {first / each['torchvision']:.2f}"
    )


def private_mebibytes(number: int) -> float:
    """Return the private memory that an epoch needs in a process of its own."""
    command = [sys.executable, __file__, "--child", str(number)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def child(number: int) -> None:
    """Read an epoch of small images and print the private memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        write_jpegs(folder, number, (48, 36))
        table = Path(name) / "images.arrow"
        subprocess.run([sys.executable, __file__, "--prepare", str(folder), str(table)], check=True)
        config = settings(folder, 0)
        data = TrainingData(Tables((), table, table, None, None, None), config, INTERPOLATION)
        rows = list(range(len(data.train)))
        batches = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
        for _ in data.training_batches(batches, 0):
            pass
        print(psutil.Process().memory_full_info().uss / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        child(arguments.child)
        return
    if arguments.prepare:
        prepare(*arguments.prepare)
        return
    print(describe_machine("benchmarks/data.py"))
    if arguments.memory:
        few, many = map(private_mebibytes, (FEW, MANY))
        print(f"private memory: {few:.0f} MiB at {FEW}, {many:.0f} MiB at {MANY} images")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        write_jpegs(folder, arguments.images)
        compare(folder, arguments.images)


if __name__ == "__main__":
    main()
