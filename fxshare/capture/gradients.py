"""The self-check of gradients, and of training mode: a graph against the original's autograd.

The loss is a random projection of all outputs. Its gradients are compared at floating-point inputs
and at parameters: which have any, at all of them; the numbers, at the smallest ones up to a share
of the model, so that a large model costs no second copy of itself. A fault in what flows through a
layer shows in its norms and biases too; one in the gradient of a large weight alone does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxshare.base.numerics import beyond_rounding, float_leaves, tolerance, worst
from fxshare.base.randomness import drawn, own_randomness, randomness_as_before
from fxshare.capture.call import Call, Shapes, resized, tensors
from fxshare.capture.products import wide_products
from fxshare.capture.steered import SteeringDiffers, eval_only, set_training
from fxshare.capture.tracing.factories import TRACE_LOCK
from fxshare.capture.tracing.functions import without_reentrant_checkpoints
from fxshare.errors import GuardError
from passes.graph.graph import structure_copy

# parameters whose gradients are held twice: a sixteenth of the model, between these
_LEAST_ELEMENTS, _MOST_ELEMENTS, _PART = 2**20, 2**24, 16
_ROWS, _POSITIONS = 2, 8
_SEED = 0
# a product has two in its backward pass
_BACKWARD = 3
# gradients that vanish but for rounding (of a bias on keys) are measured by the others
_FLOOR = 1e-2
_Key: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Pass:
    """One forward and backward pass: the outputs, which of them have a gradient, which parameters
    they reach, and gradients by name."""

    output: Mapping[str, Tensor]
    differentiable: Mapping[str, bool]
    reached: frozenset[_Key]
    gradients: Mapping[str, Tensor | None]


class _SameNoise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets random operations draw the same numbers wherever they stand and however their tensors
    lie in memory: each is seeded by its size. One number by itself is zero: it decides whether a
    layer is left out."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **given)
        tensors = [t for t in pytree.tree_leaves((args, given)) if isinstance(t, Tensor)]
        seed = _SEED + max((t.numel() for t in tensors), default=0)
        # of its own: that of torch is every thread's
        device = tensors[0].device if tensors else given.get("device") or "cpu"
        generator = torch.Generator(device).manual_seed(seed)
        flat = pytree.tree_map_only(Tensor, Tensor.contiguous, (args, given))
        found = drawn(func, flat[0], flat[1], generator)
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            found = args[0] if args[0] is flat[0][0] else args[0].copy_(flat[0][0])
        if isinstance(found, Tensor) and found.numel() == 1 and found.is_floating_point():
            return found.zero_() if found.ndim == 0 else found
        return found


def check_gradients(
    gm: fx.GraphModule, original: nn.Module, shapes: Shapes, depth: int
) -> tuple[str, ...]:
    """Compare gradients in eval mode; returns notes on what could not be compared.

    Raises :class:`SteeringDiffers` where they differ by more than rounding explains.
    """
    return _check(gm, original, shapes, depth, training=False)


def check_training(
    gm: fx.GraphModule, original: nn.Module, shapes: Shapes, depth: int
) -> tuple[str, ...]:
    """Compare outputs and gradients in training mode, dropout included; returns notes.

    Random numbers are compared as such, not the order in which they are drawn.

    Raises :class:`SteeringDiffers` where they differ by more than rounding explains.
    """
    return _check(gm, original, shapes, depth, training=True)


class _NotComparedError(Exception):
    """The original has no such pass, or the graph refuses the call."""


def _check(
    gm: fx.GraphModule, original: nn.Module, shapes: Shapes, depth: int, *, training: bool
) -> tuple[str, ...]:
    mode = "in training mode" if training else "in eval mode"
    reason = ""
    for call in _calls(shapes):
        for inputs in (True, False):  # a model may object to inputs that have gradients
            try:
                apart = _compare(gm, original, call, depth, training=training, inputs=inputs)
                if apart is not None and training:  # another thread may have drawn numbers
                    apart = _compare(gm, original, call, depth, training=True, inputs=inputs)
            except _NotComparedError as error:
                reason = str(error)
                continue
            if apart is not None:
                raise SteeringDiffers(f"self-check: {mode}, {apart}")
            return ()
    return (f"gradients {mode} were not compared: {reason}",)


def _calls(shapes: Shapes) -> Iterator[Call]:
    """The base call, cut to what shows a fault as well, and as it is where that is not taken."""
    cut: dict[str, int] = {}
    if shapes.batch:
        cut["batch"] = _ROWS
    longest = max((t.shape[1] for t in tensors(shapes.base) if t.ndim > 1), default=0)
    if shapes.sequence and longest > _POSITIONS:
        cut["sequence"] = _POSITIONS
    if cut:
        yield resized(shapes.base, **cut)
    yield shapes.base


def _compare(
    gm: fx.GraphModule,
    original: nn.Module,
    call: Call,
    depth: int,
    *,
    training: bool,
    inputs: bool,
) -> str | None:
    chosen = _chosen(original)
    copy = structure_copy(original).train(training)
    try:
        expected = _run(copy, call, chosen, same_noise=training, inputs=inputs)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise _NotComparedError(
            f"the original has none to compare with ({type(error).__name__}: {first})"
        ) from error
    graph = structure_copy(gm, one_code=True)
    # a graph of eval mode alone may do what the original does in training too
    set_training(graph, training and eval_only(gm) is None)
    try:
        found = _run(graph, call, chosen, same_noise=training, inputs=inputs)
    except GuardError as error:
        raise _NotComparedError(str(error)) from error
    except Exception as error:
        return (
            f"the graph fails with gradients where the original runs: {type(error).__name__}: "
            f"{error}"
        )
    return _difference(expected, found, _names(original), depth)


def _run(
    module: nn.Module,
    call: Call,
    chosen: Mapping[str, nn.Parameter],
    *,
    same_noise: bool,
    inputs: bool,
) -> _Pass:
    """A forward and a backward pass with generators of its own; nothing is accumulated."""
    around = randomness_as_before(_SEED) if same_noise else own_randomness(_SEED)
    with around, torch.inference_mode(False), torch.enable_grad():
        leaves: dict[str, Tensor] = {}
        values = _with_leaves(call, leaves) if inputs else dict(call)
        noise: Any = _SameNoise() if same_noise else nullcontext()  # type: ignore[no-untyped-call]
        wide = wide_products(module)
        with TRACE_LOCK, without_reentrant_checkpoints(), wide, noise:
            output = module(**values)
        reached = frozenset(_reached(output))
        loss = _projection(output)
        gradients: dict[str, Tensor | None] = {}
        if loss is not None:
            wanted = {**leaves, **{n: p for n, p in chosen.items() if _key(p) in reached}}
            parameters = {_key(p): p for p in _parameters(module)}
            sources = [parameters.get(_key(t), t) for t in wanted.values()]
            found: tuple[Tensor | None, ...] = ()
            if sources:
                with wide, noise:  # checkpoints run the forward pass again
                    found = torch.autograd.grad(loss, sources, allow_unused=True)
            gradients = dict(zip(wanted, found, strict=True))
    differentiable = {path: leaf.requires_grad for path, leaf in float_leaves(output)}
    detached = {path: leaf.detach() for path, leaf in float_leaves(output)}
    return _Pass(detached, differentiable, reached, gradients)


def _with_leaves(call: Call, leaves: dict[str, Tensor]) -> dict[str, Any]:
    """The call with floating-point tensors that have a gradient; no leaves themselves, since a
    model may write into its input."""

    def leaf(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        made = value.detach().clone().requires_grad_()
        leaves[f"input {len(leaves)}"] = made
        return made.clone()

    found: dict[str, Any] = pytree.tree_map_only(Tensor, leaf, dict(call))
    return found


def _projection(output: Any) -> Tensor | None:
    """A random projection of everything in the output that has a gradient; None for nothing."""
    generator = torch.Generator().manual_seed(_SEED)
    total: Tensor | None = None
    for _, leaf in float_leaves(output):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float32)
        if leaf.requires_grad:
            # masks of -inf and overflows: what is not finite has no gradient to speak of
            kept = torch.where(leaf.isfinite(), leaf, 0).double()
            part = (kept * direction.to(leaf.device).double()).sum()
            total = part if total is None else total + part
    return total


def _key(tensor: Tensor) -> _Key:
    """What tells a parameter: torch.export hands on other objects with the same memory."""
    place = tensor.data_ptr() if tensor.device.type != "meta" else id(tensor)
    return place, tuple(tensor.shape), tuple(tensor.stride())


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from (p for p in module.parameters() if p.requires_grad)


def _names(model: nn.Module) -> dict[_Key, str]:
    return {_key(p): name for name, p in model.named_parameters()}


def _chosen(model: nn.Module) -> dict[str, nn.Parameter]:
    """The smallest parameters, so many that they have no more elements than is allowed."""
    named = sorted(model.named_parameters(), key=lambda both: both[1].numel())
    found: dict[str, nn.Parameter] = {}
    part = sum(parameter.numel() for _, parameter in named) // _PART
    left = min(max(part, _LEAST_ELEMENTS), _MOST_ELEMENTS)
    for name, parameter in named:
        left -= parameter.numel()
        if left < 0:
            break
        if parameter.requires_grad and parameter.numel():
            found[name] = parameter
    return found


def _reached(output: Any) -> Iterator[_Key]:
    """The parameters in the backward graph of an output, without running it."""
    stack = [leaf.grad_fn for _, leaf in float_leaves(output) if leaf.grad_fn is not None]
    yield from (_key(t) for _, t in float_leaves(output) if t.requires_grad and t.is_leaf)
    seen: set[Any] = set(stack)
    while stack:
        at: Any = stack.pop()
        variable = getattr(at, "variable", None)
        if isinstance(variable, nn.Parameter):
            yield _key(variable)
        for following, _ in at.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def _difference(expected: _Pass, found: _Pass, names: Mapping[_Key, str], depth: int) -> str | None:
    """Words for how the graph's pass differs from the original's; None where it does not."""
    dtype = max(
        (t.dtype for t in expected.output.values()),
        key=lambda d: torch.finfo(d).eps,
        default=torch.float32,
    )
    limit = tolerance(dtype, depth)
    if set(expected.output) != set(found.output):
        odd_one = sorted(set(expected.output) ^ set(found.output))[0]
        return f"{odd_one} is in one of the graph's output and the original's only"
    for path, leaf in expected.output.items():
        distance = worst(leaf, found.output[path])
        if not distance.relative <= limit:
            apart = beyond_rounding(distance, limit).replace("at output", f"at {path}")
            return f"the graph differs from the original by {apart}"
    for path, has in expected.differentiable.items():
        if found.differentiable[path] != has:
            return f"{path} has {_some(found.differentiable[path])}, in the original {_some(has)}"
    odd = {names[k] for k in expected.reached ^ found.reached if k in names}
    if odd:
        name = sorted(odd)[0]
        has = any(names.get(k) == name for k in found.reached)
        return (
            f"{name!r} has {_some(has)}, in the original {_some(not has)} ({len(odd)} parameters "
            "in all)"
        )
    return _apart(expected.gradients, found.gradients, tolerance(dtype, _BACKWARD * depth))


def _some(has: bool) -> str:
    return "a gradient" if has else "no gradient"


def _apart(
    expected: Mapping[str, Tensor | None], found: Mapping[str, Tensor | None], limit: float
) -> str | None:
    sizes = [float(g.abs().max()) for g in expected.values() if g is not None and g.numel()]
    floor = _FLOOR * max((s for s in sizes if s == s and s != float("inf")), default=0.0)
    for name, gradient in expected.items():
        other = found.get(name)
        if (gradient is None) != (other is None):
            return (
                f"{name!r} has {_some(other is not None)}, in the original "
                f"{_some(gradient is not None)}"
            )
        if gradient is None or other is None or not gradient.numel():
            continue
        distance = worst(gradient, other)
        size = max(float(gradient.abs().max()), floor)
        if distance.absolute and not distance.absolute / size <= limit:
            apart = beyond_rounding(distance, limit).replace("output", "")
            return f"the gradient at {name!r} differs from the original's by {apart}"
    return None
