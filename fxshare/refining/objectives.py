"""What is trained on: a loss of the student's output, most of them against the teacher's.

Every objective is a frozen object with one method for what it keeps of the teacher's output and one
for the loss, a sum with what it is a sum over, so that batches of different sizes count alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxshare.base.numerics import float_leaves
from fxshare.calibration.cross_entropy import next_token_losses
from fxshare.calibration.distance import output_rows
from fxshare.calibration.losses import Loss, next_token_logits
from fxshare.capture import Call, tensors
from fxshare.capture.call import MASK
from fxshare.errors import RefineError
from fxshare.refining.divergence import distribution, divergence_of
from fxshare.refining.options import ObjectiveName, RefineOptions


@dataclass(frozen=True)
class Summed:
    """A loss summed over ``count`` tokens or rows, and with a ``weight`` above 0 that of the means
    over the tokens of ``samples``."""

    total: Tensor
    count: int
    of_means: Tensor | None = None
    samples: int = 0
    weight: float = 0.0

    @property
    def mean(self) -> Tensor:
        """The loss for each token, and for each sample by its weight."""
        of_rows = self.total / max(self.count, 1)
        if self.of_means is None:
            return of_rows
        return (1 - self.weight) * of_rows + self.weight * self.of_means / max(self.samples, 1)

    def to_sum(self) -> Summed:
        """In double precision on the CPU, to add many up."""
        of_means = self.of_means
        if of_means is not None:
            of_means = of_means.detach().double().cpu()
        return replace(self, total=self.total.detach().double().cpu(), of_means=of_means)

    def __add__(self, other: Summed) -> Summed:
        of_means = self.of_means
        if of_means is not None and other.of_means is not None:
            of_means = of_means + other.of_means
        return Summed(
            self.total + other.total,
            self.count + other.count,
            of_means,
            self.samples + other.samples,
            self.weight,
        )


class Objective(ABC):
    """One objective; ``name`` is its word in records and on the command line."""

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True

    @property
    def adds_up(self) -> bool:
        """Whether the losses of a batch's parts add up to that of the batch."""
        return False

    def targets(self, output: Any, call: Call) -> Any:
        """What is kept of the teacher's output; None where none is needed."""
        return None

    @abstractmethod
    def loss(self, output: Any, targets: Any, call: Call, batch: object) -> Summed:
        """The loss of the student's output."""


@dataclass(frozen=True)
class ToLogits(Objective):
    """KL divergence of the student's distribution from the teacher's, both at one temperature
    (Hinton et al. 2015, with its factor T²); mixed with the data's own loss by ``data_weight``.
    Positions that the mask leaves out do not count."""

    name: ClassVar[str] = "kl"

    temperature: float = 1.0
    data_weight: float = 0.0

    @property
    def adds_up(self) -> bool:
        return not self.data_weight

    def targets(self, output: Any, call: Call) -> Tensor:
        return distribution(_rows(_logits(output, self.name, "teacher"), call), self.temperature)

    def loss(self, output: Any, targets: Any, call: Call, batch: object) -> Summed:
        rows_NV = _rows(_logits(output, self.name, "compiled model"), call)
        if rows_NV.shape != targets.shape:
            raise RefineError(
                f"teacher: expected logits like those of the compiled model, (..., "
                f"{rows_NV.shape[-1]}) of {len(rows_NV):,} positions, found (..., "
                f"{targets.shape[-1]}) of {len(targets):,}; a teacher has the same vocabulary and "
                "reads the same tokens"
            )
        divergence = divergence_of(rows_NV, targets, self.temperature)
        total, count = divergence * self.temperature**2, len(rows_NV)
        if self.data_weight:
            data = _next_token(output, call, self.name)
            total = (1 - self.data_weight) * total + self.data_weight * count * data.mean
        return Summed(total, count)


@dataclass(frozen=True)
class ToOutputs(Objective):
    """Half the squared distance to the teacher's outputs, each row (a token, a sample) divided by
    the size of the teacher's; rows that the mask leaves out do not count. ``pool_weight`` is the
    share of the distance between the means over the tokens of each sample, where sentence
    embeddings are made of them."""

    name: ClassVar[str] = "hidden"

    pool_weight: float = 0.0

    @property
    def adds_up(self) -> bool:
        return True

    def targets(self, output: Any, call: Call) -> list[Tensor]:
        found = [
            rows.detach() for rows in (*output_rows(output, call), *self._pooled(output, call))
        ]
        if not found:
            raise RefineError(
                "objective 'hidden': the model's output has no floating-point tensor to come near "
                "to; give loss=..."
            )
        return found

    def loss(self, output: Any, targets: Any, call: Call, batch: object) -> Summed:
        rows, pooled = list(output_rows(output, call)), self._pooled(output, call)
        shapes = [tuple(r.shape) for r in (*rows, *pooled)]
        if shapes != [tuple(t.shape) for t in targets]:
            raise RefineError(
                f"teacher: expected outputs of the shapes {shapes} (rows of the batch, features), "
                f"found {[tuple(t.shape) for t in targets]}; a teacher has outputs like those of "
                "the compiled model"
            )
        total, count = _distance(rows, targets), sum(len(r) for r in rows)
        if not pooled:
            return Summed(total, count)
        of_means = _distance(pooled, targets[len(rows) :])
        return Summed(total, count, of_means, sum(len(p) for p in pooled), self.pool_weight)

    def _pooled(self, output: Any, call: Call) -> list[Tensor]:
        """The means ``(B, D)`` over the tokens of every output ``(B, T, D)``, where they count."""
        if not self.pool_weight:
            return []
        found = [_means(leaf, call.get(MASK)) for _, leaf in float_leaves(output) if leaf.ndim == 3]
        if not found:
            raise RefineError(
                "pool_weight: expected an output (batch, tokens, features) of the model, found "
                "none; leave it out"
            )
        return found


@dataclass(frozen=True)
class OfData(Objective):
    """The data's own loss: next-token cross-entropy, or what the model returns as ``loss``."""

    name: ClassVar[str] = "ce"
    needs_teacher: ClassVar[bool] = False

    def loss(self, output: Any, targets: Any, call: Call, batch: object) -> Summed:
        own = _attribute(output, "loss")
        if next_token_logits(output, call) is None and isinstance(own, Tensor) and own.ndim == 0:
            count = size_of(call)
            return Summed(own * count, count)
        return _next_token(output, call, self.name)


@dataclass(frozen=True, eq=False)
class OfUser(Objective):
    """A loss of the user's own, ``(output, batch) -> scalar`` summed over tokens."""

    name: ClassVar[str] = "the loss given"
    needs_teacher: ClassVar[bool] = False

    given: Loss

    def loss(self, output: Any, targets: Any, call: Call, batch: object) -> Summed:
        value: object = self.given(output, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else value
            raise RefineError(
                f"loss: expected a scalar tensor that depends on the model's output, found "
                f"{type(value).__name__} {shape!r}"
            )
        return Summed(value.reshape(()), size_of(call))


def objective_of(
    options: RefineOptions, loss: Loss | None, output: Any, call: Call, *, teacher: bool
) -> Objective:
    """The objective asked for; where none is, the one that suits the ``output`` of a first call.

    Raises :class:`RefineError` for one that does not go with a missing teacher or with ``loss``.
    """
    if loss is not None:
        if options.objective is not None:
            raise RefineError(
                f"objective={options.objective!r} and loss=...: expected one of them, found both"
            )
        return OfUser(loss)
    name: ObjectiveName | None = options.objective
    if name is None and not teacher:
        name = "ce"
    if name is None:
        name = "hidden" if next_token_logits(output, call) is None else "kl"
    if name != "ce" and not teacher:
        raise RefineError(
            f"objective={name!r} is measured against a teacher, and teacher is None; take "
            "objective='ce', or leave teacher out"
        )
    if name == "blocks":  # what the whole is measured by
        name = "hidden" if next_token_logits(output, call) is None else "kl"
        if options.temperature != 1.0 or options.data_weight:
            raise _without_logits("blocks")
    if name == "kl":
        _check_not_pooled(name, options)
        return ToLogits(options.temperature, options.data_weight)
    if options.temperature != 1.0 or options.data_weight:
        raise _without_logits(name)
    if name == "hidden":
        return ToOutputs(options.pool_weight)
    _check_not_pooled(name, options)
    return OfData()


def _check_not_pooled(name: str, options: RefineOptions) -> None:
    if options.pool_weight:
        raise RefineError(
            f"pool_weight belongs to objective='hidden', found {name!r}; leave it out"
        )


def _without_logits(name: str) -> RefineError:
    return RefineError(
        f"temperature and data_weight belong to objective='kl', found {name!r}; leave them out"
    )


def data_loss(output: Any, call: Call) -> Summed | None:
    """Next-token cross-entropy, to report beside an objective; None where there is none."""
    found = next_token_logits(output, call)
    return None if found is None else _cross_entropy(*found, call)


def size_of(call: Call) -> int:
    """Tokens of a call; masked ones do not count."""
    mask = call.get(MASK)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.bool().sum())
    first = next(iter(tensors(call)), None)
    if first is None:
        return 1
    return int(first.numel() if not first.is_floating_point() else first.shape[:-1].numel())


def _attribute(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _logits(output: Any, name: str, whose: str) -> Tensor:
    found = _attribute(output, "logits")
    if found is None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        found = first
    if not isinstance(found, Tensor) or found.ndim < 2 or not found.is_floating_point():
        raise RefineError(
            f"objective {name!r}: the {whose} returns no logits; expected a tensor (..., classes), "
            "alone, first of a tuple or as 'logits'. Take objective='hidden', or give loss=..."
        )
    return found


def _rows(logits: Tensor, call: Call) -> Tensor:
    mask = call.get(MASK)
    if logits.ndim > 2 and isinstance(mask, Tensor) and mask.shape == logits.shape[:2]:
        kept = mask.to(logits.device).bool()
        if not bool(kept.all()):
            return logits[kept]
    return logits.flatten(0, -2)


def _means(leaf_BTD: Tensor, mask: Any) -> Tensor:
    """Over tokens; those that the mask leaves out do not count."""
    wide_BTD = leaf_BTD if leaf_BTD.dtype == torch.float64 else leaf_BTD.float()
    if not isinstance(mask, Tensor) or mask.shape != leaf_BTD.shape[:2]:
        return wide_BTD.mean(1)
    mask_BT1 = mask.to(wide_BTD).unsqueeze(-1)
    means_BD: Tensor = (wide_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
    return means_BD


def _distance(rows: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Half the squared distances, each row by the size of its target, summed up."""
    total = rows[0].new_zeros(())
    for own_ND, wanted_ND in zip(rows, targets, strict=False):
        gap_ND = (own_ND - wanted_ND) / _sizes(wanted_ND)
        total = total + 0.5 * gap_ND.pow(2).sum()
    return total


def _sizes(rows_ND: Tensor) -> Tensor:
    sizes_N1: Tensor = rows_ND.norm(dim=-1, keepdim=True)
    # a row of zeros has no direction; it counts like the smallest of the others
    least = sizes_N1[sizes_N1 > 0].min() if bool((sizes_N1 > 0).any()) else sizes_N1.new_ones(())
    return sizes_N1.clamp(min=float(least))


def _next_token(output: Any, call: Call, name: str) -> Summed:
    found = next_token_logits(output, call)
    if found is None:
        raise RefineError(
            f"objective {name!r}: the model predicts no next token (expected logits (B, T, V) for "
            "token ids (B, T)) and returns no loss; give loss=..., or take objective='hidden'"
        )
    return _cross_entropy(*found, call)


def _cross_entropy(logits_BTV: Tensor, ids_BT: Tensor, call: Call) -> Summed:
    targets_BT = ids_BT[:, 1:].to(logits_BTV.device).long()
    losses = next_token_losses(logits_BTV, targets_BT).flatten()
    mask = call.get(MASK)
    if isinstance(mask, Tensor) and mask.shape == ids_BT.shape:
        both = (mask[:, 1:].bool() & mask[:, :-1].bool()).flatten().to(losses.device)
        return Summed((losses * both).sum(), int(both.sum()))
    return Summed(losses.sum(), losses.numel())


__all__ = ["Objective", "Summed", "data_loss", "objective_of", "size_of"]
