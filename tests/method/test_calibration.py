import io
import re

import numpy as np
import pytest
import torch

from drtune_ray.method import SemanticCalibration
from drtune_ray.method.class_rows import ClassRows
from drtune_ray.method.equations import class_level_translation, confidence_guided_weights
from tests.method.reference import AUTHORS, PAPER, ReferenceCalibration, confidence, mean

C, D = 5, 6
# Many rows of classes 0 and 3, two of class 4, one of class 1, none of class 2.
UNEVEN = [0, 3, 0, 4, 3, 0, 1, 3, 0, 4, 3, 3]
PLAIN = PAPER | {"rotation": False, "translation": False}
RANDOMIZED = PAPER | {"rotation_solver": "randomized"}
TRANSLATION_OFF = PAPER | {"translation": False}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_bank(labels=UNEVEN, seed=0, dtype=torch.float64, num_classes=C):
    """(pretrained, downstream, labels, prototypes), the downstream rows drifted away."""
    g = generator(seed)
    pretrained = torch.randn(len(labels), D, generator=g, dtype=torch.float64) + 1.0
    turn = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
    noise = torch.randn(len(labels), D, generator=g, dtype=torch.float64)
    prototypes = torch.randn(num_classes, D, generator=g, dtype=torch.float64)
    downstream = 1.5 * pretrained @ turn + 0.4 * noise - 2.0
    return pretrained.to(dtype), downstream.to(dtype), torch.tensor(labels), prototypes.to(dtype)


def by_reference(calibration, pretrained, downstream, labels, prototypes, scale=1.0):
    bank = list(zip(pretrained.numpy(), downstream.numpy(), labels.tolist(), strict=True))
    return torch.from_numpy(np.stack(calibration(bank, prototypes.numpy(), scale)))


def assert_close(actual, expected, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=atol)


OPTIONS = {
    "paper": PAPER,
    "authors": AUTHORS,
    "nothing": PLAIN,
    "rotation only, row d": TRANSLATION_OFF,
    "rotation only, recentered not": TRANSLATION_OFF | {"recenter": False},
    "rotation only, normalized": TRANSLATION_OFF | {"normalize": True},
    "normalized, recentered not": AUTHORS | {"translation": False},
    "translation only": PAPER | {"rotation": False},
    "plain mean": PAPER | {"confidence_weighting": False},
    "sharp dot": PAPER | {"confidence_temperature": 0.25},
    "sharp cosine": PAPER | {"similarity": "cosine", "confidence_temperature": 0.05},
    "normalized dot": PAPER | {"normalize": True, "confidence_temperature": 0.5},
    "proper": PAPER | {"proper_rotation": True},
    "kept for three": PAPER | {"rotation_interval": 3},
    "dropped for two": PAPER | {"rotation_interval": 3, "rotation_kept": False},
    "kept, restarted": PAPER | {"rotation_interval": 3, "restart_each_epoch": True},
    "dropped, restarted": AUTHORS | {"rotation_interval": 3},
    "kept, rotation only": TRANSLATION_OFF | {"rotation_interval": 4},
    "randomized": RANDOMIZED,
    "randomized, normalized": RANDOMIZED | {"normalize": True, "similarity": "cosine"},
    "randomized, kept for three": RANDOMIZED | {"rotation_interval": 3},
    "randomized, rotation only": RANDOMIZED | {"translation": False},
    "randomized, hardly shrunk": RANDOMIZED | {"rotation_shrinkage": 1e-3, "rotation_rank": 2},
    "randomized, one direction": RANDOMIZED | {"rotation_rank": 1, "normalize": True},
    "dropped, rotation only": TRANSLATION_OFF | {"rotation_interval": 4, "rotation_kept": False},
}


@pytest.mark.parametrize("labels", [UNEVEN, [0, 3, 3, 1], [2]], ids=["K>D", "K<D", "K=1"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_the_reference_over_several_steps(options, labels):
    fast = SemanticCalibration(D, **options)
    slow = ReferenceCalibration(**options)
    for step in range(9):
        if step in (0, 4):
            fast.begin_epoch()
            slow.begin_epoch()
        bank = random_bank(labels, seed=step)
        scale = 0.5 + step
        assert_close(fast(*bank, scale), by_reference(slow, *bank, scale), atol=1e-8)


def test_a_growing_bank_equals_the_reference():
    options = PAPER | {"rotation_interval": 2}
    fast, slow = SemanticCalibration(D, **options), ReferenceCalibration(**options)
    for num_rows in range(1, len(UNEVEN) + 1):
        bank = random_bank(UNEVEN[:num_rows], seed=num_rows)
        assert_close(fast(*bank), by_reference(slow, *bank), atol=1e-8)


@pytest.mark.parametrize("options", [PAPER, AUTHORS], ids=["paper", "authors"])
def test_float32_is_close_to_the_reference(options):
    bank = random_bank()
    calibrated = SemanticCalibration(D, **options)(*random_bank(dtype=torch.float32))
    assert calibrated.dtype == torch.float32
    expected = by_reference(ReferenceCalibration(**options), *bank)
    assert_close(calibrated.double(), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_calibrated_in_float32(dtype):
    pretrained, downstream, labels, prototypes = random_bank(dtype=dtype)
    calibrated = SemanticCalibration(D, **PAPER)(pretrained, downstream, labels, prototypes)
    expected = SemanticCalibration(D, **PAPER)(
        pretrained.float(), downstream.float(), labels, prototypes.float()
    )
    assert calibrated.dtype == torch.float32
    assert torch.equal(calibrated, expected)


@pytest.mark.parametrize("options", [PAPER, AUTHORS], ids=["paper", "authors"])
def test_autocast_does_not_lower_the_precision(options):
    bank = random_bank(dtype=torch.float32)
    expected = SemanticCalibration(D, **options)(*bank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calibrated = SemanticCalibration(D, **options)(*bank)
    assert calibrated.dtype == torch.float32
    assert torch.equal(calibrated, expected)


@pytest.mark.parametrize(
    ("options", "refreshed"),
    [
        ({"rotation_interval": 1}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"rotation_interval": 3}, [0, 3, 6]),
        ({"rotation_interval": 3, "restart_each_epoch": True}, [0, 3, 4, 7]),
        ({"rotation_interval": 3, "rotation_kept": False}, [0, 3, 6]),
        ({"rotation_interval": 10, "restart_each_epoch": True}, [0, 4]),
        ({"rotation_interval": 10}, [0]),
    ],
)
def test_steps_that_refresh_the_rotation(options, refreshed):
    """Two epochs: the second starts at step 4."""
    calibration = SemanticCalibration(D, **(PAPER | options))
    changed = []
    for step in range(9):
        if step in (0, 4):
            calibration.begin_epoch()
        before = calibration.rotation_left
        calibration(*random_bank(seed=step))
        if not torch.equal(before.double(), calibration.rotation_left.double()):
            changed.append(step)
    assert changed == refreshed


@pytest.mark.parametrize("is_kept", [True, False])
def test_between_refreshes_the_rotation_is_kept_or_not_applied(is_kept):
    calibration = SemanticCalibration(
        D, **(TRANSLATION_OFF | {"rotation_interval": 2, "rotation_kept": is_kept})
    )
    calibration(*random_bank(seed=0))
    kept = calibration.applied_rotation.matrix()
    pretrained, downstream, labels, prototypes = random_bank(seed=1)
    calibrated = calibration(pretrained, downstream, labels, prototypes)
    rotated = (pretrained - pretrained.mean(0)) @ kept.T + downstream.mean(0)
    assert_close(calibrated, rotated if is_kept else pretrained)


def test_recentering_moves_the_rows_by_the_downstream_mean():
    bank = random_bank()
    moved = SemanticCalibration(D, **TRANSLATION_OFF)(*bank)
    unmoved = SemanticCalibration(D, **(TRANSLATION_OFF | {"recenter": False}))(*bank)
    assert_close(moved.mean(0), bank[1].mean(0))
    assert_close(unmoved.mean(0), torch.zeros(D, dtype=torch.float64))
    assert_close(moved - unmoved, bank[1].mean(0).expand(len(UNEVEN), D))


@pytest.mark.parametrize("options", [PAPER, AUTHORS], ids=["paper", "authors"])
def test_recentering_cancels_where_the_translation_is_on(options):
    """Row q of METHOD.md."""
    bank = random_bank()
    calibrated = [
        SemanticCalibration(D, **(options | {"recenter": recenter}))(*bank)
        for recenter in (False, True)
    ]
    assert_close(*calibrated)


def test_proper_rotation_reaches_the_matrix():
    pretrained, _, labels, prototypes = random_bank()
    mirrored = pretrained.clone()
    mirrored[:, 0] *= -1
    determinants = []
    for is_proper in (False, True):
        calibration = SemanticCalibration(D, **(PAPER | {"proper_rotation": is_proper}))
        calibration(pretrained, mirrored, labels, prototypes)
        determinants.append(torch.linalg.det(calibration.applied_rotation.matrix()).item())
    assert determinants == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("labels", [UNEVEN, [0, 3, 3, 1]], ids=["K>D", "K<D"])
@pytest.mark.parametrize("normalize", [False, True])
def test_equal_banks_stay_where_they_are(labels, normalize):
    """As after the warm-up. With confidence weighting the centres would differ."""
    pretrained, _, labels, prototypes = random_bank(labels)
    options = PAPER | {"confidence_weighting": False, "normalize": normalize}
    calibrated = SemanticCalibration(D, **options)(pretrained, pretrained, labels, prototypes)
    norms = pretrained.norm(dim=1, keepdim=True) if normalize else 1.0
    assert_close(calibrated, pretrained / norms)


def test_normalized_rows_have_the_norm_asked_for():
    bank = random_bank()
    for scale in (2.5, torch.tensor(2.5, dtype=torch.float64)):
        norms = SemanticCalibration(D, **AUTHORS)(*bank, scale).norm(dim=1)
        assert_close(norms, torch.full_like(norms, 2.5))


def test_without_normalizing_the_scale_is_not_read():
    bank = random_bank()
    calibrated = [SemanticCalibration(D, **PAPER)(*bank, scale) for scale in (1.0, 9.0)]
    assert torch.equal(*calibrated)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_permuting_the_rows_permutes_the_output(options):
    pretrained, downstream, labels, prototypes = random_bank()
    order = torch.randperm(len(labels), generator=generator(7))
    calibrated = SemanticCalibration(D, **options)(pretrained, downstream, labels, prototypes)
    permuted = SemanticCalibration(D, **options)(
        pretrained[order], downstream[order], labels[order], prototypes
    )
    assert_close(permuted, calibrated[order])


@pytest.mark.parametrize("place", [0, 2, C], ids=["first", "middle", "last"])
@pytest.mark.parametrize("options", [PAPER, AUTHORS], ids=["paper", "authors"])
def test_an_empty_class_changes_no_row(options, place):
    pretrained, downstream, labels, prototypes = random_bank()
    more = torch.cat([prototypes[:place], torch.full((1, D), 50.0), prototypes[place:]])
    moved_up = labels + (labels >= place)
    calibrated = SemanticCalibration(D, **options)(pretrained, downstream, labels, prototypes)
    with_empty = SemanticCalibration(D, **options)(pretrained, downstream, moved_up, more)
    assert torch.isfinite(with_empty).all()
    assert_close(with_empty, calibrated, atol=1e-12)


@pytest.mark.parametrize("options", [PAPER, AUTHORS], ids=["paper", "authors"])
def test_relabelling_the_classes_changes_no_row(options):
    pretrained, downstream, labels, prototypes = random_bank()
    new_label = torch.tensor([3, 0, 4, 2, 1])
    relabelled = torch.empty_like(prototypes)
    relabelled[new_label] = prototypes
    calibrated = SemanticCalibration(D, **options)(pretrained, downstream, labels, prototypes)
    renamed = SemanticCalibration(D, **options)(
        pretrained, downstream, new_label[labels], relabelled
    )
    assert_close(renamed, calibrated, atol=1e-12)


def test_a_single_row_of_a_class_moves_onto_its_downstream_row():
    """Row f of METHOD.md: with one row the weights cannot matter."""
    pretrained, downstream, labels, prototypes = random_bank()
    calibrated = SemanticCalibration(D, **PAPER)(pretrained, downstream, labels, prototypes)
    single = labels == 1
    assert single.sum() == 1
    assert_close(calibrated[single], downstream[single])


@pytest.mark.parametrize("options", [PAPER, PLAIN, AUTHORS], ids=["paper", "nothing", "authors"])
def test_takes_no_gradient_and_leaves_its_input_as_it_was(options):
    pretrained, downstream, labels, prototypes = random_bank()
    inputs = [rows.clone().requires_grad_() for rows in (pretrained, downstream, prototypes)]
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    calibrated = SemanticCalibration(D, **options)(inputs[0], inputs[1], labels, inputs[2], scale)
    assert not calibrated.requires_grad
    for after, before in zip(inputs, (pretrained, downstream, prototypes), strict=True):
        assert torch.equal(after, before)


@pytest.mark.parametrize("options", [PAPER, AUTHORS, RANDOMIZED, PAPER | {"rotation": False}])
@pytest.mark.parametrize("num_before", [0, 1, 2, 3])
def test_a_saved_calibration_goes_on_as_the_one_saved(options, num_before):
    options = options | {"rotation_interval": 3}
    saved = SemanticCalibration(D, **options).double()
    for step in range(num_before):
        saved(*random_bank(seed=step))
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    restored = SemanticCalibration(D, **options).double()
    restored.load_state_dict(torch.load(file, weights_only=True))
    for step in range(10, 15):
        bank = random_bank(seed=step)
        assert torch.equal(saved(*bank), restored(*bank))


def test_class_translations_are_the_difference_of_the_centres():
    rotated, downstream, labels, _ = random_bank()
    weights = ClassRows(labels, C).softmax(torch.arange(12, dtype=torch.float64))
    shifts = class_level_translation(rotated, downstream, ClassRows(labels, C), weights)
    for c in range(C):
        rows = [k for k in range(len(labels)) if labels[k] == c]
        if not rows:
            assert torch.equal(shifts[c], torch.zeros(D, dtype=torch.float64))
            continue
        centre = sum(weights[k] * downstream[k] for k in rows)
        assert_close(shifts[c], centre - mean([rotated[k] for k in rows]))


def test_relabelling_the_classes_permutes_the_translations():
    rotated, downstream, labels, prototypes = random_bank()
    new_label = torch.tensor([3, 0, 4, 2, 1])
    weights = confidence_guided_weights(downstream, ClassRows(labels, C), prototypes)
    shifts = class_level_translation(rotated, downstream, ClassRows(labels, C), weights)
    renamed = class_level_translation(rotated, downstream, ClassRows(new_label[labels], C), weights)
    assert_close(renamed[new_label], shifts, atol=1e-12)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 20.0])
def test_confidence_weights_equal_the_reference(similarity, temperature):
    _, downstream, labels, prototypes = random_bank()
    weights = confidence_guided_weights(
        downstream,
        ClassRows(labels, C),
        prototypes,
        temperature=temperature,
        similarity=similarity,
    )
    for c in labels.unique().tolist():
        of_class = labels == c
        expected = confidence(
            list(downstream[of_class].numpy()), prototypes[c].numpy(), similarity, temperature
        )
        assert_close(weights[of_class], torch.tensor(expected, dtype=torch.float64))


def test_cosine_similarity_ignores_lengths_and_dot_does_not():
    _, downstream, labels, prototypes = random_bank()
    lengths = torch.linspace(0.5, 3.0, len(labels), dtype=torch.float64).unsqueeze(1)
    cosine, dot = (
        [
            confidence_guided_weights(rows, ClassRows(labels, C), phi, similarity=similarity)
            for rows, phi in ((downstream, prototypes), (downstream * lengths, prototypes * 4.0))
        ]
        for similarity in ("cosine", "dot")
    )
    assert_close(*cosine)
    assert (dot[0] - dot[1]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_small_temperature_picks_the_surest_row_without_overflow(similarity, sign, dtype):
    _, downstream, labels, prototypes = random_bank(dtype=dtype)
    prototypes = prototypes * 100.0 * sign
    weights = confidence_guided_weights(
        downstream, ClassRows(labels, C), prototypes, temperature=1e-4, similarity=similarity
    )
    expected = torch.zeros(len(labels), dtype=dtype)
    for c in labels.unique().tolist():
        rows = (labels == c).nonzero().flatten()
        scores = downstream[rows] @ prototypes[c]
        if similarity == "cosine":
            scores = scores / downstream[rows].norm(dim=1)
        expected[rows[scores.argmax()]] = 1.0
    assert_close(weights, expected, atol=1e-4)
    options = PAPER | {"similarity": similarity, "confidence_temperature": 1e-4}
    calibrated = SemanticCalibration(D, **options)(*random_bank(dtype=dtype))
    assert torch.isfinite(calibrated).all()


@pytest.mark.parametrize("magnitude", [0.0, 1.0, 3e4])
def test_class_softmax_sums_to_one_in_each_class(magnitude):
    labels = torch.tensor(UNEVEN)
    scores = torch.randn(len(labels), generator=generator(3)) * magnitude
    weights = ClassRows(labels, C).softmax(scores)
    sums = torch.zeros(C).index_add(0, labels, weights)
    assert_close(sums, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), atol=1e-6)
    if magnitude == 0.0:
        assert_close(weights[labels == 3], torch.full((5,), 0.2), atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rotation_interval": 0},
            "rotation_interval >= 1 must hold, but got rotation_interval=0",
        ),
        ({"rotation_rank": 0}, "rank >= 1 must hold, but got rank=0"),
        ({"rotation_shrinkage": -0.1}, "shrinkage >= 0 must hold, but got shrinkage=-0.1"),
        (
            {"confidence_temperature": 0.0},
            "confidence_temperature > 0 must hold, but got confidence_temperature=0.0",
        ),
        (
            {"confidence_temperature": -0.1},
            "confidence_temperature > 0 must hold, but got confidence_temperature=-0.1",
        ),
        (
            {"confidence_temperature": float("nan")},
            "confidence_temperature > 0 must hold, but got confidence_temperature=nan",
        ),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SemanticCalibration(D, **options)
