"""What holds for every pass on every model of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import fx

from passes import (
    CleanUp,
    FuseCoefficients,
    LookedUp,
    LookUpRows,
    ObserveGradients,
    ObserveInputs,
    Pass,
    PivotBasis,
    ReuseBasis,
    ShareBasis,
    SplitLinear,
    equal_outputs,
    linear_calls,
    lookups,
    run,
    slice_weight,
    slices,
)
from tests.passes.build import Cut, captured, groups, inputs, pivoted, sites
from tests.toys import BRANCHES, TIED_MLP, TOYS, Toy, same_tensors, tensors_of

EXACT = 1e-12
_SHARED: dict[tuple[str, str, bool], list[Pass]] = {}


def _split(toy: Toy, cut: Cut) -> Pass:
    return SplitLinear(sites=sites(toy, captured(toy), cut))


def _shared(toy: Toy, cut: Cut, pool: bool) -> list[Pass]:
    """Split and share; the factors are the same for every test of a toy."""
    key = (toy.name, cut, pool)
    if key not in _SHARED:
        first = _split(toy, cut)
        gm, _ = run(captured(toy), [first])
        _SHARED[key] = [first, ShareBasis(groups=groups(gm, pool))]
    return _SHARED[key]


def _looked_up(toy: Toy) -> Pass:
    """Every embedding, with the linears that are tied to it."""
    gm, found = captured(toy), []
    for lookup in {lookup.name: lookup for lookup in lookups(gm)}.values():
        tied = [c.name for c in linear_calls(gm) if c.weight_OI is lookup.weight_VI]
        found.append(LookedUp(lookup.name, (lookup.name,), tuple(tied)))
    return LookUpRows(sites=tuple(found))


def _pivot(toy: Toy) -> Pass:
    share = _shared(toy, "parts", True)[1]
    assert isinstance(share, ShareBasis)
    return PivotBasis(groups=tuple(pivoted(group) for group in share.groups))


@dataclass(frozen=True)
class Stage:
    """A pass in a place where it has something to do: what runs before it, and the pass."""

    name: str
    make: Callable[[Toy], tuple[Sequence[Pass], Pass]]
    idempotent: bool = False


STAGES = (
    Stage("split-whole", lambda t: ([], _split(t, "whole"))),
    Stage("look-up", lambda t: ([], _looked_up(t))),
    Stage("split-parts", lambda t: ([], _split(t, "parts"))),
    Stage("split-heads", lambda t: ([], _split(t, "heads"))),
    Stage("split-uneven", lambda t: ([], _split(t, "uneven"))),
    Stage("share", lambda t: (_shared(t, "parts", False)[:1], _shared(t, "parts", False)[1])),
    Stage("reuse", lambda t: (_shared(t, "heads", True), ReuseBasis()), idempotent=True),
    Stage(
        "fuse",
        lambda t: ([*_shared(t, "heads", True), ReuseBasis()], FuseCoefficients()),
        idempotent=True,
    ),
    Stage("clean-up", lambda t: (_shared(t, "heads", True), CleanUp()), idempotent=True),
    Stage(
        "observe",
        lambda t: ([], ObserveInputs(sites=tuple(c.name for c in linear_calls(captured(t))))),
    ),
    Stage("pivot", lambda t: ([*_shared(t, "parts", True), ReuseBasis()], _pivot(t))),
    Stage(
        "taps",
        lambda t: ([], ObserveGradients(sites=tuple(c.name for c in linear_calls(captured(t))))),
    ),
)
PLACES = [
    pytest.param(stage, toy, id=f"{stage.name}-{toy.name}") for stage in STAGES for toy in TOYS
]


def _placeholders(gm: fx.GraphModule) -> list[tuple[str, object]]:
    return [(str(n.target), n.args) for n in gm.graph.nodes if n.op == "placeholder"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # pivoting a square basis
@pytest.mark.parametrize(("stage", "toy"), PLACES)
def test_invariants(stage: Stage, toy: Toy) -> None:
    earlier, one = stage.make(toy)
    source, _ = run(captured(toy), earlier)
    text, tensors, keys = str(source.graph), tensors_of(source), list(source.state_dict())

    result, (applied,) = run(source, [one])

    # the source is as it was
    assert str(source.graph) == text
    assert same_tensors(tensors_of(source), tensors)
    assert list(source.state_dict()) == keys
    # the result is a graph with the same border
    result.graph.lint()
    assert _placeholders(result) == _placeholders(source)
    assert (applied.name, applied.exact) == (one.name, one.exact)
    # zero rewrites if and only if the text is the same
    assert (applied.rewrites == 0) == (str(result.graph) == text)
    # exact passes, and sharing with exact factors, compute the same
    assert equal_outputs(captured(toy), result, inputs(toy), tolerance=EXACT)
    if stage.idempotent:
        again, (second,) = run(result, [one])
        assert second.rewrites == 0
        assert list(again.state_dict()) == list(result.state_dict())


@pytest.mark.parametrize("toy", TOYS, ids=lambda t: t.name)
@pytest.mark.parametrize("cut", ["parts", "heads", "uneven"])
def test_slices_stand_for_the_same_weights_through_every_pass(toy: Toy, cut: Cut) -> None:
    shared = _shared(toy, cut, True)
    split, _ = run(captured(toy), shared[:1])
    weights = {name: slice_weight(split, name) for name in slices(split)}
    rest = [shared[1], ReuseBasis(), FuseCoefficients(), CleanUp()]

    def check(one: Pass, gm: fx.GraphModule) -> None:
        assert list(slices(gm)) == list(weights)
        for name, weight in weights.items():
            gap = (slice_weight(gm, name) - weight).abs().max()
            assert gap <= EXACT * weight.abs().max(), (one.name, name)

    run(split, rest, watch=check)


@pytest.mark.parametrize("toy", TOYS, ids=lambda t: t.name)
def test_exact_mode_stores_nothing_new(toy: Toy) -> None:
    source = captured(toy)
    result, _ = run(source, [_split(toy, "uneven"), CleanUp()])
    assert sum(p.numel() for p in result.parameters()) == sum(
        p.numel() for p in source.parameters()
    )
    storages = {p.untyped_storage()._cdata for p in source.parameters()}
    assert {p.untyped_storage()._cdata for p in result.parameters()} <= storages


@pytest.mark.parametrize("toy", [BRANCHES, TIED_MLP], ids=lambda t: t.name)
def test_exact_passes_give_the_same_gradients(toy: Toy) -> None:
    source = captured(toy)
    result, _ = run(source, [_split(toy, "uneven"), CleanUp()])

    def input_gradient(gm: fx.GraphModule) -> torch.Tensor:
        (x,) = inputs(toy)
        x.requires_grad_()
        out = gm(x)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(
        input_gradient(result), input_gradient(source), rtol=1e-12, atol=1e-12
    )
