"""A tiny norm-free DR-Tune in float64, its reference, and how one step of both is compared."""

import torch
from torch import nn

from drtune_ray.method import DRTune, FeatureBank, SemanticCalibration
from tests.method.reference import AUTHORS, PAPER, ReferenceCalibration, ReferenceDRTune

KEPT = PAPER | {"rotation_interval": 3}
DROPPED = AUTHORS | {"rotation_interval": 2}
C, D = 5, 6
IMAGE_SHAPE = (2, 3, 3)
# Rows of classes 0 to 4: none of class 2, one of class 1 in the first seven.
LABELS = [0, 3, 0, 1, 4, 3, 0, 3, 4, 4, 0]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_encoder(seed):
    """Without normalisation layers or dropout, float64, seeded."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.Tanh(), nn.Linear(4, D)).double()
    return randomise(encoder, seed, 0.7)


def make_head(seed=1):
    return randomise(nn.Linear(D, C).double(), seed, 0.5)


def randomise(module, seed, std):
    g = generator(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std, generator=g)
    return module


def make_method(
    bank_size=5, options=PAPER, weight=0.7, reduction="sum", collective=None, **arguments
):
    """DRTune in float64; the frozen encoder starts as the trained one."""
    arguments = {"pretrained_encoder": make_encoder(0)} | arguments
    method = DRTune(
        make_encoder(0),
        make_head(),
        FeatureBank(bank_size, D),
        None if options is None else SemanticCalibration(D, **options),
        regularization_weight=weight,
        reduction=reduction,
        **arguments,
    ).double()
    if collective is not None:
        method.collective = collective
    return method


def make_reference(bank_size=5, options=PAPER, weight=0.7, reduction="sum"):
    calibration = None if options is None else ReferenceCalibration(**options)
    return ReferenceDRTune(bank_size, calibration, weight, reduction)


def make_data(num_images, seed=3):
    images = torch.randn(num_images, *IMAGE_SHAPE, generator=generator(seed), dtype=torch.float64)
    repeats = -(-num_images // len(LABELS))
    return images, torch.tensor((LABELS * repeats)[:num_images])


def batches_of(num_images, batch_size, drop_last=False, seed=3):
    images, labels = make_data(num_images, seed)
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    return batches[:-1] if drop_last and num_images % batch_size else batches


def trained_parameters(method):
    return {
        name: parameter
        for name, parameter in method.named_parameters()
        if name.startswith(("downstream_encoder.", "head."))
    }


def gradients(method):
    return {name: p.grad.clone() for name, p in trained_parameters(method).items()}


def descend(method, rate=0.2):
    """A plain gradient step, so that the encoders drift apart."""
    with torch.no_grad():
        for parameter in trained_parameters(method).values():
            parameter -= rate * parameter.grad
            parameter.grad = None


def run_step(method, images, labels, *arguments, **options):
    """{name: value} of loss, parts and gradients, as the reference gives them."""
    method.zero_grad()
    output = method(images, labels, *arguments, **options)
    output.loss.backward()
    return {"loss": output.loss.detach()} | output.parts | gradients(method)


def assert_same(actual, expected, atol=1e-9):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=0.0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def warmed_up(num_rows=8, **arguments):
    method = make_method(**arguments)
    images, labels = make_data(num_rows, seed=9)
    method.warm_up(images, labels)
    return method
