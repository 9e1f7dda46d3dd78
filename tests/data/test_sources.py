from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from drtune_ray.data import sources
from drtune_ray.data.listing import BESIDE, DAMAGED, HIDDEN, NO_FILE, NO_IMAGE, UNLABELLED
from drtune_ray.data.pixels import PixelFacts, WhiteValues
from drtune_ray.data.sources import (
    INTEGER_PEAK,
    content_hash,
    read_bytes,
    whites_of,
)
from drtune_ray.errors import ConfigError
from tests.conftest import WriteImages, noise_image
from tests.data.pictures import encoded
from tests.data.scans import scan_folder

REMEDY = "replace or remove it, or set data.skip_bad=true"


def problems_of(root: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        scan_folder(root)
    return caught.value.problems


# ---- what is found


def test_scan__classes_labels_and_files(write_images: WriteImages) -> None:
    root = write_images({"dog": 2, "cat": 1})
    (root / "dog" / "deep" / "er").mkdir(parents=True)
    noise_image("deep", 8).save(root / "dog" / "deep" / "er" / "x.JPG", "JPEG")
    (root / "dog" / "notes.txt").write_text("no image")
    (root / ".git").mkdir()
    folder = scan_folder(root)
    assert folder.classes == ("cat", "dog")
    rows = folder.files.to_pylist()
    assert [(row["path"], row["label"]) for row in rows] == [
        ("cat/000.png", 0),
        ("dog/000.png", 1),
        ("dog/001.png", 1),
        ("dog/deep/er/x.JPG", 1),
    ]
    for row in rows:
        content = (root / row["path"]).read_bytes()
        assert row["content_hash"] == content_hash(content)
        assert row["num_bytes"] == len(content)
        assert read_bytes(root, row) == content


def test_scan__known_files_are_not_read_again(
    class_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scan_folder(class_folder).files
    noise_image("another", 24).save(class_folder / "cat" / "005.png")
    os.utime(class_folder / "cat" / "005.png", ns=(1, 1))  # certainly another time
    noise_image("new", 24).save(class_folder / "dog" / "new.png")
    read: list[bytes] = []

    real = sources.examine

    def examine(content: bytes) -> PixelFacts:
        read.append(content)
        return real(content)

    monkeypatch.setattr(sources, "examine", examine)
    second = scan_folder(class_folder, first).files
    assert len(read) == 2
    fresh = scan_folder(class_folder).files
    assert second.equals(fresh)


# ---- what is refused


def test_scan__missing_folder(tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    assert problems_of(root) == (
        f"data.train={str(root)!r} is neither a folder nor a file: give a folder of class folders, "
        "or another source of docs/images.md (datasets of a hub are not fetched: save them with "
        "save_to_disk)",
    )


@pytest.mark.parametrize(
    ("folders", "number"), [([], "0"), (["cat"], "1 ('cat')"), ([".git", "cat"], "1 ('cat')")]
)
def test_scan__fewer_than_two_classes(
    write_images: WriteImages, folders: list[str], number: str
) -> None:
    root = write_images(dict.fromkeys(folders, 3))
    assert problems_of(root) == (
        f"at least 2 class folders must be in data.train, but {root} holds {number}: put the "
        "images of each class into a folder named after the class",
    )


def test_scan__every_empty_class_and_the_number_of_classes_together(
    write_images: WriteImages,
) -> None:
    root = write_images({"cat": 0})
    (root / "cat" / "readme.md").write_text("no image")
    assert problems_of(root) == (
        f"at least 2 class folders must be in data.train, but {root} holds 1 ('cat'): put the "
        "images of each class into a folder named after the class",
        f"class folder 'cat' in {root} holds no image that Pillow recognises (1 .md left "
        "out): add some or remove the folder",
    )


def test_scan__empty_classes_are_all_named(write_images: WriteImages) -> None:
    root = write_images({"cat": 1, "cow": 0, "dog": 1, "eel": 0})
    assert [problem.split(" holds")[0] for problem in problems_of(root)] == [
        f"class folder 'cow' in {root}",
        f"class folder 'eel' in {root}",
    ]


@pytest.mark.parametrize(
    "content",
    [
        encoded(noise_image("a", 32), "JPEG")[:-200],
        encoded(noise_image("a", 32), "PNG")[:-200],
        encoded(noise_image("a", 32), "PNG")[:20],
        encoded(noise_image("a", 32), "WEBP", lossless=True)[:-200],
        b"<html>404</html>",
        b"",
    ],
    ids=["jpeg", "png", "png header", "webp", "html", "empty"],
)
def test_scan__image_that_cannot_be_decoded(class_folder: Path, content: bytes) -> None:
    broken = class_folder / "dog" / "broken.jpg"
    broken.write_bytes(content)
    (problem,) = problems_of(class_folder)
    assert problem.startswith(f"{broken} cannot be decoded as an image (")
    assert problem.endswith("): replace or remove it, or set data.skip_bad=true")


def test_scan__many_broken_images_are_counted(class_folder: Path) -> None:
    for number in range(8):
        (class_folder / "cat" / f"broken{number}.png").write_bytes(b"no image")
    problems = problems_of(class_folder)
    assert len(problems) == 6
    assert [str(class_folder / "cat" / f"broken{n}.png") in problems[n] for n in range(5)]
    assert problems[5] == "and 3 more such files"


# BUG found: both raise an OSError with a traceback (IsADirectoryError, FileNotFoundError).
def test_scan__folder_with_the_name_of_an_image_is_searched(class_folder: Path) -> None:
    (class_folder / "dog" / "holiday.png").mkdir()
    noise_image("inside", 8).save(class_folder / "dog" / "holiday.png" / "a.png")
    paths = scan_folder(class_folder).files["path"].to_pylist()
    assert "dog/holiday.png/a.png" in paths
    assert len(paths) == 21


def test_scan__dangling_link_is_named(class_folder: Path) -> None:
    (class_folder / "dog" / "gone.png").symlink_to(class_folder / "nowhere.png")
    (problem,) = problems_of(class_folder)
    assert str(class_folder / "dog" / "gone.png") in problem


# ---- what is left out


def paths_of(root: Path, **options: Any) -> list[str]:
    return list(scan_folder(root, **options).files["path"].to_pylist())


def reasons_of(root: Path, **options: Any) -> list[tuple[str, str, int]]:
    left_out = scan_folder(root, **options).left_out
    return sorted((item.path, item.reason, item.num_files) for item in left_out)


def test_scan__hidden_folders_and_those_of_other_programs(class_folder: Path) -> None:
    for name in ("cat/.ipynb_checkpoints", "cat/deep/@eaDir/x.png", "dog/__MACOSX", "#recycle"):
        (class_folder / name).mkdir(parents=True)
        noise_image(name, 24).save(class_folder / name / "copy.png")
    (class_folder / "dog" / "._000.png").write_bytes(b"of a Mac")
    assert len(paths_of(class_folder)) == 20
    assert reasons_of(class_folder) == [
        ("#recycle", HIDDEN, 1),
        ("cat/.ipynb_checkpoints", HIDDEN, 1),
        ("cat/deep/@eaDir", HIDDEN, 1),
        ("dog/._000.png", HIDDEN, 1),
        ("dog/__MACOSX", HIDDEN, 1),
    ]


def test_scan__other_suffixes_are_taken_by_content(class_folder: Path) -> None:
    for name, form in {
        "a.ppm": "PPM",
        "b.jfif": "JPEG",
        "c.avif": "AVIF",
        "without": "PNG",
        "d.heic": "WEBP",
        "e.jpg_large": "JPEG",
    }.items():
        noise_image(name, 24).save(class_folder / "cat" / name, form)
    (class_folder / "dog" / "000.txt").write_text("a dog")
    (class_folder / "dog" / "real.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (class_folder / "labels.csv").write_text("cat")
    assert len(paths_of(class_folder)) == 26
    assert reasons_of(class_folder) == [
        ("dog/000.txt", NO_IMAGE, 1),
        ("dog/real.heic", NO_IMAGE, 1),
        ("labels.csv", BESIDE, 1),
    ]


def test_scan__linked_folders(class_folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    noise_image("far", 24).save(elsewhere / "far.png")
    (class_folder / "cat" / "a-link").symlink_to(elsewhere)
    (class_folder / "cat" / "deep").mkdir()
    noise_image("deep", 24).save(class_folder / "cat" / "deep" / "deep.png")
    # Each of these leads to images that are there already, or round in a circle.
    (class_folder / "cat" / "a-copy").symlink_to("deep")
    (class_folder / "cat" / "deep" / "up").symlink_to("..")
    (elsewhere / "self").symlink_to(elsewhere)
    found = paths_of(class_folder)
    assert len(found) == 22
    assert {"cat/a-link/far.png", "cat/deep/deep.png"} <= set(found)


def test_scan__what_is_no_file(class_folder: Path) -> None:
    os.mkfifo(class_folder / "dog" / "pipe")
    (class_folder / "dog" / "gone").symlink_to("nowhere")
    assert reasons_of(class_folder) == [("dog/gone", NO_FILE, 1), ("dog/pipe", NO_FILE, 1)]
    os.mkfifo(class_folder / "dog" / "pipe.png")
    assert problems_of(class_folder) == (
        f"{class_folder}/dog/pipe.png cannot be read (not a regular file): {REMEDY}",
    )


def test_scan__bad_images_are_left_out_on_request(class_folder: Path) -> None:
    (class_folder / "cat" / "000.png").write_bytes(b"no image")
    (class_folder / "cat" / "gone.png").symlink_to("nowhere")
    (class_folder / "dog" / os.fsdecode(b"caf\xe9.png")).write_bytes(
        (class_folder / "dog" / "000.png").read_bytes()
    )
    assert len(problems_of(class_folder)) == 3
    assert len(paths_of(class_folder, skip_bad=True)) == 19
    assert reasons_of(class_folder, skip_bad=True) == [
        ("cat/000.png", DAMAGED, 1),
        ("cat/gone.png", DAMAGED, 1),
        ("dog/caf\\xe9.png", DAMAGED, 1),
    ]


def test_scan__class_of_bad_images_only(class_folder: Path) -> None:
    for path in (class_folder / "cat").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ConfigError) as caught:
        scan_folder(class_folder, skip_bad=True)
    assert str(caught.value) == (
        f"class folder 'cat' in {class_folder} holds no sound image (10 damaged left out): add "
        "some or remove the folder"
    )


# ---- names


def test_scan__names_that_are_not_utf8(class_folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (class_folder / "dog" / f"{name}\n.png").write_bytes(
        (class_folder / "dog" / "000.png").read_bytes()
    )
    assert problems_of(class_folder) == (
        f"the name of {class_folder}/dog/caf\\xe9\\n.png is not UTF-8: rename it",
    )
    (class_folder / "dog").rename(class_folder / name)
    assert problems_of(class_folder) == (
        f"the name of {class_folder}/caf\\xe9 is not UTF-8: rename it",
    )
    class_folder.rename(class_folder.with_name(name))
    assert problems_of(class_folder.with_name(name)) == (
        f"the name of {class_folder.parent}/caf\\xe9 is not UTF-8: rename it",
    )


def test_scan__names_in_a_locale_without_utf8(class_folder: Path) -> None:
    """Python reads each byte of such a name as one that it does not know."""
    (class_folder / "cat" / "katzé.png").write_bytes(b"")
    code = (
        "import sys; from pathlib import Path; from drtune_ray.data.sources import *\n"
        "from tests.data.scans import scan_folder\n"
        "try: scan_folder(Path(sys.argv[1]))\n"
        "except ConfigError as error: print(ascii(str(error)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(class_folder)],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "katz\\xe9.png cannot be read in this locale, whose encoding is ascii" in done.stdout
    assert "set PYTHONUTF8=1" in done.stdout


# ---- what may not be read


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder of two classes, and no right to read what forbids it, whoever runs the tests."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name in ("cat", "dog"):
            (root / name).mkdir()
            noise_image(name, 8).save(root / name / "0.png")
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        yield root
        if is_root:
            os.seteuid(0)


def forbid(path: Path) -> None:
    """Take all rights away, as the owner."""
    own = os.geteuid()
    os.seteuid(os.getuid())
    path.chmod(0)
    os.seteuid(own)


def test_scan__image_that_may_not_be_read(unprivileged: Path) -> None:
    forbid(unprivileged / "cat" / "0.png")
    assert problems_of(unprivileged) == (
        f"{unprivileged}/cat/0.png cannot be read (Permission denied): {REMEDY}",
    )


def test_scan__folder_that_may_not_be_read(unprivileged: Path) -> None:
    forbid(unprivileged / "dog")
    assert problems_of(unprivileged) == (
        f"folder {unprivileged}/dog cannot be read (Permission denied): make it readable",
    )
    forbid(unprivileged)
    (problem,) = problems_of(unprivileged / "cat")
    assert problem.startswith(f"data.train='{unprivileged}/cat' cannot be read (Permission denied)")


# ---- splits instead of classes


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train", "val", "test"), True),
        (("Training", "validation"), True),
        (("train_images", "test_images", "annotations"), True),
        (("train2017", "val2017"), True),
        (("train", "car", "bus"), False),  # a train among other vehicles
        (("test", "dev"), False),
        (("trainer", "tester"), False),
    ],
)
def test_scan__folders_of_splits(tmp_path: Path, names: tuple[str, ...], expected: bool) -> None:
    for name in names:
        for label in ("cat", "dog"):
            (tmp_path / name / label).mkdir(parents=True)
            noise_image(name + label, 8).save(tmp_path / name / label / "0.png")
    scanned = scan_folder(tmp_path)
    if not expected:
        assert len(scanned.classes) == len(names)
        return
    assert scanned.classes == ("cat", "dog")
    splits = [name for name in names if name != "annotations"]
    columns = (scanned.files[name].to_pylist() for name in ("given_split", "path"))
    found = set(zip(*columns, strict=True))
    assert found == {(name, f"{name}/{label}/0.png") for name in splits for label in ("cat", "dog")}
    assert scanned.notes[0].startswith(f"folders of splits: {splits[0]}, ")
    assert sum(item.num_files for item in scanned.left_out) == 2 * ("annotations" in names)


def test_scan__split_folder_without_classes_is_left_out(class_folder: Path, tmp_path: Path) -> None:
    class_folder.rename(tmp_path / "all")
    (tmp_path / "images" / "test").mkdir(parents=True)
    noise_image("unknown", 8).save(tmp_path / "images" / "test" / "0.png")
    (tmp_path / "all").rename(tmp_path / "images" / "train")
    scanned = scan_folder(tmp_path / "images")
    assert scanned.files.num_rows == 20
    assert [(i.path, i.reason) for i in scanned.left_out] == [("test/0.png", UNLABELLED)]


def test_scan__splits_without_classes(write_images: WriteImages) -> None:
    """They may be classes after all: a train among other things."""
    assert scan_folder(write_images({"train": 3, "test": 3})).classes == ("test", "train")


def test_scan__class_folders_one_level_below(tmp_path: Path, write_images: WriteImages) -> None:
    root = write_images({"cat": 3, "dog": 3}, folder="flowers")
    (problem,) = problems_of(tmp_path)
    assert problem.endswith(f"a folder named after the class, or give --data {root}")


# ---- values of more than 8 bits


def write_floats(root: Path, peaks: dict[str, float]) -> None:
    for name, peak in peaks.items():
        pixels = np.linspace(0, peak, 64, dtype=np.float32).reshape(8, 8)
        Image.fromarray(pixels).save(root / name)


@pytest.mark.parametrize(
    ("peaks", "words"),
    [
        ({"cat/a.tif": 1.5}, "cat/a.tif holds floating-point values up to 1.5, which fit neither"),
        (
            {"cat/a.tif": 0.9, "dog/b.tif": 250.0},
            "cat/a.tif holds floating-point values up to 0.9 and ",
        ),
    ],
)
def test_scan__floats_of_an_unclear_range(
    class_folder: Path, peaks: dict[str, float], words: str
) -> None:
    write_floats(class_folder, peaks)
    (problem,) = problems_of(class_folder)
    assert problem.startswith(f"{class_folder}/{words}")


@pytest.mark.parametrize(("peaks", "white"), [((0.2, 1.0), 1), ((9.0, 255.0), 255)])
def test_scan__one_range_for_all_images(
    class_folder: Path, peaks: tuple[float, float], white: int
) -> None:
    write_floats(class_folder, dict(zip(("cat/a.tif", "dog/b.tif"), peaks, strict=True)))
    first = scan_folder(class_folder).files
    assert whites_of(first) == WhiteValues(65535, white)
    assert whites_of(scan_folder(class_folder, first).files).floating == white


def test_scan__of_an_earlier_release_is_read_again(class_folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(class_folder / "cat" / "deep.png")
    fresh = scan_folder(class_folder).files
    earlier = fresh.drop_columns([INTEGER_PEAK, "float_peak", "is_uniform", "pixel_hash"])
    assert whites_of(earlier) == WhiteValues()  # as it was read then
    assert scan_folder(class_folder, earlier).files.equals(fresh)
    assert whites_of(fresh).integer == 4095


# ---- after the scan


def test_read_bytes__changed_file(class_folder: Path) -> None:
    row = scan_folder(class_folder).files.to_pylist()[3]
    path = class_folder / row["path"]
    noise_image("another", 24).save(path)
    with pytest.raises(ConfigError) as caught:
        read_bytes(class_folder, row)
    assert str(caught.value) == (
        f"{path} changed since the study started: restore the original file"
    )


def test_read_bytes__removed_file(class_folder: Path) -> None:
    row = scan_folder(class_folder).files.to_pylist()[3]
    path = class_folder / row["path"]
    path.unlink()
    with pytest.raises(ConfigError) as caught:
        read_bytes(class_folder, row)
    assert str(caught.value) == (f"cannot read {path}: No such file or directory; restore the file")


def test_scan__a_decompression_bomb_is_refused_by_its_header(class_folder: Path) -> None:
    """48 kB that would take 1.2 GB: Pillow's limit holds, and nothing is decoded."""
    bomb = class_folder / "dog" / "bomb.png"
    Image.new("1", (20000, 20000)).save(bomb)
    assert bomb.stat().st_size < 50_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert problems_of(class_folder) == (
        f"{bomb} cannot be decoded as an image (Image size (400000000 pixels) exceeds limit of "
        f"178956970 pixels, could be decompression bomb DOS attack.): {REMEDY}",
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
