"""Run passes one after the other, and hold each to its contract."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from passes.base import Pass
from passes.errors import EnsuresError, FxShareError, NameFault, PassError
from passes.graph.graph import structure_copy
from passes.graph.names import check_names
from passes.sharing.pivot_basis import leave_out_derived

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Applied:
    """What one pass did."""

    name: str
    rewrites: int
    exact: bool
    seconds: float


def run(
    gm: fx.GraphModule,
    passes: Sequence[Pass],
    *,
    expect: Mapping[str, int] | None = None,
    watch: Callable[[Pass, fx.GraphModule], None] | None = None,
    code: bool = True,
) -> tuple[fx.GraphModule, tuple[Applied, ...]]:
    """Apply ``passes`` in order to a copy of ``gm``; ``gm`` itself stays as it is.

    The copy shares its parameters with ``gm``. ``expect`` maps pass names to the number of rewrites
    that the caller counts on. ``watch`` is called after each pass with the graph so far.
    Without ``code`` the result has none that is up to date: for a graph that goes into another
    module, since to write the code takes longer than most passes.

    Held after every pass, beside its own ``ensures``: the graph lints, inputs and outputs are the
    same, no tensor was written into, no parameter got a second owner, and the count is honest
    (zero rewrites means unchanged text).

    Raises :class:`PassError` and its kinds, always naming the pass.
    """
    result = structure_copy(gm, clone_buffers=False, without_code=True)
    leave_out_derived(result)
    applied: list[Applied] = []
    stale = True  # the code, which ours do not read
    for one in passes:
        if not isinstance(one, Pass):
            raise PassError(
                f"expected an instance of passes.Pass in the list of passes, found {one!r}; "
                "give the pass itself, not its class or its name"
            )
        if stale and not _is_ours(one):
            _write_code(result, applied)
            stale = False
        applied.append(_apply(result, one))
        stale = stale or (_is_ours(one) and applied[-1].rewrites > 0)
        wanted = (expect or {}).get(one.name)
        if wanted is not None and wanted != applied[-1].rewrites:
            raise EnsuresError(
                f"{one.name}: expected {wanted} rewrites, made {applied[-1].rewrites}"
            )
        if watch is not None:
            if stale:
                _write_code(result, applied)
                stale = False
            watch(one, result)
    if stale and code:
        _write_code(result, applied)
    return result, tuple(applied)


def _is_ours(one: Pass) -> bool:
    """Whether a pass is of this package: those of users may run the graph or read its code."""
    return type(one).__module__.partition(".")[0] == __name__.partition(".")[0]


def _write_code(gm: fx.GraphModule, applied: Sequence[Applied]) -> None:
    try:
        gm.recompile()
    except Exception as error:
        by = ", ".join(repr(one.name) for one in applied if one.rewrites)
        if not by:
            raise  # the graph that was given
        raise EnsuresError(f"one of the passes {by} left an invalid graph: {error}") from error


def _apply(gm: fx.GraphModule, one: Pass) -> Applied:
    start = time.perf_counter()
    before = _Snapshot.of(gm)
    try:
        one.requires(gm)
        rewrites = one.rewrite(gm)
    except FxShareError:
        raise
    except Exception as error:
        raise PassError(
            f"pass {one.name or type(one).__name__!r} failed with {type(error).__name__}: {error}"
        ) from error
    if not isinstance(rewrites, int) or isinstance(rewrites, bool) or rewrites < 0:
        raise EnsuresError(
            f"pass {one.name!r} returned {rewrites!r}; expected the number of rewrites, an int"
        )
    before.check(gm, one, rewrites)
    one.ensures(gm)
    seconds = time.perf_counter() - start
    called = one.name or type(one).__name__
    _LOG.debug("pass %s: %d rewrites in %.3f s", called, rewrites, seconds)
    return Applied(one.name, rewrites, one.exact, seconds)


@dataclass(frozen=True)
class _Snapshot:
    nodes: tuple[object, ...]
    inputs: tuple[tuple[str, object], ...]
    output: pytree.TreeSpec
    versions: Mapping[str, tuple[Tensor, int]]
    shared: frozenset[int]

    @staticmethod
    def of(gm: fx.GraphModule) -> _Snapshot:
        tensors = dict(gm.named_parameters()) | dict(gm.named_buffers())
        return _Snapshot(
            nodes=_nodes(gm.graph),
            inputs=_inputs(gm.graph),
            output=_output(gm.graph),
            versions={name: (t, _version(t)) for name, t in tensors.items()},
            shared=frozenset(_owned_twice(gm)),
        )

    def check(self, gm: fx.GraphModule, one: Pass, rewrites: int) -> None:
        try:
            check_names(gm.graph)
        except NameFault as error:
            raise NameFault(f"pass {one.name!r}: {error}") from error
        try:
            gm.graph.lint()
            if rewrites and not _is_ours(one):  # without any the text is that of the code there is
                gm.recompile()
        except Exception as error:
            raise EnsuresError(f"pass {one.name!r} left an invalid graph: {error}") from error
        if _inputs(gm.graph) != self.inputs or _output(gm.graph) != self.output:
            raise EnsuresError(f"pass {one.name!r} changed the inputs or outputs of the graph")
        if rewrites == 0 and _nodes(gm.graph) != self.nodes:
            raise EnsuresError(f"pass {one.name!r} says 0 rewrites but changed the graph text")
        for name, (tensor, version) in self.versions.items():
            if _version(tensor) != version:
                raise EnsuresError(
                    f"pass {one.name!r} wrote into tensor {name!r}, which the caller's graph "
                    "shares; make a new tensor instead"
                )
        twice = {k: v for k, v in _owned_twice(gm).items() if k not in self.shared}
        if twice:
            raise EnsuresError(
                f"pass {one.name!r} gave one parameter two owners: {next(iter(twice.values()))}"
            )


def _version(tensor: Tensor) -> int:
    # made under torch.inference_mode, a tensor does not count the writes to it
    return -1 if tensor.is_inference() else tensor._version


def _nodes(graph: fx.Graph) -> tuple[object, ...]:
    """What the text of a graph says, without writing it, which took longer than most passes."""
    return tuple((n, n.name, n.op, n.target, n.args, n.kwargs, n.type) for n in graph.nodes)


def _inputs(graph: fx.Graph) -> tuple[tuple[str, object], ...]:
    return tuple((str(n.target), n.args) for n in graph.nodes if n.op == "placeholder")


def _output(graph: fx.Graph) -> pytree.TreeSpec:
    (output,) = (n for n in graph.nodes if n.op == "output")
    return pytree.tree_structure(output.args, is_leaf=lambda x: isinstance(x, fx.Node))


def _owned_twice(gm: fx.GraphModule) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in owners.items() if len(names) > 1}


def equal_outputs(
    before: fx.GraphModule, after: fx.GraphModule, inputs: Sequence[object], *, tolerance: float
) -> bool:
    """Whether both graphs agree on ``inputs``: largest difference over largest magnitude of each
    output tensor at most ``tolerance``. For tests of a pass of one's own."""
    with torch.no_grad():
        pairs = zip(
            pytree.tree_leaves(before(*inputs)), pytree.tree_leaves(after(*inputs)), strict=True
        )
        for left, right in pairs:
            if isinstance(left, Tensor):
                scale = max(float(left.abs().max()), 1e-30)
                if not float((left - right).abs().max()) <= tolerance * scale:
                    return False
    return True
