"""The compiled module: :class:`ShareModule`, and its record."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch import fx, nn

from fxshare.result.face import GenerationFace, SavingFace, Verbs, keep_verbs
from fxshare.result.fingerprint import graph_sha256
from fxshare.result.pickling import reduced
from fxshare.result.record import Record
from passes import derived_buffers
from passes.errors import FxShareError


class ShareModule(GenerationFace, SavingFace, fx.GraphModule):
    """A rewritten model: a ``torch.fx.GraphModule`` that carries its :class:`Record`."""

    @property
    def fxshare(self) -> Record:
        """The plan, the report and the configuration it was compiled with."""
        found: Record = self.meta["fxshare"]
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        result = super().__deepcopy__(memo)
        assert isinstance(result, fx.GraphModule)
        for name in derived_buffers(result):  # fx makes every buffer it copies part of the state
            path, _, leaf = name.rpartition(".")
            result.get_submodule(path)._non_persistent_buffers_set.add(leaf)
        return result


def record_of(module: nn.Module) -> Record:
    """The record of a compiled model; :class:`FxShareError` if it is not one."""
    meta = getattr(module, "meta", None)
    if not isinstance(meta, dict) or "fxshare" not in meta:
        raise FxShareError(
            f"{type(module).__name__} was not made by fxshare.compile or fxshare.load"
        )
    found: Record = meta["fxshare"]
    return found


def attach(result: nn.Module, record: Record, verbs: Verbs) -> None:
    """Put the record where :func:`record_of` finds it; ``verbs`` are what the module does by later
    stages, given by those that stand above them."""
    record = replace(record, graph_sha256=graph_sha256(result))
    result.__dict__["meta"]["fxshare"] = record
    result.__dict__["meta"]["source"] = record.source
    keep_verbs(result, verbs)
    if not isinstance(result, ShareModule):
        result.__dict__["fxshare"] = record
        if hasattr(result, "save_pretrained"):  # its own would write weights that it cannot read
            result.__dict__["save_pretrained"] = functools.partial(verbs.save_pretrained, result)
