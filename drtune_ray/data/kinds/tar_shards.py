"""WebDataset shards: tar files whose members ``0001.jpg`` and ``0001.cls`` are one sample.

Members are read in place; nothing is extracted.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.files import MAX_FILE_BYTES, Files, Stamp
from drtune_ray.data.kinds.found import FoundImages
from drtune_ray.data.kinds.rows import LABEL_NAMES, Row, found_rows, several_splits
from drtune_ray.data.listing import NO_IMAGE, LeftOut, split_word
from drtune_ray.data.pixels import names_an_image
from drtune_ray.errors import ConfigError, first_line
from drtune_ray.values import printable

TAR = ".tar"
CLASS_SUFFIXES = ("cls", "cls.txt", "label", "label.txt")
Member = tuple[int, int]  # position and size in the shard
Sample = dict[str, tuple[str, Member]]  # suffix: name of the member, member


def find_tar_shards(
    location: str, files: Files, names: Sequence[str], config: DataConfig
) -> FoundImages:
    """Return the images of WebDataset shards.

    Raises:
        ConfigError: If a shard cannot be read, or a sample holds several images.
    """
    splits = several_splits({name: split_word(name) for name in names})
    reader = TarReader(files)
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    for name in sorted(names):
        for key, sample in reader.samples(name).items():
            row = _row(reader, name, key, sample, config, splits[name])
            if row is None:
                left_out.append(LeftOut(printable(f"{name}:{key}"), NO_IMAGE, len(sample)))
            else:
                rows.append(row)
    column = config.label_column or "cls"
    found = found_rows(location, reader, rows, column, skip_bad=config.skip_bad)
    found.left_out += left_out
    found.notes.insert(0, _note(len(names), any(splits.values())))
    return found


def _note(number: int, has_splits: bool) -> str:
    shards = "1 shard" if number == 1 else f"{number} shards"
    by_name = ", splits from the names of the shards" if has_splits else ""
    return f"WebDataset, {shards}{by_name}"


class TarReader:
    """Members of tar shards, by ``shard.tar:member``.

    Args:
        files: The files of the source.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._shards: dict[str, dict[str, Member]] = {}

    def samples(self, shard: str) -> dict[str, Sample]:
        """Return the samples of a shard by their key."""
        found: dict[str, Sample] = {}
        for name, member in self._members(shard).items():
            folder, slash, base = name.rpartition("/")
            key, dot, suffix = base.partition(".")
            if dot and key:
                found.setdefault(f"{folder}{slash}{key}", {})[suffix.lower()] = name, member
        return found

    def stamp(self, path: str) -> Stamp:
        """Return the size of a member and the time of its shard."""
        shard, name = _split(path)
        members = self._members(shard)
        if name not in members:
            raise FileNotFoundError(2, "no such member")
        return Stamp(members[name][1], self._files.stamp(shard).modified_ns)

    def read(self, path: str) -> bytes:
        """Return the content of a member."""
        size = self.stamp(path).num_bytes or 0
        if size > MAX_FILE_BYTES:
            raise OSError(0, "larger than 1 GiB")
        shard, name = _split(path)
        with self._files.open(shard) as file:
            file.seek(self._members(shard)[name][0])
            content: bytes = file.read(size)
        if len(content) < size:
            raise OSError(0, "the shard is cut off")
        return content

    def address(self, path: str) -> str:
        """Return the shard and the member."""
        return self._files.address(path)

    def _members(self, shard: str) -> dict[str, Member]:
        if shard not in self._shards:
            self._shards[shard] = dict(_listed(self._files, shard))
        return self._shards[shard]


def _listed(files: Files, shard: str) -> Iterator[tuple[str, Member]]:
    try:
        with files.open(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    yield member.name, (member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ConfigError(
            f"{files.address(shard)} cannot be read ({first_line(error)}): give an uncompressed, "
            "complete tar file"
        ) from None


def _row(
    reader: TarReader, shard: str, key: str, sample: Sample, config: DataConfig, split: str | None
) -> Row | None:
    """Return the row of a sample, None for one without an image."""
    place = f"{shard}:{key}"
    images = [s for s in sample if names_an_image(f"x.{s.rpartition('.')[2]}")]
    if config.image_column is not None:
        images = [s for s in sample if s == config.image_column.lower()]
    if len(images) > 1:
        raise ConfigError(
            f"sample {printable(reader.address(place))} holds several images "
            f"({', '.join(images)}): set data.image_column to one of these suffixes"
        )
    if not images:
        return None
    about = _about(reader, shard, sample)
    label = _label(reader, shard, sample, about, config.label_column)
    given = about.get(config.split_column) if config.split_column else split
    group = about.get(config.group_column) if config.group_column else None
    return Row(f"{shard}:{sample[images[0]][0]}", reader.address(place), label, given, group)


def _about(reader: TarReader, shard: str, sample: Sample) -> dict[str, Any]:
    """Return the JSON of a sample, empty where it has none."""
    if "json" not in sample:
        return {}
    name = f"{shard}:{sample['json'][0]}"
    try:
        content = json.loads(reader.read(name))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{printable(reader.address(name))} is not JSON ({first_line(error)}): write the "
            "shard anew"
        ) from None
    return content if isinstance(content, dict) else {}


def _label(
    reader: TarReader, shard: str, sample: Sample, about: dict[str, Any], column: str | None
) -> Any:
    suffixes = CLASS_SUFFIXES if column is None else (column.lower(),)
    for suffix in suffixes:
        if suffix in sample:
            content = reader.read(f"{shard}:{sample[suffix][0]}")
            return content.decode(errors="replace").strip()
    keys = LABEL_NAMES if column is None else (column,)
    return next((about[key] for key in keys if key in about), None)


def _split(path: str) -> tuple[str, str]:
    shard, _, name = path.partition(f"{TAR}:")
    return shard + TAR, name
