"""Baselines of DR-Tune that train by the cross-entropy of the batch alone."""

from __future__ import annotations

from drtune_ray.method.base import Method


class CETuning(Method):
    """Plain fine-tuning with cross-entropy: encoder and head, nothing else.

    The baseline "CE-tuning" of DR-Tune's Table 1 (https://arxiv.org/abs/2308.12058).
    """
