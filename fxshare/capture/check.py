"""The self-check: a captured graph against the original, at two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshare.base.numerics import beyond_rounding, float_leaves, tolerance, worst
from fxshare.base.placement import device_of
from fxshare.capture.call import Call, Shapes, resized, tensors
from fxshare.capture.captured import quiet
from fxshare.capture.containers import mapped
from fxshare.capture.guards import hold_guard
from fxshare.capture.products import wide_products
from fxshare.capture.steered import set_training
from fxshare.errors import CaptureError, GuardError
from passes import structure_copy
from passes.graph.modes import caller_modes, set_modes

_SMALL = 250_000
"""Numbers of an output that is kept for the next time: a megabyte of memory for a run."""


class Original:
    """Runs the original's code on a copy: eval mode, own buffers, no trace left on the model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copy: nn.Module | None = None  # none is needed on the meta device
        self._last: tuple[Call, Any] | None = None
        self._small: list[tuple[Call, list[int], Any]] = []
        self.is_meta = device_of(model).type == "meta"
        self.refusal: str | None = None

    def __call__(self, call: Call) -> Any:
        """The original's output; it runs once where the same call is asked for twice in a row, or
        the output is small."""
        if self._last is not None and _same(call, self._last[0]):
            return self._last[1]
        writes = _writes(call)
        for before, at, output in self._small:
            if at == writes and _same(call, before):  # a model may write into its input
                return output
        self._last = None
        if self._copy is None:
            self._copy = structure_copy(self._model).eval()
        with quiet(), wide_products(self._copy):
            output = structure_copy(self._copy)(**call)
        self._last = dict(call), output
        if sum(t.numel() for _, t in float_leaves(output)) <= _SMALL:
            self._small.append((self._last[0], writes, output))
        return output

    def again(self, call: Call) -> Any:
        """What the second of two calls in a row gives: another than the first where the model
        keeps something."""
        copy = structure_copy(self._copy or self._model).eval()
        with quiet(), wide_products(copy):
            copy(**call)
            return copy(**call)

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


def _same(call: Call, other: Call) -> bool:
    return list(call) == list(other) and all(call[name] is other[name] for name in call)


def _writes(call: Call) -> list[int]:
    return [-1 if t.is_inference() else t._version for t in tensors(call)]


def described(value: object) -> object:
    """Tensors as their dtypes and shapes, anything else as it is: for messages."""
    shapes: object = mapped(
        Tensor, lambda t: f"{t.dtype} {tuple(t.shape)}".removeprefix("torch."), value
    )
    return shapes


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
    interpreter, modes = _Collecting(gm), caller_modes()
    try:
        with quiet(), wide_products(gm):
            return interpreter.run(*values), interpreter.broken
    finally:
        set_modes(modes)


def relax(gm: fx.GraphModule, run: Original, shapes: Shapes, depth: int) -> tuple[int, ...]:
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


def self_check(
    gm: fx.GraphModule, run: Original, shapes: Shapes, relaxed: Sequence[int], depth: int
) -> float:
    """The largest relative error of the graph on both example calls.

    Raises :class:`CaptureError` where it is more than rounding explains, or where the graph fails
    on a call that the original takes.
    """
    error = 0.0
    for call in filter(None, (shapes.base, shapes.other)):
        expected = run(call)
        found = _run_graph(gm, call)
        limit = tolerance(_dtype(expected), depth)
        distance = worst(expected, found)
        if not distance.relative <= limit:
            raise CaptureError(
                "self-check: the graph differs from the original by "
                f"{beyond_rounding(distance, limit)}"
            )
        error = max(error, distance.relative)
    _check_kept(gm, run, shapes.base, depth)
    return error


def _check_kept(gm: fx.GraphModule, run: Original, call: Call, depth: int) -> None:
    """Refuse a graph that forgets what the original keeps from one call to the next: a graph holds
    what is written into a buffer, and no attribute that ``forward`` sets."""
    expected = run.again(call)
    distance = worst(expected, _run_graph(gm, call, times=2))
    limit = tolerance(_dtype(expected), depth)
    if not distance.relative <= limit:
        raise CaptureError(
            "self-check: called a second time, the graph differs from the original, which keeps "
            f"something from one call to the next, by {beyond_rounding(distance, limit)}; keep it "
            "in a buffer (copy_), or use capture='modules'"
        )


def _run_graph(gm: fx.GraphModule, call: Call, times: int = 1) -> Any:
    copy = structure_copy(gm, one_code=True)
    set_training(copy, False)
    try:
        with quiet(), wide_products(copy):
            for _ in range(times - 1):
                copy(**call)
            return copy(**call)
    except Exception as error:
        raise CaptureError(
            f"self-check: the graph fails where the original runs: {type(error).__name__}: {error}"
        ) from error


__all__ = [
    "Original",
    "described",
    "erase_guards",
    "evaluate_unguarded",
    "guard_nodes",
    "relax",
    "self_check",
]
