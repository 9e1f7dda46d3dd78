"""Loads the tensors of a weights file into an encoder; refuses those that do not fill it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from drtune_ray.config.inputs import BackboneConfig
from drtune_ray.errors import ConfigError, first_line
from drtune_ray.training.weights_file import TOP_LEVEL, WeightsContent, joined
from drtune_ray.training.weights_layouts import FORMATS, PLAIN, Layout, recognized, wrappers
from drtune_ray.training.weights_match import Match, Target, matches, num_known, prefixes, resized

MIN_SHARE = 0.5  # of an encoder's elements that a file must hold, whatever may be missing
MAX_VARIANTS = 12  # that are tried for weights that do not fit
SIZES = re.compile(r"\d+|nano|tiny|small|medium|base|large|huge|giant")  # in names of models
WRONG_NAME = "name the backbone that the weights were made for"
# Words in the names of what stands on an encoder.
HEADS = frozenset(
    ("fc", "head", "head_dist", "heads", "classifier", "projection_head", "projector", "predictor")
    + ("online_predictor", "prototypes", "lm_head", "pre_logits")
)
NO_MATCH = Match("", "", {}, (), False, ())


@dataclass(frozen=True)
class KeyReport:
    """How the tensors of a weights file fit the encoder.

    Attributes:
        matched_share: Share of the encoder's elements found in the file, 0 to 1.
        missing: Names of the encoder's tensors without one in the file.
        unused: Names of the file's tensors that were not used, usually those of a classifier.
        is_by_order: Whether tensors were matched by position and shape instead of by name.
        taken: Part of the file that was taken, where others fit as well; else empty.
        others: Those other parts.
        spread: Names of first convolutions whose one channel was spread over three.
        resized: Names of position embeddings and patch embeddings that were resized.
        layout: Whose layout the file has; empty for timm's names.
        role: Which of the layout's encoders was taken, such as the teacher; else empty.
        wrappers: What the model was wrapped in when it was saved.
        num_matched: Number of the encoder's tensors found in the file.
        wrong_shape: Names and shapes of tensors that the file has in another shape.
        records_normalization: Whether the file says which normalization it was trained with.
    """

    matched_share: float
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    is_by_order: bool
    taken: str = ""
    others: tuple[str, ...] = ()
    spread: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    layout: str = ""
    role: str = ""
    wrappers: tuple[str, ...] = ()
    num_matched: int = field(default=0, compare=False)
    wrong_shape: tuple[str, ...] = ()
    records_normalization: bool = field(default=False, compare=False)

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the file's tensors that belong to a classifier or projection head."""
        return tuple(n for n in self.unused if not HEADS.isdisjoint(n.split(".")))

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Names of the other unused tensors."""
        return tuple(name for name in self.unused if name not in self.head)

    def facts(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self) | {"head": self.head, "unexpected": self.unexpected}

    def __str__(self) -> str:
        loaded = f"{self.matched_share:.1%}" if self.missing else "all"
        text = f"{loaded} of the encoder's weights loaded, matched by name"
        if self.is_by_order:
            text = f"{loaded} of the encoder's weights loaded, matched in the order of its modules"
        if self.is_by_order and not self.layout:
            text += (
                " ALONE, because the names in the file are unknown: compare the first accuracies "
                "with what you expect"
            )
        if self.layout:
            text = f"{self.layout}{f', {self.role}' if self.role else ''}; {text}"
        for what, names in (
            ("missing from the file", self.missing),
            ("of the file unused", self.unused),
            ("resized to the image size", self.resized),
        ):
            if names:
                text += f"; {len(names)} tensor{'s' * (len(names) > 1)} {what} ({_shown(names)})"
        if self.others:
            text += (
                f"; taken from {self.taken}, not from {_shown(self.others)} "
                f"(backbone.weights_key={self.others[0]} takes that instead)"
            )
        if self.spread:
            text += f"; the one channel of {_shown(self.spread)} spread over three"
        return text


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def load_weights(encoder: nn.Module, content: WeightsContent, config: BackboneConfig) -> KeyReport:
    """Load the tensors of a weights file into an encoder.

    Args:
        encoder: Encoder on the CPU; receives the weights.
        content: Content of the file.
        config: Name of the backbone, and what may be missing.

    Raises:
        ConfigError: If the file lacks parameters of the encoder; names the model that it fits.
    """
    report, problem = try_weights(encoder, content, config)
    if problem is not None:
        raise problem
    return report


def try_weights(
    encoder: nn.Module, content: WeightsContent, config: BackboneConfig
) -> tuple[KeyReport, ConfigError | None]:
    """Load what fits; return the report, and why :func:`load_weights` refuses the file.

    Raises:
        ConfigError: If the file has not the layout that ``backbone.weights_format`` names.
    """
    target = Target(encoder)
    layout = _layout_of(content, config)
    nothing = replace(NO_MATCH, unused=tuple(sorted(content.shapes)))
    match, *others = _matches(target, content, layout, config) or [nothing]
    lacking = target.lacking(match.state)
    problem = _why_lacking(lacking, match, target, content, config) if lacking else None
    encoder.load_state_dict({**target.wanted, **match.state})
    of_others = tuple(f"{o.key.removeprefix(match.part).strip('.')}." for o in others)
    report = KeyReport(
        target.share(match.state),
        tuple(name for name in target.wanted if name not in match.state),
        tuple(name for name in match.unused if not name.startswith(of_others)),
        match.is_by_order,
        (match.key or TOP_LEVEL) if others else "",
        tuple(other.key or TOP_LEVEL for other in others),
        match.spread,
        match.resized,
        "" if layout is PLAIN else layout.title,
        layout.role(match.key),
        wrappers(match.key, content.entries),
        len(match.state),
        tuple(text for text in _other_shapes(lacking, match, target, content) if ":" in text),
    )
    return report, problem


def _layout_of(content: WeightsContent, config: BackboneConfig) -> Layout:
    """Return the layout that is set, otherwise the one that the names of the file tell."""
    if config.weights_format is None:
        return recognized(content.shapes)
    return FORMATS[config.weights_format]


def _matches(
    target: Target, content: WeightsContent, layout: Layout, config: BackboneConfig
) -> list[Match]:
    if content.archive is not None:
        return [_of_archive(target, content, config)]
    found = matches(target, content.parts, layout)
    if config.weights_format is None or config.weights_key is not None or not layout.encoders:
        return found
    if found and layout.rank(found[0].key) < len(layout.encoders):
        return found
    raise ConfigError(
        f"backbone.weights_format={layout.name} needs an encoder at {list(layout.encoders)}, but "
        f"backbone.weights={config.weights!r} has none there that fits {config.name!r}: its "
        f"tensors begin {sorted(content.shapes)[:3]}; remove the setting or name the right layout"
    )


def _of_archive(target: Target, content: WeightsContent, config: BackboneConfig) -> Match:
    """Load an archive of NumPy arrays with timm's own function into a copy of the encoder.

    Raises:
        ConfigError: If timm has none for this model, or the arrays do not fit it.
    """
    copy = deepcopy(target.encoder)
    load = getattr(copy, "load_pretrained", None)
    problem = f"backbone.weights={config.weights!r}"
    if load is None:
        raise ConfigError(
            f"{problem} holds NumPy arrays, which timm reads for its ViT and BiT ResNets, not for "
            f"{config.name!r}: {WRONG_NAME}"
        )
    with torch.no_grad():
        for tensor in copy.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)  # what stays so was not in the file
        try:
            load(str(content.archive))
        except Exception as error:  # of names and shapes, as numpy and torch raise them
            raise ConfigError(
                f"{problem} holds NumPy arrays that do not fit {config.name!r} "
                f"({first_line(error)}): {WRONG_NAME}"
            ) from None
    state = {n: t for n, t in copy.state_dict().items() if not bool(t.isnan().all())}
    given = content.parts[""]
    head = tuple(sorted(n for n in given if not HEADS.isdisjoint(n.split("/"))))
    return Match("", "", state, head, False, (), resized(given, state))


def _why_lacking(
    lacking: list[str],
    match: Match,
    target: Target,
    content: WeightsContent,
    config: BackboneConfig,
) -> ConfigError | None:
    """Return why weights that do not fill the encoder are refused; None if they are allowed.

    They are refused if missing ones are not allowed, the first convolution is among them, or less
    than half of the encoder fits.
    """
    share = target.share(match.state)
    may_lack = share >= MIN_SHARE and target.first.isdisjoint(lacking)
    if config.allow_missing and may_lack:
        return None
    problem = f"backbone.weights={config.weights!r}"
    if not any(_are_akin(target.wanted, part) for part in content.parts.values()):
        given = max(content.parts.values(), key=len)
        return ConfigError(
            f"{problem} fit {share:.0%} of {config.name!r}: its tensors begin {sorted(given)[:3]}, "
            f"the backbone's {sorted(target.wanted)[:3]}; {WRONG_NAME}"
        )
    fix = WRONG_NAME
    if variant := fitting_variant(config.name, content.parts):
        fix = f"set backbone.name={variant}, which it fits wholly"
    elif not target.first.isdisjoint(lacking) and share >= MIN_SHARE:
        fix = "its first convolution must be there, for images of three channels or of one"
    if may_lack:
        fix += ", or set backbone.allow_missing=true to start these at random"
    shapes = _other_shapes(lacking, match, target, content)
    return ConfigError(
        f"{problem} lacks {len(lacking)} of the {len(target.required)} parameters of "
        f"{config.name!r} ({_shown(shapes)}): {fix}"
    )


def _other_shapes(
    lacking: list[str], match: Match, target: Target, content: WeightsContent
) -> list[str]:
    """Return the names, with both shapes where the file has a tensor of another one."""
    part = content.parts.get(match.part, {})
    prefix = match.key.removeprefix(match.part).strip(".")
    texts = []
    for name in lacking:
        given = part.get(joined(prefix, name))
        ours = list(target.wanted[name].shape)
        theirs = f": {list(given.shape)} in the file, {ours} here" if given is not None else ""
        texts.append(name + theirs)
    return texts


def fitting_variant(name: str, parts: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """Return a similar model of timm that weights fit wholly by name; None if none is found.

    Args:
        name: Model that they do not fit.
        parts: Tensors of a weights file.
    """
    base = name.split(".")[0]
    family = timm.list_models(module=timm.models.model_entrypoint(base).__module__.split(".")[-1])
    nearest = difflib.get_close_matches(base, family, n=len(family), cutoff=0.0)
    nearest.sort(key=lambda other: SIZES.sub("", other) != SIZES.sub("", base))
    others = (other for other in nearest[:MAX_VARIANTS] if other != base)
    return next((other for other in others if _fits_wholly(other, parts)), None)


def _are_akin(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    """Whether most names of an encoder are among those of a file, or the reverse."""
    return 2 * num_known(wanted, given) > min(len(wanted), len(given))


def _fits_wholly(name: str, parts: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether a part of a file has every parameter of a model, and more only in its classifier."""
    try:
        with torch.device("meta"):  # shapes alone
            target = Target(timm.create_model(name, num_classes=0))
    except Exception:  # a model that cannot be built so is no proposal
        return False
    classifier = getattr(target.encoder, "pretrained_cfg", {}).get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return any(
        _has_shapes(target, {n[len(p) :]: t for n, t in part.items() if n.startswith(p)}, heads)
        for part in parts.values()
        for p in prefixes(part, target.wanted)
    )


def _has_shapes(target: Target, given: Mapping[str, Tensor], heads: tuple[str, ...]) -> bool:
    more = given.keys() - target.wanted.keys()
    return all(
        name in given and (given[name].shape == target.wanted[name].shape or "pos_embed" in name)
        for name in target.required
    ) and all(name.startswith(heads) for name in more)
