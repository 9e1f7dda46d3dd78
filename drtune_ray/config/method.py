"""Settings of a trial: the fine-tuning method.

See :mod:`drtune_ray.config.trial` for the form of the texts under the fields.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
)

from drtune_ray.config.section import Probability, Section

MethodName = Literal[
    "dr_tune",
    "ce_tuning",
    "dr",
    "dr_tune_l2_sp",
    "dr_tune_bss",
    "linear_probe",
    "bitfit",
    "l2_sp",
    "bss",
    "ldifs",
    "lp_ft",
    "wise_ft",
    "spd",
    "ftp",
    "scl",
]
METHOD_NAMES = get_args(MethodName)
IMPORT_PATH = r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+"
L2_SP = ("l2_sp_weight", "l2_sp_head_weight")
BSS = ("bss_weight", "bss_num_values")
DR = ("regularization_weight", "reduction", "bank_size")
# Settings that a method reads besides `name` and `head_lr_multiplier`, groups by their names.
READS: dict[str, tuple[str, ...]] = {
    "dr_tune": (*DR, "calibration"),
    "dr": DR,
    "dr_tune_l2_sp": (*DR, "calibration", *L2_SP),
    "dr_tune_bss": (*DR, "calibration", *BSS),
    "l2_sp": L2_SP,
    "bss": BSS,
    "ldifs": ("ldifs_weight",),
    "lp_ft": ("probe_share",),
    "wise_ft": ("probe_share",),
    "spd": ("spd_weight",),
    "ftp": ("ftp_annealing",),
    "scl": ("scl_weight", "scl_temperature"),
}


def reads_setting(method: str, path: str) -> bool:
    """Whether a method reads the setting at a path of a trial; `method.*` alone are in question.

    Args:
        method: `method.name`; one's own method reads what all read.
        path: Dotted path, such as ``method.bank_size``.
    """
    group, _, rest = path.partition(".")
    known = ("name", "head_lr_multiplier", *READS.get(method, ()))
    return group != "method" or rest.split(".")[0] in known


def _known(name: Any) -> Any:
    if isinstance(name, str) and name not in METHOD_NAMES and not re.fullmatch(IMPORT_PATH, name):
        (nearest,) = difflib.get_close_matches(name, METHOD_NAMES, n=1, cutoff=0.0)
        raise ValueError(
            f"there is no method {name!r}: the nearest is {nearest!r}, docs/methods.md lists all, "
            "and one of your own is named by its import path, such as my_package.MyMethod"
        )
    return name


Named = Annotated[
    MethodName | Annotated[str, StringConstraints(pattern=f"^{IMPORT_PATH}$")],
    BeforeValidator(_known),
]


class CalibrationConfig(Section):
    """Semantic calibration: moves the bank's pretrained features to the downstream features."""

    rotation: bool = True
    """Apply the global rotation R to all pretrained rows. [eq. 7]"""

    rotation_interval: PositiveInt = 10
    """Steps between two refreshes of R; 1 refreshes R at every step. [authors' code: 10]"""

    rotation_solver: Literal["randomized", "svd"] = "randomized"
    """Solver of R: `svd` is the exact minimiser, `randomized` a shrunk rotation of limited rank.
    [svd: Schoenemann 1966; randomized: Halko, Martinsson and Tropp 2011]"""

    rotation_rank: PositiveInt = 32
    """Rank r: number of directions that R rotates; read by the solver `randomized` only.
    [Halko, Martinsson and Tropp 2011]"""

    rotation_shrinkage: NonNegativeFloat = 0.02
    """Singular value, relative to the root of the sum of their squares, whose direction is shrunk
    to 0.71; 0 shrinks none. Read by the solver `randomized` only."""

    rotation_kept: bool = True
    """Apply the last R at the steps between refreshes too; `false` leaves those steps unrotated.
    [authors' code: false]"""

    rotation_restarts_each_epoch: bool = False
    """Count `rotation_interval` from the first step of each epoch, not of the training.
    [authors' code: true]"""

    proper_rotation: bool = False
    """Require det R = +1, which excludes reflections; read by the solver `svd` only.
    [Kabsch 1976; authors' code: true]"""

    recenter: bool = True
    """Move the rotated rows to the mean of the downstream rows; no effect where `translation` is
    on, because a common shift cancels in eq. 12. [authors' code: false]"""

    normalize: bool = True
    """L2-normalise the features before calibration, and scale the calibrated rows to the mean norm
    of the batch's downstream features. [authors' code; paper: raw features]"""

    translation: bool = True
    """Apply the class-level translation: shift each class to its downstream centre. [eq. 8, 11]"""

    confidence_weighting: bool = True
    """Weight the rows of a downstream class centre by the head's confidence; `false` takes the
    plain mean. [eq. 9-10]"""

    confidence_temperature: PositiveFloat = 0.1
    """Divisor of the similarities in the softmax of the confidence weights; lower values favour
    the most confident rows. [eq. 10 and authors' code: 1]"""

    similarity: Literal["cosine", "dot"] = "cosine"
    """Similarity of a row to its class prototype in the confidence weights.
    [eq. 10: dot; authors' code: cosine]"""


class MethodConfig(Section):
    """Fine-tuning method; docs/methods.md says which settings each reads.

    K is min(bank_size, number of training images) and B the global batch size; both are fixed for
    the whole trial.
    """

    name: Named = "dr_tune"
    """Fine-tuning method: one of docs/methods.md, or the import path of a class of your own, which
    is imported where a trial starts. [ICCV 2023]"""

    regularization_weight: NonNegativeFloat | Literal["bank_over_batch"] = 1.0
    """Weight lambda of the distribution regularization in the loss; `bank_over_batch` is K/B.
    [eq. 14; paper: K/B]"""

    reduction: Literal["sum", "mean"] = "sum"
    """Combination of the losses: `sum` is CE + lambda DR, `mean` divides that by 1 + lambda.
    [eq. 14: sum; authors' code: mean]"""

    bank_size: PositiveInt = 512
    """Rows K of the feature bank; at most the number of training images takes effect.
    [sec. 3.3; paper: 2048]"""

    head_lr_multiplier: PositiveFloat | Literal["one_plus_bank_over_batch"] = 1.0
    """Learning rate of the head as a multiple of the backbone's; `one_plus_bank_over_batch` is
    1 + K/B. [sec. 4.2: 1 + K/B]"""

    l2_sp_weight: NonNegativeFloat = 0.1
    """Weight alpha of the squared distance to the pretrained weights, halved; read by methods with
    L2-SP. [Li et al. 2018; their code: 0.1]"""

    l2_sp_head_weight: NonNegativeFloat = 0.01
    """Weight beta of the head's squared norm, halved; read by methods with L2-SP.
    [Li et al. 2018: 0.01]"""

    bss_weight: NonNegativeFloat = 0.001
    """Weight eta of the smallest squared singular values of a batch's features; read by methods
    with BSS. [Chen et al. 2019: 0.001]"""

    bss_num_values: PositiveInt = 1
    """Number k of singular values that are shrunk; read by methods with BSS.
    [Chen et al. 2019: 1]"""

    ldifs_weight: NonNegativeFloat = 10.0
    """Weight lambda of the distance to the pretrained features of several layers; read by `ldifs`.
    [Mukhoti et al. 2024; their code: 10]"""

    probe_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of the epochs in which the head alone is trained, rounded, at least one and not all;
    read by `lp_ft` and `wise_ft`. [Kumar et al. 2022]"""

    spd_weight: NonNegativeFloat = 1.0
    """Share lambda of the growth of the distance to the pretrained weights that is undone; read by
    `spd`. [Tian et al. 2024: 1 projects onto the sphere of the former distance]"""

    ftp_annealing: Probability = 1.0
    """Factor k of a gradient that would shrink the distance allowed to the weights; read by `ftp`.
    [Tian et al. 2023; their code: 1]"""

    scl_weight: Probability = 0.9
    """Weight lambda of the contrastive loss, beside 1 - lambda of the cross-entropy; read by `scl`.
    [Gunel et al. 2021: 0.9]"""

    scl_temperature: PositiveFloat = 0.3
    """Divisor tau of the similarities in the contrastive loss; read by `scl`.
    [Gunel et al. 2021: 0.3]"""

    calibration: CalibrationConfig = CalibrationConfig()
    """Semantic calibration of the bank's pretrained features. [sec. 3.4]"""
