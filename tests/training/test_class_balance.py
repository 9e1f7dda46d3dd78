"""Class weights and class-balanced draws, against their definitions."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from drtune_ray.results.used_settings import unused_settings
from drtune_ray.training.class_balance import epoch_rows, loss_weights
from drtune_ray.training.model import generator
from drtune_ray.training.trial import Trial
from tests.small import prepared, small_trial, small_values, write_coloured

CPU = torch.device("cpu")
LABELS = np.array([0] * 11 + [2] * 2 + [1] * 4)  # 17 images: 5, 6 and 6 draws of each class


def config(**changes):
    return small_trial({"data.train": "images"} | changes)


def draws(epoch: int, labels=LABELS) -> list[int]:
    return epoch_rows(labels, "class_balanced", generator(0, "order", epoch))


def test_balanced_weights_are_n_over_c_n_c():
    weights = loss_weights(config(**{"training.class_weights": "balanced"}), LABELS, 3)
    assert weights is not None
    assert weights.tolist() == pytest.approx([17 / (3 * 11), 17 / (3 * 4), 17 / (3 * 2)])
    assert float(weights[LABELS].sum()) == pytest.approx(len(LABELS))


def test_a_class_without_images_weighs_nothing():
    weights = loss_weights(config(**{"training.class_weights": "balanced"}), LABELS, 4)
    assert weights is not None and weights[3] == 0
    assert float(weights[LABELS].sum()) == pytest.approx(len(LABELS))


@pytest.mark.parametrize(
    "changes", [{}, {"training.class_weights": "balanced", "data.sampling": "class_balanced"}]
)
def test_no_weights_where_none_are_asked_for_or_draws_are_balanced(changes):
    assert loss_weights(config(**changes), LABELS, 3) is None


def test_settings_without_effect_are_named():
    changes = {"training.class_weights": "balanced", "data.augmentation": "trivial_augment"}
    assert "training.class_weights" not in unused_settings(config(**changes))
    assert "data.augmentation_magnitude" in unused_settings(config(**changes))
    changes |= {"data.sampling": "class_balanced", "data.augmentation": "rand_augment"}
    assert "training.class_weights" in unused_settings(config(**changes))
    assert "data.augmentation_magnitude" not in unused_settings(config(**changes))


def test_uniform_draws_are_a_permutation():
    rows = epoch_rows(LABELS, "uniform", generator(0, "order", 2))
    assert rows == torch.randperm(17, generator=generator(0, "order", 2)).tolist()


@pytest.mark.parametrize("epoch", range(4))
def test_an_epoch_has_as_many_draws_as_images_and_of_each_class_as_many(epoch):
    rows = [row % len(LABELS) for row in draws(epoch)]
    assert len(rows) == len(LABELS)
    assert sorted(Counter(LABELS[rows].tolist()).values()) == [5, 6, 6]
    for label in range(3):
        counts = Counter(row for row in rows if LABELS[row] == label)
        numbers = [counts[row] for row in np.flatnonzero(LABELS == label)]
        assert max(numbers) - min(numbers) <= 1


def test_the_surplus_draw_and_the_left_out_images_change_from_epoch_to_epoch():
    epochs = [[row % 17 for row in draws(epoch)] for epoch in range(60)]
    fewest = Counter(Counter(LABELS[rows].tolist()).most_common()[-1][0] for rows in epochs)
    assert set(fewest) == {0, 1, 2}
    seen = Counter(row for rows in epochs for row in rows if LABELS[row] == 0)
    assert set(seen) == set(range(11))
    # Each of the 11 images is drawn in half of the epochs, within four standard deviations.
    assert all(abs(number - 60 * 17 / 33) < 16 for number in seen.values())


def test_balanced_classes_are_drawn_like_uniform_ones():
    labels = np.array([0, 1, 2] * 5)
    assert sorted(draws(0, labels)) == list(range(15))


def test_repetitions_are_counted_in_the_order_of_the_draws():
    rows = draws(0)
    for row in range(17):
        numbers = [drawn // 17 for drawn in rows if drawn % 17 == row]
        assert numbers == list(range(len(numbers)))
    assert max(rows) >= 2 * 17  # two images of class 2 are drawn five or six times


def test_the_order_is_shuffled():
    labels = LABELS[[row % 17 for row in draws(0)]]
    changes = sum(int(one != other) for one, other in itertools.pairwise(labels))
    assert changes > 5


# ---- in a trial


@pytest.fixture(scope="module")
def make(tmp_path_factory, weights_file):
    """A trial of 18 training images in classes of 10, 5 and 3."""
    storage = tmp_path_factory.mktemp("storage")
    images = write_coloured(storage / "images")
    for name, number in (("green", 8), ("red", 5)):
        for path in sorted((images / name).glob("*.png"))[number:]:
            path.unlink()
    base = small_values(images, weights_file) | {"data.sampling": "class_balanced"}

    def made(**changes):
        trial_config = small_trial(base | changes)
        data, backbone, _ = prepared(trial_config, storage)
        return Trial(trial_config, data, backbone, CPU)

    return made


@pytest.mark.parametrize("views", [0, 4])
def test_a_repeated_image_is_another_view_with_its_own_frozen_features(make, views):
    trial = make(**{"data.views": views})
    data = trial.data
    num_train = len(data.train)
    row = int(np.flatnonzero(np.bincount(data.train.labels)[data.train.labels] < 5)[0])
    drawn = [row + repetition * num_train for repetition in range(3)]
    ((pixels, labels),) = data.training_batches([drawn], 1)
    assert labels.tolist() == [data.train.labels[row]] * 3
    wanted = [1, 2, 3] if views else [1, 100_001, 200_001]
    for found, view in zip(pixels, wanted, strict=True):
        assert np.array_equal(found.numpy(), data.train.training_view(data._maker, row, view))
    assert len({found.numpy().tobytes() for found in pixels}) == 3
    features = data.pretrained_features(drawn, 1)
    assert (features is None) == (views == 0)
    if features is not None:
        each = [data.pretrained_features([row], view) for view in wanted]
        assert torch.equal(features, torch.cat(each))


def test_the_bank_is_warmed_up_by_balanced_draws(make):
    trial = make(**{"method.bank_size": 9})
    trial.warm_up_bank()
    num_train = len(trial.data.train)
    order = epoch_rows(trial.data.train.labels, "class_balanced", generator(0, "order", -1))[:9]
    pretrained, downstream, labels = trial.method.bank.rows()
    assert labels.tolist() == [trial.data.train.labels[row % num_train] for row in order]
    view = trial.data.view_of_epoch(-1)
    assert torch.equal(pretrained, trial.data.pretrained_features(order, view))
    assert torch.equal(downstream, pretrained)


def test_steps_of_an_epoch_are_as_many_as_of_uniform_draws(make):
    balanced, uniform = make(), make(**{"data.sampling": "uniform"})
    assert balanced.steps_per_epoch == uniform.steps_per_epoch
    batches = [[len(b) for b in trial.batches.rows(0)] for trial in (balanced, uniform)]
    assert batches[0] == batches[1]
    uniform_rows = Counter(uniform.data.train.labels.tolist())
    assert len(set(uniform_rows.values())) == 3  # the classes are of different sizes
