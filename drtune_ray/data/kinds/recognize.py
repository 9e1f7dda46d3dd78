"""Recognise the kind of a source, and find its images."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.files import Files, StoreFiles, files_below
from drtune_ray.data.kinds import lists
from drtune_ray.data.kinds.class_folders import find_class_folders, find_stored_class_folders
from drtune_ray.data.kinds.found import FoundImages, ImageReader
from drtune_ray.data.kinds.shards import ARROW, PARQUET, SAVED, find_shards, saved_shards
from drtune_ray.data.kinds.tar_shards import TAR, find_tar_shards
from drtune_ray.data.listing import is_foreign, unreadable
from drtune_ray.data.pixels import names_an_image
from drtune_ray.data.root import check_place, unreadable_place
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.folders import is_object_uri, source_location
from drtune_ray.server_uri import without_password

SHARDS = (PARQUET, ARROW, TAR)


def find_images(config: DataConfig) -> FoundImages:
    """Return the images of the source that `data.train` names.

    Raises:
        ConfigError: If there is no source, or it cannot be read; what is wrong with single images
            or classes is among its problems instead.
        EnvironmentProblem: If an object store cannot be reached.
    """
    location = source_location(config.train)
    if is_object_uri(location):
        _check_uri(location)
        try:
            return _find_stored(location, config)
        except OSError as error:
            raise EnvironmentProblem(
                f"data.train={location!r} cannot be read ({error.strerror}): check the address and "
                "the credentials in the environment"
            ) from None
    root = Path(location)
    check_place(root)
    try:
        return _find_local(location, root, config)
    except OSError as error:
        raise unreadable_place(root, error) from None


def _find_local(location: str, root: Path, config: DataConfig) -> FoundImages:
    if stat.S_ISREG(root.stat().st_mode):
        return _find_file(location, config)
    folder = files_below(location)
    if shards := _shards_in(folder, list(_names_until_image(root))):
        return _find_shards(location, folder, shards, config)
    _refuse_columns(location, config)
    return find_class_folders(root)


def _check_uri(uri: str) -> None:
    try:
        without_password(uri)
    except ValueError as error:
        raise ConfigError(f"data.train: {error}") from None


def open_images(config: DataConfig) -> ImageReader:
    """Return the reader of the images of a source.

    Raises:
        ConfigError: If there is no source, or it cannot be read.
    """
    return find_images(config).reader


def _find_stored(location: str, config: DataConfig) -> FoundImages:
    if _suffix(location) in (*lists.SUFFIXES, *SHARDS):
        return _find_file(location, config)
    files = StoreFiles(location)
    names = files.names()
    if not any(map(names_an_image, names)) and (shards := _shards_in(files, names)):
        return _find_shards(location, files, shards, config)
    _refuse_columns(location, config)
    return find_stored_class_folders(location, files)


def _find_file(location: str, config: DataConfig) -> FoundImages:
    suffix = _suffix(location)
    folder, _, name = location.rpartition("/")
    if suffix in SHARDS:
        return _find_shards(location, files_below(folder or "/"), [name], config)
    if suffix in lists.SUFFIXES:
        return lists.find_list(location, config)
    raise ConfigError(
        f"data.train={location!r} is a file of no known kind: give a folder of class folders, a "
        f"list ({', '.join(lists.SUFFIXES)}), or shards ({', '.join(SHARDS)})"
    )


def _find_shards(
    location: str, files: Files, names: Sequence[str], config: DataConfig
) -> FoundImages:
    suffixes = sorted({_suffix(name) for name in names})
    if len(suffixes) > 1:
        raise ConfigError(
            f"data.train={location!r} holds shards of several kinds ({', '.join(suffixes)}): give "
            "a folder with one of them"
        )
    find = find_tar_shards if suffixes == [TAR] else find_shards
    return find(location, files, names, config)


def _shards_in(files: Files, names: Sequence[str]) -> list[str]:
    """Return the shards among names; empty for folders that hold images."""
    if any(name.rpartition("/")[2] == SAVED for name in names):
        return saved_shards(files, names)
    return [name for name in names if _suffix(name) in SHARDS]


def _names_until_image(root: Path) -> Iterator[str]:
    """Yield the names of the files below a folder; nothing where one is named like an image.

    Raises:
        ConfigError: If a folder cannot be read.
    """
    found, seen = [], set[tuple[int, int]]()
    for folder, folders, names in os.walk(root, onerror=_refuse_unreadable, followlinks=True):
        folders[:] = sorted(f for f in folders if not is_foreign(f) and _is_new(folder, f, seen))
        for name in sorted(names):
            if names_an_image(name):
                return
            if not is_foreign(name):
                found.append((Path(folder) / name).relative_to(root).as_posix())
    yield from found


def _is_new(above: str, name: str, seen: set[tuple[int, int]]) -> bool:
    """Return whether a folder was not listed before, as one that a link leads back to was."""
    try:
        status = os.stat(os.path.join(above, name))
    except OSError as error:
        _refuse_unreadable(error)
    identity = (status.st_dev, status.st_ino)
    is_new = identity not in seen
    seen.add(identity)
    return is_new


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise ConfigError(unreadable(error.filename, error)) from None


def _refuse_columns(location: str, config: DataConfig) -> None:
    """Refuse settings of columns for class folders, which have none.

    Raises:
        ConfigError: Naming the settings.
    """
    given = [
        f"data.{name}"
        for name in ("image_column", "label_column", "split_column", "group_column")
        if getattr(config, name) is not None
    ]
    if given:
        raise ConfigError(
            f"{', '.join(given)} cannot be used with class folders, which have no columns, and "
            f"{location} holds class folders: leave it out, or give a list of the images"
        )


def _suffix(name: str) -> str:
    return os.path.splitext(name.partition("?")[0])[1].lower()
