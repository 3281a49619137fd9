"""The compiled module: :class:`Compiled`, :class:`ShareModule`, and the record."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxshare.capture.contract import Contract
from fxshare.capture.steered import SteeredGraph
from fxshare.result.face import GenerationFace, SavingFace, Verbs, keep_verbs
from fxshare.result.fingerprint import graph_sha256
from fxshare.result.pickling import reduced
from fxshare.result.record import Record
from passes import derived_buffers
from passes.errors import FxShareError
from passes.packing.lay_out import rows_again

_CONTRACT = "contract"


class _Face(GenerationFace, SavingFace):
    @property
    def fxshare(self) -> Record:
        """The plan, the report and the configuration it was compiled with."""
        assert isinstance(self, nn.Module)
        return record_of(self)


class _HasRecord(type):
    def __instancecheck__(cls, instance: object) -> bool:
        if cls is not Compiled:  # a class derived from it asks for its own
            return super().__instancecheck__(instance)
        meta = getattr(instance, "__dict__", {}).get("meta")
        return isinstance(instance, nn.Module) and isinstance(meta, dict) and "fxshare" in meta


class Compiled(_Face, nn.Module, metaclass=_HasRecord):
    """A compiled model, as ``compile``, ``load``, ``lower`` and ``readable`` return it: a type to
    annotate with, and one to ask ``isinstance`` for.

    An ``nn.Module``, so that whatever takes one takes it. Nothing is made of this class: a compiled
    model is a :class:`ShareModule` or, at module granularity, of the original's own class, where
    ``generate``, ``config`` and ``device`` are what that class has.
    """


# a compiled model may be of any class, so what it is is told by its record and not by its bases; a
# type checker knows bases only
if TYPE_CHECKING:
    _Base = Compiled
else:
    _Base = _Face


class ShareModule(_Base, SteeredGraph):
    """A rewritten model: a ``torch.fx.GraphModule`` that carries its :class:`Record`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on a call of the form that was captured.

        Raises :class:`GuardError` naming the argument that is none, and the way out.
        """
        contract = self.__dict__.get("meta", {}).get(_CONTRACT)
        # a compiler reads the code of the graph, which holds what makes a difference itself
        if contract is not None and not torch.compiler.is_compiling():
            contract.check(args, kwargs)
        return super().__call__(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        rows_again(self)
        return moved

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


def keep_contract(result: ShareModule, contract: Contract | None) -> None:
    """Let the module hold its calls to what was captured."""
    result.meta[_CONTRACT] = contract


def attach(result: nn.Module, record: Record, verbs: Verbs) -> Compiled:
    """Put the record where :func:`record_of` finds it; the module is a compiled one from then on.
    ``verbs`` are what it does by later stages, given by those that stand above them."""
    record = replace(record, graph_sha256=graph_sha256(result))
    result.__dict__["meta"]["fxshare"] = record
    result.__dict__["meta"]["source"] = record.source
    keep_verbs(result, verbs)
    if not isinstance(result, ShareModule):
        result.__dict__["fxshare"] = record
        if hasattr(result, "save_pretrained"):  # its own would write weights that it cannot read
            result.__dict__["save_pretrained"] = functools.partial(verbs.save_pretrained, result)
    assert isinstance(result, Compiled)
    return result
