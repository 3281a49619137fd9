"""The ``torch.export`` program of a compiled model, which three of the targets are made from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxshare.capture import quiet
from fxshare.capture.signature import method_taking
from fxshare.capture.tracing.lines import failing_line
from fxshare.errors import ExportError
from fxshare.exporting.codes import with_plain_tensors
from fxshare.exporting.outputs import plain
from fxshare.exporting.subject import Subject
from passes.errors import FxShareError

# what lowering to a runtime reads; the rest says where on this machine a node came from
_LIVE_META = ("val", "tensor_meta")


@dataclass(frozen=True, eq=False)
class Traced:
    """``program`` takes the subject's inputs by name. ``batch`` and ``sequence`` say which sizes
    really vary: some models bake one."""

    program: torch.export.ExportedProgram
    batch: bool
    sequence: bool
    notes: tuple[str, ...]


def traced(subject: Subject, *, onnx: bool = False) -> Traced:
    """Export the subject; the program holds each tensor once and nothing of this machine. ``onnx``
    says that it is to be written as such, and is not run otherwise.

    Raises :class:`ExportError` with the model's line where ``torch.export`` fails.
    """
    dims = pytree.tree_map(
        lambda found: dict.fromkeys(found, torch.export.Dim.AUTO) if found else None,
        dict(subject.dims()),
        is_leaf=lambda found: isinstance(found, tuple) and all(type(d) is int for d in found),
    )
    inputs = dict(subject.inputs)
    try:
        with quiet():
            program = torch.export.export(
                _Bare.around(
                    compact(with_plain_tensors(subject.model, onnx=onnx)),
                    list(inputs),
                    dict(subject.constants),
                ),
                (),
                inputs,
                dynamic_shapes=dims,
                strict=False,
            )
    except FxShareError:
        raise
    except Exception as error:
        raise ExportError(
            f"torch.export of {subject.name} failed at {failing_line(error)}: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    baked = _baked(program, subject)
    strip(program)
    shapes = subject.shapes
    notes = tuple(
        f"the {what} is fixed at the example's: the model depends on it"
        for what, number in (("batch size", 0), ("sequence length", 1))
        if number in baked
    )
    return Traced(
        program, shapes.batch and 0 not in baked, shapes.sequence and 1 not in baked, notes
    )


class _Bare(nn.Module):
    """Calls a model with exactly the exported inputs, and returns plain containers.

    It holds the model's own dictionaries of children and tensors: names in the export are those of
    the model, without a prefix. A subclass of a graph module will not do: torch.export interprets
    the graph and never calls ``forward``.
    """

    def __init__(self, model: nn.Module, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.training = False
        self._modules = model._modules
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.__dict__["_called"] = model
        self.__dict__["_constants"] = constants

    @staticmethod
    def around(model: nn.Module, inputs: list[str], constants: Mapping[str, Any]) -> _Bare:
        """One whose ``forward`` has the inputs as its parameters: exports take their names."""
        forward = method_taking(inputs, _Bare.call)
        cls = type("Model", (_Bare,), {"forward": forward, "__module__": __name__})
        made: _Bare = cls(model, constants)
        return made

    def call(self, **inputs: Any) -> Any:
        """The model's output in plain containers."""
        return plain(self.__dict__["_called"](**inputs, **self.__dict__["_constants"]))


def compact(model: nn.Module) -> nn.Module:
    """A copy in which no tensor is a part of a larger one: torch.export.save writes whole storages,
    and the slices of one weight are views of it."""
    memo: dict[int, Any] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        whole = parameter.untyped_storage().nbytes() == parameter.nbytes
        if id(parameter) not in memo:
            packed = parameter.detach() if whole else parameter.detach().clone()
            kept = packed.contiguous()
            memo[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _baked(program: torch.export.ExportedProgram, subject: Subject) -> set[int]:
    """The dimensions that were meant to vary and do not."""
    names = set(program.graph_signature.user_inputs)
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    values = [n.meta["val"] for n in placeholders]
    given = [v for v in pytree.tree_leaves(dict(subject.inputs)) if isinstance(v, Tensor)]
    found = [v for v in values if isinstance(v, Tensor)]
    return {
        dim
        for tensor, value in zip(given, found, strict=True)
        for dim in subject.shapes.dynamic_dims(tensor)
        if isinstance(value.shape[dim], int)
    }


def strip(program: torch.export.ExportedProgram) -> None:
    """Drop what only this process can use: stack traces with local paths, and module classes."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            module.meta.clear()
            for node in module.graph.nodes:
                node.meta = {key: node.meta[key] for key in _LIVE_META if key in node.meta}
