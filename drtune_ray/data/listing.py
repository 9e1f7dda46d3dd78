"""List the files of a folder of class folders: the images of each class, and what is left out."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from drtune_ray.data.files import Files
from drtune_ray.data.pixels import is_recognised, names_an_image
from drtune_ray.values import printable

# Folders that programs put beside the user's own: thumbnails and trash of file servers, remains of
# archives and caches. Names in lower case.
FOREIGN_FOLDERS = frozenset(
    {
        "@eadir",
        "@recycle",
        "@tmp",
        "#recycle",
        "$recycle.bin",
        "__macosx",
        "__pycache__",
        "lost+found",
        "system volume information",
    }
)
# Names of folders that hold a split: that of training, and others.
OF_TRAINING = r"train(ing)?"
OF_VALIDATION = r"(e?val(id(ation)?|uation)?|dev)"
OF_HELD_OUT = r"(test(ing)?|hold-?out)"
OF_A_SPLIT = rf"({OF_TRAINING}|{OF_VALIDATION}|{OF_HELD_OUT})"
QUALIFIER = r"([-_ ]?(set|split|data|images|\d+))?"
NUM_KINDS_SHOWN = 8
# Why a file is left out.
HIDDEN = "hidden or in folders of other programs"
BESIDE = "beside the class folders"
NO_FILE = "broken links, pipes or devices"
NO_IMAGE = "not recognised as an image"
DAMAGED = "damaged"
UNLABELLED = "without a label"
REPEATED = "listed twice"


@dataclass(frozen=True)
class LeftOut:
    """Files that are not used.

    Attributes:
        path: Path relative to the root, printable: a file, or a folder with all its files.
        reason: `HIDDEN`, `BESIDE`, `NO_FILE`, `NO_IMAGE`, `DAMAGED`, `UNLABELLED` or `REPEATED`.
        num_files: Number of files.
    """

    path: str
    reason: str
    num_files: int = 1

    @property
    def class_name(self) -> str | None:
        """The class folder that holds the files, printable; None outside of the classes."""
        return None if self.reason == BESIDE else self.path.split("/")[0]


@dataclass
class Listing:
    """Files below a folder of class folders.

    Attributes:
        root: The folder.
        images: Paths of files that may be images by the name of their class folder, sorted.
        left_out: Files that are not used.
        problems: Sentences about folders that cannot be read.
    """

    root: Path
    images: dict[str, list[Path]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        """Number of files that may be images."""
        return sum(map(len, self.images.values()))

    @property
    def split_folders(self) -> list[str]:
        """Names of folders that hold splits instead of classes, training first; empty for none."""
        names = [name for name in self.images if is_named(name, OF_A_SPLIT)]
        training = [name for name in names if is_named(name, OF_TRAINING)]
        are_splits = training and len(names) > 1
        return training + [name for name in names if name not in training] if are_splits else []

    def leave_out(self, path: Path, reason: str, num_files: int = 1) -> None:
        """Record files as not used."""
        if num_files:
            relative = printable(path.relative_to(self.root))
            self.left_out.append(LeftOut(relative, reason, num_files))


def list_class_folders(root: Path) -> Listing:
    """List the files of a folder of class folders, without decoding any.

    Links to folders are followed; a folder that is linked from several places counts once a class.
    """
    listing = Listing(root)
    for entry in _entries(root, listing):
        path = Path(entry.path)
        if not _is_folder(entry):
            listing.leave_out(path, HIDDEN if is_foreign(entry.name) else BESIDE)
        elif not is_foreign(entry.name):
            _list_class(path, listing)
        elif not entry.name.startswith("."):  # a repository beside the classes may be huge
            listing.leave_out(path, HIDDEN, _num_files(path))
    return listing


def list_names(names: Iterable[str], files: Files, below: str = "") -> Listing:
    """Divide the names of all files of an object store among their class folders.

    Args:
        names: Names below the root of the files.
        files: The files, to recognise those that are not named like an image.
        below: Folder of the class folders; the root by default.
    """
    listing = Listing(Path(below))
    for name in sorted(names):
        path = Path(name)
        class_name, *rest = path.relative_to(below).parts
        if any(map(is_foreign, (class_name, *rest))):
            listing.leave_out(path, HIDDEN)
        elif not rest:
            listing.leave_out(path, BESIDE)
        else:
            images = listing.images.setdefault(class_name, [])
            if names_an_image(name) or _is_stored_image(name, files):
                images.append(path)
            else:
                listing.leave_out(path, NO_IMAGE)
    return listing


def _is_stored_image(name: str, files: Files) -> bool:
    with files.open(name) as file:
        return is_recognised(file)


def others_of(name: str, left_out: Iterable[LeftOut]) -> str:
    """Return what is left out of a class, in brackets after a space; empty for nothing."""
    found = [item for item in left_out if item.class_name == printable(name)]
    return f" ({kinds_of(found)} left out)" if found else ""


def kinds_of(left_out: Iterable[LeftOut]) -> str:
    """Return the numbers of files that are left out by their suffix, most frequent first."""
    kinds = Counter[str]()
    for item in left_out:
        suffix = PurePath(item.path).suffix.lower() or "without a suffix"
        kinds[suffix if item.reason == NO_IMAGE else item.reason] += item.num_files
    shown = [f"{number} {kind}" for kind, number in kinds.most_common(NUM_KINDS_SHOWN)]
    return ", ".join(shown) + (", ..." if len(kinds) > len(shown) else "")


def is_foreign(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or another program's."""
    return name.startswith(".") or name.lower() in FOREIGN_FOLDERS


def folders_in(folder: Path) -> list[Path]:
    """Return the folders directly below a folder that may be class folders; empty on errors."""
    found = _entries(folder, Listing(folder))
    return [Path(e.path) for e in found if _is_folder(e) and not is_foreign(e.name)]


def split_word(path: str) -> str | None:
    """Return the first folder or beginning of a file name that names a split; None for none."""
    *folders, name = path.split("/")
    for word in (*folders, re.split(r"[-_.]", name)[0]):
        if is_named(word, OF_A_SPLIT):
            return word
    return None


def is_named(name: str, kind: str) -> bool:
    """Return whether a name is one of a kind, such as `OF_A_SPLIT`, perhaps with a qualifier."""
    return re.fullmatch(kind + QUALIFIER, name, re.IGNORECASE) is not None


def _list_class(folder: Path, listing: Listing) -> None:
    files = [path for path in _files(folder, listing) if _may_be_image(path, listing)]
    listing.images[folder.name] = sorted(files)


def _files(folder: Path, listing: Listing) -> Iterator[Path]:
    """Yield the files below a class folder, those of linked folders last."""
    folders, links, seen = [folder], list[Path](), set[tuple[int, int]]()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        if not _enter(here, seen, listing):
            continue
        for entry in _entries(here, listing):
            path, is_folder = Path(entry.path), _is_folder(entry)
            if is_foreign(entry.name):
                num_files = _num_files(path) if is_folder else 1
                listing.leave_out(path, HIDDEN, num_files)
            elif is_folder:
                (links if entry.is_symlink() else folders).append(path)
            else:
                yield path


def _enter(folder: Path, seen: set[tuple[int, int]], listing: Listing) -> bool:
    """Return whether a folder was not listed before, as one that a link leads back to was."""
    try:
        status = folder.stat()
    except OSError as error:
        listing.problems.append(unreadable(folder, error))
        return False
    identity = (status.st_dev, status.st_ino)
    is_new = identity not in seen
    seen.add(identity)
    return is_new


def _entries(folder: Path, listing: Listing) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        listing.problems.append(unreadable(folder, error))
        return []


def unreadable(folder: Path | str, error: OSError) -> str:
    """Return a sentence about a folder that cannot be read."""
    return f"folder {printable(folder)} cannot be read ({error.strerror}): make it readable"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _num_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def _may_be_image(path: Path, listing: Listing) -> bool:
    """Return whether a file is named like an image, or has the content of one.

    An unreadable file may be an image: whether it is one is not known.
    """
    if names_an_image(path.name):
        return True
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
        if is_file:
            with path.open("rb") as file:
                if is_recognised(file):
                    return True
    except FileNotFoundError:  # a link to nowhere
        is_file = False
    except OSError:
        return True
    listing.leave_out(path, NO_IMAGE if is_file else NO_FILE)
    return False
