"""How the tensors of a weights file are matched to an encoder: by name, or by position.

By name: whatever stands before the encoder's own names (``module.encoder_q.``) is taken off.
By position, where names do not fit: the k-th module of the file is the encoder's k-th, if the last
words of their tensors (weight, bias, running_mean) and all shapes agree.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from io import StringIO
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from drtune_ray.training.weights_file import joined
from drtune_ray.training.weights_layouts import PLAIN, Layout

# State that the weights were trained with; other buffers follow from the architecture.
STATISTICS = ("running_mean", "running_var")
COUNTER = "num_batches_tracked"  # old files lack it, and nothing depends on it
AVERAGES = ("teacher", "target_encoder")
SIZED = ("pos_embed", "relative_position_bias_table", "patch_embed.proj.weight")
MAX_KNOWN = 0.1  # share of the encoder's names in a file that is still matched by position


class Target:
    """An encoder that weights are loaded into.

    Attributes:
        encoder: The encoder.
        wanted: Its ``state_dict``.
        required: Names that a file must hold: all parameters, and the statistics of BatchNorm.
        first: Names of the weights of its first convolutions.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder
        self.wanted: Mapping[str, Tensor] = encoder.state_dict()
        parameters = {name for name, _ in encoder.named_parameters()}
        self.required = frozenset(
            name for name in self.wanted if name in parameters or last_word(name) in STATISTICS
        )
        self.first = frozenset(_first_convolutions(encoder, self.wanted))

    @cached_property
    def num_elements(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.numel() for tensor in self.wanted.values())

    def share(self, names: Iterable[str]) -> float:
        """Return the share of the encoder's elements in the named tensors, 0 to 1."""
        return sum(self.wanted[name].numel() for name in names) / max(self.num_elements, 1)

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Return the required names that are not among the given ones, in the encoder's order."""
        there = set(names)
        return [name for name in self.wanted if name in self.required and name not in there]

    def is_gray(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is the weight of a first convolution for images of one channel."""
        return (
            name in self.first
            and tensor.ndim == 4
            and tensor.shape[1] == 1
            and self.wanted[name].shape[1] == 3
        )


def _first_convolutions(encoder: nn.Module, wanted: Mapping[str, Tensor]) -> list[str]:
    """Return the weights of the layers that timm names, otherwise the first one for images."""
    named: Any = getattr(encoder, "pretrained_cfg", {}).get("first_conv") or ()
    layers = (named,) if isinstance(named, str) else named
    found = [f"{layer}.weight" for layer in layers if f"{layer}.weight" in wanted]
    kernels = (name for name, tensor in wanted.items() if tensor.ndim == 4 and tensor.shape[1] == 3)
    return found or list(islice(kernels, 1))


@dataclass(frozen=True)
class Match:
    """Tensors of one part of a file that fit the encoder.

    Attributes:
        key: Dotted path to the tensors in the file, prefixes of their names included.
        part: Dotted path of the mapping that holds them.
        state: Tensors by their name in the encoder.
        unused: Names in that mapping that were not used.
        is_by_order: Whether they were matched by position instead of by name.
        spread: Names of first convolutions whose one channel was spread over three.
        resized: Names of position embeddings and patch embeddings that were resized.
    """

    key: str
    part: str
    state: Mapping[str, Tensor]
    unused: tuple[str, ...]
    is_by_order: bool
    spread: tuple[str, ...]
    resized: tuple[str, ...] = ()

    @property
    def is_average(self) -> bool:
        """Whether the file calls them an average over the training: EMA weights, a teacher."""
        words = self.key.split(".")
        return any(word in AVERAGES or "ema" in word.split("_") for word in words)


def last_word(name: str) -> str:
    """Return the part of a name after its last dot."""
    return name.rpartition(".")[2]


def matches(
    target: Target, parts: Mapping[str, Mapping[str, Tensor]], layout: Layout = PLAIN
) -> list[Match]:
    """Return the parts of a file that fit the whole encoder, the one to take first.

    If none does, the one that fits most; it is empty if no name fits. The layout's order of
    preference goes before averages, and averages go first.
    """
    by_name = [
        match
        for part, found in parts.items()
        for find in (_by_name, partial(_by_conversion, layout))
        for match in find(target, part, found)
    ]

    def order(match: Match) -> tuple[int, bool]:
        return layout.rank(match.key), not match.is_average

    whole = [match for match in by_name if not target.lacking(match.state)]
    if not whole and (layout is PLAIN or layout.in_order):
        whole = [m for part, found in parts.items() for m in _by_order(target, part, found)]
    if whole:  # sorting keeps the file's order among equals
        return sorted(whole, key=order)
    return sorted(by_name, key=lambda match: -target.share(match.state))[:1]


# ---- by name


def num_known(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> int:
    """Return how many of the encoder's names stand in a file, behind one prefix."""
    counts = (sum(p + name in given for name in wanted) for p in prefixes(given, wanted))
    return max(counts, default=0)


def prefixes(names: Iterable[str], wanted: Mapping[str, Any]) -> list[str]:
    """Return what stands before the encoder's names in a file, where it fits enough of them."""
    counts = Counter(
        name[:start] for name in names for start in _starts(name) if name[start:] in wanted
    )
    most = max(counts.values(), default=0)
    return [prefix for prefix, count in counts.items() if 2 * count >= most]


def _starts(name: str) -> Iterator[int]:
    yield 0
    yield from (dot.end() for dot in re.finditer(r"\.", name))


def _by_name(target: Target, part: str, given: Mapping[str, Tensor]) -> Iterator[Match]:
    for prefix in prefixes(given, target.wanted):
        below = {n.removeprefix(prefix): t for n, t in given.items() if n.startswith(prefix)}
        state = _fitting(target, below)
        used = {prefix + name for name in below if name in state}
        unused = tuple(sorted(given.keys() - used))
        key, spread = joined(part, prefix), _spread(target, below, state)
        yield Match(key, part, state, unused, False, spread, resized(below, state))


def _by_conversion(
    layout: Layout, target: Target, part: str, given: Mapping[str, Tensor]
) -> Iterator[Match]:
    """Yield the tensors of each place that holds a layout's anchor, under timm's names."""
    ends = (name for name in given if layout.anchor and f".{name}".endswith(f".{layout.anchor}"))
    for prefix in (name.removesuffix(layout.anchor) for name in ends):
        below = {n.removeprefix(prefix): t for n, t in given.items() if n.startswith(prefix)}
        converted = layout.convert(below) if layout.convert else below
        state = _fitting(target, converted, always=True)
        used = {_storage(tensor) for tensor in state.values()}
        unused = tuple(
            sorted(n for n, t in given.items() if not (_storage(t) in used or "pos" in n))
        )
        key, spread = joined(part, prefix), _spread(target, converted, state)
        yield Match(key, part, state, unused, False, spread, resized(below, state))


def _storage(tensor: Tensor) -> int:
    """Return where a tensor's numbers are; a conversion renames and turns, it seldom copies."""
    return tensor.untyped_storage().data_ptr()


def _fitting(
    target: Target, given: Mapping[str, Tensor], *, always: bool = False
) -> dict[str, Tensor]:
    """Return the tensors that fit under the encoder's names, converted to its image size."""
    given = {n: _three_channels(t) if target.is_gray(n, t) else t for n, t in given.items()}
    state = _converted(target, given, always=always)
    return {n: t for n, t in state.items() if n in target.wanted and _fits(t, target.wanted[n])}


def _spread(
    target: Target, given: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[str, ...]:
    return tuple(n for n, t in given.items() if n in state and target.is_gray(n, t))


def resized(given: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of tensors that depend on the image size and whose size no one has."""
    sizes = {tensor.numel() for tensor in given.values()}
    sized = ((n, t) for n, t in state.items() if any(word in n for word in SIZED))
    # timm's DINOv2 with registers has one position less: that of the class token.
    return tuple(n for n, t in sized if sizes.isdisjoint((t.numel(), t.numel() + t.shape[-1])))


def _three_channels(tensor: Tensor) -> Tensor:
    """Spread a kernel for one channel over three, so that gray images give the same response."""
    return tensor.expand(-1, 3, -1, -1) / 3


def _converted(
    target: Target, given: Mapping[str, Tensor], *, always: bool
) -> Mapping[str, Tensor]:
    """Apply timm's own conversion, which also resizes position embeddings to the image size."""
    convert = getattr(sys.modules[type(target.encoder).__module__], "checkpoint_filter_fn", None)
    is_known = 2 * len(target.wanted.keys() & given.keys()) > len(target.wanted)
    if convert is None or not (always or is_known):
        return given
    try:
        with redirect_stdout(StringIO()):  # that of EVA prints
            converted: Mapping[str, Tensor] = convert(dict(given), target.encoder)
    except Exception:  # of tensors that do not fit, which is reported by their names
        return given
    return converted


def _fits(tensor: Tensor, wanted: Tensor) -> bool:
    return (
        tensor.shape == wanted.shape
        and (tensor.is_floating_point() or not wanted.is_floating_point())
        and tensor.layout is torch.strided
        and tensor.device == wanted.device
    )


# ---- by position


def _by_order(target: Target, part: str, given: Mapping[str, Tensor]) -> Iterator[Match]:
    pairs = _paired(target.wanted, given)
    below = {name: given[other] for name, other in pairs.items()}
    state = _fitting(target, below)
    if pairs and not target.lacking(state):
        unused = tuple(sorted(given.keys() - {pairs[name] for name in state}))
        yield Match(part, part, state, unused, True, _spread(target, below, state))


def _paired(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the file's name for each name of the encoder; empty if the order cannot be trusted."""
    ours, theirs = _modules(wanted), _modules(given)
    # Names that are known say what belongs to what.
    knows_names = num_known(wanted, given) > MAX_KNOWN * len(wanted)
    if len(theirs) < len(ours) or not _counts_up(given) or knows_names:
        return {}
    pairs: dict[str, str] = {}
    for own, other in zip(ours, theirs, strict=False):
        if own.keys() - {COUNTER} != other.keys() - {COUNTER}:
            return {}
        pairs |= {own[word]: other[word] for word in own if word in other}
    return pairs


def _modules(names: Iterable[str]) -> list[dict[str, str]]:
    """Return the names by their last word, for each module in the order of its first name."""
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        module, _, word = name.rpartition(".")
        modules.setdefault(module, {})[word] = name
    return list(modules.values())


def _counts_up(names: Iterable[str]) -> bool:
    """Whether numbers in the names ascend; in alphabetical order block 10 is before block 2."""
    last: dict[str, int] = {}
    for name in names:
        words = name.split(".")
        for at, word in enumerate(words):
            if word.isdecimal():
                group = ".".join(words[:at])
                if int(word) < last.get(group, 0):
                    return False
                last[group] = int(word)
    return True
