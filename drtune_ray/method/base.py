"""The interface of a fine-tuning method, which is plain fine-tuning where nothing is overridden.

Legend: B batch rows, C classes, D features, W processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from torch import Tensor, nn

from drtune_ray.method.collective import ALONE, Collective, MicroBatch, Shard
from drtune_ray.method.equations import cross_entropy

CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True)
class MethodOutput:
    """Result of one step of a method.

    Attributes:
        loss: Scalar to call ``backward`` on. Where several processes train, the *mean* of their
            losses and gradients is that of one process.
        parts: Named parts of the loss, scalars without gradient.
        logits: Logits of the batch rows, shape (B, C).
        is_finite: Whether the loss and every feature so far were finite: a boolean scalar on the
            device, which nothing here waits for. False means that the training has diverged.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    logits: Tensor
    is_finite: Tensor


class MixedBatch(NamedTuple):
    """Mixed images (mixup, CutMix), on which the cross-entropy is computed instead.

    Attributes:
        images: (B, 3, H, W).
        targets: Probabilities of the classes, (B, C).
    """

    images: Tensor
    targets: Tensor


class Penalty(nn.Module):
    """A term that is added to the loss of a method.

    Attributes:
        name: Name of the term among the parts of the loss.
        needs_whole_batch: Whether it needs all rows of a batch at once, so that gradients cannot be
            accumulated over parts of it.
    """

    name: str
    needs_whole_batch: bool = False

    def forward(self, method: Method, features: Tensor, labels: Tensor, batch: Shard) -> Tensor:
        """Compute the term, already weighted; the mean over the processes is that of one process.

        Args:
            method: Method whose loss it joins.
            features: Downstream features of this process's rows, (B, D), with gradient.
            labels: Their labels, (B,).
            batch: This process's part of the global batch.
        """
        raise NotImplementedError


class Method(nn.Module):
    """Fine-tuning with the cross-entropy of the batch, plus penalties.

    A method of one's own is a subclass; :meth:`terms` alone is enough where it adds to the loss.
    A trainer calls, for each epoch, :meth:`begin_epoch`; for each step the method itself,
    :meth:`before_step` once the gradients are complete, the optimiser, and :meth:`after_step`.
    A trainer of several processes sets `collective` on the finished method. State that a resumed
    training needs is in ``state_dict``; `pretrained_encoder` is not, since it never changes.

    Args:
        downstream_encoder: Images to features (B, D); trained.
        head: Linear layer, (B, D) to (B, C).
        pretrained_encoder: Encoder as it was before training; frozen, in eval mode.
        penalties: Terms that are added to the loss.
        cross_entropy_weight: Weight of the cross-entropy in the loss.
        label_smoothing: Label smoothing of the cross-entropy.
        class_weights: Weights of the classes in the cross-entropy, (C,); 1 by default.

    Attributes:
        collective: The processes of the training.
        enqueues: Whether a step is final once its loss was computed. A trainer that may skip an
            update, because scaled gradients overflowed, sets it to False.
        needs_pretrained_features: Whether a trainer that has not prepared z^p must give it the
            encoder that computes it.
        chosen: Number of the candidate that the trainer chose in the last validation.
    """

    collective: Collective = ALONE
    enqueues: bool = True
    chosen: int = 0
    needs_pretrained_features: bool = False
    class_weights: Tensor | None
    pretrained_encoder: nn.Module | None

    def __init__(
        self,
        downstream_encoder: nn.Module,
        head: nn.Linear,
        pretrained_encoder: nn.Module | None = None,
        *,
        penalties: Sequence[Penalty] = (),
        cross_entropy_weight: float = 1.0,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        if pretrained_encoder is downstream_encoder:
            raise ValueError(
                "pretrained_encoder must be another module than downstream_encoder, since it is "
                "frozen: pass copy.deepcopy(encoder)"
            )
        self.downstream_encoder = downstream_encoder
        self.head = head
        self.pretrained_encoder = pretrained_encoder
        if pretrained_encoder is not None:
            pretrained_encoder.requires_grad_(False).eval()
        self.penalties = nn.ModuleDict({penalty.name: penalty for penalty in penalties})
        self.cross_entropy_weight = cross_entropy_weight
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    # ---- what a trainer calls

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts of the loss, in the order in which :meth:`forward` returns them."""
        return (CROSS_ENTROPY, *self.penalties)

    @property
    def num_warm_up_rows(self) -> int:
        """Number of training images that :meth:`warm_up` takes before the first epoch."""
        return 0

    def warm_up(
        self,
        images: Tensor,
        labels: Tensor,
        pretrained_features: Tensor | None = None,
        shares: Sequence[int] | None = None,
    ) -> None:
        """Take a batch before the first epoch; arguments as for :meth:`forward`."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode as ``nn.Module.train`` does; the frozen encoder stays in eval mode."""
        super().train(mode)
        if self.pretrained_encoder is not None:
            self.pretrained_encoder.eval()
        return self

    def begin_epoch(self) -> None:
        """Start an epoch; not called where a resumed one goes on."""

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        pretrained_features: Tensor | None = None,
        shares: Sequence[int] | None = None,
        micro: MicroBatch | None = None,
        mixed: MixedBatch | None = None,
    ) -> MethodOutput:
        """Compute the loss of one step.

        Args:
            images: Augmented images, (B, 3, H, W).
            labels: (B,).
            pretrained_features: z^p of the same augmented images, (B, D), where they are known.
            shares: Number of rows of each process; see
                :meth:`~drtune_ray.method.collective.Collective.batch`.
            micro: Place of these images in their batch, if they are a part of it. The sum of the
                losses of all parts is that of the batch.
            mixed: The same images mixed, to be trained on instead.
        """
        batch = self.collective.batch(len(labels), shares, micro)
        images, targets = (images, labels) if mixed is None else mixed
        features = self.features(images, None if mixed is not None else pretrained_features)
        logits = self.head(features)[batch.own]
        loss = self.cross_entropy(logits, targets[batch.own], batch)
        parts = {CROSS_ENTROPY: loss.detach()}
        if self.cross_entropy_weight != 1.0:
            loss = self.cross_entropy_weight * loss
        for name, term in self.terms(features[batch.own], labels[batch.own], batch).items():
            loss = loss + term
            parts[name] = term.detach()
        return MethodOutput(loss, parts, logits, loss.detach().isfinite())

    def before_step(self) -> None:
        """Read or change the gradients: they are complete, and the optimiser follows."""

    def after_step(self, is_taken: bool) -> None:
        """Read or change the weights after an update.

        Args:
            is_taken: Whether there was one; False where it was skipped.
        """

    @property
    def num_candidates(self) -> int:
        """Number of models that a validation compares, of which the best counts."""
        return 1

    def candidate(
        self, index: int, encoder: nn.Module, head: nn.Module
    ) -> tuple[nn.Module, nn.Module]:
        """Encoder and head of a candidate; of equals, the first is chosen.

        Args:
            index: Number of the candidate; 0 counts where nothing is validated.
            encoder: The trained encoder, or the average of its weights.
            head: The trained head, or the average of its weights.
        """
        return encoder, head

    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars that describe the training at the end of an epoch, by their names."""
        return {}

    # ---- what a method of its own overrides or calls

    def features(self, images: Tensor, pretrained_features: Tensor | None) -> Tensor:
        """Downstream features of images, (B, D); z^p is given where it is known."""
        features: Tensor = self.downstream_encoder(images)
        return features

    def terms(self, features: Tensor, labels: Tensor, batch: Shard) -> dict[str, Tensor]:
        """Terms that are added to the cross-entropy, by their names in `part_names`.

        A mean over the batch is the sum over the rows given here divided by ``batch.divisor``.

        Args:
            features: Downstream features of this process's rows, (B, D).
            labels: Their labels, (B,); those before mixing.
            batch: This process's part of the global batch.
        """
        return {
            name: penalty(self, features, labels, batch) for name, penalty in self.penalties.items()
        }

    def cross_entropy(self, logits: Tensor, targets: Tensor, batch: Shard) -> Tensor:
        """Cross-entropy of this process's rows, a scalar; its settings are those of the method."""
        return cross_entropy(
            logits,
            targets,
            batch.divisor,
            class_weights=self.class_weights,
            label_smoothing=self.label_smoothing,
        )
