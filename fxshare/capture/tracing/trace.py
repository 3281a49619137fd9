"""Capture by symbolic tracing with proxies that carry values: one graph over module names."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxshare.base.fakes import failures_unsaid
from fxshare.base.randomness import randomness_as_before
from fxshare.capture.call import Call, Shapes
from fxshare.capture.containers import holds_tensor
from fxshare.capture.contract import Contract
from fxshare.capture.guards import hold_guard
from fxshare.capture.inputs import give_signature
from fxshare.capture.signature import check_arguments, checked_names, method_taking
from fxshare.capture.steered import SteeredGraph, hold_eval, hold_plain, hold_training
from fxshare.capture.tracing.align import (
    Difference,
    StructureDiffers,
    check_switches,
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
from fxshare.capture.tracing.factories import traced_factories
from fxshare.capture.tracing.functions import kept_functions
from fxshare.capture.tracing.held import held_modes
from fxshare.capture.tracing.kept import Kept
from fxshare.capture.tracing.lines import failing_line
from fxshare.capture.tracing.regions import (
    OTHERS,
    PLAIN,
    Around,
    keep_apart,
    keep_modes,
    own_modes,
)
from fxshare.capture.tracing.tracer import Guard, ValueTracer
from fxshare.capture.tracing.values import FakeValues, fake_mode
from fxshare.capture.tracing.writing import without_aliases
from fxshare.errors import CaptureError
from passes.errors import FxShareError
from passes.graph.graph import structure_copy
from passes.graph.noted import NOTED


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
    values = FakeValues(_inputs(shapes.base))
    graph, guards = trace_once(root, shapes.base, training=False, values=values)
    compared = _compare(model, graph, shapes)
    trained, found, reason = _in_training(model, graph, shapes, compared, values)
    held = held_modes(graph, trained)
    own = own_modes(graph, compared.graph, compared.around, trained)
    switches = insert_training_switches(root, graph, found)
    for name, module in root.named_modules():
        module.training = flags.get(name, model.training)
    hold_guards(graph, guards)
    if compared.held is not None:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        insert_hold(root, graph, dtype, compared.held)
        notes.append(f"the graph holds for {dtype} alone: {compared.held}")
    elif compared.followed:
        insert_switches(
            root,
            graph,
            compared.followed,
            switches_for(compared.followed, next(model.parameters()).device),
        )
    switches += keep_modes(root, graph, own)
    if switches:
        notes.insert(0, f"{switches} constants follow train/eval through switches")
    give_signature(graph, contract, shapes.base)
    for node in graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key in NOTED}
    graph._tracer_cls = None  # else a copy would call ValueTracer without its values
    checked_names(graph, model)
    gm = SteeredGraph(root, graph, type(model).__name__)
    check_arguments(gm, model)
    keep_apart(gm)
    hold_training(gm, held)
    if reason is not None:
        notes.append(f"what eval mode does is baked: training takes another path ({reason})")
        hold_eval(gm, f"training takes another path ({reason})")
    if not compared.around.autocast:
        hold_plain(gm, compared.why)
    return gm, tuple(notes)


@dataclass(frozen=True)
class _Compared:
    """What a second trace tells: the constants that follow the dtype, or why it cannot be followed;
    and that trace, with the modes around it. ``why``: what it did under others."""

    followed: list[Difference]
    held: str | None
    graph: fx.Graph
    around: Around
    why: str


def _compare(model: nn.Module, graph: fx.Graph, shapes: Shapes) -> _Compared:
    """Trace once more, at the other shape, in another dtype *and* with other modes around, which
    finds everything at once that the first trace bakes; only where these cannot be told apart are
    there further traces.

    Raises :class:`CaptureError` for a size that is baked.
    """
    dtype = other_dtype(model)
    held, best, why = None, None, ""
    if dtype is not None:
        call, mode = cast_call(shapes.other or shapes.base, dtype), fake_mode()
        values = FakeValues(_inputs(call), mode)
        for around in OTHERS:
            try:
                # on a copy: fx leaves the constants of a trace on the root, and numbers on from
                # there
                root = cast_without_values(model, dtype, mode)
                other, _ = trace_once(root, call, training=False, values=values, around=around)
                found = differences(graph, other)
                switches_for(found, torch.device("cpu"))
                own_modes(graph, other, around, None)
            except (CaptureError, StructureDiffers) as error:
                if around is PLAIN:
                    held = f"in {dtype} the model does other operations ({error})"
                    break
                why = why or str(error)
                continue
            best = _Compared(found, None, other, around, why)
            if around is not PLAIN:
                return best
    if best is not None:
        return best
    call = shapes.other or shapes.base
    values = FakeValues(_inputs(call))
    for around in OTHERS:
        root = structure_copy(model)
        other, _ = trace_once(root, call, training=False, values=values, around=around)
        try:
            _check_sizes(graph, other)
            own_modes(graph, other, around, None)
        except (CaptureError, StructureDiffers) as error:
            if around is PLAIN:
                raise
            why = str(error)
            continue
        return _Compared([], held, other, around, why)
    raise AssertionError("PLAIN is one of the modes that are tried")


def _in_training(
    model: nn.Module, graph: fx.Graph, shapes: Shapes, compared: _Compared, values: FakeValues
) -> tuple[fx.Graph | None, list[Difference], str | None]:
    """The trace in training mode and the constants in which it differs; or why it takes another
    path than the graph, which then holds for eval mode alone."""
    try:
        trained, _ = trace_once(structure_copy(model), shapes.base, training=True, values=values)
        found = differences(graph, trained)
        held_modes(graph, trained)
        own_modes(graph, compared.graph, compared.around, trained)
        check_switches(found)
    except (CaptureError, StructureDiffers) as error:
        return None, [], str(error)
    return trained, found, None


def trace_once(
    root: nn.Module,
    call: Call,
    *,
    training: bool,
    mode: FakeTensorMode | None = None,
    values: FakeValues | None = None,
    objects: Container[str] = (),
    around: Around = PLAIN,
) -> tuple[fx.Graph, list[Guard]]:
    """One trace of ``root``, which it changes; ``objects`` names inputs that are not tensors, such
    as a cache. ``values`` are those of an earlier trace of the same call.

    Raises :class:`CaptureError` with the model's own line where tracing failed.
    """
    before = set(vars(root))
    inputs = _inputs(call, objects)
    values = values or FakeValues(inputs, mode)
    tracer = ValueTracer(inputs, values, around)
    try:
        return _traced(root, call, tracer, training, around)
    except CaptureError:
        if not tracer.wrote_constant:
            raise
    for name in set(vars(root)) - before:  # where fx put the constants of the first try
        delattr(root, name)
    tracer = ValueTracer(inputs, values, around, nodes_of_constants=True)
    return _traced(root, call, tracer, training, around)


def _inputs(call: Call, objects: Container[str] = ()) -> dict[str, Any]:
    return {n: value for n, value in call.items() if holds_tensor(value) or n in objects}


def _traced(
    root: nn.Module, call: Call, tracer: ValueTracer, training: bool, around: Around
) -> tuple[fx.Graph, list[Guard]]:
    inputs = list(tracer.inputs)
    constants = {name: value for name, value in call.items() if name not in tracer.inputs}
    root.train(training)
    kept = Kept(root)
    with (
        explicit_forward(root, inputs, constants),
        traced_factories(tracer),
        kept_functions(tracer),
        randomness_as_before(),
        failures_unsaid(),
        around.entered(),
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
        finally:
            replaced = kept.restore()
    if replaced is not None:
        raise CaptureError(
            f"forward replaces {replaced}, a buffer of {type(root).__name__}, by what it computes: "
            "a graph would forget it from one call to the next. Write into it (copy_) instead"
        )
    without_aliases(graph, root)
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
    own = vars(root).pop("forward", None)  # one that was put on the model

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
