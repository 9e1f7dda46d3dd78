"""Names of the optimisers: PyTorch's SGD and AdamW, and timm's.

timm itself is not imported: reading a configuration stays light. A test compares the names with
what timm offers; those of timm that are missing here are refused with the reason.
"""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator

OptimizerName = Literal[
    "sgd",
    "adamw",
    # timm's `create_optimizer_v2`, those of timm 1.0.20 and later
    "adabelief",
    "adadelta",
    "adafactor",
    "adafactorbv",
    "adafactorbvc",
    "adagrad",
    "adam",
    "adamax",
    "adamc",
    "adamp",
    "adan",
    "adanw",
    "adopt",
    "adoptc",
    "adoptw",
    "cadafactor",
    "cadafactorbv",
    "cadafactorbvc",
    "cadamc",
    "cadamw",
    "cadan",
    "cadanw",
    "cadopt",
    "cadoptc",
    "cadoptw",
    "clamb",
    "clambw",
    "claprop",
    "clion",
    "clionc",
    "cmars",
    "cnadamc",
    "cnadamw",
    "crmsproptf",
    "csgdc",
    "csgdw",
    "lamb",
    "lambc",
    "lambcd",
    "lambcw",
    "lambw",
    "laprop",
    "lapropc",
    "larc",
    "lars",
    "lion",
    "lionc",
    "madgrad",
    "madgradw",
    "mars",
    "nadamc",
    "nadamw",
    "nlarc",
    "nlars",
    "novograd",
    "radabelief",
    "radam",
    "radamw",
    "rmsprop",
    "rmsproptf",
    "rmsproptfc",
    "sgdc",
    "sgdp",
    "sgdw",
]
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)
# Those of them that read `optim.momentum`.
WITH_MOMENTUM = frozenset(
    {
        *("sgd", "sgdc", "sgdp", "sgdw", "csgdc", "csgdw", "lars", "larc", "nlars", "nlarc"),
        *("madgrad", "madgradw", "adafactorbv", "adafactorbvc", "cadafactorbv", "cadafactorbvc"),
        *("rmsprop", "rmsproptf", "rmsproptfc", "crmsproptf"),
    }
)
# Names of timm that are refused, and what to choose instead; a star stands for any ending. A step
# has no second derivatives (adahessian); a trial would not resume exactly (kron, nadam); they need
# CUDA and another package (bnb, fused); the rest are older versions and other names.
REFUSED = {
    "adahessian": "adamw",
    "kron*": "adamw",
    "nadam": "nadamw",
    "bnb*": "adamw",
    "fused*": "adamw",
    "adamwlegacy": "adamw",
    "nadamlegacy": "nadamw",
    "radamlegacy": "radam",
    "momentum": "sgd",
    "nesterov": "sgd",
    "nesterovw": "sgdw",
}


def alternative_to(name: str) -> str | None:
    """Return what to choose instead of an optimiser of timm that is refused, None for others."""
    for pattern, other in REFUSED.items():
        if fnmatchcase(name, pattern):
            return other
    return None


def _known(name: object) -> object:
    if not isinstance(name, str) or name in OPTIMIZERS:
        return name
    if other := alternative_to(name):
        raise ValueError(
            f"timm's optimiser {name!r} cannot train here (docs/recipe.md says why): choose "
            f"{other!r}"
        )
    (nearest,) = difflib.get_close_matches(name.lower(), OPTIMIZERS, n=1, cutoff=0.0)
    raise ValueError(
        f"there is no optimiser {name!r}: the nearest is {nearest!r}, and docs/recipe.md lists all"
    )


Optimizer = Annotated[OptimizerName, BeforeValidator(_known)]
