"""DR-Tune as in its paper, in torch alone; `equations` holds the equations in their order.

Zhou, Chen, Huang, "DR-Tune: Improving Fine-tuning of Pretrained Visual Models by Distribution
Regularization with Semantic Calibration", ICCV 2023, https://arxiv.org/abs/2308.12058.
"""

from drtune_ray.method.baselines import CETuning
from drtune_ray.method.calibration import SemanticCalibration
from drtune_ray.method.dr_tune import DRTune, MethodOutput
from drtune_ray.method.equations import global_rotation
from drtune_ray.method.feature_bank import FeatureBank

__all__ = [
    "CETuning",
    "DRTune",
    "FeatureBank",
    "MethodOutput",
    "SemanticCalibration",
    "global_rotation",
]
