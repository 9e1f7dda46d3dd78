"""Every kind of source gives the same pictures, classes and splits."""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.cache import read_images, write_images
from drtune_ray.data.kinds.recognize import find_images, open_images
from drtune_ray.data.sources import read_bytes
from drtune_ray.data.splits import TEST, TRAIN, VALIDATION, num_train_at_least
from drtune_ray.errors import ConfigError
from tests.conftest import noise_image
from tests.data.pictures import encoded
from tests.data.scans import scan_folder, splits_of
from tests.servers import BUCKET, object_store_here

GIVEN = {"train": 6, "validation": 2, "test": 2}
CLASSES = ("cat", "dog")
Record = dict[str, Any]


def records(splits: dict[str, int] = GIVEN) -> Iterator[Record]:
    for split, number in splits.items():
        for label in CLASSES:
            for index in range(number):
                key = f"{split}-{label}-{index}"
                content = encoded(noise_image(key, 12), "PNG")
                yield {"key": key, "image": content, "label": label, "split": split}


ALL = {r["image"]: (r["label"], r["split"]) for r in records()}


def write_files(folder: Path) -> list[Record]:
    """Write the pictures to files, and return rows that name them."""
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for record in records():
        (folder / "pictures" / f"{record['key']}.png").write_bytes(record["image"])
        path = f"pictures/{record['key']}.png"
        rows.append({"path": path, "label": record["label"], "split": record["split"]})
    return rows


# ---- one writer a kind


def split_folders(folder: Path) -> Path:
    for record in records():
        path = folder / record["split"] / record["label"] / f"{record['key']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record["image"])
    return folder


def delimited(name: str, delimiter: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        rows = write_files(folder)
        with (folder / name).open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        return folder / name

    return write


def json_lines(folder: Path) -> Path:
    lines = [json.dumps(row) for row in write_files(folder)]
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "list.jsonl"


def class_label_table(found: list[Record]) -> pa.Table:
    """A table in Hugging Face's layout, its classes in the schema's metadata."""
    images = [{"bytes": r["image"], "path": f"{r['key']}.png"} for r in found]
    labels = [("unused", *CLASSES).index(r["label"]) for r in found]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["unused", *CLASSES]},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata=metadata)
    return pa.table({"image": pa.array(images, kind), "label": labels}, schema=schema)


def parquet_shards(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("a data set")
    for split in GIVEN:
        found = [r for r in records() if r["split"] == split]
        for part in range(2):
            path = folder / "data" / f"{split}-{part:05d}-of-00002.parquet"
            pq.write_table(class_label_table(found[part::2]), path, row_group_size=3)
    return folder


def parquet_of_words(folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(list(records())), folder / "all.parquet")
    return folder / "all.parquet"


def tar_shards(folder: Path) -> Path:
    folder.mkdir()
    for split in GIVEN:
        with tarfile.open(folder / f"{split}-000.tar", "w") as archive:
            for record in records():
                if record["split"] == split:
                    add(archive, f"./{record['key']}.png", record["image"])
                    add(archive, f"./{record['key']}.cls", record["label"].encode())
    return folder


def tar_with_json(folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "all.tar", "w") as archive:
        for record in records():
            about = {"label": record["label"], "split": record["split"]}
            add(archive, f"{record['key']}.json", json.dumps(about).encode())
            add(archive, f"{record['key']}.png", record["image"])
    return folder / "all.tar"


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def saved_dataset(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    parts = {
        split: datasets.Dataset(class_label_table([r for r in records() if r["split"] == split]))
        for split in GIVEN
    }
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


KINDS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "split folders": (split_folders, {}),
    "csv": (delimited("list.csv", ","), {}),
    "csv with semicolons": (delimited("list.csv", ";"), {}),
    "tsv": (delimited("list.tsv", "\t"), {}),
    "json lines": (json_lines, {}),
    "parquet shards": (parquet_shards, {}),
    "parquet of words": (parquet_of_words, {}),
    "tar shards": (tar_shards, {}),
    "tar with json": (tar_with_json, {"split_column": "split"}),
    "saved dataset": (saved_dataset, {}),
}


@pytest.fixture(params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> DataConfig:
    write, settings = KINDS[request.param]
    return DataConfig(train=str(write(tmp_path / "source")), **settings)


@pytest.mark.filterwarnings("ignore")  # of `datasets` and what it imports
def test_source__pictures_classes_and_splits(source: DataConfig, tmp_path: Path) -> None:
    splits = splits_of(source.train, split_column=source.split_column)
    assert splits.classes == CLASSES
    reader = open_images(source)
    rows = splits.manifest.to_pylist()
    found = {read_bytes(reader, r): (CLASSES[r["label"]], r["split"]) for r in rows}
    assert found == ALL
    assert [splits.count(split) for split in (TRAIN, VALIDATION, TEST)] == [12, 4, 4]
    assert num_train_at_least(find_images(source), source) == 12
    # Read from the tables as a trial reads them; no test image is there.
    write_images(splits, reader, tmp_path / "images.arrow")
    train, validation = read_images(tmp_path / "images.arrow")
    assert (len(train), len(validation)) == (12, 4)
    # The order of the rows follows the content alone.
    assert train._hashes == sorted(train._hashes)


def test_source__known_images_are_not_read_again(
    source: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scan_folder(source.train, split_column=source.split_column).files
    monkeypatch.setattr("drtune_ray.data.sources.examine", None)
    assert scan_folder(source.train, first, split_column=source.split_column).files.equals(first)


@pytest.mark.parametrize("kind", ["split folders", "csv", "parquet shards", "tar shards"])
def test_source__in_an_object_store(kind: str, tmp_path: Path) -> None:
    from pyarrow import fs

    local = KINDS[kind][0](tmp_path / "source")
    name = "" if local.is_dir() else f"/{local.name}"
    prefix = kind.replace(" ", "-")  # a process has one store
    with object_store_here():
        store, root = fs.FileSystem.from_uri(f"s3://{BUCKET}/{prefix}")
        fs.copy_files(str(tmp_path / "source"), root, destination_filesystem=store)
        uri = f"s3://{BUCKET}/{prefix}{name}"
        splits = splits_of(uri)
        reader = open_images(DataConfig(train=uri))
        rows = splits.manifest.to_pylist()
        found = {read_bytes(reader, r): (CLASSES[r["label"]], r["split"]) for r in rows}
    assert found == ALL


# ---- columns and labels


def write_csv(folder: Path, lines: list[str], pictures: int = 8) -> Path:
    for number in range(pictures):
        noise_image(str(number), 8).save(folder / f"{number}.png")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


def problems_of(source: Path, **settings: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        splits_of(source, **settings)
    return caught.value.problems


def test_list__columns_are_chosen_by_settings(tmp_path: Path) -> None:
    lines = ["path,label,kind,patient"]
    lines += [f"{n}.png,x,{'ab'[n % 2]},p{n // 2}" for n in range(8)]
    settings = {"label_column": "kind", "group_column": "patient"}
    splits = splits_of(write_csv(tmp_path, lines), **settings)
    assert splits.classes == ("a", "b")
    assert splits.notes[0] == (
        "list list.csv: images from 'path', labels from 'kind', groups from 'patient'"
    )
    by_group: dict[str, set[str]] = {}
    for row in splits.manifest.to_pylist():
        by_group.setdefault(row["group"], set()).add(row["split"])
    assert all(len(found) == 1 for found in by_group.values())
    assert set().union(*by_group.values()) == {TRAIN, VALIDATION, TEST}


def test_list__numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    lines = ["path,label", *(f"{n}.png,{(10, 9)[n % 2]}" for n in range(8))]
    assert splits_of(write_csv(tmp_path, lines)).classes == ("9", "10")


def test_list__repeated_rows_are_reported(tmp_path: Path) -> None:
    lines = ["path,label", *(f"{n}.png,{'ab'[n % 2]}" for n in range(8)), "0.png,a"]
    scanned = scan_folder(write_csv(tmp_path, lines))
    assert scanned.files.num_rows == 8
    assert [(item.path, item.reason) for item in scanned.left_out] == [
        (f"{tmp_path}/list.csv:10", "listed twice")
    ]


def test_list__missing_files_are_named_or_left_out(tmp_path: Path) -> None:
    lines = ["path,label", *(f"{n}.png,{'ab'[n % 2]}" for n in range(8)), "gone.png,a"]
    source = write_csv(tmp_path, lines)
    assert problems_of(source) == (
        f"{tmp_path}/gone.png cannot be read (No such file or directory): replace or remove it, or "
        "set data.skip_bad=true",
    )
    assert scan_folder(source, skip_bad=True).files.num_rows == 8


def test_shards__damaged_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no table")
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{tmp_path}/a.parquet cannot be read (")
    (tmp_path / "b.tar").write_bytes(b"no archive")
    (problem,) = problems_of(tmp_path / "b.tar")
    assert problem.startswith(f"{tmp_path}/b.tar cannot be read (")


def test_shards__images_that_cannot_be_read(tmp_path: Path) -> None:
    rows = [{"image": content, "label": label} for content in (b"", None) for label in "ab"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    remedy = "replace or remove it, or set data.skip_bad=true"
    assert problems_of(tmp_path / "a.parquet")[1:3] == (
        f"{tmp_path}/a.parquet:1 cannot be decoded as an image (not recognised as an image): "
        f"{remedy}",
        f"{tmp_path}/a.parquet:2 cannot be read (no bytes in column 'image'): {remedy}",
    )
    reader = open_images(DataConfig(train=str(tmp_path / "a.parquet")))
    with pytest.raises(ConfigError, match="a.parquet:9: row 9 does not exist; restore the file$"):
        read_bytes(reader, {"path": "a.parquet:9", "content_hash": ""})
    path = tar_with_json(tmp_path / "source")
    reader = open_images(DataConfig(train=str(path)))
    with pytest.raises(ConfigError, match="all.tar:x: no such member; restore the file$"):
        read_bytes(reader, {"path": "all.tar:x", "content_hash": ""})
    row = {"path": "all.tar:train-cat-0.png", "content_hash": ""}
    path.write_bytes(path.read_bytes()[:2000])  # while it is open
    with pytest.raises(ConfigError, match="the shard is cut off; restore the file$"):
        read_bytes(reader, row)


def test_shards__cut_off_tar(tmp_path: Path) -> None:
    path = tar_with_json(tmp_path / "source")
    path.write_bytes(path.read_bytes()[:3000])
    (problem,) = problems_of(path)
    assert "source/all.tar" in problem


def test_recognize__linked_shards_and_loops(tmp_path: Path) -> None:
    elsewhere = parquet_of_words(tmp_path / "elsewhere").parent
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "part").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(tmp_path / "source")
    assert scan_folder(tmp_path / "source").files.num_rows == 20


def test_recognize__images_win_over_files_beside_them(class_folder: Path) -> None:
    for name in ("labels.parquet", "labels.tar", "labels.csv"):
        (class_folder / name).write_text("no table")
    assert scan_folder(class_folder).files.num_rows == 20


# ---- given splits


def test_given_splits__a_missing_one_is_cut_from_training(tmp_path: Path) -> None:
    lines = ["path,label,split"]
    lines += [f"{n}.png,{'ab'[n % 2]},{'test' if n < 2 else 'training'}" for n in range(12)]
    source = write_csv(tmp_path, lines, 12)
    splits = splits_of(source)
    assert [splits.count(split) for split in (TRAIN, VALIDATION, TEST)] == [8, 2, 2]
    assert sorted(splits.rows(TEST)["path"].to_pylist()) == ["0.png", "1.png"]
    assert splits.notes[1] == (
        "given splits are kept: train, test; validation is cut from the training images"
    )
    again = splits_of(source, splits.manifest)
    assert again.manifest.equals(splits.manifest)
    fewer = splits_of(source, train_per_class=2)
    assert [fewer.count(split) for split in (TRAIN, VALIDATION, TEST)] == [4, 6, 2]


def test_given_splits__a_picture_in_two_of_them_is_not_trained_on(tmp_path: Path) -> None:
    source = split_folders(tmp_path / "source")
    copied = next((source / "test" / "cat").iterdir())
    (source / "train" / "cat" / "copy.png").write_bytes(copied.read_bytes())
    splits = splits_of(source)
    rows = {row["path"]: row["split"] for row in splits.manifest.to_pylist()}
    assert rows["train/cat/copy.png"] == TEST
    assert splits.notes[2].startswith("1 picture is in several given splits")


def test_given_splits__a_class_that_a_held_out_split_lacks_is_reported(tmp_path: Path) -> None:
    source = split_folders(tmp_path / "source")
    for path in (source / "test" / "cat").iterdir():
        path.rename(source / "train" / "cat" / f"more{path.name}")
    (source / "test" / "cat").rmdir()
    assert splits_of(source).notes[-1] == "test has no image of class 'cat'"


def test_groups__old_images_never_move(tmp_path: Path) -> None:
    def lines(number: int) -> list[str]:
        return ["path,label,patient", *(f"{n}.png,{'ab'[n % 2]},p{n // 3}" for n in range(number))]

    settings = {"group_column": "patient"}
    before = splits_of(write_csv(tmp_path, lines(21), 21), **settings)
    after = splits_of(write_csv(tmp_path, lines(40), 40), before.manifest, **settings)
    kept = dict(zip(*(before.manifest[n].to_pylist() for n in ("path", "split")), strict=True))
    rows = {row["path"]: row for row in after.manifest.to_pylist()}
    assert kept.items() <= {path: row["split"] for path, row in rows.items()}.items()
    groups = {(row["group"], row["split"]) for row in rows.values()}
    assert len(groups) == len({group for group, _ in groups})
    assert after.count(TRAIN) >= 20


# ---- damaged files


@pytest.mark.parametrize("kind", ["csv", "json lines", "parquet of words", "tar with json"])
def test_source__damage_is_never_a_traceback(kind: str, tmp_path: Path) -> None:
    write, settings = KINDS[kind]
    path = write(tmp_path / "source")
    content = path.read_bytes()
    rng = random.Random(0)
    for number in range(24):
        damaged = bytearray(content[: rng.randrange(len(content))] if number % 2 else content)
        for _ in range(8 * (number % 2 == 0)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            splits_of(path, **settings)
        except ConfigError:
            continue


# ---- real pictures

STAMPS = Path("/work/shared/data/stamps")


def as_parquet(folder: Path, out: Path) -> Path:
    """Class folders as Hugging Face's library would write them, one file."""
    names = sorted(path.name for path in folder.iterdir())
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": names.index(name)}
        for name in names
        for path in sorted((folder / name).iterdir())
    ]
    features = {"label": {"_type": "ClassLabel", "names": names}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
    pq.write_table(table, out / "all.parquet", row_group_size=50)
    return out / "all.parquet"


def as_list(folder: Path, out: Path) -> Path:
    rows = [f"{path},{path.parent.name}" for path in sorted(folder.glob("*/*"))]
    (out / "list.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    return out / "list.csv"


@pytest.mark.parametrize("convert", [as_parquet, as_list])
def test_source__scikit_learns_digits(
    convert: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    """The same images give the same splits and the same digest, whatever the kind."""
    pytest.importorskip("sklearn")
    from drtune_ray.demo import write_digits

    folder = write_digits(tmp_path / "digits")
    for path in folder.glob("*/*[1-9].png"):  # a tenth is enough
        path.unlink()
    there, here = splits_of(folder), splits_of(convert(folder, tmp_path))
    assert here.classes == tuple("0123456789")
    assert here.content_digest() == there.content_digest()


@pytest.mark.skipif(not STAMPS.exists(), reason="the stamps are not here")
@pytest.mark.parametrize("convert", [as_parquet, as_list])
def test_source__stamps(convert: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    here = splits_of(convert(STAMPS, tmp_path))
    assert here.content_digest() == splits_of(STAMPS).content_digest()
