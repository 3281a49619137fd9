"""The front ends, one after the other: :func:`capture`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from fxshare.base.progress import stage
from fxshare.capture.adapted import adapt
from fxshare.capture.call import Call, Shapes, vary
from fxshare.capture.captured import Captured, FrontEnd, Mode
from fxshare.capture.check import Original, described, erase_guards, guard_nodes, relax, self_check
from fxshare.capture.contract import Contract
from fxshare.capture.example import example_call, hooks_of
from fxshare.capture.exported import export
from fxshare.capture.faithful import Trainable, check_faithful, modules_show
from fxshare.capture.modules import linears_side_by_side
from fxshare.capture.once import kept
from fxshare.capture.ranges import export_notes, relax_lengths
from fxshare.capture.signature import check_model_names
from fxshare.capture.steered import SteeringDiffers
from fxshare.capture.switches import SWITCH
from fxshare.capture.tracing.trace import trace
from fxshare.capture.written import Unwritten, refuse_written
from fxshare.errors import CaptureError
from fxshare.models.computed import uncopied
from fxshare.models.traits import context_of
from passes import linear_calls, lookups, structure_copy

_LOG = logging.getLogger(__name__)
_MANY = 4
"""A function of so many tensors computes more than one product."""


def capture(
    model: nn.Module,
    example: object = None,
    *,
    mode: Mode = "auto",
    needs: Sequence[str] = (),
    relaxed: Sequence[int] | None = None,
) -> Captured:
    """Capture ``model`` as a graph; the model itself is left as it is, whatever happens.

    ``example`` is one batch: a tensor, a tuple, or a mapping by argument name. ``needs`` are
    qualified names of linears that the graph must show; a front end that hides one of them fails.
    ``relaxed`` repeats an earlier capture's decisions about guards (see :class:`Captured`).

    Raises :class:`CaptureError` naming the model's line and every front end that was tried.
    """
    how = mode, modules_show(model, needs)
    known = None if relaxed is not None else kept().find(model, how, example)
    if known is not None and (known.side_by_side or not _inside_leaves(known.graph, needs)):
        return known
    trainable = Trainable(model)
    weights = Unwritten(model, needs)
    with stage("capture", _LOG) as running:
        try:
            captured = _captured(model, example, mode, needs, relaxed, trainable)
        finally:
            trainable.restore()
            written = weights.restore()
        if not captured.side_by_side:  # else the calls that are watched tell it
            refuse_written(model, written)
        running.found(f"front end {captured.front_end}")
    kept().keep(model, how, example, captured)
    return captured


def _captured(
    model: nn.Module,
    example: object,
    mode: Mode,
    needs: Sequence[str],
    relaxed: Sequence[int] | None,
    trainable: Trainable,
) -> Captured:
    start = time.perf_counter()
    try:
        structure_copy(model)
    except Exception as error:
        for reason in uncopied(model):
            raise CaptureError(f"{type(model).__name__} cannot be copied: {reason}") from error
        raise CaptureError(
            f"{type(model).__name__} cannot be copied (copy.deepcopy): {type(error).__name__}: "
            f"{str(error).splitlines()[0]}; take what it holds beside parameters and buffers out"
        ) from error
    check_model_names(model)
    if mode == "auto" and example is None:
        return _modules(model, start, ("no example inputs: captured at module granularity",))
    if mode == "modules":
        return _modules(model, start, ())
    if example is None:
        raise CaptureError(
            f"capture={mode!r} needs an example of the model's inputs: give calibration data or "
            "example=..., or use capture='modules'"
        )
    hooked = hooks_of(model)
    if hooked is not None:
        if mode == "auto":
            return _modules(model, start, (hooked,))
        raise CaptureError(hooked)
    adapted = adapt(model)
    run = Original(adapted.reference)
    call, fills_mask = example_call(model, example, run)
    shapes = vary(call, run.works)
    if SWITCH in call and shapes.other is None and not run.works(shapes.base):
        call = {name: value for name, value in call.items() if name != SWITCH}  # our idea
        shapes = vary(call, run.works)
    if run.refusal is not None and shapes.other is None and not run.works(shapes.base):
        raise CaptureError(
            f"{type(model).__name__} does not accept the example call "
            f"{ {k: described(v) for k, v in call.items()} }: {run.refusal}"
        )
    failures: list[str] = []
    order: list[FrontEnd] = ["fx", "export"] if mode == "auto" else [mode]
    elsewhere = mode == "auto" and modules_show(model, needs)
    for front_end in order:
        try:
            contract = Contract.of(model, shapes.base, fills_mask=fills_mask)
            traced = _traced(adapted.traced, shapes, front_end, contract)
            found = _checked(traced, run, call, needs, relaxed, failures, start)
            checked = check_faithful(found, adapted.reference, trainable, keep_eval=not elsewhere)
            found = replace(found, notes=(*found.notes, *checked))
        except CaptureError as error:
            failures.append(f"{front_end}: {error}")
            if elsewhere and isinstance(error, SteeringDiffers):
                break  # no graph has what this one lacks
        else:
            return replace(found, model=model, notes=(*adapted.notes, *found.notes))
    if mode == "auto":
        return _modules(model, start, tuple(f"tried {failure}" for failure in failures))
    raise CaptureError("; ".join(failures))


def recapture(
    model: nn.Module,
    front_end: FrontEnd,
    shapes: Shapes | None,
    relaxed: Sequence[int],
    *,
    fills_mask: bool = True,
) -> Captured:
    """Repeat an earlier capture of a model of this structure.

    Nothing is run, so neither the weights nor the values of the calls matter.

    Raises :class:`CaptureError` where the front end fails.
    """
    start = time.perf_counter()
    check_model_names(model)
    if front_end == "modules" or shapes is None:
        return _modules(model, start, ())
    traced = adapt(model).traced
    contract = Contract.of(model, shapes.base, fills_mask=fills_mask)
    if front_end == "fx":
        # one shape will do: that none is baked into the graph was seen the first time
        graph, notes = trace(traced, replace(shapes, other=None), contract)
    else:
        graph, notes = export(traced, shapes, contract), ()
    guards = len(guard_nodes(graph))
    if any(not 0 <= number < guards for number in relaxed):
        raise CaptureError(
            f"the graph has {guards} guards, and {list(relaxed)} are to be let go: it is not the "
            "graph that was captured before"
        )
    erase_guards(graph, relaxed)
    seconds = time.perf_counter() - start
    relaxed = tuple(relaxed)
    return Captured(model, front_end, graph, shapes, relaxed, None, notes, seconds, contract)


def recapture_devices(front_end: FrontEnd, device: torch.device) -> tuple[torch.device, ...]:
    """Where :func:`recapture` may see the model, in the order to try, for a result on ``device``.

    torch.export writes the device into the graph, so it must see the one that is wanted. The tracer
    does not, and meta costs no memory; but a model that makes a tensor on the CPU without saying so
    can only be traced there.
    """
    meta = torch.device("meta")
    return {"fx": (meta, torch.device("cpu")), "export": (device,), "modules": (meta,)}[front_end]


def _modules(model: nn.Module, start: float, notes: tuple[str, ...]) -> Captured:
    graph = linears_side_by_side(model)
    seconds = time.perf_counter() - start
    return Captured(model, "modules", graph, None, (), None, notes, seconds)


def _traced(model: nn.Module, shapes: Shapes, front_end: FrontEnd, contract: Contract) -> Captured:
    """What a front end makes, not yet looked at."""
    if front_end == "fx":
        gm, notes = trace(model, shapes, contract)
    else:
        gm = export(model, shapes, contract)
        notes = ("torch.export: the mode (eval) and the device are baked",)
    return Captured(model, front_end, gm, shapes, (), None, notes, 0.0, contract)


def _checked(
    captured: Captured,
    run: Original,
    given: Call,
    needs: Sequence[str],
    relaxed: Sequence[int] | None,
    failures: Sequence[str],
    start: float,
) -> Captured:
    gm, shapes, notes = captured.graph, captured.shapes, captured.notes
    assert shapes is not None
    hidden = _inside_leaves(gm, needs)
    if hidden:
        raise CaptureError(
            f"the graph does not show the matched linear {hidden[0]!r} ({len(hidden)} in all), "
            "which is inside a module or function that is called as a whole"
        )
    error = None
    if not run.is_meta:
        depth = len(linear_calls(gm))
        if relaxed is None:
            relaxed = relax(gm, run, shapes, depth)
            relaxed = relax_lengths(
                gm, run, shapes, given, relaxed, depth, context_of(captured.model)
            )
        error = self_check(gm, run, shapes, relaxed, depth)
        if captured.front_end == "export":
            notes = (*notes, *export_notes(gm, run, shapes, depth))
    erase_guards(gm, relaxed or ())
    if not shapes.sequence:
        notes = (*notes, "only the batch size is known to vary")
    notes = (*notes, *(f"tried {failure}" for failure in failures))
    seconds = time.perf_counter() - start
    return replace(
        captured, relaxed=tuple(relaxed or ()), error=error, notes=notes, seconds=seconds
    )


def _inside_leaves(gm: fx.GraphModule, names: Sequence[str]) -> list[str]:
    seen = [(call.node, call.name) for call in linear_calls(gm)]
    seen += [(lookup.node, lookup.name) for lookup in lookups(gm)]
    nodes = {node for node, _ in seen}
    hidden = set(names) - {name for _, name in seen}
    called = [f"{n.target}." for n in gm.graph.nodes if n.op == "call_module"]
    # F.multi_head_attention_forward is one node that reads the weight of out_proj among others; a
    # product by a weight hides nothing, it is no call of the linear
    read = {
        str(n.target).rpartition(".")[0]
        for n in gm.graph.nodes
        if n.op == "get_attr"
        and str(n.target).endswith(".weight")
        and any(len(u.all_input_nodes) >= _MANY for u in n.users if u not in nodes)
    }
    return sorted(n for n in hidden if n in read or any(n.startswith(leaf) for leaf in called))


__all__ = ["capture", "recapture", "recapture_devices"]
