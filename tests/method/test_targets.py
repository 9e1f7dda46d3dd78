"""Label smoothing, class weights and mixed images in a step, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from drtune_ray.method import CETuning, MixedBatch
from drtune_ray.method.equations import cross_entropy
from tests.method.test_processes import run_ranks
from tests.method.tiny import (
    KEPT,
    C,
    assert_same,
    make_data,
    make_encoder,
    make_head,
    make_method,
    run_step,
    warmed_up,
)

WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
EPSILON = 0.3


def by_hand(logits, targets, weights=None, epsilon=0.0):
    """-sum_c w_c ((1 - eps) t_c + eps / C) log p_c, meaned over the rows, in loops."""
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        norm = math.log(sum(math.exp(score) for score in row))
        shares = target if isinstance(target, list) else [float(c == target) for c in range(C)]
        for at, (score, share) in enumerate(zip(row, shares, strict=True)):
            weight = 1.0 if weights is None else float(weights[at])
            total -= weight * ((1 - epsilon) * share + epsilon / C) * (score - norm)
    return total / len(logits)


def random_targets(num_rows):
    drawn = torch.rand(num_rows, C, generator=torch.Generator().manual_seed(4)).double()
    return drawn / drawn.sum(1, keepdim=True)


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_the_cross_entropy_equals_its_definition(kind, weights, epsilon):
    logits = torch.randn(11, C, generator=torch.Generator().manual_seed(1)).double()
    targets = make_data(11)[1] if kind == "labels" else random_targets(11)
    found = cross_entropy(logits, targets, class_weights=weights, label_smoothing=epsilon)
    assert float(found) == pytest.approx(by_hand(logits, targets, weights, epsilon), rel=1e-12)


def logits_of(method, images):
    with torch.no_grad():
        return method.head(method.downstream_encoder(images))


def test_smoothing_changes_the_images_part_and_leaves_that_of_the_bank():
    images, labels = make_data(7)
    plain = warmed_up(options=KEPT)
    smoothed = warmed_up(options=KEPT, label_smoothing=EPSILON)
    logits = logits_of(plain, images)
    one, other = plain(images, labels), smoothed(images, labels)
    part = "distribution_regularization"
    assert torch.equal(one.parts[part], other.parts[part])
    wanted = by_hand(logits, labels, epsilon=EPSILON)
    assert float(other.parts["cross_entropy"]) == pytest.approx(wanted, rel=1e-12)
    assert wanted != pytest.approx(by_hand(logits, labels), rel=1e-3)


def test_class_weights_are_in_both_parts():
    images, labels = make_data(7)
    # Without a calibration the rows of DR are those of the bank.
    method = warmed_up(options=None, class_weights=WEIGHTS)
    rows, _, of_bank = method.bank.rows()
    rows, of_bank = rows.clone(), of_bank.clone()
    with torch.no_grad():
        bank_logits = method.head(rows)
    logits = logits_of(method, images)
    parts = method(images, labels).parts
    wanted = by_hand(bank_logits, of_bank, WEIGHTS)
    assert float(parts["distribution_regularization"]) == pytest.approx(wanted, rel=1e-12)
    wanted = by_hand(logits, labels, WEIGHTS)
    assert float(parts["cross_entropy"]) == pytest.approx(wanted, rel=1e-12)


def test_class_weights_are_no_part_of_a_checkpoint():
    assert (
        make_method(class_weights=WEIGHTS).state_dict().keys() == make_method().state_dict().keys()
    )


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
def test_ce_tuning_takes_them_too(epsilon):
    method = CETuning(make_encoder(0), make_head(), label_smoothing=epsilon, class_weights=WEIGHTS)
    method = method.double()
    images, labels = make_data(7)
    targets = random_targets(7)
    logits = logits_of(method, images)
    assert float(method(images, labels).loss.detach()) == pytest.approx(
        by_hand(logits, labels, WEIGHTS, epsilon), rel=1e-12
    )
    mixed = MixedBatch(images.flip(0), targets)
    assert float(method(images, labels, mixed=mixed).loss.detach()) == pytest.approx(
        by_hand(logits.flip(0), targets, WEIGHTS, epsilon), rel=1e-12
    )


# ---- mixed images


def test_mixed_images_decide_the_cross_entropy_alone():
    """Bank, R, scale and DR, with its gradient, are those of the step without mixing."""
    images, labels = make_data(7)
    mixed = MixedBatch(0.3 * images + 0.7 * images.roll(1, 0), random_targets(7))
    plain, mixing = warmed_up(options=KEPT), warmed_up(options=KEPT)
    for _ in range(3):  # of which the first refreshes R
        logits = logits_of(mixing, mixed.images)
        expected, found = plain(images, labels), mixing(images, labels, mixed=mixed)
        part = "distribution_regularization"
        assert torch.equal(found.parts[part], expected.parts[part])
        assert float(found.parts["cross_entropy"]) == pytest.approx(
            by_hand(logits, mixed.targets), rel=1e-12
        )
        assert torch.equal(found.logits, logits)
        for one, other in zip(mixing.bank.rows(), plain.bank.rows(), strict=True):
            assert torch.equal(one, other)
    rotations = [method.calibration.applied_rotation.matrix() for method in (plain, mixing)]
    assert torch.equal(*rotations)


def test_the_encoder_has_the_gradient_of_the_mixed_images_alone():
    images, labels = make_data(7)
    mixed = MixedBatch(0.3 * images + 0.7 * images.roll(1, 0), random_targets(7))
    found = run_step(warmed_up(options=KEPT), images, labels, mixed=mixed)
    alone = CETuning(make_encoder(0), make_head()).double()
    expected = run_step(alone, images, labels, mixed=mixed)
    names = [name for name in expected if name.startswith("downstream_encoder.")]
    assert names
    assert_same({n: found[n] for n in names}, {n: expected[n] for n in names}, atol=1e-12)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_several_processes_equal_one(num_ranks):
    """Unequal shares: 7 rows, of which the last of three processes has none."""
    shares = {2: [4, 3], 3: [4, 3, 0]}[num_ranks]
    images, labels = make_data(7)
    mixed = MixedBatch(0.3 * images + 0.7 * images.roll(1, 0), random_targets(7))
    options = {"class_weights": WEIGHTS, "label_smoothing": EPSILON}
    expected = run_step(warmed_up(options=KEPT, **options), images, labels, mixed=mixed)

    def run(collective):
        method = warmed_up(options=KEPT, **options)
        method.collective = collective
        start, share = sum(shares[: collective.rank]), shares[collective.rank]
        own = slice(start, start + share) if share else slice(0, 1)  # a spare row
        part = MixedBatch(mixed.images[own], mixed.targets[own])
        return run_step(method, images[own], labels[own], None, shares, mixed=part)

    ranks = run_ranks(num_ranks, run)
    found = {name: sum(rank[name] for rank in ranks) / num_ranks for name in ranks[0]}
    assert_same(found, expected, atol=1e-12)
