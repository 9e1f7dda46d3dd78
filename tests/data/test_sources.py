from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from PIL import Image

from drtune_ray.data import sources
from drtune_ray.data.pixels import PixelFacts
from drtune_ray.data.sources import content_hash, read_bytes, scan_class_folders
from drtune_ray.errors import ConfigError
from tests.conftest import WriteImages, noise_image
from tests.data.pictures import encoded


def problems_of(root: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        scan_class_folders(root)
    return caught.value.problems


# ---- what is found


def test_scan__classes_labels_and_files(write_images: WriteImages) -> None:
    root = write_images({"dog": 2, "cat": 1})
    (root / "dog" / "deep" / "er").mkdir(parents=True)
    noise_image("deep", 8).save(root / "dog" / "deep" / "er" / "x.JPG", "JPEG")
    (root / "dog" / "notes.txt").write_text("no image")
    (root / ".git").mkdir()
    folder = scan_class_folders(root)
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
    first = scan_class_folders(class_folder).files
    noise_image("another", 24).save(class_folder / "cat" / "005.png")
    os.utime(class_folder / "cat" / "005.png", ns=(1, 1))  # certainly another time
    noise_image("new", 24).save(class_folder / "dog" / "new.png")
    read: list[bytes] = []

    def examine(content: bytes) -> PixelFacts:
        read.append(content)
        return PixelFacts(None, None, False)

    monkeypatch.setattr(sources, "examine", examine)
    second = scan_class_folders(class_folder, first).files
    assert len(read) == 2
    fresh = scan_class_folders(class_folder).files
    assert second.equals(fresh)


# ---- what is refused


def test_scan__missing_folder(tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    assert problems_of(root) == (
        f"data.train={str(root)!r} is not a folder: give a folder of class folders",
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
        f"class folder 'cat' in {root} holds no image that Pillow recognises; it holds .md: add "
        "some or remove the folder",
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
    assert problem.endswith("): replace or remove it")


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
    paths = scan_class_folders(class_folder).files["path"].to_pylist()
    assert "dog/holiday.png/a.png" in paths
    assert len(paths) == 21


def test_scan__dangling_link_is_named(class_folder: Path) -> None:
    (class_folder / "dog" / "gone.png").symlink_to(class_folder / "nowhere.png")
    (problem,) = problems_of(class_folder)
    assert str(class_folder / "dog" / "gone.png") in problem


# ---- after the scan


def test_read_bytes__changed_file(class_folder: Path) -> None:
    row = scan_class_folders(class_folder).files.to_pylist()[3]
    path = class_folder / row["path"]
    noise_image("another", 24).save(path)
    with pytest.raises(ConfigError) as caught:
        read_bytes(class_folder, row)
    assert str(caught.value) == (
        f"{path} changed since the study started: restore the original file"
    )


def test_read_bytes__removed_file(class_folder: Path) -> None:
    row = scan_class_folders(class_folder).files.to_pylist()[3]
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
        "178956970 pixels, could be decompression bomb DOS attack.): replace or remove it",
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
