"""DR-Tune as in its paper, in torch alone; `equations` holds the equations in their order.

Zhou, Chen, Huang, "DR-Tune: Improving Fine-tuning of Pretrained Visual Models by Distribution
Regularization with Semantic Calibration", ICCV 2023, https://arxiv.org/abs/2308.12058.
"""

from drtune_ray.method.base import Method, MethodOutput, MixedBatch, Penalty
from drtune_ray.method.baselines import CETuning
from drtune_ray.method.calibration import SemanticCalibration
from drtune_ray.method.contrastive import SupervisedContrast
from drtune_ray.method.dr_tune import DRTune
from drtune_ray.method.equations import global_rotation
from drtune_ray.method.feature_bank import FeatureBank
from drtune_ray.method.freezing import BitFit, LinearProbe
from drtune_ray.method.ldifs import LDIFS
from drtune_ray.method.penalties import L2SP, BatchSpectralShrinkage
from drtune_ray.method.probing import LPFT
from drtune_ray.method.projection import FTP, SPD
from drtune_ray.method.wise_ft import WiSEFT

__all__ = [
    "FTP",
    "L2SP",
    "LDIFS",
    "LPFT",
    "SPD",
    "BatchSpectralShrinkage",
    "BitFit",
    "CETuning",
    "DRTune",
    "FeatureBank",
    "LinearProbe",
    "Method",
    "MethodOutput",
    "MixedBatch",
    "Penalty",
    "SemanticCalibration",
    "SupervisedContrast",
    "WiSEFT",
    "global_rotation",
]
