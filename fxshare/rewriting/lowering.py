"""``fxshare.lower`` and ``fxshare.readable``: from the graph one reads to the one that is fast, and
back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn

from fxshare.base.numerics import beyond_rounding, tolerance, worst
from fxshare.base.progress import stage
from fxshare.base.surroundings import plain_surroundings
from fxshare.capture import bind, dtype_of, quiet
from fxshare.capture.modules import BorrowedBasis, RewrittenLinear
from fxshare.errors import CheckFailed, ConfigError
from fxshare.models.structure import freeze, frozen_in, without_values
from fxshare.result.face import verbs_of
from fxshare.result.module import Compiled, ShareModule, attach, record_of
from fxshare.result.products import slices_of
from fxshare.result.record import Lowered, Readable, Record, Step
from fxshare.verifying.evaluated import evaluated
from passes import (
    Materialise,
    Origin,
    Slice,
    WriteOutPivots,
    derive_gathers,
    derived_buffers,
    forget_origins,
    lowering_passes,
    original,
    origins,
    run,
    slices,
    structure_copy,
)
from passes.errors import FxShareError
from passes.pipeline import Prefer

_LOG = logging.getLogger(__name__)


@plain_surroundings()
def lower(gm: nn.Module, *, prefer: Prefer = "memory", example: object = None) -> Compiled:
    """The same function, packed for speed: fewer and larger matmuls, no copies between them.

    Parameters
    ----------
    gm
        What :func:`fxshare.compile` or :func:`fxshare.load` returned. It stays as it is; tensors
        that are not repacked are shared with the result.
    prefer
        ``"memory"`` never stores more numbers than ``gm``. ``"speed"`` may store a basis twice,
        multiplies a group out where its products need more operations than the dense ones, and
        stores pivoted bases of low rank whole where several read one input.
    example
        One batch to compare the result with ``gm`` on.

    Returns
    -------
    ShareModule
        A module of the kind of ``gm``, with its signature and its record. At module granularity
        each rewritten linear is lowered by itself, and bases stay as they are. Lowering what is
        lowered already starts from its readable graph.

    Raises
    ------
    FxShareError
        ``gm`` is not ours or, for the sake of ``example``, :class:`CheckFailed`.
    """
    if prefer not in get_args(Prefer):
        raise ConfigError(f"prefer: expected 'memory' or 'speed', found {prefer!r}")
    record = record_of(gm)
    if record.lowered is not None and record.lowered.prefer == prefer:
        return shared_copy(gm, record)
    if record.lowered is not None:
        gm = readable(gm)
        record = record_of(gm)
    with stage("lower", _LOG):
        result, lowered = lower_module(gm, prefer)
    compiled = attach(result, with_lowered(record, lowered, result), verbs_of(gm))
    if example is not None:
        _compare(gm, compiled, example)
    return compiled


def readable(gm: nn.Module) -> Compiled:
    """The readable module of a lowered one, with its present weights: views of them, where rows
    were not put in another order. What is not lowered comes back as a copy that shares its tensors.

    Groups that were multiplied out stay dense, and pivoted bases that were written out stay so:
    which basis or which kept inputs they had cannot be told from weights that may have been trained
    since.

    Raises :class:`FxShareError` where ``gm`` is not ours, or was trained so that the two copies
    that lowering for speed made of one basis differ.
    """
    record = record_of(gm)
    lowered = record.lowered
    if lowered is None:
        return shared_copy(gm, record)
    result = _readable_module(gm, lowered)
    changed = lowered.dense or lowered.written_out
    steps: tuple[Step, ...] = (*record.lowering, "readable") if changed else ()
    return attach(result, replace(record, lowering=steps, lowered=None), verbs_of(gm))


def with_lowered(record: Record, lowered: Lowered, result: nn.Module) -> Record:
    """The record of a module that was just lowered."""
    report = record.report
    notes = [
        f"lowered for {lowered.prefer}: {len(names)} {what} ({_some(names)})"
        for names, what in (
            (lowered.dense, "groups cost less as dense weights and are multiplied out"),
            (lowered.written_out, "pivoted bases cost less whole and are written out"),
        )
        if names
    ]
    if notes:
        after = sum(p.numel() for p in result.parameters())
        report = replace(report, notes=(*report.notes, *notes), parameters_after=after)
    steps = (*record.lowering, lowered.prefer)
    return replace(
        record,
        lowering=steps,
        lowered=lowered,
        report=report,
        frozen_when_lowered=lowered.frozen,
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def replay(module: nn.Module, record: Record) -> tuple[nn.Module, Lowered | None]:
    """What the steps of a record make of a module that was just rewritten; it needs no values."""
    lowered: Lowered | None = None
    for step in record.lowering:
        if step == "readable":
            assert lowered is not None, "nothing to make readable"
            module, lowered = _readable_module(module, lowered), None
        else:
            if record.frozen_when_lowered is not None:
                freeze(module, record.frozen_when_lowered)
            module, lowered = lower_module(module, step)
    return module, lowered


def lower_module(gm: nn.Module, prefer: Prefer) -> tuple[nn.Module, Lowered]:
    """Lower a module that needs no record yet."""
    if isinstance(gm, fx.GraphModule):
        graph, from_graph = _lower_graph(gm, prefer)
        before, after = slices_of(gm), slices(from_graph.graph)
        left = {place.basis: place.pivoted for place in after.values()}
        held = {place.basis: place.pivoted for place in before.values() if place.basis}
        dense = tuple(sorted(name for name in held if name not in left))
        whole = tuple(sorted(n for n, pivoted in held.items() if pivoted and left.get(n) is False))
        made = Lowered(prefer, {"": from_graph}, after, dense, whole, frozen_in(gm))
        return _share_module(graph), made
    result = structure_copy(gm, clone_buffers=False)
    graphs: dict[str, Readable] = {}
    for name, piece in _pieces(result).items():
        lowered, graphs[name] = _lower_graph(piece, prefer)
        _borrow_from(piece, lowered)
        result.set_submodule(name, lowered)
    result.__dict__["meta"] = {**result.__dict__["meta"], "slices": _root_slices(result)}
    return result, Lowered(prefer, graphs, slices_of(gm), frozen=frozen_in(gm))


def _lower_graph(gm: fx.GraphModule, prefer: Prefer) -> tuple[fx.GraphModule, Readable]:
    passes = lowering_passes(prefer)
    # what they make cannot be taken apart again, so the readable graph is what comes after them
    first = [one for one in passes if isinstance(one, (Materialise, WriteOutPivots))]
    start, _ = run(gm, first, code=False)
    start.meta.pop("fxshare", None)
    forget_origins(start)
    result, _ = run(start, [one for one in passes if one not in first])
    return result, Readable(without_values(start), dict(origins(result)))


def _readable_module(gm: nn.Module, lowered: Lowered) -> nn.Module:
    if isinstance(gm, fx.GraphModule):
        return _share_module(_filled(lowered.graphs[""], gm))
    result = structure_copy(gm, clone_buffers=False)
    for name, piece in _pieces(result).items():
        back = _filled(lowered.graphs[name], piece)
        _borrow_from(piece, back)
        result.set_submodule(name, back)
    result.__dict__["meta"] = {**result.__dict__["meta"], "slices": lowered.slices}
    return result


def _filled(source: Readable, gm: fx.GraphModule) -> fx.GraphModule:
    """The readable graph with the tensors of the lowered graph ``gm``."""
    result = structure_copy(source.graph, clone_buffers=False)
    trained = {name: module.training for name, module in gm.named_modules()}
    for path, module in result.named_modules():
        module.training = trained.get(path, gm.training)
        origin = source.origins.get(path)
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            for leaf in [leaf for leaf, tensor in held.items() if tensor is not None]:
                if f"{path}.{leaf}".lstrip(".") in derived_buffers(result):
                    continue
                where = origin.module if origin else path
                tensor = getattr(gm.get_submodule(where), leaf)
                if origin is not None and isinstance(tensor, nn.Parameter):
                    _check_copies(path, gm, origin, leaf)
                    rows = original(gm, origin, tensor.detach())
                    tensor = nn.Parameter(rows, tensor.requires_grad)
                held[leaf] = tensor
    derive_gathers(result)
    return result


def _check_copies(name: str, gm: fx.GraphModule, origin: Origin, leaf: str) -> None:
    first: Tensor = getattr(gm.get_submodule(origin.module), leaf)[origin.start : origin.stop]
    for module, start, stop in origin.copies:
        again: Tensor = getattr(gm.get_submodule(module), leaf)[start:stop]
        if first.device.type != "meta" and not torch.equal(first, again):
            raise FxShareError(
                f"{name!r} is stored in {origin.module!r} and in {module!r} and the two differ: "
                "they were trained apart. Train the readable module, or one that was lowered with "
                "prefer='memory', which stores each basis once"
            )


def _share_module(gm: fx.GraphModule) -> ShareModule:
    result = ShareModule(gm, gm.graph, type(gm).__name__)
    result.meta.update(gm.meta)
    derive_gathers(result)  # fx registers every buffer that a graph reads as part of the state
    return result


def shared_copy(
    gm: nn.Module, record: Record, instead: Mapping[int, object] | None = None
) -> Compiled:
    """A copy that shares its tensors, but for those ``instead`` of which, by ``id``, others are
    put; with ``record`` for its own."""
    result = structure_copy(gm, clone_buffers=False, memo=instead)
    if isinstance(result, fx.GraphModule):
        result = _share_module(result)
    return attach(result, record, verbs_of(gm))


def _pieces(module: nn.Module) -> dict[str, RewrittenLinear]:
    return {n: m for n, m in module.named_modules() if isinstance(m, RewrittenLinear)}


def _borrow_from(old: nn.Module, new: nn.Module) -> None:
    """Copying a piece by itself copies the bases that it borrows: let it borrow the same ones."""
    borrowed = {n: m for n, m in old.named_modules() if isinstance(m, BorrowedBasis)}
    for name, module in new.named_modules():
        if isinstance(module, BorrowedBasis):
            module.__dict__["_owner"] = borrowed[name].__dict__["_owner"]


def _root_slices(module: nn.Module) -> Mapping[str, Slice]:
    """The places of the slices from the root of a module of lowered pieces."""
    found: dict[str, Slice] = {}
    for name, piece in _pieces(module).items():
        for key, place in slices(piece).items():
            found.setdefault(key, replace(place, module=f"{name}.{place.module}"))
    return {key: found[key] for key in slices_of(module)}


def _compare(gm: nn.Module, lowered: nn.Module, example: object) -> None:
    record = record_of(gm)
    call = bind(gm, example)
    with quiet():
        expected, found = evaluated(gm, False)(**call), evaluated(lowered, False)(**call)
    distance = worst(expected, found)
    limit = tolerance(dtype_of(gm), 2 * len(record.plan.sites) + 1)
    if not distance.relative <= limit:
        raise CheckFailed(
            f"the lowered {type(gm).__name__} differs from the readable one: "
            f"{beyond_rounding(distance, limit)}. This is a fault of fxshare: report it, "
            "and use the readable one"
        )
