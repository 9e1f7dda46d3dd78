import io
import re

import pytest
import torch

from drtune_ray.method import FeatureBank

D = 3


class Stream:
    """Batches whose rows all differ: row i is (i, i + 0.25, ...) and (-i, ...), label i mod 7."""

    def __init__(self):
        self.num_drawn = 0

    def draw(self, num_rows):
        start, self.num_drawn = self.num_drawn, self.num_drawn + num_rows
        index = torch.arange(start, start + num_rows)
        pretrained = index.unsqueeze(1) + torch.arange(D) * 0.25
        return pretrained, -pretrained - 1.0, index % 7


def assert_rows(bank, expected):
    pretrained, downstream, labels = bank.rows()
    assert len(bank) == len(expected) == len(labels)
    assert pretrained.shape == downstream.shape == (len(expected), D)
    for k, (row_p, row_d, label) in enumerate(expected):
        assert torch.equal(pretrained[k], row_p)
        assert torch.equal(downstream[k], row_d)
        assert labels[k] == label


@pytest.mark.parametrize(
    ("bank_size", "batches"),
    [
        (6, [3, 3, 3, 3]),
        (5, [3, 3, 3, 2]),
        (7, [4, 4, 1, 4, 4, 3]),
        (10, [2, 2]),
        (1, [1, 2, 1]),
        (4, [4, 4]),
        (4, [10]),
        (4, [3, 9, 1]),
        (4, [3, 4, 6, 2]),
        (3, [0, 2, 0, 3, 0]),
    ],
)
def test_equals_a_list_whose_oldest_rows_are_popped(bank_size, batches):
    bank, stream, expected = FeatureBank(bank_size, D), Stream(), []
    assert_rows(bank, expected)
    for num_rows in batches:
        batch = stream.draw(num_rows)
        bank.enqueue(*batch)
        for row in zip(*batch, strict=True):
            expected.append(row)
            if len(expected) > bank_size:
                expected.pop(0)
        assert_rows(bank, expected)


@pytest.mark.parametrize("num_before", [2, 5, 6], ids=["filling", "full", "wrapped"])
def test_rows_taken_do_not_change_when_a_batch_is_enqueued(num_before):
    bank, stream = FeatureBank(5, D), Stream()
    bank.enqueue(*stream.draw(num_before))
    taken = bank.rows()
    copies = [rows.clone() for rows in taken]
    bank.enqueue(*stream.draw(4))
    assert all(torch.equal(rows, copy) for rows, copy in zip(taken, copies, strict=True))


def test_rows_are_copies_without_gradient():
    bank = FeatureBank(4, D)
    features = torch.ones(2, D, requires_grad=True)
    labels = torch.tensor([1, 2])
    bank.enqueue(features, features * 2, labels)
    with torch.no_grad():
        features.zero_()
        labels.zero_()
    pretrained, downstream, kept_labels = bank.rows()
    assert not pretrained.requires_grad
    assert not downstream.requires_grad
    assert torch.equal(pretrained, torch.ones(2, D))
    assert torch.equal(downstream, torch.full((2, D), 2.0))
    assert kept_labels.tolist() == [1, 2]


@pytest.mark.parametrize("num_before", [0, 3, 5, 8], ids=["empty", "filling", "full", "wrapped"])
def test_a_saved_bank_goes_on_as_the_one_saved(num_before):
    bank, stream = FeatureBank(5, D), Stream()
    bank.enqueue(*stream.draw(num_before))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    restored = FeatureBank(5, D)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for num_rows in (0, 1, 2, 4):
        batch = stream.draw(num_rows)
        bank.enqueue(*batch)
        restored.enqueue(*batch)
        assert_rows(restored, list(zip(*bank.rows(), strict=True)))


def test_a_bank_of_another_size_is_not_loaded():
    with pytest.raises(RuntimeError, match="size mismatch for pretrained"):
        FeatureBank(6, D).load_state_dict(FeatureBank(5, D).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_keep_the_precision_of_the_bank(dtype):
    bank = FeatureBank(4, D).to(dtype)
    features = torch.full((2, D), 1 / 3, dtype=torch.float64)
    bank.enqueue(features, features, torch.tensor([0, 1]))
    pretrained, downstream, labels = bank.rows()
    assert torch.equal(pretrained, features.to(dtype))
    assert torch.equal(downstream, features.to(dtype))
    assert labels.dtype == torch.long


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "bank_size >= 1 must hold, but got bank_size=0"),
        ((-2, 3), "bank_size >= 1 must hold, but got bank_size=-2"),
        ((3, 0), "num_features >= 1 must hold, but got num_features=0"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FeatureBank(*arguments)


@pytest.mark.parametrize(
    ("pretrained", "downstream", "labels", "shapes"),
    [
        ((2, 4), (2, 3), (2,), "(2, 4), (2, 3) and (2,)"),
        ((2, 3), (2, 2), (2,), "(2, 3), (2, 2) and (2,)"),
        ((3, 3), (2, 3), (2,), "(3, 3), (2, 3) and (2,)"),
        ((2, 3), (2, 3), (3,), "(2, 3), (2, 3) and (3,)"),
        ((3,), (3,), (1,), "(3,), (3,) and (1,)"),
    ],
)
def test_shapes_that_disagree_are_refused_before_anything_is_written(
    pretrained, downstream, labels, shapes
):
    bank, stream = FeatureBank(4, D), Stream()
    bank.enqueue(*stream.draw(2))
    before = list(zip(*(rows.clone() for rows in bank.rows()), strict=True))
    message = (
        "pretrained, downstream and labels must be (B, D), (B, D) and (B,) with D=3, "
        f"but got {shapes}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bank.enqueue(
            torch.ones(pretrained), torch.ones(downstream), torch.ones(labels, dtype=torch.long)
        )
    assert_rows(bank, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["pretrained", "downstream"])
def test_a_row_that_is_not_finite_is_stored_as_zeros_and_counted(value, which):
    bank, stream = FeatureBank(4, D), Stream()
    batch = dict(zip(("pretrained", "downstream", "labels"), stream.draw(3), strict=True))
    given = {name: rows.clone() for name, rows in batch.items()}
    given[which][1, 2] = value
    bank.enqueue(**given)
    pretrained, downstream, labels = bank.rows()
    for found, expected in ((pretrained, batch["pretrained"]), (downstream, batch["downstream"])):
        assert torch.equal(found[1], torch.zeros(D))
        assert torch.equal(found[::2], expected[::2])
    assert torch.equal(labels, batch["labels"])
    assert bank.num_nonfinite == 1
    bank.enqueue(*stream.draw(2))
    assert bank.num_nonfinite == 1
    restored = FeatureBank(4, D)
    restored.load_state_dict(bank.state_dict())
    assert restored.num_nonfinite == 1


def test_stored_rows_are_the_bank_itself():
    bank, stream = FeatureBank(4, D), Stream()
    for size in (3, 2):  # wraps by one
        bank.enqueue(*stream.draw(size))
        for found, kept in zip(bank.stored(), bank.rows(), strict=True):
            assert len(found) == len(bank)
            assert sorted(found.flatten().tolist()) == sorted(kept.flatten().tolist())
    assert bank.stored()[0].data_ptr() == bank.pretrained.data_ptr()
    assert bank.rows()[0].data_ptr() != bank.pretrained.data_ptr()


@pytest.mark.parametrize("num_before", [0, 2])
def test_of_a_batch_longer_than_the_bank_the_last_rows_are_kept(num_before):
    bank = FeatureBank(3, 1)
    before, batch = torch.arange(num_before), torch.arange(10, 15)
    for rows in (before, batch):
        features = rows.float().unsqueeze(1)
        bank.enqueue(features, -features, rows)
    pretrained, downstream, labels = bank.rows()
    assert labels.tolist() == [12, 13, 14]
    assert pretrained.flatten().tolist() == [12.0, 13.0, 14.0]
    assert downstream.flatten().tolist() == [-12.0, -13.0, -14.0]
