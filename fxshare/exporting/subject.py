"""What is exported: a compiled model, and the calls that it is exported and checked with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxshare.base.numerics import float_leaves, tolerance, worst
from fxshare.capture import Caller, device_of, quiet
from fxshare.capture.call import (
    MASK,
    Call,
    Shapes,
    parameters_of,
    resized,
    vary,
)
from fxshare.capture.containers import holds_tensor
from fxshare.errors import ExportError
from fxshare.exporting.outputs import left_out, plain
from fxshare.result.module import record_of
from fxshare.result.products import slices_of
from fxshare.result.record import Record
from fxshare.verifying.evaluated import evaluated
from passes.errors import FxShareError
from passes.graph.graph import is_linear, structure_copy

_LITERALS = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True, eq=False)
class Subject:
    """``model`` is a copy in eval mode that shares its parameters with the caller's.

    ``inputs`` are the arguments that become inputs of the export, ``constants`` those that are
    baked in; ``shapes`` the calls between which sizes vary. ``shown`` is the output of the first
    call, in plain containers.
    """

    name: str
    model: nn.Module
    record: Record
    shapes: Shapes
    inputs: Call
    constants: Call
    shown: Any
    notes: tuple[str, ...]

    @property
    def depth(self) -> int:
        """Number of matrix products one after the other, two for each rewritten weight."""
        places = slices_of(self.model).values()
        own = {name for place in places for name in (place.module, place.basis)}
        others = sum(is_linear(m) and n not in own for n, m in self.model.named_modules())
        return 2 * len(self.record.plan.sites) + max(others, 1)

    def limit(self, call: Call, expected: Any) -> float:
        """How far apart rounding may bring the model's output on a call and an export's.

        In half precision the general bound lets nearly everything pass; there it is four times what
        rounding does to the model's own output, compared with the same model in float32.
        """
        dtypes = [t.dtype for _, t in float_leaves(expected)]
        dtype = max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)
        bound = tolerance(dtype, self.depth)
        if dtype not in (torch.float16, torch.bfloat16):
            return bound
        wide = pytree.tree_map_only(
            Tensor, lambda t: t.float() if t.is_floating_point() else t, dict(call)
        )
        with quiet():
            exact = plain(_run(evaluated(self.model, True), wide, self.constants))
        own = worst(exact, pytree.tree_map_only(Tensor, lambda t: t.float(), expected))
        return min(bound, 4 * max(own.relative, torch.finfo(dtype).eps))

    def run(self, call: Call) -> Any:
        """The model's own output, in plain containers."""
        with quiet():
            return plain(_run(self.model, call, self.constants))

    def dims(self) -> Mapping[str, Any]:
        """Per input the dimensions that are meant to vary, nested like the inputs."""

        def of(value: object) -> object:
            return self.shapes.dynamic_dims(value) if isinstance(value, Tensor) else None

        return {name: pytree.tree_map(of, value) for name, value in self.inputs.items()}

    def other_calls(self, *, batch: bool, sequence: bool, seed: int) -> list[tuple[str, Call]]:
        """Calls to check with, of sizes that were not the example's where those may vary: another
        batch and length with a position masked out, one row, and one row of one position.

        Calls that the model itself refuses are left out.
        """
        base, other = self.shapes.base, self.shapes.other
        sizes: list[Call] = []
        if other is not None and batch == self.shapes.batch and sequence == self.shapes.sequence:
            sizes.append(other)
        if batch:
            sizes.append(resized(base, batch=1))
            if sequence:
                sizes.append(resized(base, batch=1, sequence=1))
        elif sequence:
            sizes.append(resized(base, sequence=3))
        found: list[tuple[str, Call]] = []
        for number, size in enumerate(sizes or [base]):
            call = _other_values({name: size[name] for name in self.inputs}, seed + 1 + number)
            if number == 0 or _refusal(self.model, call, self.constants) is None:
                found.append((_sizes(call), call))
        return found


def subject_of(gm: nn.Module, example: object, *, dynamic: bool, seed: int) -> Subject:
    """Prepare a compiled model for export.

    Raises :class:`ExportError` naming the argument that an export cannot carry, or where no call
    is known, or the model refuses it.
    """
    record = record_of(gm)
    name = record.source.class_name.rpartition(":")[2]
    call = _example(gm, record, example, seed)
    for argument, value in call.items():
        _check_carried(name, argument, value)
    model = structure_copy(gm).eval()
    if isinstance(model, fx.GraphModule):  # its other arguments are baked already
        known = parameters_of(model)
        call = {n: v for n, v in call.items() if n in known}
    constants = {n: v for n, v in call.items() if not holds_tensor(v)}
    varied = Shapes(call, None, batch=False, sequence=False)
    if dynamic:
        varied = vary(call, lambda c: _refusal(model, c, {}) is None)
    refusal = _refusal(model, varied.base, {})
    if refusal is not None:
        raise ExportError(
            f"{name} does not accept the example call ({_sizes(call)}): {refusal}; give "
            "example=..., a batch that it accepts"
        )
    inputs = {n: v for n, v in varied.base.items() if n not in constants}
    with quiet():
        output = _run(model, inputs, constants)
    shown = plain(output)
    if shown is None or shown == {}:
        raise ExportError(
            f"{name} returns a {type(output).__name__} without a tensor in it, and an export "
            "returns tensors; compile a model whose forward returns some"
        )
    dropped = left_out(output)
    notes = (f"not in the export's output: {', '.join(dropped)}",) if dropped else ()
    return Subject(name, model, record, varied, inputs, constants, shown, notes)


def _example(gm: nn.Module, record: Record, example: object, seed: int) -> Call:
    if example is not None:
        return record.caller(gm)(example)
    if record.inputs:
        call = record.random_call(0, seed=seed, device=device_of(gm))
        mask = call.get(MASK)  # a random one may leave a row nothing to attend to
        return {**call, MASK: torch.ones_like(mask)} if isinstance(mask, Tensor) else call
    from fxshare.models.traits import example_ids

    ids = example_ids(gm, seed=seed)
    if ids is None:
        raise ExportError(
            f"{record.source.class_name.rpartition(':')[2]} was captured without example inputs, "
            "so nothing says how it is called; give example=..., one batch"
        )
    return Caller(gm)(ids)


def _check_carried(name: str, argument: str, value: object) -> None:
    if type(value) in (tuple, list):
        assert isinstance(value, (tuple, list))
        for item in value:
            _check_carried(name, argument, item)
    elif type(value) is dict:
        for item in value.values():
            _check_carried(name, argument, item)
    elif not isinstance(value, (Tensor, *_LITERALS)):
        raise ExportError(
            f"argument {argument!r} of {name} is a {type(value).__name__}; expected tensors, "
            "numbers, strings, or tuples, lists and dictionaries of them: an export cannot carry "
            f"a Python object. Leave {argument!r} out of the example, or compile with an example "
            "without it"
        )


def _run(model: nn.Module, call: Call, constants: Call) -> Any:
    return model(**call, **{n: v for n, v in constants.items() if n not in call})


def _refusal(model: nn.Module, call: Call, constants: Call) -> str | None:
    """Why the model does not accept a call; None where it does. Buffers stay as they are."""
    try:
        with quiet():
            _run(structure_copy(model, one_code=True), call, constants)
    except FxShareError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _other_values(call: Call, seed: int) -> Call:
    """The call with its rows' contents moved about: the values stay legal, their places change."""
    generator = torch.Generator().manual_seed(seed)

    def moved(t: Tensor) -> Tensor:
        order = torch.randperm(t.numel(), generator=generator).to(t.device)
        return t.flatten()[order].view(t.shape)

    return {
        name: value if name == MASK else pytree.tree_map_only(Tensor, moved, value)
        for name, value in call.items()
    }


def _sizes(call: Call) -> str:
    shapes = [
        f"{name} {'×'.join(map(str, t.shape))}"
        for name, value in call.items()
        for t in pytree.tree_leaves(value)
        if isinstance(t, Tensor)
    ]
    return ", ".join(shapes)
