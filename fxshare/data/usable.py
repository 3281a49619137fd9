"""Batches as statistics can be made of them: with values, and outside of inference mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxshare.errors import CalibrationError


def usable(batch: object) -> Any:
    """The batch; where tensors of it were made in inference mode, with copies that autograd takes.

    Raises :class:`CalibrationError` for fake tensors, which have no values, and where all tensors
    are empty.
    """
    known = isinstance(batch, Mapping) and type(batch) not in pytree.SUPPORTED_NODES
    given: Any = {**batch} if isinstance(batch, Mapping) and known else batch
    found = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    if any(isinstance(tensor, FakeTensor) for tensor in found):
        raise CalibrationError(
            "a batch holds a FakeTensor, which has no values; make the data outside of "
            "FakeTensorMode"
        )
    if found and not any(tensor.numel() for tensor in found):
        raise CalibrationError(
            f"a batch holds nothing: its tensors are of shape "
            f"{', '.join(str(tuple(tensor.shape)) for tensor in found[:3])}; leave it out"
        )
    if not any(tensor.is_inference() for tensor in found):
        return batch
    return pytree.tree_map_only(
        Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, given
    )


def usable_batches(batches: Iterable[object]) -> Iterable[object]:
    """:func:`usable` of each batch; a sequence stays one, what is read once is read as late."""
    if not isinstance(batches, Sequence):
        return _each(batches)
    made = [usable(batch) for batch in batches]
    return made if any(new is not old for new, old in zip(made, batches, strict=True)) else batches


def _each(batches: Iterable[object]) -> Iterator[object]:
    for batch in batches:
        yield usable(batch)


__all__ = ["usable", "usable_batches"]
