"""The placeholders of a captured graph: the parameters of ``forward``, each with its own default,
and the guards on what they may be."""

from __future__ import annotations

from torch import fx

from fxshare.capture.call import IDS, Call
from fxshare.capture.contract import Contract, Parameter
from fxshare.capture.forms import TENSOR, Form
from fxshare.capture.guards import (
    OMITTED,
    Default,
    hold_arguments,
    hold_form,
    hold_given,
    ones_if_missing,
)
from passes.graph.graph import read_instead

_LITERALS = (bool, int, float, str, type(None))


def give_signature(graph: fx.Graph, contract: Contract, call: Call) -> None:
    """Give the graph the parameters of ``forward``, in its order, each with its default; what
    differs from the captured ``call`` is refused by the graph itself."""
    traced = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    at = next(iter(traced.values())).prev if traced else graph._root
    optional = False
    placed: list[tuple[Parameter, fx.Node]] = []
    for parameter in contract.parameters:
        node = traced.get(parameter.name)
        if node is None:
            node = _placeholder(graph, parameter, contract, call, optional)
        else:
            node.args = _default_of_input(parameter, contract, optional)
        optional = optional or bool(node.args)
        if at is not node:
            at.append(node)
        at = node
        placed.append((parameter, node))
    with graph.inserting_before(at.next):
        _hold(graph, contract, call, placed)


def _placeholder(
    graph: fx.Graph, parameter: Parameter, contract: Contract, call: Call, optional: bool
) -> fx.Node:
    """The placeholder of an argument that the graph does not read."""
    name = parameter.name
    # a node is made where the insertion point is, and moved into its place afterwards
    with graph.inserting_before(next(iter(graph.nodes))):
        if contract.fills(name):
            return graph.placeholder(name, default_value=call[name])
        if parameter.required and not optional:
            return graph.placeholder(name)
        return graph.placeholder(name, default_value=parameter.default)


def _default_of_input(
    parameter: Parameter, contract: Contract, optional: bool
) -> tuple[Default | None, ...]:
    if contract.fills(parameter.name):
        return (None,)
    if not optional:  # a call without it is refused as one that lacks an argument
        return ()
    return (Default.OWN if parameter.default is Default.OWN else None,)


def _hold(
    graph: fx.Graph,
    contract: Contract,
    call: Call,
    placed: list[tuple[Parameter, fx.Node]],
) -> None:
    literal = {
        parameter.name: node for parameter, node in placed if _is_literal(parameter, node, call)
    }
    if literal:
        captured = {p.name: call.get(p.name, p.default) for p, _ in placed if p.name in literal}
        graph.call_function(hold_arguments, (literal, captured))
    for parameter, node in placed:
        if parameter.name not in literal and parameter.captured != TENSOR:
            graph.call_function(hold_form, (node, _forms(parameter), parameter.name))
    ids = next((node for parameter, node in placed if parameter.name == IDS), None)
    for parameter, node in placed:
        if parameter.captured == TENSOR and node.args:
            if contract.fills(parameter.name):
                filled = graph.call_function(ones_if_missing, (node, ids))
            else:
                filled = graph.call_function(hold_given, (node, parameter.name))
            read_instead(node, filled)


def _is_literal(parameter: Parameter, node: fx.Node, call: Call) -> bool:
    if parameter.is_input or Default.OWN in node.args:
        return False
    return type(call.get(parameter.name, parameter.default)) in _LITERALS


def _forms(parameter: Parameter) -> tuple[Form, ...]:
    omitted = (OMITTED,) if parameter.may_be_left_out else ()
    return omitted if parameter.captured is None else (parameter.captured, *omitted)


__all__ = ["give_signature"]
