from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.report import image_changes, image_notes
from drtune_ray.data.splits import Splits, make_splits
from tests.conftest import WriteImages, noise_image
from tests.data.scans import scan_folder


def splits_of(root: Path) -> Splits:
    config = DataConfig(train=str(root))
    return make_splits(scan_folder(root), config)


def notes_of(root: Path) -> tuple[str, ...]:
    return image_notes(splits_of(root))


def test_image_notes__of_a_sound_folder(class_folder: Path) -> None:
    assert notes_of(class_folder) == ("images per class: cat 10, dog 10",)


def test_image_notes__many_classes(write_images: WriteImages) -> None:
    root = write_images({f"class{number:02d}": 3 + number % 3 for number in range(25)})
    (note,) = notes_of(root)
    assert note.startswith("images per class: class00 3, class01 4, ")
    assert note.endswith("class19 4, and 5 more classes of 3 to 5 images")


def test_image_notes__imbalance(write_images: WriteImages) -> None:
    assert len(notes_of(write_images({"cat": 30, "dog": 4}))) == 1
    note = notes_of(write_images({"cat": 40, "dog": 4}))[1]
    assert note.startswith("the classes are imbalanced: cat has 40 images, dog 4; val_accuracy")


def test_image_notes__what_is_left_out(class_folder: Path) -> None:
    (class_folder / "cat" / ".ipynb_checkpoints").mkdir()
    for number in range(6):
        copy = class_folder / "cat" / ".ipynb_checkpoints" / f"{number}.png"
        shutil.copy(class_folder / "cat" / "000.png", copy)
    for name in ("a.heic", "b.HEIC", "c.txt", "without"):
        (class_folder / "dog" / name).write_text("no image")
    (class_folder / "list.txt").write_text("cat")
    assert notes_of(class_folder)[1] == (
        "11 files left out: 1 beside the class folders (list.txt); 6 hidden or in folders of other "
        "programs (cat/.ipynb_checkpoints); 4 not recognised as an image (2 .heic, 1 .txt, 1 "
        "without a suffix)"
    )


def test_image_notes__one_picture_in_several_classes(class_folder: Path) -> None:
    for number in range(6):
        source = class_folder / "cat" / f"{number:03d}.png"
        shutil.copy(source, class_folder / "dog" / f"copy{number}.png")
    shutil.copy(class_folder / "cat" / "007.png", class_folder / "cat" / "within.png")
    # The first was saved again, in another format.
    (class_folder / "dog" / "copy0.png").unlink()
    Image.open(class_folder / "cat" / "000.png").save(class_folder / "dog" / "copy0.bmp")
    note = notes_of(class_folder)[1]
    assert note.startswith(
        "6 pictures lie in several classes (cat/000.png = dog/copy0.bmp, cat/001.png = "
        "dog/copy1.png, cat/002.png = dog/copy2.png, ...)"
    )


def test_image_notes__pictures_of_one_value(class_folder: Path) -> None:
    Image.new("RGB", (24, 24), "black").save(class_folder / "dog" / "black.png")
    scanned = scan_folder(class_folder).files
    config = DataConfig(train=str(class_folder))
    for known in (None, scanned):  # a second start does not read the files again
        splits = make_splits(scan_folder(class_folder, known), config)
        assert image_notes(splits)[1] == "1 picture has one value in all pixels (dog/black.png)"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (np.uint16, "1 picture of more than 8 bits: 0 becomes black and 4095 becomes white"),
        (np.float32, "1 picture of floating-point values: 0 becomes black and 4095 becomes white"),
    ],
)
def test_image_notes__scaling(class_folder: Path, kind: type, words: str) -> None:
    pixels = np.linspace(0, 4000, 64).reshape(8, 8).astype(kind)
    Image.fromarray(pixels).save(class_folder / "cat" / "deep.tif")
    assert notes_of(class_folder)[1] == words


# ---- changes


def test_image_changes__a_new_image(class_folder: Path) -> None:
    former = splits_of(class_folder).manifest
    assert image_changes(former, former) == []
    noise_image("new", 24).save(class_folder / "cat" / "new.png")
    assert image_changes(former, splits_of(class_folder).manifest) == [
        "1 image is new (cat/new.png)"
    ]


def test_image_changes__of_several_kinds(class_folder: Path) -> None:
    former = splits_of(class_folder).manifest
    (class_folder / "ant").mkdir()  # comes first and changes each label
    for number in range(4):
        noise_image(f"ant{number}", 24).save(class_folder / "ant" / f"{number}.png")
    (class_folder / "cat" / "000.png").unlink()
    noise_image("other", 24).save(class_folder / "dog" / "001.png")
    assert image_changes(former, splits_of(class_folder).manifest) == [
        "4 images are new (ant/0.png, ant/1.png, ant/2.png, ...)",
        "1 image is missing (cat/000.png)",
        "1 image is changed (dog/001.png)",
    ]


def test_image_changes__other_splits_only(class_folder: Path) -> None:
    former = splits_of(class_folder).manifest
    config = DataConfig(train=str(class_folder), test_fraction=0.3)
    present = make_splits(scan_folder(class_folder), config).manifest
    (change,) = image_changes(former, present)
    assert " in another split (" in change
