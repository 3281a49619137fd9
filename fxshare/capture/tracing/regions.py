"""Regions of other modes: ``no_grad``, ``enable_grad``, ``inference_mode``, ``autocast``.

The tracer looks at torch's modes wherever it makes a node, so it does not matter who set them: a
``with``, a decorator, a call of ``torch.set_grad_enabled``. What one trace cannot tell is whether a
mode is the model's own or its caller's. Two traces under different modes around them can: what
changes with those is the caller's, what stays is the model's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from fxshare.capture.tracing.align import StructureDiffers, TrainingSwitch
from passes.graph.graph import attribute, linear_calls
from passes.graph.modes import DEVICES, Cast, Modes, caller_modes, crossing, modes_of, set_modes

KEY = "modes"
"""Where a node's ``meta`` has the modes in which the tracer made it."""
FLOATING = "floating"
"""Where it says whether a node's value is one that could have gradients."""
Own: TypeAlias = tuple[bool | None, tuple[Cast, ...]]
"""The modes that a model sets itself: gradients, None where they are the caller's, and autocast on
the devices where it sets it."""
_NONE: Own = (None, ())


@dataclass(frozen=True)
class Around:
    """The modes around a trace."""

    grad: bool = True
    autocast: bool = False

    @property
    def modes(self) -> Modes:
        """As :func:`seen` tells them."""
        dtype = torch.float16 if self.autocast else None
        return self.grad, tuple((device, self.autocast, dtype) for device in DEVICES)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Set them; the caller's come back."""
        caller = caller_modes()
        try:
            with torch.inference_mode(False):
                set_modes(caller, *self.modes)
                yield
        finally:
            set_modes(caller)

    def without(self) -> contextlib.AbstractContextManager[None]:
        """The modes as they would be with no autocast around the trace, to compute values in: the
        dtypes of a graph are those of a call by itself. Nor are values inference tensors, since one
        may stand for many nodes."""
        if not self.autocast and not torch.is_inference_mode_enabled():
            return contextlib.nullcontext()
        return self._without()

    @contextlib.contextmanager
    def _without(self) -> Iterator[None]:
        around = dict.fromkeys(self.modes[1] if self.autocast else ())
        here = [cast[0] for cast in seen()[1] if cast in around]
        for device in here:
            torch.set_autocast_enabled(device, False)
        try:
            with torch.inference_mode(False):
                yield
        finally:
            for device in here:
                torch.set_autocast_enabled(device, True)


PLAIN = Around()
OTHERS = (Around(grad=False, autocast=True), PLAIN, Around(grad=False), Around(autocast=True))
"""The modes around a second trace, in the order to try: a model that asks for one of them does
other operations under it."""


def seen() -> Modes:
    """The present modes; the dtype of an autocast that is off is None."""
    grad, casts = caller_modes()
    return grad, tuple((device, on, dtype if on else None) for device, on, dtype in casts)


def may_have_gradients(value: Any) -> bool:
    """Whether a value is no number, size or device, and no tensor of integers."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return not isinstance(value, (bool, int, float, str, torch.Size, torch.device, torch.dtype))


def own_modes(
    graph: fx.Graph, other: fx.Graph | None, around: Around, trained: fx.Graph | None
) -> dict[fx.Node, tuple[Own, Own]]:
    """The modes that the model sets at each node that computes, in eval and in training mode.

    ``other`` is the trace with other modes ``around`` it, ``trained`` that in training mode; either
    is None, or of the structure of ``graph``.

    Raises :class:`StructureDiffers` for modes that the model makes of its caller's.
    """
    found: dict[fx.Node, tuple[Own, Own]] = {}
    nodes = list(graph.nodes)
    others = nodes if other is None else list(other.nodes)
    training = nodes if trained is None else list(trained.nodes)
    outside = PLAIN if other is None else around
    for node, twin, train in zip(nodes, others, training, strict=True):
        if KEY not in node.meta:
            continue
        here, there = node.meta[KEY], twin.meta[KEY]
        own = _resolved(node, here, there, outside.modes)
        other_way = train.meta[KEY]
        changed = own if other_way == here else _resolved(train, other_way, other_way, PLAIN.modes)
        found[node] = (own, changed)
    return found


def _resolved(node: fx.Node, here: Modes, there: Modes, outside: Modes) -> Own:
    grad, casts = PLAIN.modes
    if (here[0], there[0]) == (grad, outside[0]):
        own = None
    elif here[0] == there[0]:
        own = here[0]
    else:
        raise StructureDiffers(
            f"{node.format_node()} has gradients on where its caller has them off, and the other "
            "way round"
        )
    kept = []
    for inside, same, plain, other in zip(here[1], there[1], casts, outside[1], strict=True):
        if (inside, same) == (plain, other):
            continue
        if inside != same:
            raise StructureDiffers(f"{node.format_node()} has an autocast that follows its caller")
        kept.append(inside)
    return own, tuple(kept)


def keep_modes(root: nn.Module, graph: fx.Graph, own: Mapping[fx.Node, tuple[Own, Own]]) -> int:
    """Let the graph set what the model sets; returns how many of the modes follow train/eval."""
    wanted = _where_it_matters(root, graph, own)
    if all(both == (_NONE, _NONE) for both in wanted.values()):
        return 0
    inside = [n for n in graph.nodes if n.op != "placeholder"]
    with graph.inserting_before(inside[0]):
        caller = graph.call_function(caller_modes)
    here = (_NONE, _NONE)
    switches = 0
    for node in inside:
        there = (_NONE, _NONE) if node.op == "output" else wanted.get(node, here)
        if there == here:
            continue
        with graph.inserting_before(node):
            given = [
                value if value == trained else _switch(root, graph, trained, value)
                for value, trained in zip(*there, strict=True)
            ]
            # the defaults of set_modes say nothing
            args = () if there == (_NONE, _NONE) else tuple(given)
            graph.call_function(set_modes, (caller, *args))
            switches += sum(isinstance(value, fx.Node) for value in given)
        here = there
    return switches


def _where_it_matters(
    root: nn.Module, graph: fx.Graph, own: Mapping[fx.Node, tuple[Own, Own]]
) -> dict[fx.Node, tuple[Own, Own]]:
    """The modes of each node; one that has no gradient either way is in those of the node before
    it. (transformers computes rotary angles, from positions alone, under ``no_grad``.)"""
    differentiable: set[fx.Node] = set()
    found: dict[fx.Node, tuple[Own, Own]] = {}
    here: tuple[Own, Own] = (_NONE, _NONE)
    for node in graph.nodes:
        source = node.op in ("placeholder", "call_module")
        if node.op == "get_attr":
            source = isinstance(attribute(root, str(node.target)), nn.Parameter)
        reads = any(n in differentiable for n in node.all_input_nodes)
        if node.meta.get(FLOATING, True) and (source or reads):
            differentiable.add(node)
        if node not in own:
            continue
        there = own[node]
        if node not in differentiable:
            there = (here[0][0], there[0][1]), (here[1][0], there[1][1])
        found[node] = here = there
    return found


def _switch(root: nn.Module, graph: fx.Graph, train: Any, evaluated: Any) -> fx.Node:
    number = 0
    while hasattr(root, f"training_switch_{number}"):
        number += 1
    root.add_module(f"training_switch_{number}", TrainingSwitch(train, evaluated))
    return graph.call_module(f"training_switch_{number}")


def keep_apart(gm: fx.GraphModule) -> None:
    """Let linears read what was computed in other modes through :func:`crossing`, so that no pass
    merges a product under ``no_grad`` with one that has gradients."""
    if not any(node.target is set_modes for node in gm.graph.nodes):
        return
    modes = modes_of(gm.graph)
    made: dict[tuple[fx.Node, Any], fx.Node] = {}
    for call in linear_calls(gm):
        source, here = call.input, modes[call.node]
        if source.op == "get_attr" or modes[source] == here:
            continue
        key = (source, here)
        if key not in made:
            with gm.graph.inserting_before(call.node):
                made[key] = gm.graph.call_function(crossing, (source,))
            made[key].meta.update(source.meta)
        call.node.replace_input_with(source, made[key])
    if made:
        gm.recompile()
