"""Files of pretrained weights: what they hold, and why one cannot be read.

The content of a file decides its format, not its suffix. PyTorch files are read without running
code of theirs: torch's unpickler for weights refuses every class and function but tensors, plain
containers and those of `HARMLESS`, in whose place an object without content is left.
"""

from __future__ import annotations

import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from drtune_ray.errors import CheckpointError, ConfigError, first_line
from drtune_ray.training.checkpoint import MAGIC, read_checkpoint

TOP_LEVEL = "top-level"  # key of what lies in no mapping of the file
MAX_DEPTH = 5  # of mappings in mappings
NORMALIZATION = "normalization"  # key of the mean and standard deviation, if a file records them
ARCHIVE = b"PK\x03\x04"  # first bytes of a zip archive
LFS_POINTER = b"version https://git-lfs"
ADVICE = "save model.state_dict() there"
Channels = tuple[float, float, float]
MODELS = ("torch.nn.modules.", "torchvision.models.", "timm.models.")
# torch names the first global that it refuses.
REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")


class _LeftOut:
    """Stands for an object that is not read: takes any content and keeps none."""

    def __new__(cls, *arguments: object, **options: object) -> _LeftOut:
        """Return an object, whatever the arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Take the content of the original object and forget it."""


def _plain_dict(*arguments: object) -> dict[Any, Any]:
    return {}


_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path")
# Classes and functions of training scripts' settings and records, by their name in a pickle.
HARMLESS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    *(
        f"{builtins}.{name}"
        for builtins in ("builtins", "__builtin__")
        for name in ("dict", "list")
    ),
)
_SAFE: list[Any] = [(_LeftOut, name) for name in HARMLESS]
_SAFE.append((_plain_dict, "collections.defaultdict"))


@dataclass(frozen=True)
class WeightsContent:
    """Content of a weights file.

    Attributes:
        parts: Tensors by name, for each mapping of the file that holds some; its key is the dotted
            path to it, empty at the top.
        normalization: Mean and standard deviation that the file records, if it does.
        shapes: Shapes of all tensors of the file by their dotted path, whatever part is taken.
        entries: Keys at the top of the file.
        archive: The file, if it is an archive of NumPy arrays, which timm reads by itself.
    """

    parts: Mapping[str, Mapping[str, Tensor]]
    normalization: tuple[Channels, Channels] | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    entries: tuple[str, ...] = ()
    archive: Path | None = None

    def below(self, key: str) -> WeightsContent:
        """Return the content whose full names begin with a dotted key, or that has none."""
        if key == TOP_LEVEL:
            return replace(self, parts={p: found for p, found in self.parts.items() if not p})
        parts = {
            part: {n: t for n, t in tensors.items() if joined(part, n).startswith(f"{key}.")}
            for part, tensors in self.parts.items()
        }
        return replace(self, parts={part: found for part, found in parts.items() if found})


def joined(part: str, name: str) -> str:
    """Return the dotted path of a name in a part of a file."""
    return f"{part}.{name}".strip(".")


def read_weights(path: Path, key: str | None = None) -> WeightsContent:
    """Read a weights file: safetensors, PyTorch, NumPy, or a checkpoint of this package.

    Args:
        path: The file.
        key: Dotted path of the part to take; None takes all parts.

    Raises:
        ConfigError: If it is not such a file or holds no tensors there.
    """
    content = _content(path)
    if not isinstance(content, Mapping):
        raise ConfigError(f"backbone.weights={str(path)!r} holds no state dict: {ADVICE}")
    parts = dict(_parts(content))
    whole = WeightsContent(
        parts,
        _recorded_normalization(content),
        {joined(part, n): tuple(t.shape) for part, ts in parts.items() for n, t in ts.items()},
        tuple(map(str, content)),
        path if is_numpy_archive(path) else None,
    )
    if not whole.parts:
        raise ConfigError(
            f"backbone.weights={str(path)!r} holds no tensors, only the keys "
            f"{[str(name) for name in islice(content, 8)]}: {ADVICE}"
        )
    if key is None:
        return whole
    taken = whole.below(key)
    if not taken.parts:
        raise ConfigError(
            f"backbone.weights_key={key!r} names no part of {str(path)!r}, which has tensors in "
            f"{_places(whole.parts)}"
        )
    return taken


def _content(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(
            f"backbone.weights={str(path)!r} is not a file: give a file, 'timm' or 'demo'"
        )
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ConfigError(
            f"backbone.weights={str(path)!r} cannot be read ({error.strerror}): give another file "
            "or the right to read it"
        ) from None
    if head.startswith(LFS_POINTER):
        raise ConfigError(
            f"backbone.weights={str(path)!r} is a Git LFS pointer, not the file itself: run git "
            "lfs pull in its repository"
        )
    if head.startswith(MAGIC):
        return _own_checkpoint(path)
    if is_numpy_archive(path):
        return _numpy_archive(path)
    return _safetensors_file(path) if head[8:9] == b"{" else _torch_file(path)


def is_numpy_archive(path: Path) -> bool:
    """Whether a file is a zip archive of NumPy arrays, as ``numpy.savez`` writes them."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _numpy_archive(path: Path) -> Any:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"backbone.weights={str(path)!r} is an archive of NumPy arrays that cannot be read "
            f"({first_line(error)}): only arrays of numbers are, since objects could run code; "
            "copy it again or save the numbers alone"
        ) from None


def _own_checkpoint(path: Path) -> Any:
    try:
        return read_checkpoint(path)
    except CheckpointError:
        raise ConfigError(
            f"backbone.weights={str(path)!r} is a damaged checkpoint of drtune-ray: copy it again "
            "or give another file"
        ) from None


def _safetensors_file(path: Path) -> Any:
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            recorded = (file.metadata() or {}).get(NORMALIZATION)
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(
            f"backbone.weights={str(path)!r} is a damaged safetensors file ({first_line(error)}): "
            "download or copy it again"
        ) from None
    return tensors | ({NORMALIZATION: _from_json(recorded)} if recorded else {})


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _torch_file(path: Path) -> Any:
    try:
        # Opened here, because torch takes the suffix .safetensors at its word.
        with path.open("rb") as file, _harmless_allowed():
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each format raises its own errors, of no use to the user
        raise ConfigError(f"backbone.weights={str(path)!r} {_why_not(path, error)}") from None


@contextmanager
def _harmless_allowed() -> Iterator[None]:
    with torch.serialization.safe_globals(_SAFE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols; what cannot be read raises
        yield


def _why_not(path: Path, error: Exception) -> str:
    """Return why a file could not be read as PyTorch's, and what to do."""
    if found := REFUSED_GLOBAL.search(str(error)):
        return _why_refused(found[1], _refused_globals(path))
    if "TorchScript" in str(error):
        return f"is a TorchScript archive, not a state dict: {ADVICE}"
    if _begins_archive(path) and not zipfile.is_zipfile(path):
        return "is a PyTorch file that is cut off or damaged: download or copy it again"
    return (
        f"is neither a safetensors nor a PyTorch weights file ({type(error).__name__}): convert it "
        "to one of them, or download it again if it should be one"
    )


def _begins_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ARCHIVE)) == ARCHIVE


def _why_refused(first: str, refused: list[str]) -> str:
    if any(name.startswith(MODELS) for name in (first, *refused)):
        return f"holds a whole model ({first}), not its state_dict: {ADVICE}"
    first = next((name for name in refused if name.endswith(f".{first}")), first)
    others = [name for name in refused if name != first]
    more = f" and {len(others)} more ({', '.join(others[:3])})" if others else ""
    return (
        f"holds {first}{more}, which is not read because it could run code: save the state_dict "
        "alone in a file"
    )


def _refused_globals(path: Path) -> list[str]:
    """Return the classes and functions of a file that are refused; empty in older formats."""
    try:
        with _harmless_allowed():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # a file that is no archive, or has opcodes that torch does not list
        return []


def _parts(
    content: Mapping[Any, Any], path: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for name, value in content.items():
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            yield from _parts(value, joined(path, str(name)), depth + 1)


def _places(parts: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Return where tensors are: the parts, and the first words of the names of each."""
    found = [joined(part, name.split(".")[0]) for part, names in parts.items() for name in names]
    return list(islice(dict.fromkeys([*filter(None, parts), *found]), 8))


def _recorded_normalization(content: Mapping[Any, Any]) -> tuple[Channels, Channels] | None:
    recorded = content.get(NORMALIZATION)
    if not isinstance(recorded, Mapping):
        return None
    mean, std = _channels(recorded.get("mean")), _channels(recorded.get("std"))
    return (mean, std) if mean and std and min(std) > 0.0 else None


def _channels(values: object) -> Channels | None:
    """Return three finite numbers; None for anything else."""
    if not isinstance(values, list | tuple) or len(values) != 3:
        return None
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        return None
    first, second, third = map(float, values)
    return first, second, third
