"""A captured graph with its inputs, constants and outputs written out, for printing as code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen
from torch.fx.node import map_aggregate, map_arg

from fxshare.capture.guards import Default, hold_arguments, hold_form
from fxshare.errors import ExportError
from fxshare.exporting.outputs import leaves, refilled
from fxshare.exporting.subject import Subject
from passes.graph.uses import is_impure


def closed_graph(subject: Subject) -> fx.GraphModule:
    """A copy of the subject's graph whose placeholders are the exported inputs.

    Other arguments become their captured values. Switches that follow train/eval or the dtype
    become the value they have now. Outputs are plain containers.
    """
    source = subject.model
    assert isinstance(source, fx.GraphModule)
    gm = fx.GraphModule(source, copy.deepcopy(source.graph))
    names = list(subject.inputs)
    if type(gm.graph._codegen) is not CodeGen:  # torch.export flattens outputs
        _write_outputs(gm, subject)
    _bake(gm, names)
    for node in gm.graph.nodes:
        node.meta.clear()
        if node.op == "call_module" and not node.all_input_nodes:
            _fold_switch(gm, node)
        if node.op == "output":
            node.args = (_plain(node.args[0]),)
    gm.graph.eliminate_dead_code(is_impure_node=is_impure)
    gm.graph.lint()
    gm.recompile()
    return gm


def _write_outputs(gm: fx.GraphModule, subject: Subject) -> None:
    """Put the outputs of torch.export's graphs, which are flat, into their containers."""
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    flat = [leaf for leaf in output.args[0] if isinstance(leaf, fx.Node)]
    if len(flat) != len(leaves(subject.shown)):
        raise ExportError(
            f"to='py' of {subject.name}: the graph of capture='export' returns {len(flat)} tensors "
            f"where the model shows {len(leaves(subject.shown))}. Compile with capture='fx'"
        )
    for node in [n for n in gm.graph.nodes if n.target == "_guards_fn"]:
        gm.graph.erase_node(node)
    output.args = (refilled(subject.shown, flat),)  # nodes where there were tensors
    gm.graph.set_codegen(CodeGen())


def _bake(gm: fx.GraphModule, names: list[str]) -> None:
    """Erase the arguments that are not exported: the graph holds them at their captured values."""
    for node in [n for n in gm.graph.nodes if n.target in (hold_arguments, hold_form)]:
        # of what is exported, the form stays held
        if node.target is hold_arguments or str(node.args[0].target) not in names:
            gm.graph.erase_node(node)
    for node in [n for n in gm.graph.nodes if n.op == "placeholder"]:
        if node.target in names:
            if Default.OWN in node.args:
                node.args = (None,)
            continue
        value = node.args[0] if node.args else None
        _replace_by_value(node, value)
        gm.graph.erase_node(node)


def _replace_by_value(node: fx.Node, value: Any) -> None:
    def swapped(user: Any) -> Any:
        return map_arg(user, lambda n: value if n is node else n)

    for user in list(node.users):
        user.args, user.kwargs = swapped(user.args), swapped(user.kwargs)


def _fold_switch(gm: fx.GraphModule, node: fx.Node) -> None:
    """A module that is called with nothing and gives no tensor is a switch."""
    value = gm.get_submodule(str(node.target))()
    if value is None or isinstance(value, (bool, int, float, torch.dtype, tuple)):
        _replace_by_value(node, value)
        gm.graph.erase_node(node)


def _plain(output: Any) -> Any:
    """The output argument in plain containers; a ``ModelOutput`` becomes a dictionary."""
    if isinstance(output, fx.Node):
        made = output.target
        if output.op == "call_function" and isinstance(made, type) and issubclass(made, dict):
            return {key: _plain(v) for key, v in output.kwargs.items() if v is not None}
        return output
    if isinstance(output, dict):
        return {key: _plain(value) for key, value in output.items()}
    return map_aggregate(output, lambda leaf: leaf) if output is not None else None
