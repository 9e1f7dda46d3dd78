"""The golden losses: how they are made. ``python -m tests.method.golden`` writes them anew.

A refactor may not change them; a change of numbers is a commit of its own that says why.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from drtune_ray.config.study import reference_config
from drtune_ray.config.trial import TrialConfig
from drtune_ray.training.model import build_method
from tests.method.tiny import C, D, batches_of, descend, make_encoder, randomise, run_step

FILE = Path(__file__).with_name("golden_losses.json")
PRESETS = ("default", "paper", "authors", "ce_tuning")
NUM_TRAIN, BATCH_SIZE, EPOCHS = 46, 4, 2


def golden_losses(preset):
    """[loss, cross_entropy, distribution_regularization] of each step; one thread, float64.

    A norm-free encoder, N = 46 images in batches of 4 (so that K = N, and interval 10 is refreshed
    in each epoch), plain gradient steps.
    """
    base = TrialConfig.from_mapping(
        {"data": {"train": "unused"}, "training": {"batch_size": BATCH_SIZE}}
    )
    config = reference_config(base, preset)
    backbone = SimpleNamespace(num_features=D, build=lambda *_: make_encoder(0))
    backbone.build_frozen = lambda _: make_encoder(0)
    method = build_method(config, backbone, C, NUM_TRAIN, live_features=True).double()
    randomise(method.head, 1, 0.5)
    if preset != "ce_tuning":
        for images, labels in batches_of(NUM_TRAIN, BATCH_SIZE, seed=9):
            method.warm_up(images, labels)
    losses = []
    for epoch in range(EPOCHS):
        method.begin_epoch()
        for images, labels in batches_of(
            NUM_TRAIN, BATCH_SIZE, config.training.drop_last, seed=epoch
        ):
            step = run_step(method, images, labels)
            names = ("loss", "cross_entropy", "distribution_regularization")
            losses.append([step[name].item() for name in names if name in step])
            descend(method)
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = {preset: golden_losses(preset) for preset in PRESETS}
    FILE.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"wrote {FILE}")
