"""DR-Tune as its paper means it, in torch alone.

Zhou, Chen, Huang, "DR-Tune: Improving Fine-tuning of Pretrained Visual Models by Distribution
Regularization with Semantic Calibration", ICCV 2023, https://arxiv.org/abs/2308.12058.
"""

from drtune_ray.method.baselines import CETuning
from drtune_ray.method.calibration import SemanticCalibration
from drtune_ray.method.feature_bank import FeatureBank
from drtune_ray.method.objective import DRTune, MethodOutput
from drtune_ray.method.rotation import global_rotation

__all__ = [
    "CETuning",
    "DRTune",
    "FeatureBank",
    "MethodOutput",
    "SemanticCalibration",
    "global_rotation",
]
