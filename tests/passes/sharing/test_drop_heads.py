"""DropHeads: whole heads go from a graph of any structure, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from passes import (
    DropHeads,
    DroppedHeads,
    NotWhole,
    RequiresError,
    Rows,
    ShapeError,
    SplitSite,
    dialect,
    linear_calls,
    run,
    slices,
    whole_heads,
)
from passes.errors import DialectError
from passes.graph.noted import noted
from passes.graph.slices import set_slices, slice_weight
from tests.passes.build import split
from tests.passes.sharing.test_narrow_heads import (
    FOUND,
    Attention,
    D,
    back,
    by_heads,
    inputs,
    scores,
)

Way = Callable[[Attention, Tensor], Tensor]


class Noting(fx.Interpreter):
    """Notes what every capture does of a node."""

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if isinstance(found, Tensor):
            n.meta |= noted(found.shape)
        return found


def graph(way: Way, heads: int, kv: int, fused: bool = False, by_head: bool = False) -> Any:
    gm = fx.symbolic_trace(Attention(way, heads, kv, fused).double())
    Noting(gm).run(inputs())
    sites = []
    for call in linear_calls(gm):
        name, size = call.name, len(call.weight_OI)
        rows = [Rows(name, 0, size)]
        if name == "qkv":
            ends = [0, heads * D, (heads + kv) * D, size]
            rows = [Rows(f"qkv.{part}", *ends[at : at + 2]) for at, part in enumerate("qkv")]
        if by_head and name != "o":
            rows = [
                Rows(f"{one.name}.{n}", one.start + n * D, one.start + (n + 1) * D)
                for one in rows
                for n in range((one.stop - one.start) // D)
            ]
        if not any(site.calls == (name,) for site in sites):
            sites.append(SplitSite((name,), tuple(rows)))
    return split(gm, *sites)


def selection(gm: fx.GraphModule, heads: int, kv: int, kept: tuple[int, ...]) -> DroppedHeads:
    """Rows of the graph's own linears, and another output."""
    group = heads // kv
    of: dict[str, dict[str, Tensor]] = {"q": {}, "k": {}, "v": {}}
    biases = {}
    for part, own in of.items():
        each, first = (group if part == "q" else 1) * D, 0
        for name in (n for n in slices(gm) if n.removeprefix("qkv.").split(".")[0] == part):
            linear = gm.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            size = linear.out_features
            rows = [r for g in kept for r in range(g * each - first, (g + 1) * each - first)]
            rows = [r for r in rows if 0 <= r < size]
            own[name], biases[name] = linear.weight.detach()[rows], linear.bias.detach()[rows]
            first += size
    generator = torch.Generator().manual_seed(1)
    wide = len(kept) * group * D
    consumer = torch.randn(5, wide, generator=generator, dtype=torch.float64)
    biases["o"] = torch.randn(5, generator=generator, dtype=torch.float64)
    return DroppedHeads("heads", kept, kv, of["q"], of["k"], of["v"], {"o": consumer}, biases)


def expected(way: Way, one: DroppedHeads, x: Tensor, heads: int, fused: bool) -> Tensor:
    """The dense module whose output has zeros where heads go."""
    dense = Attention(way, heads, one.of, fused).double().eval()
    each = heads // one.of * D
    columns = [c for group in one.kept for c in range(group * each, (group + 1) * each)]
    with torch.no_grad():
        dense.o.weight.zero_()
        dense.o.weight[:, columns] = one.consumers["o"]
        dense.o.bias.copy_(one.biases["o"])
        return dense(x)


KEPT = {"usual": (0, 2), "stacked": (2,)}
SOME = [name for name in FOUND if name not in ("one for all", "batch and heads as one")]


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_fewer_heads_are_all_heads_with_zeros(name: str, by_head: bool) -> None:
    way, heads, kv, fused = FOUND[name]
    gm = graph(way, heads, kv, fused, by_head).eval()
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    one = selection(gm, heads, kv, KEPT.get(name, (1,)))
    found, applied = run(gm, [DropHeads(selections=(one,))])
    assert applied[0].rewrites == len(one.weights) + 1
    x = inputs()
    wanted = expected(way, one, x, heads, fused)
    torch.testing.assert_close(found(x), wanted, rtol=1e-10, atol=1e-10)
    other = replace(one, kept=tuple((n + 1) % kv for n in one.kept))
    assert (wanted - expected(way, other, x, heads, fused)).abs().max() > 1e-4
    left = sum(found.get_submodule(slices(found)[n].module).out_features for n in one.keys)
    assert left == len(one.kept) * D
    for slice_, weight in before.items():
        if slice_.removesuffix(".weight") in one.weights:
            assert slice_weight(found, slice_.removesuffix(".weight")).shape == weight.shape
    dialect.check(found, "split")
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())
    shorter = inputs()[:1, :3]
    wanted = expected(way, one, shorter, heads, fused)
    torch.testing.assert_close(found(shorter), wanted, rtol=1e-10, atol=1e-10)


def test_all_heads_are_the_graph_as_it_was() -> None:
    gm = graph(*FOUND["in thirds"])
    one = selection(gm, 4, 2, (0, 1))
    found, applied = run(gm, [DropHeads(selections=(one,))])
    assert applied[0].rewrites == 0
    assert str(found.graph) == str(gm.graph)


def biased(shape: tuple[int, ...]) -> Way:
    def way(m: Attention, x: Tensor) -> Tensor:
        bias = torch.ones(shape).to(x)
        q, k, v = (by_heads(m, part(x), m.heads) for part in (m.q, m.k, m.v))
        return back(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))

    return way


def returned(m: Attention, x: Tensor) -> Tensor:
    weights = scores(m, x, 1)
    torch._assert(weights.sum() > -1, "shown")
    return back(weights @ by_heads(m, m.v(x), m.kv))


def between(change: Callable[[Tensor], Tensor]) -> Way:
    def way(m: Attention, x: Tensor) -> Tensor:
        q, k, v = (by_heads(m, part(x), m.heads) for part in (m.q, m.k, m.v))
        return back(change(q @ k.mT) @ v)

    return way


FINE: dict[str, Way] = {
    "a mask for all": biased((2, 1, 5, 5)),
    "a mask of positions": biased((5, 5)),
    "a mask that is added": between(lambda s: (s * 0.5 + torch.ones(5, 5).to(s)).softmax(-1)),
    "capped": between(lambda s: (torch.tanh(s / 3.0) * 3.0).softmax(dim=-1)),
    "filled": between(lambda s: s.masked_fill(torch.ones(1, 1, 5, 5) < 0, -1e9).softmax(3)),
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_the_same_for_all_heads_may_be_there(name: str) -> None:
    gm = graph(FINE[name], 3, 3).eval()
    one = selection(gm, 3, 3, (0, 2))
    found, _ = run(gm, [DropHeads(selections=(one,))])
    wanted = expected(FINE[name], one, inputs(), 3, False)
    torch.testing.assert_close(found(inputs()), wanted, rtol=1e-10, atol=1e-10)


LEFT: dict[str, tuple[Way, int, int, str]] = {
    "a bias of each head": (biased((3, 5, 5)), 3, 3, "other numbers for each head"),
    "a factor of each head": (
        between(lambda s: (s * torch.ones(3, 1, 1).to(s)).softmax(-1)),
        3,
        3,
        "other numbers for each head",
    ),
    "mixed heads": (between(lambda s: s.softmax(1)), 3, 3, "no scores alone.*'softmax'"),
    "shown scores": (returned, 3, 3, "scores that go to 'sum_1' as well"),
    "one key": (FOUND["one for all"][0], 4, 1, "all share one key"),
    "batch and heads as one": (FOUND["batch and heads as one"][0], 3, 3, "no scores alone|as one"),
    "a norm": (
        lambda m, x: back(
            F.scaled_dot_product_attention(
                m.norm(by_heads(m, m.q(x), 3)), by_heads(m, m.k(x), 3), by_heads(m, m.v(x), 3)
            )
        ),
        3,
        3,
        "'norm'",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_tells_heads_apart_is_left_alone_with_the_reason(name: str) -> None:
    way, heads, kv, reason = LEFT[name]
    gm = graph(way, heads, kv)
    made = {call.node: call for call in linear_calls(gm)}

    def leaf(node: fx.Node) -> dict[str, int] | None:
        return {made[node].name: len(made[node].weight_OI)} if node in made else None

    reading = [node for node, call in made.items() if call.name == "o"]
    with pytest.raises(NotWhole, match=reason):
        whole_heads(gm, reading, leaf, heads * D)
    with pytest.raises(RequiresError, match=r"drop-heads: 'o' .*leave 'heads' out"):
        run(gm, [DropHeads(selections=(selection(gm, heads, kv, (0,)),))])


@given(
    st.integers(2, 4),
    st.integers(1, 3),
    st.data(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=20)
def test_any_structure(
    kv: int, group: int, data: st.DataObject, sdpa: bool, fused: bool, by_head: bool
) -> None:
    """Heads and groups of any number, any of which stay, attention in one call or written out."""
    heads = kv * group
    kept = tuple(sorted(data.draw(st.sets(st.integers(0, kv - 1), min_size=1, max_size=kv - 1))))

    def way(m: Attention, x: Tensor) -> Tensor:
        if fused:
            parts = m.qkv(x).split([heads * D, kv * D, kv * D], dim=-1)
        else:
            parts = m.q(x), m.k(x), m.v(x)
        q, k, v = (parts[at].unflatten(-1, (-1, D)).transpose(1, 2) for at in range(3))
        if sdpa:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
        else:
            k, v = (one.repeat_interleave(group, 1) for one in (k, v))
            z = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return z.swapaxes(1, 2).reshape(x.size(0), x.size(1), -1)

    gm = graph(way, heads, kv, fused, by_head).eval()
    one = selection(gm, heads, kv, kept)
    found, _ = run(gm, [DropHeads(selections=(one,))])
    wanted = expected(way, one, inputs(), heads, fused)
    torch.testing.assert_close(found(inputs()), wanted, rtol=1e-10, atol=1e-10)


def test_wrong_sizes_and_names_are_refused() -> None:
    gm = graph(*FOUND["usual"])
    one = selection(gm, 3, 3, (0, 2))

    def refused(wrong: DroppedHeads, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            run(gm, [DropHeads(selections=(wrong,))])

    refused(replace(one, kept=(2, 0)), RequiresError, "ascending numbers from 0 to 2")
    refused(replace(one, kept=(0, 3)), RequiresError, "ascending numbers from 0 to 2")
    refused(replace(one, kept=()), RequiresError, "ascending numbers from 0 to 2")
    refused(replace(one, kept=(1,)), ShapeError, r"'q' has 12 rows .* expected \(4, 12\)")
    cut = {"o": one.consumers["o"][:, :-1]}
    refused(replace(one, consumers=cut), ShapeError, r"'o' has 12 inputs .* expected \(5, 8\)")
    refused(replace(one, values={"w": one.values["v"]}), RequiresError, "'w' of 'heads' is not a")
    turned = replace(one, queries=one.keys, keys=one.queries)
    refused(turned, RequiresError, r"3 heads of \['k', 'q', 'v'\]; the graph has 3 of \['q', 'k'")
    with pytest.raises(RequiresError, match="stands in no graph that shows"):
        run(gm, [DropHeads(selections=(one,), apart=True)])


def test_heads_that_are_not_recorded_break_a_rule() -> None:
    gm = graph(*FOUND["usual"])
    found, _ = run(gm, [DropHeads(selections=(selection(gm, 3, 3, (0, 2)),))])
    place = slices(found)["v"]
    assert place.unit_rows is not None
    set_slices(found, {"v": replace(place, unit_rows=replace(place.unit_rows, kept=(1,)))})
    with pytest.raises(DialectError, match="8 where 4 times 1 are recorded"):
        dialect.check(found, "split")
