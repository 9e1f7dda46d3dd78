"""What each kind of source returns: its images with class, split and group, before they are read.

Nothing behind this module knows the kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from drtune_ray.data.files import Stamp
from drtune_ray.data.listing import LeftOut


@dataclass(frozen=True)
class FoundImage:
    """An image of a source.

    Attributes:
        path: Place in the source, by which its reader finds it; unique.
        label: Name of its class.
        split: Word of the source for its split, such as ``valid``; None where it gives none.
        group: Images of one group are never in different splits; None for a group of its own.
    """

    path: str
    label: str
    split: str | None = None
    group: str | None = None


class ImageReader(Protocol):
    """Encoded images by their path. Whatever fails raises `OSError` with a `strerror`."""

    def stamp(self, path: str) -> Stamp:
        """Return size and time of an image, or of the file that holds it."""

    def read(self, path: str) -> bytes:
        """Return an encoded image."""

    def address(self, path: str) -> str:
        """Return the place of an image for messages."""


@dataclass
class FoundImages:
    """The images of a source.

    Attributes:
        location: The source.
        reader: Reads the images.
        images: All images, in the source's order.
        classes: Names of the classes in the order of the labels.
        left_out: Files or rows that are not used.
        problems: Sentences about what must be corrected.
        notes: Sentences about how the source was read.
        class_noun: What a class is called in messages.
    """

    location: str
    reader: ImageReader
    images: Sequence[FoundImage] = ()
    classes: tuple[str, ...] = ()
    left_out: list[LeftOut] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    class_noun: str = "class"
