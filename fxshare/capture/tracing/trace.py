"""Capture by symbolic tracing with proxies that carry values: one graph over module names."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxshare.capture.call import Call, Shapes
from fxshare.capture.containers import holds_tensor
from fxshare.capture.contract import Contract
from fxshare.capture.guards import hold_guard
from fxshare.capture.inputs import give_signature
from fxshare.capture.signature import checked_names, method_taking
from fxshare.capture.tracing.align import (
    Difference,
    StructureDiffers,
    differences,
    insert_training_switches,
)
from fxshare.capture.tracing.dtypes import (
    cast_call,
    cast_without_values,
    insert_hold,
    insert_switches,
    other_dtype,
    switches_for,
)
from fxshare.capture.tracing.tracer import Guard, ValueTracer, failing_line, traced_factories
from fxshare.capture.tracing.values import fake_mode
from fxshare.errors import CaptureError
from passes.errors import FxShareError
from passes.graph.graph import structure_copy


def trace(
    model: nn.Module, shapes: Shapes, contract: Contract
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Trace ``model`` at both shapes and in both modes; returns the graph module and notes.

    The graph module has the signature of ``model.forward``, reads the parameters of ``model`` and
    copies of its buffers. It refuses what the ``contract`` does not allow.

    Raises :class:`CaptureError` with the model's own line where tracing failed.
    """
    root = structure_copy(model)
    flags = {name: m.training for name, m in root.named_modules()}
    notes: list[str] = []
    graph, guards = trace_once(root, shapes.base, training=False)
    followed, held = _compare(model, graph, shapes)
    try:
        trained, _ = trace_once(structure_copy(model), shapes.base, training=True)
        switches = insert_training_switches(root, graph, differences(graph, trained))
        if switches:
            notes.append(f"{switches} constants follow train/eval through switches")
    except (CaptureError, StructureDiffers) as error:
        notes.append(f"what eval mode does is baked: training takes another path ({error})")
    for name, module in root.named_modules():
        module.training = flags.get(name, model.training)
    hold_guards(graph, guards)
    if held is not None:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        insert_hold(root, graph, dtype, held)
        notes.append(f"the graph holds for {dtype} alone: {held}")
    elif followed:
        insert_switches(
            root, graph, followed, switches_for(followed, next(model.parameters()).device)
        )
    give_signature(graph, contract, shapes.base)
    for node in graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key == "ndim"}
    graph._tracer_cls = None  # else a copy would call ValueTracer without its values
    checked_names(graph, model)
    return fx.GraphModule(root, graph, type(model).__name__), tuple(notes)


def _compare(
    model: nn.Module, graph: fx.Graph, shapes: Shapes
) -> tuple[list[Difference], str | None]:
    """The constants that follow the model's dtype, and why it cannot be followed, if it cannot.

    One more trace at the other shape *and* in another dtype finds both kinds of baked constants;
    only where the two cannot be told apart is the model traced again at the other shape alone.

    Raises :class:`CaptureError` for a size that is baked.
    """
    dtype = other_dtype(model)
    found: list[Difference] = []
    held = None
    if dtype is not None:
        mode = fake_mode()
        call = cast_call(shapes.other or shapes.base, dtype)
        try:
            # on a copy: fx leaves the constants of a trace on the root, and numbers on from there
            root = cast_without_values(model, dtype, mode)
            found = differences(graph, trace_once(root, call, training=False, mode=mode)[0])
            switches_for(found, torch.device("cpu"))
            return found, None
        except (CaptureError, StructureDiffers) as error:
            held = f"in {dtype} the model does other operations ({error})"
    if shapes.other is not None:
        other, _ = trace_once(structure_copy(model), shapes.other, training=False)
        _check_sizes(graph, other)
    return [], held


def trace_once(
    root: nn.Module,
    call: Call,
    *,
    training: bool,
    mode: FakeTensorMode | None = None,
    objects: Container[str] = (),
) -> tuple[fx.Graph, list[Guard]]:
    """One trace of ``root``, which it changes; ``objects`` names inputs that are not tensors, such
    as a cache. Raises :class:`CaptureError` with the model's own line where tracing failed."""
    inputs = [name for name, value in call.items() if holds_tensor(value) or name in objects]
    constants = {name: value for name, value in call.items() if name not in inputs}
    tracer = ValueTracer({name: call[name] for name in inputs}, mode)
    root.train(training)
    with (
        explicit_forward(root, inputs, constants),
        traced_factories(tracer),
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
    ):
        try:
            graph = tracer.trace(root)
        except FxShareError:
            raise
        except Exception as error:
            nodes = list(tracer.graph.nodes) if hasattr(tracer, "graph") else []
            last = nodes[-1].format_node() if nodes else "no node yet"
            raise CaptureError(
                f"tracing {type(root).__mro__[1].__name__} failed at {failing_line(error)}, after "
                f"{last}: {type(error).__name__}: {error}"
            ) from error
    return graph, list(tracer.guards.values())


@contextmanager
def explicit_forward(
    root: nn.Module, inputs: list[str], constants: dict[str, Any]
) -> Iterator[None]:
    """Give the copied root, for a while, a ``forward`` whose signature is the traced inputs.

    fx reads the code object of ``forward``; the decorated ones of transformers break it
    (``co_varnames is too small``), and constants must not become inputs.
    """
    original = type(root)
    own = vars(root).pop("forward", None)  # a functools.partial of it, say

    def call(self: nn.Module, **given: Any) -> Any:
        if own is not None:
            return own(**given, **constants)
        return original.forward(self, **given, **constants)

    shim = {"forward": method_taking(inputs, call), "__module__": original.__module__}
    root.__class__ = type(original.__name__, (original,), shim)
    try:
        yield
    finally:
        root.__class__ = original
        if own is not None:
            vars(root)["forward"] = own


def _check_sizes(graph: fx.Graph, other: fx.Graph) -> None:
    try:
        found = differences(graph, other)
    except StructureDiffers as error:
        raise CaptureError(
            f"the model does different operations at another batch size or length: {error}"
        ) from error
    if found:
        raise CaptureError(f"a size is baked into the graph: {found[0]}")


def hold_guards(graph: fx.Graph, guards: list[Guard]) -> None:
    """Let the graph check what the trace rested on."""
    for guard in guards:
        with graph.inserting_after(guard.node):
            graph.call_function(hold_guard, (guard.node, guard.value, guard.where))
