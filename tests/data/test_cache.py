from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data import cache
from drtune_ray.data.cache import (
    MappedArray,
    read_images,
    read_table,
    table_name,
    write_array,
    write_images,
    write_table,
)
from drtune_ray.data.pixels import WhiteValues, decode
from drtune_ray.data.sources import INTEGER_PEAK, read_bytes
from drtune_ray.data.splits import TEST, TRAIN, VALIDATION, Splits, make_splits
from drtune_ray.data.views import ViewMaker
from drtune_ray.errors import ConfigError
from tests.conftest import WriteImages, noise_image
from tests.data.scans import scan_folder


@pytest.fixture
def splits(class_folder: Path) -> Splits:
    config = DataConfig(train=str(class_folder))
    return make_splits(scan_folder(class_folder), config)


# ---- arrays


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("shape", [(3,), (3, 4, 5), (1,)])
def test_write_array__round_trip(tmp_path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((11, *shape)) * 100).astype(dtype)
    write_array(tmp_path / "rows.arrow", [rows[:4], rows[4:5], rows[5:]])
    mapped = MappedArray(tmp_path / "rows.arrow")
    assert len(mapped) == 11
    assert mapped[0].dtype == dtype
    assert all(np.array_equal(mapped[row], rows[row]) for row in range(11))
    assert np.array_equal(mapped.take([10, 4, 4, 0]), rows[[10, 4, 4, 0]])


def test_write_array__not_contiguous(tmp_path: Path) -> None:
    rows = np.arange(24.0).reshape(4, 3, 2).transpose(0, 2, 1)
    write_array(tmp_path / "rows.arrow", [rows])
    assert np.array_equal(MappedArray(tmp_path / "rows.arrow").take(range(4)), rows)


def test_write_array__nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^write_array needs at least one block$"):
        write_array(tmp_path / "rows.arrow", [])
    assert list(tmp_path.iterdir()) == []


def test_mapped_array__is_a_view_of_the_file(tmp_path: Path) -> None:
    rows = np.ones((64, 3, 50, 50), np.float32)
    path = tmp_path / "rows.arrow"
    write_array(path, [rows[:40], rows[40:]])
    before = pa.total_allocated_bytes()
    mapped = MappedArray(path)
    views = [mapped[row] for row in range(64)]
    assert pa.total_allocated_bytes() - before < rows.nbytes / 100
    assert not any(view.flags.owndata or view.flags.writeable for view in views)
    address = views[3].__array_interface__["data"][0]
    assert any(start <= address < end for start, end in mapped_ranges(path))


def test_mapped_array__taken_rows_are_copies(tmp_path: Path) -> None:
    write_array(tmp_path / "rows.arrow", [np.zeros((4, 2), np.float32)])
    mapped = MappedArray(tmp_path / "rows.arrow")
    taken = mapped.take([1, 2])
    taken += 1.0
    assert (mapped[1] == 0.0).all()


def mapped_ranges(path: Path) -> Iterator[tuple[int, int]]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, end = line.split()[0].split("-")
            yield int(start, 16), int(end, 16)


# ---- images


def test_write_images__training_and_validation_only(
    splits: Splits, class_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "images.arrow"
    write_images(splits, class_folder, path)
    table = read_table(path)
    assert set(table["split"].to_pylist()) == {TRAIN, VALIDATION}
    sealed = set(splits.rows(TEST)["content_hash"].to_pylist())
    assert len(sealed) == 4
    assert not sealed & set(table["content_hash"].to_pylist())
    content = path.read_bytes()
    for row in splits.rows(TEST).to_pylist():
        assert (class_folder / row["path"]).read_bytes() not in content
    assert (class_folder / splits.rows(TRAIN)["path"][0].as_py()).read_bytes() in content


def test_read_images__labels_order_and_pixels(
    splits: Splits, class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "ROWS_PER_BATCH", 5)  # several record batches
    write_images(splits, class_folder, tmp_path / "images.arrow")
    maker = ViewMaker(DataConfig(train="images", image_size=24, crop_fraction=1.0), "bicubic")
    for split, rows in zip(
        (TRAIN, VALIDATION), read_images(tmp_path / "images.arrow"), strict=True
    ):
        expected = splits.rows(split).sort_by("content_hash").to_pylist()
        assert rows.labels.tolist() == [row["label"] for row in expected]
        assert len(rows) == splits.count(split)
        for at, row in enumerate(expected):
            name, file = row["path"].split("/")
            image = noise_image(f"{name}/{int(file[:3])}", 24)
            pixels = np.asarray(image).transpose(2, 0, 1)
            assert np.array_equal(rows.evaluation_view(maker, at), pixels)
            view = maker.training_view(image, row["content_hash"], 1)
            assert np.array_equal(rows.training_view(maker, at, 1), view)


def test_read_images__encoded_bytes_stay_on_disk(write_images: WriteImages, tmp_path: Path) -> None:
    # BUG found: filtering the table by split copies every encoded image into the memory of every
    # trial's process. Training rows come first in the file: two slices need no copy.
    root = write_images({"cat": 5, "dog": 5}, side=200)
    splits = make_splits(scan_folder(root), DataConfig(train=str(root)))
    path = tmp_path / "images.arrow"
    cache.write_images(splits, root, path)
    gc.collect()
    before = pa.total_allocated_bytes()
    rows = read_images(path)
    allocated = pa.total_allocated_bytes() - before
    assert len(rows[0]) == 6
    assert allocated < path.stat().st_size / 10


@pytest.mark.parametrize("change", ["removed", "changed"])
def test_write_images__source_changed_since_the_scan(
    splits: Splits, class_folder: Path, tmp_path: Path, change: str
) -> None:
    last = splits.rows(VALIDATION).sort_by("content_hash").to_pylist()[-1]
    path = class_folder / last["path"]
    if change == "removed":
        path.unlink()
        message = f"cannot read {path}: No such file or directory; restore the file"
    else:
        noise_image("another", 24).save(path)
        message = f"{path} changed since the study started: restore the original file"
    with pytest.raises(ConfigError) as caught:
        write_images(splits, class_folder, tmp_path / "images.arrow")
    assert str(caught.value) == message


def test_write_table__empty_tables_can_be_read(tmp_path: Path) -> None:
    schema = pa.schema([("label", pa.int32())])
    write_table(tmp_path / "empty.arrow", schema, [])
    assert read_table(tmp_path / "empty.arrow").num_rows == 0


def test_table_name__follows_everything_given_and_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = table_name("rows", "a", 1)
    assert name.startswith("rows-") and name.endswith(".arrow")
    assert table_name("rows", "a", 1) == name
    others = [table_name("rows", "a", 2), table_name("rows", "b", 1), table_name("views", "a", 1)]
    monkeypatch.setattr(cache, "TABLE_VERSION", cache.TABLE_VERSION + 1)
    others += [table_name("rows", "a", 1), table_name("rows", "a", 1, suffix=".safetensors")]
    assert len({name, *others}) == 6


def test_write_images__values_of_more_than_eight_bits(class_folder: Path, tmp_path: Path) -> None:
    """Training reads them as it would decode them in the range of all images."""
    ramp = np.linspace(0, 4095, 24 * 24).reshape(24, 24)
    for path in class_folder.glob("cat/*.png"):
        path.unlink()
    for number in range(10):
        pixels = (ramp * (number + 1) / 10).astype(np.uint16)
        PIL.Image.fromarray(pixels).save(class_folder / "cat" / f"{number}.tif")
    splits = make_splits(scan_folder(class_folder), DataConfig(train=str(class_folder)))
    write_images(splits, class_folder, tmp_path / "images.arrow")
    table = read_table(tmp_path / "images.arrow").to_pylist()
    by_hash = {row["content_hash"]: row for row in splits.manifest.to_pylist()}
    deep = [row for row in table if by_hash[row["content_hash"]][INTEGER_PEAK] is not None]
    assert len(deep) == 8
    for row in table:
        original = read_bytes(class_folder, by_hash[row["content_hash"]])
        expected = decode(original, WhiteValues(4095, 255))
        assert np.array_equal(decode(row["image"]), expected)
        assert (row["image"] == original) == (row not in deep)
    assert max(np.asarray(decode(row["image"])).max() for row in deep) > 200
