"""A batch as a call: what happens to it on its way into a model, once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from fxshare.base.placement import device_of
from fxshare.capture.call import Call, bind, completed, to_device, without_labels


@dataclass(frozen=True)
class Caller:
    """Makes calls of a model from batches.

    ``keep`` names the optional labels that stay in a call; data brings them along for training,
    and a graph that was captured without has no input for them.
    """

    model: nn.Module
    keep: Collection[str] = ()

    def __call__(self, batch: object) -> Call:
        """The batch bound to the names of ``forward``, without labels, with what a Hugging Face
        model would fill in, on the model's device.

        Raises :class:`CalibrationError` for an entry that ``forward`` does not take.
        """
        return to_device(self.where_it_is(batch), device_of(self.model))

    def where_it_is(self, batch: object) -> Call:
        """The same on the device that the batch is on: to look at, not to run."""
        # labels go first: what is filled in follows from what is left
        return completed(self.model, without_labels(self.model, bind(self.model, batch), self.keep))


__all__ = ["Caller"]
