"""A batch as a call: what happens to it on its way into a model, once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxshare.base.placement import device_of
from fxshare.capture.call import Call, as_float32, bind, completed, to_device, without_labels
from fxshare.capture.switches import without_cache


@dataclass(frozen=True)
class Caller:
    """Makes calls of a model from batches.

    ``keep`` names the optional labels that stay in a call; data brings them along for training,
    and a graph that was captured without has no input for them. ``mask`` says whether one of ones
    is filled in, and ``options`` are what is no tensor, for batches that do not say it.
    ``cache_off`` is no where the model refuses ``use_cache=False``. With ``wide`` the numbers of a
    batch are made float32.
    """

    model: nn.Module
    keep: Collection[str] = ()
    mask: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    cache_off: bool = True
    wide: bool = False

    def __call__(self, batch: object) -> Call:
        """The batch bound to the names of ``forward``, without labels, with what a Hugging Face
        model would fill in, on the model's device.

        Raises :class:`CalibrationError` for an entry that ``forward`` does not take.
        """
        return to_device(self.where_it_is(batch), device_of(self.model))

    def where_it_is(self, batch: object) -> Call:
        """The same on the device that the batch is on: to look at, not to run."""
        # labels go first: what is filled in follows from what is left
        call: Call = {**self.options, **bind(self.model, batch)}
        call = without_labels(self.model, call, self.keep)
        call = completed(self.model, call, mask=self.mask)
        call = without_cache(self.model, call) if self.cache_off else call
        return as_float32(call) if self.wide else call


__all__ = ["Caller"]
