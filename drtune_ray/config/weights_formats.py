"""Names of the layouts of weights files; training/weights_layouts.py says what they are."""

from __future__ import annotations

from typing import Literal

WeightsFormat = Literal[
    "timm",
    "torchvision",
    "torchvision_vit",
    "efficientnet_pytorch",
    "google_vit",
    "deit",
    "moco_v1",
    "moco_v2",
    "moco_v3",
    "pcl",
    "infomin",
    "hcsc",
    "swav",
    "simsiam",
    "byol",
    "barlow_twins",
    "dino",
    "dinov2",
    "dinov3",
    "ibot",
    "mae",
    "beit",
    "beit_pretraining",
    "clip",
    "siglip",
]
