import io
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from drtune_ray.config.presets import PRESETS
from drtune_ray.config.trial import TrialConfig
from drtune_ray.method import CETuning, DRTune, FeatureBank
from drtune_ray.method.equations import objective
from drtune_ray.training.methods import method_scale
from drtune_ray.training.model import build_method
from tests.method.reference import AUTHORS, PAPER
from tests.method.tiny import (
    DROPPED,
    KEPT,
    C,
    D,
    assert_same,
    batches_of,
    descend,
    make_data,
    make_encoder,
    make_head,
    make_method,
    make_reference,
    randomise,
    run_step,
    trained_parameters,
    warmed_up,
)


def assert_follows_the_reference(method, slow, epochs):
    """Step by step in loss, parts, gradients and bank, at parameters that descend."""
    for batches in epochs:
        method.begin_epoch()
        if slow.calibration is not None:
            slow.calibration.begin_epoch()
        for images, labels in batches:
            pretrained = method.pretrained_encoder(images)
            expected = slow.step(trained_parameters(method), images, labels, pretrained)
            assert_same(run_step(method, images, labels), expected, atol=1e-8)
            descend(method)
            assert_same_bank(method.bank, slow.bank)


def assert_same_bank(bank, expected):
    pretrained, downstream, labels = bank.rows()
    assert labels.tolist() == [label for _, _, label in expected]
    for k, (v_p, v_d, _) in enumerate(expected):
        assert torch.equal(pretrained[k], torch.from_numpy(v_p))
        torch.testing.assert_close(downstream[k], torch.from_numpy(v_d), rtol=0.0, atol=1e-12)


WARM = KEPT | {"rotation_solver": "randomized", "rotation_interval": 1}
SHARP = KEPT | {"normalize": True, "similarity": "cosine", "confidence_temperature": 0.1}
PLAIN = PAPER | {"rotation": False, "translation": False}

CASES = {
    "bank wraps, K no multiple of B, odd last batch": (5, 11, 3, PAPER, 0.7, "sum"),
    "K > D": (9, 11, 4, PAPER, 0.7, "sum"),
    "B > K": (3, 11, 5, PAPER, 0.7, "sum"),
    "K > N": (50, 7, 3, PAPER, 0.7, "sum"),
    "one row": (1, 7, 3, PAPER, 0.7, "sum"),
    "authors' mean": (8, 11, 4, AUTHORS, 2.0, "mean"),
    "kept rotation": (8, 11, 3, KEPT, 0.7, "sum"),
    "dropped rotation": (8, 11, 3, DROPPED, 0.7, "mean"),
    "sharp cosine": (8, 11, 3, SHARP, 0.7, "sum"),
    "no calibration": (8, 11, 3, None, 0.7, "sum"),
    "calibration without parts": (8, 11, 3, PLAIN, 0.7, "mean"),
    "lambda 0": (8, 11, 3, PAPER, 0.0, "sum"),
}


@pytest.mark.parametrize("is_warmed_up", [False, True], ids=["empty bank", "warmed up"])
@pytest.mark.parametrize(
    ("bank_size", "num_images", "batch_size", "options", "weight", "reduction"),
    CASES.values(),
    ids=CASES.keys(),
)
def test_equals_the_reference_over_three_epochs(
    bank_size, num_images, batch_size, options, weight, reduction, is_warmed_up
):
    method = make_method(bank_size, options, weight, reduction)
    slow = make_reference(bank_size, options, weight, reduction)
    if is_warmed_up:
        for images, labels in batches_of(num_images, batch_size, seed=9):
            method.warm_up(images, labels)
            pretrained = method.pretrained_encoder(images)
            slow.enqueue(pretrained, pretrained, labels)
        assert_same_bank(method.bank, slow.bank)
    epochs = [batches_of(num_images, batch_size, seed=seed) for seed in (3, 4, 5)]
    assert_follows_the_reference(method, slow, epochs)


def stub_backbone():
    def build(dtype=torch.float64):
        return make_encoder(0).to(dtype)

    return SimpleNamespace(num_features=D, build=lambda *_: build(), build_frozen=build)


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_equals_the_reference(preset):
    """Two epochs of 11 or 12 steps, so that a rotation of interval 10 is refreshed in them."""
    num_train, batch_size = 46, 4
    config = TrialConfig.from_mapping(
        {"data": {"train": "unused"}, "training": {"batch_size": batch_size}}, preset=preset
    )
    scale = method_scale(config, num_train)
    assert scale.bank_size == num_train
    ratio = num_train / batch_size
    if preset == "default":  # chosen by evidence, so read from the configuration
        options = config.method.calibration.model_dump()
        options["restart_each_epoch"] = options.pop("rotation_restarts_each_epoch")
        weight, reduction = config.method.regularization_weight, config.method.reduction
    else:
        options, reduction = {"paper": (PAPER, "sum"), "authors": (AUTHORS, "mean")}[preset]
        weight = ratio
        assert scale.head_lr_multiplier == 1 + ratio
    method = build_method(config, stub_backbone(), C, num_train, live_features=True).double()
    randomise(method.head, 1, 0.5)
    slow = make_reference(num_train, options, weight, reduction)
    for images, labels in batches_of(num_train, batch_size, seed=9):
        method.warm_up(images, labels)
        pretrained = method.pretrained_encoder(images)
        slow.enqueue(pretrained, pretrained, labels)
    drop_last = config.training.drop_last
    epochs = [batches_of(num_train, batch_size, drop_last, seed) for seed in (3, 4)]
    assert [len(batches) for batches in epochs] == ([11, 11] if drop_last else [12, 12])
    assert_follows_the_reference(method, slow, epochs)


@pytest.mark.parametrize(("reduction", "share"), [("sum", 1.0), ("mean", 1 / (1 + 3.0))])
def test_regularization_has_a_gradient_for_the_head_only(reduction, share):
    """The encoder's gradient is that of CE-tuning, in `mean` divided by 1 + lambda."""
    images, labels = make_data(4)
    plain = run_step(CETuning(make_encoder(0), make_head()), images, labels)
    actual = run_step(
        warmed_up(bank_size=8, options=AUTHORS, weight=3.0, reduction=reduction), images, labels
    )
    for name, gradient in plain.items():
        if name.startswith("downstream_encoder."):
            torch.testing.assert_close(actual[name], share * gradient, rtol=1e-10, atol=1e-12)
        if name.startswith("head."):
            assert (actual[name] - share * gradient).abs().max() > 0.01


def test_the_frozen_encoder_has_no_gradient_and_stays_in_eval_mode():
    frozen = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(18, D)).double()
    method = make_method(pretrained_encoder=frozen)
    assert method.train() is method
    assert method.downstream_encoder.training
    assert not any(module.training for module in frozen.modules())
    images, labels = make_data(4)
    method(images, labels).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert torch.equal(method.bank.rows()[0], frozen[2](images.flatten(1)))


def test_the_first_step_of_an_empty_bank_is_cross_entropy():
    """The bank is read before the batch is enqueued (row j of METHOD.md)."""
    images, labels = make_data(4)
    method = make_method()
    step = run_step(method, images, labels)
    plain = run_step(CETuning(make_encoder(0), make_head()), images, labels)
    assert step.pop("distribution_regularization") == 0.0
    assert_same(step, plain, atol=0.0)
    assert len(method.bank) == 4


def test_only_the_rows_filled_take_part():
    """A bank larger than the data changes nothing (row g of METHOD.md)."""
    images, labels = make_data(4)
    exact, roomy = (
        run_step(warmed_up(7, bank_size=size, weight=2.0), images, labels) for size in (7, 90)
    )
    assert_same(roomy, exact, atol=1e-12)


def test_warm_up_writes_the_pretrained_features_into_both_banks():
    method = make_method(bank_size=6)
    randomise(method.downstream_encoder, 5, 1.0)
    images, labels = make_data(4)
    method.warm_up(images, labels)
    known = torch.full((1, D), 3.0, dtype=torch.float64)
    method.warm_up(images[:1], labels[:1], known)
    pretrained, downstream, kept_labels = method.bank.rows()
    assert torch.equal(pretrained, torch.cat([method.pretrained_encoder(images), known]))
    assert torch.equal(downstream, pretrained)
    assert kept_labels.tolist() == [*labels.tolist(), int(labels[0])]


def test_known_features_replace_the_frozen_encoder():
    images, labels = make_data(11)
    live, table = make_method(bank_size=4), make_method(bank_size=4, pretrained_encoder=None)
    features = make_encoder(0)(images).detach()
    table.warm_up(images[:4], labels[:4], features[:4])
    live.warm_up(images[:4], labels[:4])
    for start in (0, 4, 8):
        rows = slice(start, start + 4)
        expected = run_step(live, images[rows], labels[rows])
        actual = run_step(table, images[rows], labels[rows], features[rows])
        assert_same(actual, expected, atol=1e-12)


def test_mean_is_one_mean_over_batch_and_bank_rows():
    """Row a of METHOD.md: at lambda = K/B."""
    method = warmed_up(bank_size=8, options=None, weight=8 / 4, reduction="mean")
    images, labels = make_data(4)
    pretrained, _, bank_labels = (rows.clone() for rows in method.bank.rows())
    rows = torch.cat([method.downstream_encoder(images), pretrained])
    log_probabilities = method.head(rows).log_softmax(1)
    targets = torch.cat([labels, bank_labels])
    expected = -sum(log_probabilities[k, y] for k, y in enumerate(targets)) / 12
    torch.testing.assert_close(method(images, labels).loss, expected)


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 2.0 + 3 * 5.0), ("mean", 17 / 4)])
def test_objective(reduction, expected):
    total = objective(torch.tensor(2.0), torch.tensor(5.0), 3.0, reduction)
    assert total.item() == pytest.approx(expected)


def test_output_has_named_parts_without_gradient_and_the_batch_logits():
    method = warmed_up(bank_size=8, weight=0.7)
    images, labels = make_data(4)
    logits = method.head(method.downstream_encoder(images))
    output = method(images, labels)
    assert list(output.parts) == ["cross_entropy", "distribution_regularization"]
    assert not any(part.requires_grad for part in output.parts.values())
    assert all(part.item() > 0.1 for part in output.parts.values())
    total = output.parts["cross_entropy"] + 0.7 * output.parts["distribution_regularization"]
    torch.testing.assert_close(output.loss.detach(), total)
    assert torch.equal(output.logits, logits)


def test_ce_tuning_is_the_cross_entropy_of_the_batch():
    method = CETuning(make_encoder(0), make_head())
    images, labels = make_data(4)
    method.begin_epoch()
    expected = make_reference(options=None).step(
        trained_parameters(method), images, labels, torch.zeros(4, D)
    )
    del expected["distribution_regularization"]
    assert_same(run_step(method, images, labels), expected)
    output = method(images, labels)
    assert not output.parts["cross_entropy"].requires_grad
    assert torch.equal(output.logits, method.head(method.downstream_encoder(images)))


@pytest.mark.parametrize("make", [warmed_up, lambda: CETuning(make_encoder(0), make_head())])
def test_rows_beyond_the_share_do_not_count(make):
    images, labels = make_data(5)
    spared, shorter = make(), make()
    actual = run_step(spared, images, labels, None, [3])
    assert_same(actual, run_step(shorter, images[:3], labels[:3]), atol=1e-12)
    assert len(spared(images, labels, None, [3]).logits) == 3
    shorter(images[:3], labels[:3])
    assert_same(bank_of(spared), bank_of(shorter), atol=1e-12)


def bank_of(method):
    return {name: t for name, t in method.state_dict().items() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("options", [KEPT, DROPPED, WARM], ids=["kept", "dropped", "warm"])
@pytest.mark.parametrize("num_before", [1, 2])
def test_a_saved_method_goes_on_as_the_one_saved(options, num_before):
    method = warmed_up(bank_size=7, options=options)
    batches = batches_of(20, 3)
    for images, labels in batches[:num_before]:
        run_step(method, images, labels)
        descend(method)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    restored = make_method(bank_size=7, options=options)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for images, labels in batches[num_before:]:
        expected = run_step(method, images, labels)
        assert_same(run_step(restored, images, labels), expected, atol=0.0)
        descend(method)
        descend(restored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "weights"])
def test_losses_are_float32_where_the_logits_are_bfloat16(dtype):
    images, labels = make_data(8)
    exact = warmed_up(bank_size=8, options=AUTHORS)
    rounded = make_method(bank_size=8, options=AUTHORS).to(dtype)
    warm_images, warm_labels = make_data(8, seed=9)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        rounded.warm_up(warm_images.to(dtype), warm_labels)
        output = rounded(images.to(dtype), labels)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in output.parts.values())
    expected = run_step(exact, images, labels)
    assert output.loss.item() == pytest.approx(expected["loss"].item(), rel=0.03)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in trained_parameters(rounded).values())


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_an_impossible_weight_is_refused(weight):
    message = f"regularization_weight >= 0 must hold, but got regularization_weight={weight}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_method(weight=weight)


def test_features_are_needed_without_a_frozen_encoder():
    message = "pretrained_features is needed where there is no pretrained_encoder"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_method(pretrained_encoder=None)(*make_data(2))


def test_one_encoder_for_both_is_refused():
    """It would be frozen, and the training would train the head alone."""
    encoder = make_encoder(0)
    with pytest.raises(ValueError, match="pretrained_encoder must be another module"):
        DRTune(encoder, make_head(), FeatureBank(4, D), None, encoder)
