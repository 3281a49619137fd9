"""A graph with a cache, rewritten like the plain one, that runs on the plain one's modules."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from fxshare.capture import Captured, device_of, dtype_of
from fxshare.capture.adapted import adapt
from fxshare.capture.steered import SteeredGraph
from fxshare.capture.tracing.functions import FunctionCall, function_calls
from fxshare.capture.tracing.regions import PLAIN, keep_apart, keep_modes, own_modes
from fxshare.capture.tracing.trace import hold_guards, trace_once
from fxshare.capture.tracing.values import fake_like, fake_mode
from fxshare.errors import CaptureError
from fxshare.factors.empty import empty_codes, empty_factors, empty_units
from fxshare.generation.encoder_decoder import part_of_plan, source_like, warm_step
from fxshare.generation.step import CACHE, Kind, Values, arguments_of, nested
from fxshare.models.structure import Structure, structure_of, tensors_by_name
from fxshare.result.module import ShareModule, record_of
from fxshare.result.products import slices_of
from fxshare.result.record import Record
from fxshare.rewriting.lowering import replay
from fxshare.rewriting.rewrite import rewrite
from fxshare.sites.visible import unstacked
from passes import StoreCodes
from passes.graph.graph import structure_copy
from passes.graph.noted import NOTED

# of the traced step: a batch, new tokens, and more tokens in the cache than any window is wide
_BATCH, _NEW, _OLD = 2, 3, 5


@dataclass(eq=False)
class Program:
    """``graph`` is the rewritten graph with a cache, its tensors without values; ``constants`` are
    tensors that the trace made."""

    kind: Kind
    graph: fx.GraphModule
    constants: dict[str, Tensor]
    _bound: fx.GraphModule | None = None
    _parts: tuple[int, ...] = field(default=())
    _has_code: bool = False

    def bound(self, gm: nn.Module, *, code: bool = True) -> fx.GraphModule:
        """The graph over the present modules and tensors of ``gm``; made anew where one of them was
        replaced since. Without ``code`` it is only to be interpreted.

        Raises :class:`CaptureError` naming what the graph reads and ``gm`` does not have.
        """
        parts = dict(self._resolved(gm))
        identities = tuple(map(id, parts.values()))
        if self._bound is None or identities != self._parts:
            self._bound = _side_by_side(self.graph.graph, parts).eval()
            self._parts, self._has_code = identities, False
        if code and not self._has_code:
            self._bound.recompile()
            self._has_code = True
        return self._bound

    def forget(self) -> None:
        """Make the graph module anew at the next :meth:`bound`."""
        self._bound = None

    def _resolved(self, gm: nn.Module) -> Iterator[tuple[str, Any]]:
        device = device_of(gm)
        structure = structure_of(gm)
        assert structure is not None
        known = tensors_by_name(gm, structure.model)
        for node in self.graph.graph.nodes:
            target = str(node.target)
            if node.op == "get_attr" and target in self.constants:
                if self.constants[target].device != device:
                    self.constants[target] = self.constants[target].to(device)
                yield target, self.constants[target]
            elif node.op == "get_attr":
                yield target, _tensor(known, target, operator.attrgetter(target)(self.graph))
            elif node.op == "call_module":
                yield target, _module(gm, known, target, self.graph.get_submodule(target))


def _side_by_side(graph: fx.Graph, parts: Mapping[str, Any]) -> fx.GraphModule:
    """The graph with every part an attribute of its root: finding each through ``a.b.c`` at every
    step takes a tenth of the time of small models."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for target in parts:
        name = target.replace(".", "_")
        while name in taken:
            name += "_"
        taken.add(name)
        names[target] = name
    flat = fx.Graph()
    flat.output(flat.graph_copy(graph, {}))
    for node in flat.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = names[node.target]
    root = {names[target]: part for target, part in parts.items()}
    return SteeredGraph(root, flat, "Step", code=False)


def _tensor(known: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    found = known.get(name)
    if found is None or found.shape != like.shape:
        what = "nothing" if found is None else f"shape {tuple(found.shape)}"
        raise CaptureError(
            f"the graph with a cache reads {name!r} of shape {tuple(like.shape)}, and the plain "
            f"graph has {what} of that name"
        )
    return found


def _module(gm: nn.Module, known: Mapping[str, Tensor], name: str, like: nn.Module) -> nn.Module:
    """The module of ``gm``; where that is no module but a place for tensors (torch.export), or the
    plain graph does not call it, one like it that reads the tensors of ``gm``."""
    if isinstance(like, FunctionCall):  # numbered in the order of its own graph
        return like
    try:
        found = gm.get_submodule(name)
    except AttributeError:
        found = None
    # weights in another packing than the graph expects are told by their shapes
    if found is not None and type(found).__module__ != "torch.fx.graph_module":
        is_module = type(found).forward is not nn.Module().forward.__func__  # type: ignore[attr-defined]
        if is_module and (type(found) is not type(like) or _shapes(found) == _shapes(like)):
            return found
    borrowed = copy.copy(like)
    borrowed._parameters, borrowed._buffers = dict(like._parameters), dict(like._buffers)
    for held in (borrowed._parameters, borrowed._buffers):
        for leaf, tensor in held.items():
            if tensor is not None:
                held[leaf] = _tensor(known, f"{name}.{leaf}", tensor)  # type: ignore[assignment]
    return borrowed


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in (*module.parameters(), *module.buffers())]


def capture_program(gm: nn.Module, shell: nn.Module, kind: Kind) -> Program:
    """Trace the original's structure on a step of that kind and rewrite it as ``gm`` was rewritten.

    Nothing is run and nothing allocated: the weights have no values.

    Raises :class:`CaptureError` where the model cannot be traced so.
    """
    structure = structure_of(gm)
    assert structure is not None
    if kind.takes("inputs_embeds"):
        raise CaptureError("it begins with embeddings, and the plain graph with tokens")
    try:
        traced, constants = _traced(gm, shell, kind, structure)
        graph = _rewritten(traced, structure, record_of(gm), gm)
        program = Program(kind, graph, constants)
        program.bound(gm, code=False)
    except CaptureError:
        raise
    except Exception as error:  # code of the model, of transformers, or of a user's pass
        reason = str(error).strip().splitlines() or [""]
        raise CaptureError(f"{type(error).__name__}: {reason[0]}") from error
    return program


def _traced(
    gm: nn.Module, shell: nn.Module, kind: Kind, structure: Structure
) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    mode = fake_mode()
    model = adapt(structure.model).traced
    root = structure_copy(model, memo=_fakes(model, gm, mode))
    untouched = [(part, dict(part.__dict__), dict(part._buffers)) for part in root.modules()]
    call = _call(root, shell, kind, mode, gm)
    for part, attributes, buffers in untouched:
        # tensors that the steps before left there (frequencies of a longer context) have no
        # values; the trace makes its own
        left = [n for n, v in part.__dict__.items() if isinstance(v, Tensor)]
        for name in left:
            del part.__dict__[name]
        part.__dict__.update({n: v for n, v in attributes.items() if isinstance(v, Tensor)})
        part.__dict__["_buffers"] = buffers
    missing = set(kind.inputs) ^ {name for name in call if name not in dict(kind.constants)}
    if missing:
        raise CaptureError(
            f"{type(model).__name__}.prepare_inputs_for_generation makes another call "
            f"than this one: {sorted(missing)[0]!r} is in one of them only"
        )
    before = {name for name, _ in _named_tensors(root)}
    _take_apart(root, call, encoder=kind.cache is None)
    graph, guards = trace_once(root, call, training=False, mode=mode, objects=(CACHE,))
    own = own_modes(graph, None, PLAIN, None)
    hold_guards(graph, guards)
    keep_modes(root, graph, own)
    _keep_lengths(graph)
    for node in graph.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _of_python)
        node.meta = {key: value for key, value in node.meta.items() if key in NOTED}
    graph._tracer_cls = None
    made = {name: t for name, t in _named_tensors(root) if name not in before}
    # passes look at weights, and fake ones answer only to their own mode
    hollow = structure_copy(model)
    for name, tensor in made.items():
        setattr(hollow, name, tensor.detach())
    for name, function in function_calls(root).items():
        hollow.add_module(name, function)
    traced = SteeredGraph(hollow, graph, type(model).__name__, code=False)
    keep_apart(traced)
    return traced, made


def _of_python(value: Any) -> Any:
    """A number of numpy as one of Python: code that says ``np.float64(1.5)`` lacks that name."""
    return value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value


def kept_length(length: int | Tensor) -> int | Tensor:
    """The length as it is now: a static cache counts in a tensor, once it holds anything."""
    return length.clone() if isinstance(length, Tensor) else length


def _keep_lengths(graph: fx.Graph) -> None:
    """Let no length that was read from a static cache change with the cache. The models' own code
    asks whether it is a tensor, which a proxy is not."""
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target == "get_seq_length" and "ndim" in node.meta:
            with graph.inserting_after(node):
                kept = graph.call_function(kept_length, (node,))
            kept.meta.update(node.meta)
            node.replace_all_uses_with(
                kept, delete_user_cb=lambda user, kept=kept: user is not kept
            )


def _fakes(model: nn.Module, gm: nn.Module, mode: Any) -> dict[int, object]:
    """For each tensor of the structure a fake one, of the dtype that ``gm`` has now."""
    device, dtype, then = device_of(gm), dtype_of(gm), dtype_of(model)
    known = dict(gm.named_parameters()) | dict(gm.named_buffers())
    memo: dict[int, object] = {}
    for name, tensor in _named_tensors(model):
        of = known[name].dtype if name in known else tensor.dtype
        if name not in known and tensor.dtype == then:
            of = dtype
        memo[id(tensor)] = fake_like(mode, tensor, of, device).requires_grad_(False)
    return memo


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        for held in (part._parameters, part._buffers, part.__dict__):
            for leaf, value in held.items():
                if isinstance(value, Tensor):
                    yield f"{prefix}{leaf}", value


def _call(root: nn.Module, shell: nn.Module, kind: Kind, mode: Any, gm: nn.Module) -> Values:
    """The call to trace, on fake tensors."""
    if kind.cache is not None and kind.cache.cross is None:
        call = _warm_step(root, shell, kind, mode)
    else:
        source = {name: (value.shape, value.dtype) for name, value in source_like(gm, kind).items()}
        with mode, torch.no_grad():
            fakes = {
                name: torch.ones(shape, dtype=dtype, device=device_of(gm))
                for name, (shape, dtype) in source.items()
            }
            if kind.cache is None:
                call = {**fakes, **dict(kind.constants)}
            else:
                call = warm_step(root, shell, kind, fakes, (_OLD, _NEW))
    # in the order of the graph's inputs, constants last
    return {name: call[name] for name in (*kind.inputs, *call) if name in call}


def _warm_step(root: nn.Module, shell: nn.Module, kind: Kind, mode: Any) -> Values:
    """A step after others, so that the path for a cache with something in it, and for windows that
    have left tokens behind, is taken. Those for less are special cases of it."""
    assert kind.cache is not None
    windows = [
        getattr(layer, "sliding_window", 0) for layer in kind.cache.new(shell.config, 1).layers
    ]
    old = _OLD + max(windows, default=0)
    length = old + _NEW
    with mode, torch.no_grad():
        ids = torch.ones(_BATCH, length, dtype=torch.long, device=device_of(shell))
        mask = torch.ones_like(ids)
        cache = kind.cache.new(shell.config, 2 * length)
        root(**nested(arguments_of(shell, kind, ids[:, :old], mask[:, :old], cache, old)))
        return arguments_of(shell, kind, ids, mask, cache, _NEW)


def _take_apart(root: nn.Module, call: Values, *, encoder: bool) -> None:
    """Let the root's class take the entries of dictionaries as arguments of their own, and stand
    for its encoder where that is what is called."""
    if not encoder and not any("__" in name for name in call):
        return
    original: Any = type(root)

    def forward(self: Any, **values: Any) -> Any:
        if encoder:
            return self.get_encoder()(**nested(values))
        return original.forward(self, **nested(values))

    members = {"forward": forward, "__module__": original.__module__}
    root.__class__ = type(original.__name__, (original,), members)


def _rewritten(
    traced: fx.GraphModule, structure: Structure, record: Record, gm: nn.Module
) -> fx.GraphModule:
    """The default passes and the lowering, as ``gm`` had them; they need no values."""
    captured = Captured(structure.model, "fx", traced, None, (), None, (), 0.0)
    captured = unstacked(captured, record.plan.sites)
    plan = record.plan
    if structure.model.config.is_encoder_decoder:
        plan = part_of_plan(plan, captured.graph)
    groups, pivots = empty_factors(plan, lambda _: dtype_of(gm), torch.device("meta"))
    kept = {rows.name: rows.kept for x in slices_of(gm).values() if (rows := x.unit_rows)}
    units = empty_units(plan, lambda _: dtype_of(gm), torch.device("meta"), kept)
    codes = empty_codes(plan, lambda _: dtype_of(gm), torch.device("meta"))
    rewritten, _ = rewrite(
        captured.graph,
        plan,
        groups,
        record.config.fuse,
        structure.passes,
        pivots=pivots,
        units=units,
        codes=StoreCodes(weights=codes),
    )
    whole = ShareModule(rewritten, rewritten.graph, type(traced).__name__, code=False)
    whole.meta.update(rewritten.meta)
    result, _ = replay(whole, record)
    assert isinstance(result, fx.GraphModule)
    return result
