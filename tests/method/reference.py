"""DR-Tune written slowly, in float64 with loops, from eq. 5-14 of arXiv 2308.12058.

It shares no code with `drtune_ray.method`; the fast code is compared with it. Where the paper
leaves a choice, METHOD.md's table (rows a-r) names the option. Vectors are numpy arrays of shape
(D,); a bank is a list of (v^p, v^d, label), oldest first. Only the losses are torch, for autograd.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

PAPER = {
    "rotation": True,
    "rotation_interval": 1,
    "rotation_solver": "svd",
    "rotation_rank": 3,
    "rotation_shrinkage": 0.2,
    "rotation_kept": True,
    "restart_each_epoch": False,
    "proper_rotation": False,
    "recenter": True,
    "normalize": False,
    "translation": True,
    "confidence_weighting": True,
    "confidence_temperature": 1.0,
    "similarity": "dot",
}
"""Calibration options for eq. 7-12 as printed; rank and shrinkage are not read by `svd`."""

AUTHORS = PAPER | {
    "rotation_interval": 10,
    "rotation_kept": False,
    "restart_each_epoch": True,
    "proper_rotation": True,
    "recenter": False,
    "normalize": True,
    "similarity": "cosine",
}
"""Those of the authors' code: rows b, c, d, e, n and o of METHOD.md."""


def mean(vectors):
    total = 0.0
    for vector in vectors:
        total = total + vector
    return total / len(vectors)


def unit(vector):
    """At length 1; a zero vector has no direction and stays."""
    length = math.sqrt(sum(x * x for x in vector))
    return vector / length if length else vector


def cross_covariance(pretrained, downstream):
    """H = sum_k (v^d_k - mean v^d) (v^p_k - mean v^p)^T."""
    mean_p, mean_d = mean(pretrained), mean(downstream)
    total = np.zeros((len(mean_p), len(mean_p)))
    for v_p, v_d in zip(pretrained, downstream, strict=True):
        total += np.outer(v_d - mean_d, v_p - mean_p)
    return total


def plain_rotation(pretrained, downstream):
    """Eq. 7 by one SVD; where H is singular, whatever the SVD gives."""
    left, _, right_t = np.linalg.svd(cross_covariance(pretrained, downstream))
    return left @ right_t


def rotation_matrix(pretrained, downstream, proper=False):
    """Eq. 7; of several minimisers the one nearest to the identity.

    U_1 V_1^T on the directions with evidence. What is left maps the complement of V_1 onto the
    complement of U_1: the nearest such map to I is the polar factor of the product of the two
    projectors. With `proper`, a negative determinant flips the pair that costs least.
    """
    covariance = cross_covariance(pretrained, downstream)
    width = len(covariance)
    left, values, right_t = np.linalg.svd(covariance)
    rank = sum(1 for value in values if value > 1e-10 * values[0])
    onto_left = np.eye(width) - left[:, :rank] @ left[:, :rank].T
    onto_right = np.eye(width) - right_t[:rank].T @ right_t[:rank]
    free_left, _, free_right_t = np.linalg.svd(onto_left @ onto_right)
    pairs = [(left[:, i], right_t[i]) for i in range(rank)]
    pairs += [(free_left[:, i], free_right_t[i]) for i in range(width - rank)]
    rotation = np.zeros((width, width))
    for u, v in pairs:
        rotation += np.outer(u, v)
    if proper and np.linalg.det(rotation) < 0:
        rotation -= 2 * np.outer(*pairs[-1])
    return rotation


def subspace_rotation(pretrained, downstream, start, shrinkage, num_iterations):
    """The rank-limited, shrunk rotation, by a singular value decomposition: (R, right factor).

    U F V^T + c (I - V F V^T) with F = diag(s / sqrt(s^2 + t^2)), t = shrinkage sqrt(sum s^2), where
    the singular triplets come from `num_iterations` products of the columns `start` with H and
    H^T; c in [0, 1] is the least-squares factor of what V F V^T leaves of the pretrained rows.
    """
    covariance, width = cross_covariance(pretrained, downstream), len(pretrained[0])
    right = start
    for _ in range(num_iterations):
        left = np.linalg.qr(covariance @ np.linalg.qr(right)[0])[0]
        right = covariance.T @ left
    right_vectors, values, mix_t = np.linalg.svd(right, full_matrices=False)
    size = math.sqrt(sum(value**2 for value in values))
    shrunk = [v / math.hypot(v, shrinkage * size) if v > 1e-8 * size else 0.0 for v in values]
    turned = left @ mix_t.T @ np.diag(shrunk) @ right_vectors.T
    rest = np.eye(width) - right_vectors @ np.diag(shrunk) @ right_vectors.T
    explained, total = 0.0, 0.0
    for v_p, v_d in zip(pretrained, downstream, strict=True):
        v_p, v_d = v_p - mean(pretrained), v_d - mean(downstream)
        explained += (rest @ v_p) @ (v_d - turned @ v_p)
        total += (rest @ v_p) @ (rest @ v_p)
    kept = min(max(explained / total, 0.0), 1.0) if total > 1e-20 else 1.0
    return turned + kept * rest, right_vectors @ np.diag(shrunk) @ mix_t


def seeded_start(width, rank):
    """Where the first solution starts from: the same numbers as `drtune_ray.method`."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, min(rank, width), generator=generator) / math.sqrt(width)
    return start.double().numpy()


def confidence(rows, prototype, similarity="dot", temperature=1.0):
    """Eq. 10: softmax over the downstream rows of one class."""
    if similarity == "cosine":
        rows, prototype = [unit(row) for row in rows], unit(prototype)
    scores = [sum(prototype * row) / temperature for row in rows]
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


@dataclass
class ReferenceCalibration:
    """Eq. 7-12 with the options of `SemanticCalibration`, all of them to be given."""

    rotation: bool
    rotation_interval: int
    rotation_solver: str
    rotation_rank: int
    rotation_shrinkage: float
    rotation_kept: bool
    restart_each_epoch: bool
    proper_rotation: bool
    recenter: bool
    normalize: bool
    translation: bool
    confidence_weighting: bool
    confidence_temperature: float
    similarity: str
    matrix: np.ndarray | None = None
    right: np.ndarray | None = None
    step_in_interval: int = 0

    def begin_epoch(self):
        if self.restart_each_epoch:
            self.step_in_interval = 0

    def __call__(self, bank, prototypes, scale):
        pretrained = [unit(p) if self.normalize else p for p, _, _ in bank]
        downstream = [unit(d) if self.normalize else d for _, d, _ in bank]
        labels = [label for _, _, label in bank]
        calibrated = self.rotated(pretrained, downstream)
        if self.translation:
            shifts = self.translations(calibrated, downstream, labels, prototypes)
            calibrated = [v + shifts[y] for v, y in zip(calibrated, labels, strict=True)]
        if self.normalize:
            calibrated = [unit(v) * scale for v in calibrated]
        return calibrated

    def rotated(self, pretrained, downstream):
        is_due = self.step_in_interval == 0
        self.step_in_interval = (self.step_in_interval + 1) % self.rotation_interval
        if not self.rotation or not (is_due or self.rotation_kept):
            return pretrained
        if is_due:
            self.refresh(pretrained, downstream)
        origin = mean(pretrained)
        destination = mean(downstream) if self.recenter else 0.0
        return [self.matrix @ (v - origin) + destination for v in pretrained]

    def refresh(self, pretrained, downstream):
        if self.rotation_solver == "svd":
            self.matrix = rotation_matrix(pretrained, downstream, self.proper_rotation)
            return
        is_first = self.right is None
        start = seeded_start(len(pretrained[0]), self.rotation_rank)
        if not is_first:
            start = self.right + 1e-3 * start
        self.matrix, self.right = subspace_rotation(
            pretrained, downstream, start, self.rotation_shrinkage, 3 if is_first else 1
        )

    def translations(self, rotated, downstream, labels, prototypes):
        """{c: delta_c} of the classes with rows, eq. 8-11."""
        shifts = {}
        for c in set(labels):
            of_class = [k for k, label in enumerate(labels) if label == c]
            rows = [downstream[k] for k in of_class]
            if self.confidence_weighting:
                weights = confidence(
                    rows, prototypes[c], self.similarity, self.confidence_temperature
                )
                centre = sum(w * row for w, row in zip(weights, rows, strict=True))
            else:
                centre = mean(rows)
            shifts[c] = centre - mean([rotated[k] for k in of_class])
        return shifts


def encode(parameters, image):
    """Flatten, Linear, Tanh, Linear."""
    p = {name.removeprefix("downstream_encoder."): value for name, value in parameters.items()}
    return p["3.weight"] @ torch.tanh(p["1.weight"] @ image.flatten() + p["1.bias"]) + p["3.bias"]


def cross_entropy(parameters, feature, label):
    logits = parameters["head.weight"] @ feature + parameters["head.bias"]
    return torch.log(sum(torch.exp(logit) for logit in logits)) - logits[label]


@dataclass
class ReferenceDRTune:
    """Eq. 5, 13 and 14, and the queue."""

    bank_size: int
    calibration: ReferenceCalibration | None
    regularization_weight: float
    reduction: str
    bank: list = field(default_factory=list)

    def enqueue(self, pretrained, downstream, labels):
        for v_p, v_d, label in zip(pretrained, downstream, labels, strict=True):
            self.bank.append((v_p.numpy().copy(), v_d.numpy().copy(), int(label)))
            if len(self.bank) > self.bank_size:
                self.bank.pop(0)

    def step(self, parameters, images, labels, pretrained):
        """One step at the given parameters: {name: value} of loss, parts and gradients."""
        parameters = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
        features = [encode(parameters, image) for image in images]
        batch_loss, bank_loss = torch.zeros(()).double(), torch.zeros(()).double()
        for feature, label in zip(features, labels, strict=True):
            batch_loss = batch_loss + cross_entropy(parameters, feature, label) / len(labels)
        features = [feature.detach() for feature in features]
        rows = self.calibrated(parameters, features)
        for row, (_, _, label) in zip(rows, self.bank, strict=True):
            row_loss = cross_entropy(parameters, torch.from_numpy(row), label)
            bank_loss = bank_loss + row_loss / len(self.bank)
        loss = batch_loss + self.regularization_weight * bank_loss
        if self.reduction == "mean":
            loss = loss / (1 + self.regularization_weight)
        loss.backward()
        self.enqueue(pretrained, features, labels)
        return {
            "loss": loss.detach(),
            "cross_entropy": batch_loss.detach(),
            "distribution_regularization": bank_loss.detach(),
        } | {name: parameter.grad for name, parameter in parameters.items()}

    def calibrated(self, parameters, features):
        if self.calibration is None:
            return [v_p for v_p, _, _ in self.bank]
        if not self.bank:
            return []
        scale = mean([math.sqrt(sum(float(x) ** 2 for x in feature)) for feature in features])
        return self.calibration(self.bank, parameters["head.weight"].detach().numpy(), scale)
