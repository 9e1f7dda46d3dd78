"""Mixup and CutMix against their definitions, for one process and several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drtune_ray.training.batches import divided
from drtune_ray.training.mixing import Mixing, mixing, own_rows, part_of
from drtune_ray.training.model import derived_seed
from tests.small import small_trial

C, SIDE, STEPS = 4, 10, 200


def mixer(**values: float) -> Mixing:
    made = mixing(small_trial({"data.train": "i", "seed": 3} | values), C)
    assert made is not None
    return made


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    images = torch.rand(number, 3, SIDE, SIDE, generator=drawn, dtype=torch.float64)
    return images, torch.arange(number) % C


def whole(number: int):
    return part_of(number, 0, number)


def shares_of(targets: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Share of the own label of each row, whose partner has another label."""
    return targets[torch.arange(len(labels)), labels].tolist()


def test_nothing_is_mixed_by_default() -> None:
    assert mixing(small_trial({"data.train": "images"}), C) is None


def test_mixup_is_a_weighted_sum_of_images_and_targets() -> None:
    """x = lambda x_i + (1 - lambda) x_j, and the same of the one-hot labels."""
    mix = mixer(**{"training.mixup": 0.4})
    images, labels = batch(8)
    partners = [1, 0, 3, 2, 5, 4, 7, 6]
    for step in range(5):
        mixed = mix(images, labels, whole(8), 2, step)
        (lam,) = {round(share, 6) for share in shares_of(mixed.targets, labels)}
        one_hot = torch.eye(C)[labels]
        wanted = lam * one_hot + (1 - lam) * one_hot[partners]
        torch.testing.assert_close(mixed.targets, wanted, atol=2e-6, rtol=0)
        wanted = lam * images + (1 - lam) * images[partners]
        torch.testing.assert_close(mixed.images, wanted, atol=2e-6, rtol=0)


def test_lambda_of_mixup_is_drawn_from_its_beta_distribution() -> None:
    """Mean 1/2, variance 1 / (4 (2 alpha + 1))."""
    alpha = 0.7
    mix = mixer(**{"training.mixup": alpha})
    images, labels = batch(2)
    lams = [
        shares_of(mix(images, labels, whole(2), 0, step).targets, labels)[0]
        for step in range(STEPS)
    ]
    deviation = (1 / (4 * (2 * alpha + 1))) ** 0.5
    assert abs(np.mean(lams) - 0.5) < 4 * deviation / STEPS**0.5
    assert np.std(lams) == pytest.approx(deviation, rel=0.15)


def test_cutmix_puts_a_rectangle_of_the_partner_in_and_shares_the_target_by_area() -> None:
    mix = mixer(**{"training.cutmix": 1.0})
    images, labels = batch(6)
    partners, areas = [1, 0, 3, 2, 5, 4], []
    for step in range(40):
        mixed = mix(images, labels, whole(6), 0, step)
        is_own = (mixed.images == images).all(1)
        is_of_partner = (mixed.images == images[partners]).all(1)
        assert bool((is_own ^ is_of_partner).all())
        assert bool((is_own == is_own[0]).all())  # one rectangle for the whole batch
        cut = ~is_own[0]
        rows, columns = cut.any(1), cut.any(0)
        assert bool((cut == rows[:, None] & columns[None]).all())
        for at in (rows, columns):  # without a gap
            places = at.nonzero().flatten().tolist()
            assert places == list(range(*(places[0], places[-1] + 1) if places else (0, 0)))
        area = float(cut.double().mean())
        areas.append(area)
        assert shares_of(mixed.targets, labels) == pytest.approx([1 - area] * 6, abs=1e-6)
    assert len(set(areas)) > 10 and max(areas) > 0.5


def test_with_both_each_step_draws_one_of_them() -> None:
    mix = mixer(**{"training.cutmix": 1.0, "training.mixup": 1.0})
    images, labels = batch(2)
    num_cut = 0
    for step in range(STEPS):
        mixed = mix(images, labels, whole(2), 0, step)
        num_cut += bool(((mixed.images == images) | (mixed.images == images[[1, 0]])).all())
    assert abs(num_cut - STEPS / 2) < 4 * (STEPS / 4) ** 0.5


def test_what_is_drawn_follows_from_seed_epoch_and_step() -> None:
    images, labels = batch(4)
    values = {"training.mixup": 0.4, "training.cutmix": 0.4}
    first = mixer(**values)(images, labels, whole(4), 1, 2)
    np.random.seed(7)
    before = np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    again = mixer(**values)(images, labels, whole(4), 1, 2)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index,union-attr]
    assert all(map(torch.equal, first, again))
    others = [
        mixer(**values)(images, labels, whole(4), 1, 3),
        mixer(**values)(images, labels, whole(4), 2, 2),
        mixer(**values, seed=4)(images, labels, whole(4), 1, 2),
    ]
    assert len({mixed.images.numpy().tobytes() for mixed in (first, *others)}) == 4
    assert derived_seed(3, "mixing", 1, 2) != derived_seed(3, "mixing", 2, 1)


def test_the_batch_itself_stays_as_it_is() -> None:
    images, labels = batch(4)
    copy = images.clone()
    for step in range(10):
        mixer(**{"training.cutmix": 1.0})(images, labels, whole(4), 0, step)
    assert torch.equal(images, copy)


@pytest.mark.parametrize("values", [{"training.mixup": 0.4}, {"training.cutmix": 1.0}])
@pytest.mark.parametrize("number", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_several_processes_mix_as_one_does(values, number, world_size) -> None:
    mix = mixer(**values)
    images, labels = batch(number)
    expected = mix(images, labels, whole(number), 0, 5)
    shares = divided(number, world_size)
    found = []
    for rank in range(world_size):
        start, stop = own_rows(shares, rank)
        part = part_of(number, start, stop)
        assert part.positions[: part.num_own] == list(range(start, stop))
        assert len(part.positions) <= part.num_own + 2
        mixed = mix(images[part.positions], labels[part.positions], part, 0, 5)
        assert len(mixed.images) == len(mixed.targets) == part.num_own
        found.append([tensor[: shares[rank]] for tensor in mixed])
    for at in (0, 1):
        assert torch.equal(torch.cat([parts[at] for parts in found]), expected[at])


def test_partners_stand_side_by_side() -> None:
    def partners(number: int) -> list[int]:
        part = whole(number)
        return [part.positions[at] for at in part.partners]

    assert partners(6) == [1, 0, 3, 2, 5, 4]
    assert partners(5) == [1, 0, 3, 2, 3]  # the last one has the row before it
    assert partners(1) == [0]
