"""Capture by ``torch.export``: slower, at aten level, bound to one mode and device."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxshare.base.randomness import randomness_as_before
from fxshare.capture.call import Call, Shapes
from fxshare.capture.containers import holds_tensor
from fxshare.capture.contract import Contract
from fxshare.capture.inputs import give_signature
from fxshare.capture.ranges import hold_range
from fxshare.capture.signature import check_arguments, checked_names
from fxshare.capture.steered import SteeredGraph, hold_eval, set_training
from fxshare.capture.tracing.constants import outside
from fxshare.capture.tracing.dtypes import insert_hold
from fxshare.capture.tracing.lines import failing_line
from fxshare.capture.tracing.trace import explicit_forward
from fxshare.errors import CaptureError
from passes.graph.graph import structure_copy


class PlainInputs(_PyTreeCodeGen):
    """Writes a graph whose placeholders are the arguments themselves. The outputs are put into
    their containers as torch.export has them."""

    def process_inputs(self, *inputs: Any) -> Any:
        """The arguments, as they are."""
        return inputs

    def gen_fn_def(
        self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False
    ) -> str:
        """The first line of a plain function."""
        return CodeGen.gen_fn_def(
            self, free_vars, maybe_return_annotation, expanded_def=expanded_def
        )


def export(model: nn.Module, shapes: Shapes, contract: Contract) -> fx.GraphModule:
    """Export a copy of ``model`` with dynamic batch and sequence; the graph has the signature of
    ``model.forward``, and refuses what the ``contract`` does not allow.

    Raises :class:`CaptureError` with the model's own line where it failed.
    """
    copy = structure_copy(model).eval()

    def dims(value: Any) -> object:
        if isinstance(value, Tensor):
            return dict.fromkeys(shapes.dynamic_dims(value), torch.export.Dim.AUTO)
        if type(value) in pytree.SUPPORTED_NODES and type(value) not in (dict, list, tuple):
            entries, _ = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
            return [pytree.tree_map(dims, entry, is_leaf=is_other) for entry in entries]
        return None

    def is_other(value: object) -> bool:
        # which torch.export wants as lists
        return type(value) not in (dict, list, tuple) and not hasattr(value, "_fields")

    inputs = {name: value for name, value in shapes.base.items() if holds_tensor(value)}
    constants = {name: value for name, value in shapes.base.items() if name not in inputs}
    met = _Weights(copy)
    try:
        with (
            explicit_forward(copy, list(inputs), constants),
            randomness_as_before(),
            met,
        ):
            program = torch.export.export(
                copy,
                (),
                inputs,
                dynamic_shapes=pytree.tree_map(dims, inputs, is_leaf=is_other),
                strict=False,
            )
        gm = program.module()
        assert isinstance(gm, fx.GraphModule)
        _take_arguments(gm.graph, inputs)
    except Exception as error:
        raise CaptureError(
            f"torch.export of {type(model).__name__} failed at {failing_line(error)}: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    if met.error is not None:
        raise met.error
    _check_baked(copy, program)
    _check_transforms(model, program.graph)
    assert isinstance(gm, fx.GraphModule)
    gm = SteeredGraph(gm, gm.graph, type(model).__name__)
    set_training(gm, False)  # what it computes, whatever torch.export leaves there
    hold_eval(gm, "torch.export follows one mode")
    _hold_dtype(gm)
    hold_range(gm)
    give_signature(gm.graph, contract, shapes.base)
    checked_names(gm.graph, model)
    gm.recompile()
    check_arguments(gm, model)
    return gm


def _take_arguments(graph: fx.Graph, inputs: Call) -> None:
    """Let the placeholders be the arguments, where torch.export has one for each leaf of each."""
    flattened: Any = graph._codegen
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    # the order of the program's, which need not be that of the call
    order = flattened.pytree_info.in_spec.child(1).context
    found, _ = pytree.tree_flatten_with_path({name: inputs[name] for name in order})
    arguments: dict[str, fx.Node] = {}
    last = placeholders[-1]
    for node, (path, _) in zip(placeholders, found, strict=True):
        argument, *inside = path
        assert isinstance(argument, pytree.MappingKey)
        name = str(argument.key)
        if not inside:
            node.target = name
            continue
        if name not in arguments:
            with graph.inserting_before(node):
                arguments[name] = graph.placeholder(name)
        with graph.inserting_before(last.next):
            entry = arguments[name]
            for key in inside:
                entry = _entry(graph, entry, key)
            last = entry
        node.replace_all_uses_with(entry)
        graph.erase_node(node)
    info = flattened.pytree_info
    graph.set_codegen(PlainInputs(_PyTreeInfo([], info.in_spec, info.out_spec)))


def _entry(graph: fx.Graph, held: fx.Node, key: Any) -> fx.Node:
    """The entry of a container at one step of a pytree's path."""
    if isinstance(key, pytree.GetAttrKey):
        return graph.call_function(getattr, (held, key.name))
    at = key.idx if isinstance(key, pytree.SequenceKey) else key.key
    return graph.call_function(operator.getitem, (held, at))


def _check_baked(model: nn.Module, program: torch.export.ExportedProgram) -> None:
    """Refuse a graph that holds a weight of the model a second time, as a constant: it was read
    past the module tree."""
    named = {_memory(p): name for name, p in model.named_parameters() if p.device.type != "meta"}
    for constant in program.constants.values():
        if isinstance(constant, Tensor) and _memory(constant) in named:
            raise CaptureError(
                f"torch.export made a constant of {named[_memory(constant)]!r}, which "
                f"{type(model).__name__} also reads past its module tree (a list, a dict, a "
                "closure); use capture='fx' or 'modules'"
            )


def _check_transforms(model: nn.Module, graph: fx.Graph) -> None:
    """Refuse a region of ``torch.vmap`` or ``torch.func``: torch.export writes its entry and exit
    as calls whose results nothing reads, at the nesting of the caller that it saw, and an error
    between them would leave the process inside."""
    for node in graph.nodes:
        if getattr(node.target, "__module__", None) == "torch._functorch.predispatch":
            raise CaptureError(
                f"{type(model).__name__} calls torch.vmap or torch.func in its forward "
                f"({node.name}), whose regions a graph of torch.export cannot hold; use "
                "capture='modules'"
            )


def _memory(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.untyped_storage().data_ptr(), tensor.shape


class _Weights(TorchFunctionMode):
    """Notices weights that are not the model's: torch.export would bake them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.error: CaptureError | None = None
        self._known = {id(tensor) for tensor in model.parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in (*args, *(kwargs or {}).values()):
            kind = type(leaf)  # not one of torch.export's own, which stand for the model's
            is_weight = kind is nn.Parameter or (
                kind is Tensor and leaf.is_leaf and leaf.requires_grad
            )
            if is_weight and id(leaf) not in self._known:
                self.error = self.error or outside(leaf)
        return func(*args, **(kwargs or {}))


def _hold_dtype(gm: fx.GraphModule) -> None:
    """Which of the graph's dtypes are the model's own cannot be told: hold them where there are
    any, else a cast would end in torch's assertions or in float32 results."""
    dtype = next((p.dtype for p in gm.parameters() if p.is_floating_point()), None)
    for node in gm.graph.nodes:
        if dtype is not None and dtype in pytree.tree_leaves((node.args, dict(node.kwargs))):
            insert_hold(gm, gm.graph, dtype, "torch.export writes dtypes into the graph")
            gm.recompile()
            return
