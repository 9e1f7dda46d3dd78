"""What an accelerator needs: no step waits for the host, non-finite features do no harm."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from drtune_ray.method import CETuning, DRTune, FeatureBank, SemanticCalibration
from tests.method.reference import AUTHORS
from tests.method.tiny import (
    IMAGE_SHAPE,
    KEPT,
    D,
    generator,
    make_data,
    make_encoder,
    make_head,
    make_method,
    warmed_up,
)

RANDOMIZED = KEPT | {"rotation_solver": "randomized", "normalize": True, "similarity": "cosine"}
CASES = {
    "default": RANDOMIZED,
    "no rotation": KEPT | {"rotation": False},
    "no translation": RANDOMIZED | {"translation": False},
    "plain mean": RANDOMIZED | {"confidence_weighting": False},
    "no calibration": None,
}


def one_step(options, device, *, name="dr_tune"):
    """A whole training step at a full bank, refresh included: loss, gradients, update, bank."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.Tanh(), nn.Linear(4, D))
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(18, D))
    if name == "ce_tuning":
        method = CETuning(encoder, nn.Linear(D, 3))
    else:
        calibration = None if options is None else SemanticCalibration(D, **options)
        bank = FeatureBank(7, D)
        method = DRTune(encoder, nn.Linear(D, 3), bank, calibration, frozen)
    if device != "cpu":  # fake parameters cannot be swapped
        method = method.to(device)
    optimizer = torch.optim.SGD(method.parameters(), 0.1, momentum=0.9, foreach=False)
    images, labels = (
        torch.rand(5, *IMAGE_SHAPE, device=device),
        torch.zeros(5, device=device).long(),
    )
    if name == "dr_tune":
        method.warm_up(images, labels)
        method.warm_up(images, labels)

    def step():
        output = method(images, labels)
        output.loss.backward()
        optimizer.step()
        return output

    return step


@pytest.mark.parametrize(
    ("options", "name"),
    [*((options, "dr_tune") for options in CASES.values()), (None, "ce_tuning")],
    ids=[*CASES, "ce_tuning"],
)
def test_a_step_never_asks_for_a_value(options, name):
    """A fake tensor has none: anything that read one (item, bool, nonzero) would raise."""
    with FakeTensorMode():
        step = one_step(options, "cpu", name=name)
        step()
        output = step()
        assert output.loss.shape == output.is_finite.shape == ()
        with pytest.raises(DataDependentOutputException):
            bool(output.is_finite)


def test_the_exact_solver_does_ask():
    """So the test above can fail."""
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        one_step(AUTHORS, "cpu")()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_a_step_does_not_synchronise_the_device(options):
    step = one_step(options, "cuda")
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- features that are not finite


@pytest.mark.parametrize("options", [RANDOMIZED, AUTHORS, None], ids=["default", "authors", "none"])
@pytest.mark.parametrize("which", ["pretrained", "downstream"])
def test_a_feature_that_is_not_finite_spoils_nothing_but_is_told(which, options):
    method = warmed_up(bank_size=8, options=options)
    images, labels = make_data(8)
    first = method(images[:4], labels[:4])
    assert first.is_finite
    known = make_encoder(0)(images[4:]).detach()
    if which == "pretrained":
        known[1, 2] = torch.inf
    else:
        images[5] = torch.nan
    broken = method(images[4:], labels[4:], known)
    assert not broken.is_finite
    assert broken.loss.isfinite() == (which == "pretrained")
    assert method.bank.num_nonfinite == 1
    for rows in method.bank.stored():
        assert rows.isfinite().all()
    after = method(images[:4], labels[:4])
    assert after.loss.isfinite()
    assert not after.is_finite  # it has diverged, whatever comes


def test_ce_tuning_tells_of_a_loss_that_is_not_finite():
    images, labels = make_data(4)
    method = CETuning(make_encoder(0), make_head())
    assert method(images, labels).is_finite
    images[0] = torch.nan
    assert not method(images, labels).is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-30, 1e-300])
def test_no_temperature_overflows_or_underflows(temperature, dtype):
    g = generator(4)
    rows = [torch.randn(9, D, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    prototypes = torch.randn(4, D, generator=g, dtype=torch.float64).to(dtype)
    options = RANDOMIZED | {"confidence_temperature": temperature}
    calibrated = SemanticCalibration(D, **options)(*rows, labels, prototypes)
    assert calibrated.isfinite().all()
    # In the limit each class goes to its surest row.
    scores = (F.normalize(rows[1], dim=1) * F.normalize(prototypes, dim=1)[labels]).sum(1)
    plain = SemanticCalibration(D, **(options | {"normalize": False}))
    moved = plain(*rows, labels, prototypes)
    for c in range(3):
        of_class = (labels == c).nonzero().flatten()
        surest = of_class[scores[of_class].argmax()]
        torch.testing.assert_close(moved[of_class].mean(0), rows[1][surest], rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [RANDOMIZED, AUTHORS], ids=["default", "authors"])
@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_zero_features_give_no_nan(options, value):
    method = make_method(bank_size=6, options=options)
    zeros = torch.full((6, D), value, dtype=torch.float64)
    method.bank.enqueue(zeros, zeros, torch.tensor([0, 0, 1, 1, 2, 2]))
    images, labels = make_data(4)
    output = method(images, labels)
    output.loss.backward()
    assert output.is_finite
    assert all(p.grad.isfinite().all() for p in method.head.parameters())
