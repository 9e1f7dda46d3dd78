"""Methods besides DR-Tune against their equations, by themselves and on several processes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from drtune_ray.method import (
    FTP,
    L2SP,
    LDIFS,
    LPFT,
    SPD,
    BatchSpectralShrinkage,
    BitFit,
    CETuning,
    LinearProbe,
    Method,
    Penalty,
    SupervisedContrast,
    WiSEFT,
)
from drtune_ray.method.collective import MicroBatch
from drtune_ray.method.ldifs import channel_axis
from drtune_ray.method.penalties import StartingPoint
from tests.method.test_processes import mean_of, run_ranks
from tests.method.tiny import (
    C,
    D,
    assert_same,
    make_data,
    make_encoder,
    make_head,
    make_method,
    randomise,
)

Make = Callable[[], Method]


def moved(module: nn.Module, seed: int = 5) -> nn.Module:
    """Change the weights a little, so that they are not the pretrained ones."""
    step = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=step, dtype=parameter.dtype)
            parameter += 0.1 * noise
    return module


def with_norm(seed: int = 0) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(18, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, D)]
    return randomise(nn.Sequential(*layers).double(), seed, 0.7)


def penalised(make: Callable[[nn.Module], Penalty]) -> Method:
    """CE-tuning with a penalty, some steps after its start."""
    encoder, head = make_encoder(0), make_head()
    method = CETuning(encoder, head, penalties=[make(encoder)]).double()
    moved(encoder)
    return method


def ldifs() -> Method:
    """Two inner layers of five channels at four places, and one without places."""
    encoders = [randomise(nn.Sequential(*layers()).double(), 3, 0.7) for _ in range(2)]
    layered = {"1": 5, "4": 4}
    moved(encoders[0])
    return LDIFS(encoders[0], make_head(), encoders[1], layers=layered, weight=0.7)


def layers() -> list[nn.Module]:
    convolution = nn.Conv2d(2, 5, 2, padding=0)
    return [nn.Identity(), convolution, nn.Tanh(), nn.Flatten(), nn.Linear(20, 4), nn.Linear(4, D)]


METHODS: dict[str, Make] = {
    "ce_tuning": lambda: CETuning(make_encoder(0), make_head()),
    "linear_probe": lambda: LinearProbe(make_encoder(0), make_head()),
    "bitfit": lambda: BitFit(with_norm(), make_head()),
    "l2_sp": lambda: penalised(lambda encoder: L2SP(encoder, 0.3, 0.2)),
    "bss": lambda: penalised(lambda encoder: BatchSpectralShrinkage(0.4, 2)),
    "ldifs": lambda: ldifs(),
    "lp_ft, probing": lambda: LPFT(make_encoder(0), make_head(), probe_epochs=5),
    "lp_ft": lambda: LPFT(make_encoder(0), make_head(), probe_epochs=2),
    "wise_ft": lambda: WiSEFT(make_encoder(0), make_head(), make_encoder(0), probe_epochs=1),
    "spd": lambda: SPD(make_encoder(0), make_head()),
    "ftp": lambda: FTP(make_encoder(0), make_head()),
    "scl": lambda: CETuning(
        make_encoder(0),
        make_head(),
        penalties=[SupervisedContrast(0.7, 0.4)],
        cross_entropy_weight=0.3,
    ),
    "dr_tune_l2_sp": lambda: make_method(penalties=[L2SP(make_encoder(0), 0.3, 0.2)]),
    "dr_tune_bss": lambda: make_method(penalties=[BatchSpectralShrinkage(0.4, 2)]),
}


def step(method: Method, *inputs: Any, **options: Any) -> dict[str, Tensor]:
    """{name: value} of loss, parts and the gradients of what is trained."""
    method.zero_grad()
    output = method(*inputs, **options)
    assert tuple(output.parts) == method.part_names
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach()} | output.parts | gradients


def by_hand(method: Method, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features and mean cross-entropy, row by row."""
    features = torch.stack([method.downstream_encoder(image[None])[0] for image in images])
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(features, labels, strict=True):
        logits = [method.head.weight[c] @ row + method.head.bias[c] for c in range(C)]
        exponentials = [logit.exp() for logit in logits]
        total = total - (exponentials[int(label)] / sum(exponentials)).log()
    return features, total / len(labels)


def wanted(method: Method, loss: Tensor, **parts: Tensor) -> dict[str, Tensor]:
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    detached = {name: part.detach() for name, part in parts.items()}
    return {"loss": loss.detach()} | detached | dict(zip(trained, gradients, strict=True))


# ---- each method by its equation


def test_l2_sp_is_the_squared_distance_to_the_start_and_the_heads_norm() -> None:
    method, (images, labels) = METHODS["l2_sp"](), make_data(6)
    _, loss = by_hand(method, images, labels)
    penalty = torch.zeros((), dtype=torch.float64)
    starts = list(make_encoder(0).parameters())
    for parameter, start in zip(method.downstream_encoder.parameters(), starts, strict=True):
        for value, first in zip(parameter.flatten(), start.detach().flatten(), strict=True):
            penalty = penalty + 0.3 / 2 * (value - first) ** 2
    for parameter in method.head.parameters():
        for value in parameter.flatten():
            penalty = penalty + 0.2 / 2 * value**2
    assert penalty > 0.1
    expected = wanted(method, loss + penalty, cross_entropy=loss, l2_sp=penalty)
    assert_same(step(method, images, labels), expected)


def test_l2_sp_starts_at_the_pretrained_weights_that_are_trained() -> None:
    encoder = with_norm()
    encoder[1].weight.requires_grad_(False)
    penalty = L2SP(encoder)
    method = CETuning(encoder, make_head(), penalties=[penalty])
    found, labels = make_data(4)
    features = encoder(found)
    only_head = 0.01 / 2 * sum(p.square().sum() for p in method.head.parameters())
    batch = method.collective.batch(4)
    torch.testing.assert_close(penalty(method, features, labels, batch), only_head)
    with torch.no_grad():
        encoder[1].weight.add_(1.0)  # not trained: it has no start
    torch.testing.assert_close(penalty(method, features, labels, batch), only_head)
    assert not [name for name in method.state_dict() if "start" in name]
    assert len(StartingPoint(encoder).pairs(encoder)) == 5


@pytest.mark.parametrize("number", [3, 6, 9])  # below and above D
def test_bss_is_the_sum_of_the_smallest_squared_singular_values(number: int) -> None:
    method, (images, labels) = METHODS["bss"](), make_data(number)
    features, loss = by_hand(method, images, labels)
    left, values, right = np.linalg.svd(features.detach().numpy(), full_matrices=False)
    penalty = torch.tensor(0.4 * sum(values[-k] ** 2 for k in (1, 2)))
    # Its gradient by the features is 2 eta sum sigma u v^T.
    slope = 2 * 0.4 * sum(values[-k] * np.outer(left[:, -k], right[-k]) for k in (1, 2))
    tied = loss + (features * torch.from_numpy(slope)).sum()
    expected = wanted(method, tied, cross_entropy=loss, bss=penalty)
    expected["loss"] = loss.detach() + penalty
    assert_same(step(method, images, labels), expected)


def test_bss_passes_gradcheck() -> None:
    method = METHODS["bss"]()
    penalty: Any = method.penalties["bss"]
    rows = torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batch, labels = method.collective.batch(4), torch.zeros(4, dtype=torch.long)
    assert torch.autograd.gradcheck(
        lambda features: penalty(method, features, labels, batch), rows.requires_grad_()
    )


@pytest.mark.parametrize("is_known", [False, True])
def test_linear_probe_trains_the_head_on_pretrained_features(is_known: bool) -> None:
    method, (images, labels) = METHODS["linear_probe"](), make_data(6)
    features, loss = by_hand(method, images, labels)
    expected = wanted(method, loss, cross_entropy=loss)
    assert sorted(expected) == ["cross_entropy", "head.bias", "head.weight", "loss"]
    known = features.detach() if is_known else None
    called: list[int] = []
    method.downstream_encoder.register_forward_hook(lambda *call: called.append(1))
    assert_same(step(method, images, labels, known), expected)
    assert len(called) == (0 if is_known else 1)


def test_linear_probe_keeps_the_encoder_in_eval_mode() -> None:
    encoder = nn.Sequential(make_encoder(0), nn.BatchNorm1d(D), nn.Dropout(0.5)).double()
    method = LinearProbe(encoder, make_head()).train()
    images, labels = make_data(6)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert torch.equal(method(images, labels).loss, method(images, labels).loss)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert method.head.training and not encoder.training


def test_bitfit_trains_biases_norms_and_head() -> None:
    method, (images, labels) = METHODS["bitfit"](), make_data(6)
    _, loss = by_hand(method, images, labels)
    expected = wanted(method, loss, cross_entropy=loss)
    trained = {name.removeprefix("downstream_encoder.") for name in expected}
    encoder = {"1.bias", "2.weight", "2.bias", "4.bias"}
    assert trained == {"loss", "cross_entropy", "head.weight", "head.bias"} | encoder
    assert_same(step(method, images, labels), expected)


def test_bitfit_leaves_frozen_parameters_and_refuses_an_encoder_without_any() -> None:
    encoder = with_norm()
    encoder[2].requires_grad_(False)
    BitFit(encoder, make_head())
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {"1.bias", "4.bias"}
    with pytest.raises(ValueError, match="needs biases or normalisation layers"):
        BitFit(nn.Sequential(nn.Flatten(), nn.Linear(18, D, bias=False)), make_head())


def places(features: Tensor) -> list[Tensor]:
    """Vectors of channels."""
    if features.ndim == 1:
        return [features]
    return [features[:, y, x] for y in range(2) for x in range(2)]


def test_ldifs_is_the_mean_distance_of_normalised_features() -> None:
    method, (images, labels) = METHODS["ldifs"](), make_data(4)
    _, loss = by_hand(method, images, labels)
    total = torch.zeros((), dtype=torch.float64)
    for image in images:
        pairs = []
        for encoder in (method.downstream_encoder, method.pretrained_encoder):
            convolved = encoder[1](image[None])[0]
            inner = encoder[4](encoder[3](encoder[2](convolved[None])))[0]
            pairs.append((convolved, inner, encoder[5](inner[None])[0]))
        layered = []
        for now, before in zip(*pairs, strict=True):
            squares = torch.zeros((), dtype=torch.float64)
            for one, other in zip(places(now), places(before), strict=True):
                for c in range(len(one)):
                    squares = squares + (one[c] / one.norm() - other[c] / other.norm()) ** 2
            layered.append(squares / now.numel())
        total = total + sum(layered) / 3 / 4
    part = 0.7 * total.double()
    assert part > 0.001
    expected = wanted(method, loss + part, cross_entropy=loss, ldifs=part)
    assert_same(step(method, images, labels), expected)


@pytest.mark.parametrize(
    ("shape", "width", "axis"),
    [((2, 5, 4, 4), 5, 1), ((2, 4, 4, 5), 5, -1), ((2, 9, 5), 5, -1), ((2, 5), 5, 1)],
)
def test_ldifs_finds_the_channels(shape: tuple[int, ...], width: int, axis: int) -> None:
    assert channel_axis(torch.zeros(shape), width) == axis
    with pytest.raises(ValueError, match="have no 7 channels"):
        channel_axis(torch.zeros(shape), 7)


def test_lp_ft_is_a_linear_probe_then_plain_fine_tuning() -> None:
    method, (images, labels) = LPFT(make_encoder(0), make_head(), probe_epochs=2), make_data(6)
    probe, plain = METHODS["linear_probe"](), METHODS["ce_tuning"]()
    for _ in range(2):
        method.begin_epoch()
        method.train()
        assert method.is_probing and not method.downstream_encoder.training
        assert_same(step(method, images, labels), step(probe, images, labels))
    state = method.state_dict()
    method.begin_epoch()
    method.train()
    assert not method.is_probing and method.downstream_encoder.training
    assert_same(step(method, images, labels), step(plain, images, labels))
    method.load_state_dict(state)
    assert method.is_probing
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    method.before_step()
    assert {n for n, p in method.named_parameters() if p.grad is not None} == {
        "head.weight",
        "head.bias",
    }


def test_wise_ft_interpolates_from_the_probed_to_the_trained_model() -> None:
    encoder = nn.Sequential(make_encoder(0), nn.BatchNorm1d(D)).double()
    method = WiSEFT(encoder, make_head(), copy.deepcopy(encoder), probe_epochs=2).double()
    heads = []
    for epoch in range(4):
        method.begin_epoch()
        assert method.num_candidates == (1 if epoch < 2 else 11)
        moved(method.head, seed=epoch)
        heads.append({n: t.clone() for n, t in method.head.state_dict().items()})
    moved(encoder)
    encoder[1].running_mean += 1.0
    encoder[1].num_batches_tracked += 3
    start, end = method.pretrained_encoder.state_dict(), encoder.state_dict()
    state = {name: value.clone() for name, value in method.state_dict().items() if "." in name}
    for index in (0, 3, 10):
        a = 1 - index / 10
        with torch.inference_mode():
            found, head = method.candidate(index, encoder, method.head)
        for name, value in found.state_dict().items():
            wanted = end[name] if "num" in name else (1 - a) * start[name] + a * end[name]
            torch.testing.assert_close(value, wanted)
        for name, value in head.state_dict().items():
            torch.testing.assert_close(value, (1 - a) * heads[1][name] + a * heads[3][name])
        method.candidate(index, encoder, method.head)  # outside of inference mode too
    assert all(torch.equal(state[name], method.state_dict()[name]) for name in state)
    method.chosen = 3
    assert method.diagnostics()["coefficient"] == pytest.approx(0.7)


@pytest.mark.parametrize("labels", [[0, 3, 0, 0, 3, 1], [0, 1, 2], [4, 4]])
def test_scl_is_the_mean_over_the_partners_of_each_row(labels: list[int]) -> None:
    method, (images, _) = METHODS["scl"](), make_data(len(labels))
    features, loss = by_hand(method, images, torch.tensor(labels))
    unit = [row / row.norm() for row in features]
    total = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(labels):
        others = [k for k in range(len(labels)) if k != i]
        partners = [j for j in others if labels[j] == label]
        below = sum((unit[i] @ unit[k] / 0.4).exp() for k in others)
        for j in partners:
            share = (unit[i] @ unit[j] / 0.4).exp() / below
            total = total - share.log() / len(partners) / len(labels)
    part = 0.7 * total
    expected = wanted(method, 0.3 * loss + part, cross_entropy=loss, scl=part)
    assert_same(step(method, images, torch.tensor(labels)), expected)


def optimised(method: Method, num_steps: int = 6) -> Iterator[dict[str, Any]]:
    """Train with momentum, and yield each step's weights before, after and at the end."""
    optimizer = torch.optim.SGD(method.parameters(), lr=0.3, momentum=0.9)
    images, labels = make_data(6)
    for _ in range(num_steps):
        step(method, images, labels)
        method.before_step()
        named = dict(method.downstream_encoder.named_parameters())
        seen = {"before": {n: p.detach().clone() for n, p in named.items()}}
        seen["gradient"] = {n: p.grad.clone() for n, p in named.items()}
        head = method.head.weight.detach().clone()
        optimizer.step()
        seen["after"] = {n: p.detach().clone() for n, p in named.items()}
        stepped = method.head.weight.detach().clone()
        assert not torch.equal(head, stepped)
        method.after_step(True)
        assert torch.equal(method.head.weight, stepped)
        seen["end"] = {n: p.detach().clone() for n, p in named.items()}
        yield seen


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_spd_undoes_growth_where_the_gradient_points_back(weight: float) -> None:
    method = SPD(make_encoder(0), make_head(), weight=weight)
    starts = {n: p.detach() for n, p in make_encoder(0).named_parameters()}
    seen_cases = set()
    for seen in optimised(method, 12):
        for name, start in starts.items():
            before, after = (seen[when][name] - start for when in ("before", "after"))
            condition = -sum(
                float(g * m)
                for g, m in zip(seen["gradient"][name].flatten(), before.flatten(), strict=True)
            )
            expected = seen["after"][name]
            ratio = max(0.0, float(after.norm() - before.norm())) / float(after.norm())
            seen_cases.add((condition < 0, ratio > 0))
            if condition < 0:
                expected = expected - weight * ratio * after
            torch.testing.assert_close(seen["end"][name], expected)
            if condition < 0 < ratio and weight == 1.0:  # on the former sphere
                torch.testing.assert_close((seen["end"][name] - start).norm(), before.norm())
    assert seen_cases >= {(True, True), (False, True)}


@pytest.mark.parametrize("annealing", [1.0, 0.3])
def test_ftp_keeps_each_tensor_to_a_learnt_distance(annealing: float) -> None:
    method = FTP(make_encoder(0), make_head(), annealing=annealing)
    starts = {n: p.detach() for n, p in make_encoder(0).named_parameters()}
    gammas, moments = dict.fromkeys(starts, 1e-8), dict.fromkeys(starts, (0.0, 0.0))
    last: dict[str, Any] = {}
    signs = set()
    for number, seen in enumerate(optimised(method, 8), start=1):
        for name, start in starts.items():
            moved = seen["after"][name] - start
            rows = moved if moved.ndim > 1 else moved[None]
            norms = [sum(abs(float(v)) for v in row) + 1e-8 for row in rows]
            if number > 1:
                gradient = seen["gradient"][name].reshape(rows.shape)
                slope = sum(float(g @ r) / n for g, r, n in zip(gradient, *last[name], strict=True))
                signs.add(slope > 0)
                slope *= annealing if slope > 0 else 1.0
                first, second = moments[name]
                first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
                moments[name] = first, second
                size = (second / (1 - 0.999**number)) ** 0.5 + 1e-8
                gamma = gammas[name] - 0.01 * first / (1 - 0.9**number) / size
                gammas[name] = min(max(gamma, 1e-8), max(norms))
            last[name] = rows, norms
            factors = [min(1.0, gammas[name] / n) for n in norms]
            kept = torch.stack([f * row for f, row in zip(factors, rows, strict=True)])
            torch.testing.assert_close(seen["end"][name], start + kept.reshape(start.shape))
    assert signs == {True, False}
    assert method.diagnostics()["distance_limit"] > 1e-8


@pytest.mark.parametrize("name", ["spd", "ftp"])
def test_a_skipped_update_projects_nothing(name: str) -> None:
    method = METHODS[name]()
    for _ in optimised(method, 2):
        pass
    before = {n: t.clone() for n, t in method.state_dict().items() if "." in n}
    step(method, *make_data(6))
    method.before_step()
    method.after_step(False)
    assert all(torch.equal(before[n], method.state_dict()[n]) for n in before)


@pytest.mark.parametrize("name", ["dr_tune_l2_sp", "dr_tune_bss"])
def test_a_penalty_is_added_to_dr_tune(name: str) -> None:
    (images, labels), (more, their) = make_data(5), make_data(4, seed=8)
    plain, penalised = make_method(), METHODS[name]()
    for method in (plain, penalised):
        method.warm_up(more, their)
        moved(method.downstream_encoder)
    found, expected = step(penalised, images, labels), step(plain, images, labels)
    part = found.pop(name.removeprefix("dr_tune_"))
    assert part > 0
    torch.testing.assert_close(found["loss"], expected["loss"] + part)
    (penalty,) = penalised.penalties.values()
    features = penalised.downstream_encoder(images)
    term = penalty(penalised, features, labels, penalised.collective.batch(5))
    trained = {n: p for n, p in penalised.named_parameters() if p.requires_grad}
    slopes = torch.autograd.grad(term, list(trained.values()), allow_unused=True)
    for parameter, slope in zip(trained, slopes, strict=True):
        wanted = expected[parameter] + (0 if slope is None else slope)
        torch.testing.assert_close(found[parameter], wanted)


# ---- each method on several processes, and in parts


def prepared(name: str) -> Method:
    """A method as several steps leave it."""
    method = METHODS[name]()
    for _ in range(3):
        method.begin_epoch()
    method.train()
    return method


@pytest.mark.parametrize("share", [(3, 2), (5, 0), (0, 5), (2, 1, 2), (1, 0, 4)])
@pytest.mark.parametrize("name", METHODS)
def test_several_processes_equal_one(name: str, share: tuple[int, ...]) -> None:
    (images, labels), (more, their) = make_data(5), make_data(len(share), seed=9)
    alone = prepared(name)
    alone.warm_up(more, their)
    expected = step(alone, images, labels)
    bounds = list(itertools.accumulate(share, initial=0))

    def run(collective: Any) -> dict[str, Tensor]:
        method, rank = prepared(name), collective.rank
        method.collective = collective
        method.warm_up(more[rank : rank + 1], their[rank : rank + 1], None, [1] * len(share))
        rows = slice(bounds[rank], bounds[rank + 1]) if share[rank] else slice(0, 1)
        found = step(method, images[rows], labels[rows], None, share)
        method.before_step()  # a probe keeps its graph for all processes
        kept = {name for name, p in method.named_parameters() if p.grad is not None}
        return {key: value for key, value in found.items() if "." not in key or key in kept}

    assert_same(mean_of(run_ranks(len(share), run)), expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_in_parts_equals_the_whole(name: str) -> None:
    whole, parts, (images, labels) = prepared(name), prepared(name), make_data(6)
    if any(penalty.needs_whole_batch for penalty in whole.penalties.values()):
        pytest.skip("refused")
    expected = step(whole, images, labels)
    found: dict[str, Tensor] = {}
    for start in (0, 2, 4):
        rows = slice(start, start + 2)
        parted = step(parts, images[rows], labels[rows], micro=MicroBatch(6, start == 4))
        found = {key: found.get(key, 0) + value for key, value in parted.items()}
    assert_same(found, expected)
