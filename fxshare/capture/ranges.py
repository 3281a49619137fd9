"""For which lengths a graph holds, found by calls that are longer and shorter than the example."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxshare.base.fakes import failures_unsaid
from fxshare.base.numerics import beyond_rounding, float_leaves, tolerance, worst
from fxshare.capture.call import Call, Shapes, resized
from fxshare.capture.captured import quiet
from fxshare.capture.check import Original, evaluate_unguarded, guard_nodes
from fxshare.capture.containers import holds_tensor
from fxshare.errors import CaptureError, GuardError
from passes.graph.graph import structure_copy

GUARDS = "_guards_fn"
"""The submodule in which torch.export keeps what a graph rests on."""
_LONGEST_ASKED = 4096
_WHOLE_CHUNKS = 256  # of chunks of any power of two up to this


def hold_range(gm: fx.GraphModule) -> None:
    """Let an exported graph refuse a call outside its range as every other graph does."""
    guards = getattr(gm, GUARDS, None)
    if isinstance(guards, nn.Module):
        guards.forward = _held(guards.forward)


def _held(asserts: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any) -> None:
        if torch.compiler.is_compiling():  # dynamo takes the assertions over
            asserts(*args)
            return
        try:
            asserts(*args)
        except AssertionError as error:
            reason = str(error).removeprefix("Guard failed: ")
            raise GuardError(
                f"torch.export made a graph that holds where {reason}; this call is another. "
                "Capture with an example like this call (example=...), or with capture='modules', "
                "which follows every path"
            ) from error

    return forward


def export_notes(gm: fx.GraphModule, run: Original, shapes: Shapes, depth: int) -> tuple[str, ...]:
    """What to say about the lengths that an exported graph takes.

    Raises :class:`CaptureError` where it takes a longer or shorter call and gives other numbers
    than the original, or fails with anything but :class:`GuardError`.
    """
    if not shapes.sequence or run.is_meta:
        return ()
    takes = _taken(gm, shapes.base)
    length = _length(shapes.base)
    inside = [n for n in takes if n <= max(4 * length, 64)]
    for n in {min(inside, default=length), max(inside, default=length)} - {length}:
        _probe(gm, run, resized(shapes.base, sequence=n), n, depth)
    if len(takes) == _LONGEST_ASKED:
        return ()
    spans = _spans(takes)
    said = ", ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in spans[:3])
    more = ", …" if len(spans) > 3 else ""
    return (
        f"torch.export: the graph holds for lengths {said}{more} of those up to {_LONGEST_ASKED}, "
        "and refuses others",
    )


def _length(call: Call) -> int:
    shaped = [t for t in pytree.tree_leaves(dict(call)) if isinstance(t, Tensor) and t.ndim >= 2]
    return shaped[0].shape[1] if shaped else 0


def _taken(gm: fx.GraphModule, base: Call) -> list[int]:
    """The lengths that the guards let pass, told by sizes alone."""
    guards = getattr(gm, GUARDS, None)
    every = range(1, _LONGEST_ASKED + 1)
    if not isinstance(guards, nn.Module):
        return list(every)
    nodes = [n for n in gm.graph.nodes if n.target == GUARDS]
    given = [a for a in nodes[0].args if isinstance(a, fx.Node)] if nodes else []
    # a mask that may be left out is filled in on its way
    names = [str((a if a.op == "placeholder" else a.all_input_nodes[0]).target) for a in given]
    inputs = {name: v.to("meta") for name, v in base.items() if isinstance(v, Tensor)}
    if not names or not set(names) <= set(inputs):
        return list(every)
    found = []
    for length in every:
        call = resized(inputs, sequence=length)
        try:
            guards(*(call[name] for name in names))
        except GuardError:
            continue
        found.append(length)
    return found


def _spans(numbers: list[int]) -> list[tuple[int, int]]:
    ends = [a for a, b in pairwise(numbers) if b != a + 1]
    starts = [b for a, b in pairwise(numbers) if b != a + 1]
    if not numbers:
        return []
    return list(zip([numbers[0], *starts], [*ends, numbers[-1]], strict=True))


def _probe(gm: fx.GraphModule, run: Original, call: Call, length: int, depth: int) -> None:
    if not run.works(call):
        return
    expected = run(call)
    try:
        with quiet():
            given = {name: v for name, v in call.items() if holds_tensor(v)}
            found = structure_copy(gm, one_code=True)(**given)
    except GuardError:
        return
    except Exception as error:
        raise CaptureError(
            f"self-check: the graph fails at length {length}, where the original runs: "
            f"{type(error).__name__}: {error}"
        ) from error
    limit = _limit(expected, depth)
    distance = worst(expected, found)
    if not distance.relative <= limit:
        raise CaptureError(
            f"self-check: at length {length} the graph differs from the original by "
            f"{beyond_rounding(distance, limit)}"
        )


def _limit(output: Any, depth: int) -> float:
    dtypes = [t.dtype for _, t in float_leaves(output)]
    widest = max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)
    return tolerance(widest, depth)


def relax_lengths(
    gm: fx.GraphModule,
    run: Original,
    shapes: Shapes,
    given: Call,
    relaxed: tuple[int, ...],
    depth: int,
    most: int | None,
) -> tuple[int, ...]:
    """More guards that do not matter: those which the user's own call breaks, or one of 256
    positions (``if padding > 0`` of a model that works in chunks).

    ``most`` is the longest that the model takes, where it is known. Which guards a call breaks is
    told without values, by the nodes that they depend on; only then is the original run.
    """
    guards = guard_nodes(gm)
    left = set(guards) - {guards[number] for number in relaxed}
    if not left or not shapes.sequence or run.is_meta:
        return relaxed
    lengths = {_length(shapes.base)}
    calls = []
    for call in (given, resized(shapes.base, sequence=_WHOLE_CHUNKS)):
        if _length(call) not in lengths and _length(call) <= (most or _length(call)):
            lengths.add(_length(call))
            calls.append(call)
    harmless: set[fx.Node] = set()
    for call in calls:
        if not _broken(gm, call, left - harmless) or not run.works(call):
            continue
        expected = run(call)
        try:
            found, broken = evaluate_unguarded(gm, call)
        except Exception:  # the traced path cannot even be run at this length: its guards stay
            continue
        if worst(expected, found).relative <= _limit(expected, depth):
            harmless |= broken
    return tuple(n for n, node in enumerate(guards) if n in relaxed or node in harmless)


def _broken(gm: fx.GraphModule, call: Call, guards: set[fx.Node]) -> bool:
    """Whether one of the guards does not let the call pass."""
    needed, stack = set(guards), list(guards)
    while stack:
        stack += (new := [n for n in stack.pop().all_input_nodes if n not in needed])
        needed.update(new)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values: dict[fx.Node, Any] = {}
    interpreter = fx.Interpreter(gm)
    interpreter.env = values
    try:
        with failures_unsaid(), mode, torch.no_grad():
            for node in gm.graph.nodes:
                if node not in needed:
                    continue
                if node.op == "placeholder":
                    default = node.args[0] if node.args else None
                    value = call.get(str(node.target), default)
                    values[node] = pytree.tree_map_only(Tensor, mode.from_tensor, value)
                else:
                    values[node] = interpreter.run_node(node)
    except GuardError:
        return True
    except Exception:  # data decides about sizes
        return False
    return False


__all__ = ["GUARDS", "export_notes", "hold_range", "relax_lengths"]
