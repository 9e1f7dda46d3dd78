"""Folders of class folders, also below folders of splits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from drtune_ray.data.files import Files, LocalFiles, StoreFiles
from drtune_ray.data.kinds.found import FoundImage, FoundImages
from drtune_ray.data.listing import (
    BESIDE,
    UNLABELLED,
    LeftOut,
    Listing,
    folders_in,
    list_class_folders,
    list_names,
    others_of,
)
from drtune_ray.data.root import name_problems
from drtune_ray.values import printable


def find_class_folders(root: Path) -> FoundImages:
    """Return the images of a folder of class folders, or of such folders of splits."""
    listing = list_class_folders(root)
    parts = {name: list_class_folders(root / name) for name in listing.split_folders}
    found = _found(str(root), LocalFiles(root), listing, parts)
    names = name_problems(part / name for part, name in _class_folders(root, listing, parts))
    unreadable = [p for part in (listing, *parts.values()) for p in part.problems]
    found.problems = [*unreadable, *names] or found.problems
    return found


def find_stored_class_folders(location: str, files: StoreFiles) -> FoundImages:
    """Return the images of class folders in an object store."""
    names = files.names()
    listing = list_names(names, files)
    parts = {
        folder: list_names([n for n in names if n.startswith(f"{folder}/")], files, below=folder)
        for folder in listing.split_folders
    }
    return _found(location, files, listing, parts)


def _class_folders(
    root: Path, listing: Listing, parts: dict[str, Listing]
) -> Iterator[tuple[Path, str]]:
    if not parts:
        yield from ((root, name) for name in listing.images)
    for folder, part in parts.items():
        yield from ((root / folder, name) for name in part.images)


def _found(location: str, files: Files, listing: Listing, parts: dict[str, Listing]) -> FoundImages:
    found = FoundImages(location, files, class_noun="class folder")
    labelled = {name: part for name, part in parts.items() if part.images}
    if not labelled:
        found.classes = tuple(listing.images)
        found.images = list(_images(listing))
        found.left_out = listing.left_out
        found.problems = [*_class_problems(location, listing)]
        return found
    found.classes = tuple(sorted({name for part in labelled.values() for name in part.images}))
    found.images = [image for split, part in labelled.items() for image in _images(part, split)]
    found.left_out = [
        item
        for item in listing.left_out
        if item.path.partition("/")[0] not in parts or item.reason == BESIDE
    ]
    for split, part in parts.items():
        found.left_out += _below(split, part)
    others = [name for name in listing.images if name not in parts]
    found.left_out += [LeftOut(printable(n), BESIDE, len(listing.images[n])) for n in others]
    found.problems = [*_split_class_problems(location, found.classes)]
    found.notes = [f"folders of splits: {', '.join(map(printable, labelled))}"]
    return found


def _below(split: str, part: Listing) -> list[LeftOut]:
    """Return what a split leaves out; images beside its classes have no label."""
    reason = {BESIDE: UNLABELLED}
    return [
        replace(
            item,
            path=f"{printable(split)}/{item.path}",
            reason=reason.get(item.reason, item.reason),
        )
        for item in part.left_out
    ]


def _images(listing: Listing, split: str | None = None) -> Iterator[FoundImage]:
    above = f"{split}/" if split else ""
    for name, paths in listing.images.items():
        for path in paths:
            yield FoundImage(above + path.relative_to(listing.root).as_posix(), name, split)


def _split_class_problems(location: str, classes: tuple[str, ...]) -> Iterator[str]:
    if len(classes) < 2:
        yield (
            f"at least 2 class folders must be in the splits of {location}, but they hold "
            f"{', '.join(map(repr, classes))}: put the images of each class into a folder named "
            "after the class"
        )


def _class_problems(location: str, listing: Listing) -> Iterator[str]:
    names = list(listing.images)
    if len(names) < 2:
        yield (
            f"at least 2 class folders must be in data.train, but {location} holds {len(names)}"
            + (f" ({names[0]!r})" if names else "")
            + ": put the images of each class into a folder named after the class"
            + _other_sources(listing, names)
        )
    for name, found in listing.images.items():
        if not found:
            yield (
                f"class folder {printable(name)!r} in {location} holds no image that Pillow "
                f"recognises{others_of(name, listing.left_out)}: add some or remove the folder"
            )


def _other_sources(listing: Listing, names: list[str]) -> str:
    """Return what else could be meant: a folder of class folders below, or a list of images."""
    below = folders_in(listing.root / names[0]) if names else []
    lists = [item.path for item in listing.left_out if item.path.endswith((".csv", ".jsonl"))]
    if len(below) > 1:
        return f", or give --data {listing.root / names[0]}"
    return f", or give --data {listing.root / lists[0]}" if lists else ""
