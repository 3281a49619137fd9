"""Capture: from any ``nn.Module`` to a graph that passes can rewrite.

Three front ends, in the order in which ``capture="auto"`` tries them: the value-carrying fx tracer,
``torch.export``, and module granularity. The first two end with a self-check against the original
at two shapes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxshare.capture.adapted import adapt
from fxshare.capture.call import (
    Call,
    Shapes,
    bind,
    completed,
    holds_tensor,
    resized,
    tensors,
    to_device,
    vary,
)
from fxshare.capture.export_front_end import export
from fxshare.capture.fx_front_end import trace
from fxshare.capture.guards import hold_guard
from fxshare.capture.modules_front_end import linears_side_by_side
from fxshare.errors import CaptureError, GuardError
from fxshare.numerics import float_leaves, tolerance, worst
from passes import linear_calls, lookups, structure_copy

FrontEnd = Literal["fx", "export", "modules"]
Mode = Literal["auto", "fx", "export", "modules"]


@dataclass(frozen=True)
class Captured:
    """A captured model.

    ``graph`` is what passes rewrite; for the modules front end it is all linears side by side.
    ``shapes`` are the calls it was checked on; ``relaxed`` the numbers of the guards that proved
    harmless; ``error`` the largest relative difference from the original in the self-check, None
    where nothing was run (meta device, modules).
    """

    front_end: FrontEnd
    graph: fx.GraphModule
    shapes: Shapes | None
    relaxed: tuple[int, ...]
    error: float | None
    notes: tuple[str, ...]
    seconds: float


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
    start = time.perf_counter()
    try:
        structure_copy(model)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied (copy.deepcopy): {type(error).__name__}: "
            f"{str(error).splitlines()[0]}; take what it holds beside parameters and buffers out"
        ) from error
    if mode == "auto" and example is None:
        return _modules(model, start, ("no example inputs: captured at module granularity",))
    if mode == "modules":
        return _modules(model, start, ())
    if example is None:
        raise CaptureError(
            f"capture={mode!r} needs an example of the model's inputs: give calibration data or "
            "example=..., or use capture='modules'"
        )
    call = to_device(completed(model, bind(model, example)), device_of(model))
    adapted = adapt(model)
    run = _Original(adapted.reference)
    shapes = vary(call, run.works)
    if run.refusal is not None and shapes.other is None and not run.works(shapes.base):
        raise CaptureError(
            f"{type(model).__name__} does not accept the example call "
            f"{ {k: _describe(v) for k, v in call.items()} }: {run.refusal}"
        )
    failures: list[str] = []
    order: list[FrontEnd] = ["fx", "export"] if mode == "auto" else [mode]
    for front_end in order:
        try:
            found = _graph(adapted.traced, run, shapes, front_end, needs, relaxed, failures, start)
        except CaptureError as error:
            failures.append(f"{front_end}: {error}")
        else:
            return replace(found, notes=(*adapted.notes, *found.notes))
    if mode == "auto":
        return _modules(model, start, tuple(f"tried {failure}" for failure in failures))
    raise CaptureError("; ".join(failures))


def recapture(
    model: nn.Module, front_end: FrontEnd, shapes: Shapes | None, relaxed: Sequence[int]
) -> Captured:
    """Repeat an earlier capture of a model of this structure.

    Nothing is run, so neither the weights nor the values of the calls matter.

    Raises :class:`CaptureError` where the front end fails.
    """
    start = time.perf_counter()
    if front_end == "modules" or shapes is None:
        return _modules(model, start, ())
    model = adapt(model).traced
    if front_end == "fx":
        # one shape will do: that none is baked into the graph was seen the first time
        graph, notes = trace(model, replace(shapes, other=None))
    else:
        graph, notes = export(model, shapes), ()
    guards = len(guard_nodes(graph))
    if any(not 0 <= number < guards for number in relaxed):
        raise CaptureError(
            f"the graph has {guards} guards, and {list(relaxed)} are to be let go: it is not the "
            "graph that was captured before"
        )
    erase_guards(graph, relaxed)
    seconds = time.perf_counter() - start
    return Captured(front_end, graph, shapes, tuple(relaxed), None, notes, seconds)


def _modules(model: nn.Module, start: float, notes: tuple[str, ...]) -> Captured:
    graph = linears_side_by_side(model)
    return Captured("modules", graph, None, (), None, notes, time.perf_counter() - start)


def _graph(
    model: nn.Module,
    run: _Original,
    shapes: Shapes,
    front_end: FrontEnd,
    needs: Sequence[str],
    relaxed: Sequence[int] | None,
    failures: Sequence[str],
    start: float,
) -> Captured:
    if front_end == "fx":
        gm, notes = trace(model, shapes)
    else:
        gm = export(model, shapes)
        notes = ("torch.export: the mode (eval) and the device are baked",)
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
            relaxed = _relax(gm, run, shapes, depth)
        error = _self_check(gm, run, shapes, relaxed, depth)
    erase_guards(gm, relaxed or ())
    if not shapes.sequence:
        notes = (*notes, "only the batch size is known to vary")
    notes = (*notes, *(f"tried {failure}" for failure in failures))
    seconds = time.perf_counter() - start
    return Captured(front_end, gm, shapes, tuple(relaxed or ()), error, notes, seconds)


def _inside_leaves(gm: fx.GraphModule, names: Sequence[str]) -> list[str]:
    seen = [(call.node, call.name) for call in linear_calls(gm)]
    seen += [(lookup.node, lookup.name) for lookup in lookups(gm)]
    nodes = {node for node, _ in seen}
    hidden = set(names) - {name for _, name in seen}
    called = [f"{n.target}." for n in gm.graph.nodes if n.op == "call_module"]
    # F.multi_head_attention_forward is one node that reads the weight of out_proj
    read = {
        str(n.target).rpartition(".")[0]
        for n in gm.graph.nodes
        if n.op == "get_attr"
        and str(n.target).endswith(".weight")
        and not nodes.issuperset(n.users)
    }
    return sorted(n for n in hidden if n in read or any(n.startswith(leaf) for leaf in called))


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; CPU where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter; float32 where it has none."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


@contextmanager
def quiet() -> Iterator[None]:
    """No gradients, and the random number generators as before afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class _Original:
    """Runs the original's code on a copy: eval mode, own buffers, no trace left on the model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copy: nn.Module | None = None  # none is needed on the meta device
        self.is_meta = device_of(model).type == "meta"
        self.refusal: str | None = None

    def __call__(self, call: Call) -> Any:
        if self._copy is None:
            self._copy = structure_copy(self._model).eval()
        with quiet():
            return structure_copy(self._copy)(**call)

    def works(self, call: Call) -> bool:
        """Whether the model accepts the call; the reason why not is kept in ``refusal``.

        On the meta device nothing is run: the trace finds out.
        """
        if self.is_meta:
            return True
        try:
            self(call)
        except Exception as error:
            self.refusal = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            return False
        return True


def _describe(value: object) -> object:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
    return value


def guard_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The guards of a graph, in order."""
    return [node for node in gm.graph.nodes if node.target is hold_guard]


class _Collecting(fx.Interpreter):
    """Runs a graph and collects the guards that do not hold, or ignores them."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.broken: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except GuardError:
            if n.target is not hold_guard:
                raise
            self.broken.add(n)
            return None


def evaluate_unguarded(gm: fx.GraphModule, call: Call) -> tuple[Any, set[fx.Node]]:
    """The graph's output whether or not its guards hold, and those that do not."""
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    defaults = [n.args for n in gm.graph.nodes if n.op == "placeholder"]
    values = [
        call[name] if name in call else default[0]
        for name, default in zip(names, defaults, strict=True)
    ]
    interpreter = _Collecting(gm)
    with quiet():
        return interpreter.run(*values), interpreter.broken


def _relax(gm: fx.GraphModule, run: _Original, shapes: Shapes, depth: int) -> tuple[int, ...]:
    """The guards that do not matter at batch 1 or length 1.

    ``if query_length > 1`` chooses between two ways to the same numbers; holding it would refuse a
    one-token call. Such a guard is let go only where the graph, run against it, gave what the
    original gave.
    """
    guards = guard_nodes(gm)
    harmless: set[fx.Node] = set()
    if not guards:
        return ()
    sizes: list[dict[str, int]] = []
    if shapes.batch:
        sizes.append({"batch": 1})
    if shapes.sequence:
        sizes.append({"sequence": 1})
    if shapes.batch and shapes.sequence:
        sizes.append({"batch": 1, "sequence": 1})
    for size in sizes:
        call = resized(shapes.base, **size)
        if not run.works(call):
            continue
        expected = run(call)
        try:
            found, broken = evaluate_unguarded(gm, call)
        except Exception:  # the traced path cannot even be run at this size: its guards stay
            continue
        if worst(expected, found).relative <= tolerance(_dtype(expected), depth):
            harmless |= broken
    return tuple(number for number, node in enumerate(guards) if node in harmless)


def _dtype(output: Any) -> torch.dtype:
    dtypes = [t.dtype for _, t in float_leaves(output)]
    return max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)


def erase_guards(gm: fx.GraphModule, numbers: Sequence[int]) -> None:
    """Take guards out of a graph, by their place in :func:`guard_nodes`."""
    if not numbers:
        return
    guards = guard_nodes(gm)
    for number in numbers:
        gm.graph.erase_node(guards[number])
    gm.recompile()


def _self_check(
    gm: fx.GraphModule, run: _Original, shapes: Shapes, relaxed: Sequence[int], depth: int
) -> float:
    error = 0.0
    for call in filter(None, (shapes.base, shapes.other)):
        expected = run(call)
        found = _run_graph(gm, call)
        limit = tolerance(_dtype(expected), depth)
        distance = worst(expected, found)
        if not distance.relative <= limit:
            raise CaptureError(
                f"self-check: the graph differs from the original by {distance}; rounding "
                f"explains {limit:.1e}"
            )
        error = max(error, distance.relative)
    return error


def _run_graph(gm: fx.GraphModule, call: Call) -> Any:
    given = {name: value for name, value in call.items() if holds_tensor(value)}
    flags = [(m, m.training) for m in gm.modules()]
    for m, _ in flags:
        m.training = False
    try:
        with quiet():
            return structure_copy(gm)(**given)
    except Exception as error:
        raise CaptureError(
            f"self-check: the graph fails where the original runs: {type(error).__name__}: {error}"
        ) from error
    finally:
        for m, flag in flags:
            m.training = flag


__all__ = [
    "Call",
    "Captured",
    "FrontEnd",
    "Mode",
    "Shapes",
    "bind",
    "capture",
    "device_of",
    "dtype_of",
    "erase_guards",
    "evaluate_unguarded",
    "guard_nodes",
    "quiet",
    "recapture",
    "resized",
    "tensors",
    "to_device",
]
