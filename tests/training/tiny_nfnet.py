"""A norm-free timm model of one block: what `test_nfnet` has in four, in half the time.

Importing this file makes its name known to timm, in the processes of a group as well.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.nfnet import NfCfg, NormFreeNet

TINY_NFNET = "tiny_nfnet"
NETWORK = NfCfg(
    depths=(1,),
    channels=(128,),  # with 32, features have so few directions that float32 gives 2e-5
    group_size=8,
    bottle_ratio=0.25,
    extra_conv=True,
    num_features=192,
    attn_layer="se",
    attn_kwargs={"rd_ratio": 0.25, "rd_divisor": 8},
)
default_cfgs = generate_default_cfgs(
    {
        TINY_NFNET: {
            "input_size": (3, 32, 32),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bicubic",
            "first_conv": "stem.conv",
            "classifier": "head.fc",
        }
    }
)


@register_model
def tiny_nfnet(pretrained: bool = False, **options: Any) -> NormFreeNet:
    return build_model_with_cfg(
        NormFreeNet,
        TINY_NFNET,
        pretrained,
        model_cfg=NETWORK,
        feature_cfg={"flatten_sequential": True},
        **options,
    )
