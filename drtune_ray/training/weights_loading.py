"""Loads the tensors of a weights file into an encoder; refuses those that do not fill it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

from drtune_ray.config.trial import BackboneConfig
from drtune_ray.errors import ConfigError
from drtune_ray.training.weights_file import TOP_LEVEL, WeightsContent, joined
from drtune_ray.training.weights_match import Match, Target, matches, num_known, prefixes

MIN_SHARE = 0.5  # of an encoder's elements that a file must hold, whatever may be missing
MAX_VARIANTS = 12  # that are tried for weights that do not fit
SIZES = re.compile(r"\d+|nano|tiny|small|medium|base|large|huge|giant")  # in names of models
WRONG_NAME = "name the backbone that the weights were made for"
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
    """

    matched_share: float
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    is_by_order: bool
    taken: str = ""
    others: tuple[str, ...] = ()
    spread: tuple[str, ...] = ()

    def __str__(self) -> str:
        loaded = f"{self.matched_share:.1%}" if self.missing else "all"
        matched = "position" if self.is_by_order else "name"
        text = f"{loaded} of the encoder's weights loaded, matched by {matched}"
        for what, names in (
            ("missing from the file", self.missing),
            ("of the file unused", self.unused),
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
    target = Target(encoder)
    match, *others = matches(target, content.parts) or [NO_MATCH]
    if lacking := target.lacking(match.state):
        _check_lacking(lacking, match, target, content, config)
    encoder.load_state_dict({**target.wanted, **match.state})
    missing = tuple(name for name in target.wanted if name not in match.state)
    of_others = tuple(f"{o.key.removeprefix(match.part).strip('.')}." for o in others)
    return KeyReport(
        target.share(match.state),
        missing,
        tuple(name for name in match.unused if not name.startswith(of_others)),
        match.is_by_order,
        (match.key or TOP_LEVEL) if others else "",
        tuple(other.key or TOP_LEVEL for other in others),
        match.spread,
    )


def _check_lacking(
    lacking: list[str],
    match: Match,
    target: Target,
    content: WeightsContent,
    config: BackboneConfig,
) -> None:
    """Refuse weights that do not fill the encoder, unless the configuration allows it.

    Raises:
        ConfigError: If parameters are missing and may not be, the first convolution is among them,
            or less than half of the encoder fits.
    """
    share = target.share(match.state)
    may_lack = share >= MIN_SHARE and target.first.isdisjoint(lacking)
    if config.allow_missing and may_lack:
        return
    problem = f"backbone.weights={config.weights!r}"
    if not any(_are_akin(target.wanted, part) for part in content.parts.values()):
        given = max(content.parts.values(), key=len)
        raise ConfigError(
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
    raise ConfigError(
        f"{problem} lacks {len(lacking)} of the {len(target.required)} parameters of "
        f"{config.name!r} ({_shown(shapes)}): {fix}"
    )


def _other_shapes(
    lacking: list[str], match: Match, target: Target, content: WeightsContent
) -> list[str]:
    """Return the names, with both shapes where the file has a tensor of another one."""
    part, prefix = content.parts[match.part], match.key.removeprefix(match.part).strip(".")
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
