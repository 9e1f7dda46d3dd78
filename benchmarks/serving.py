"""Images a second of a served model against the model alone, on the same machine.

    .venv/bin/python benchmarks/serving.py STUDY IMAGES...

Both read the same encoded images. Many clients ask at once, each for one image at a time; the
model alone gets all images in batches. The two run in turn, three times; the medians are compared.
"""

from __future__ import annotations

import argparse
import http.client
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local
from urllib.parse import urlsplit

from report import describe_machine

import drtune_ray
from drtune_ray.data.image_files import image_files
from drtune_ray.execution.serving import served
from drtune_ray.results.places import served_model

NUM_CLIENTS, NUM_ROUNDS, LEAST_IMAGES = 64, 3, 1000
PORT = 8123
_OWN = local()


def ask(address: str, content: bytes) -> None:
    """Send an image over the thread's connection."""
    if not hasattr(_OWN, "connection"):
        _OWN.connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    _OWN.connection.request("POST", "/", content)
    answer = _OWN.connection.getresponse()
    answer.read()
    assert answer.status == 200, answer.status


def rate(run: Callable[[Sequence[bytes]], object], images: Sequence[bytes]) -> float:
    """Return images a second."""
    start = time.perf_counter()
    run(images)
    return len(images) / (time.perf_counter() - start)


def main() -> None:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="a study's name or folder, or another model")
    parser.add_argument("images", nargs="+", help="files, folders or globs")
    options = parser.parse_args()
    print(describe_machine(f"benchmarks/serving.py {' '.join(sys.argv[1:])}"))
    files = [Path(path).read_bytes() for path in image_files(options.images, sys.stdin)]
    images = files * -(-LEAST_IMAGES // len(files))
    place, _ = served_model(options.study, "./drtune-studies", None)
    alone = drtune_ray.load(place)
    rates: dict[str, list[float]] = {"alone": [], "served": []}
    with served(place, "127.0.0.1", PORT) as address, ThreadPoolExecutor(NUM_CLIENTS) as clients:
        runs: dict[str, Callable[[Sequence[bytes]], object]] = {
            "alone": alone.predict,
            "served": lambda some: list(clients.map(lambda image: ask(address, image), some)),
        }
        for run in runs.values():
            run(images[:200])  # warm-up
        for _ in range(NUM_ROUNDS):
            for name, run in runs.items():
                rates[name].append(rate(run, images))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, median in medians.items():
        print(f"{name:8}{median:10.1f} images/s   {[round(value, 1) for value in rates[name]]}")
    print(f"served / alone = {medians['served'] / medians['alone']:.2f}")


if __name__ == "__main__":
    main()
