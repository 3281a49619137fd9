"""NarrowKeys: narrower queries and keys, found in a graph, and what it refuses."""

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
    KeptUnits,
    NarrowedKeys,
    NarrowKeys,
    RequiresError,
    Rows,
    ShapeError,
    SplitSite,
    attention_scores,
    calls_by_slices,
    dialect,
    linear_calls,
    run,
    slices,
    together,
)
from tests.passes.build import split
from tests.passes.sharing.test_narrow_heads import IN, Attention, back, by_heads, inputs

D = 8
HALVES, PAIRS = ("halves", D), ("neighbours", D)
NONE = ("none", 0)


def tables(x: Tensor, width: int = D, *, twice: str = "halves") -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions, ``(1, 1, tokens, width)``."""
    at = torch.arange(x.size(1), dtype=x.dtype)[:, None]
    angles = at * 0.7 ** torch.arange(width // 2, dtype=x.dtype)
    whole = (
        torch.cat([angles, angles], -1)
        if twice == "halves"
        else torch.repeat_interleave(angles, 2, dim=-1)
    )
    return whole.cos()[None, None], whole.sin()[None, None]


def half_turned(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = y.size(-1) // 2
    return y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin


def chunk_turned(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = y.chunk(2, dim=-1)
    return torch.add(y * cos, torch.cat((-second, first), dim=-1) * sin)


def pair_turned(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    other = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
    return y * cos + other * sin


def heads_of(m: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return by_heads(m, m.q(x), m.heads), by_heads(m, m.k(x), m.kv), by_heads(m, m.v(x), m.kv)


def attend(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return back(F.scaled_dot_product_attention(q, k, v, enable_gqa=m.heads != m.kv))


def plain(m: Attention, x: Tensor) -> Tensor:
    return attend(m, *heads_of(m, x))


def written_out(m: Attention, x: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    k, v = (one.repeat_interleave(m.heads // m.kv, 1) for one in (k, v))
    return back((torch.matmul(q, k.transpose(2, 3)) / q.size(-1) ** 0.5).softmax(-1) @ v)


def scaled_first(m: Attention, x: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    b, h, t, d = q.shape
    q, k = ((one * D**-0.5).reshape(b * h, t, d) for one in (q, k.expand(b, h, t, d)))
    return back(torch.bmm(q, k.transpose(1, 2)).softmax(-1).view(b, h, t, t) @ v)


def in_thirds(m: Attention, x: Tensor) -> Tensor:
    parts = m.qkv(x).split([m.heads * D, m.kv * D, m.kv * D], dim=-1)
    q, k, v = (by_heads(m, parts[at], n) for at, n in enumerate((m.heads, m.kv, m.kv)))
    cos, sin = tables(x)
    return attend(m, half_turned(q, cos, sin), half_turned(k, cos, sin), v)


def turned(
    turn: Callable[[Tensor, Tensor, Tensor], Tensor], twice: str = "halves"
) -> Callable[[Attention, Tensor], Tensor]:
    def way(m: Attention, x: Tensor) -> Tensor:
        q, k, v = heads_of(m, x)
        cos, sin = tables(x, twice=twice)
        return attend(m, turn(q, cos, sin), turn(k, cos, sin), v)

    return way


def partly(m: Attention, x: Tensor) -> Tensor:
    """Four numbers of eight are turned."""
    q, k, v = heads_of(m, x)
    cos, sin = tables(x, 4)
    q, k = (torch.cat((half_turned(one[..., :4], cos, sin), one[..., 4:]), -1) for one in (q, k))
    return attend(m, q, k, v)


FOUND: dict[str, tuple[Any, int, int, bool, tuple[str, int]]] = {
    "plain": (plain, 4, 2, False, NONE),
    "written out": (written_out, 4, 2, False, NONE),
    "batch and heads as one": (scaled_first, 3, 3, False, NONE),
    "halves": (turned(half_turned), 4, 2, False, HALVES),
    "one key for all": (turned(chunk_turned), 4, 1, False, HALVES),
    "in thirds": (in_thirds, 4, 2, True, HALVES),
    "neighbours": (turned(pair_turned, "pairs"), 2, 2, False, PAIRS),
    "partly": (partly, 2, 1, False, ("halves", 4)),
}


def normed(m: Attention, x: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    q = q * (q.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    return attend(m, q, k, v)


def other_pairs(m: Attention, x: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    cos, sin = tables(x)
    q, k = (one * cos + one.flip(-1)[..., :] * sin for one in (q, k))
    return attend(m, q, k, v)


def three_turned(m: Attention, x: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    cos, sin = tables(x)
    q, k = (one * cos + torch.cat([one[..., 3:], one[..., :3]], -1) * sin for one in (q, k))
    return attend(m, q, k, v)


def lifted(m: Attention, x: Tensor) -> Tensor:
    """Numbers that are added would still be multiplied where rows are zeros."""
    q, k, v = heads_of(m, x)
    cos, _ = tables(x)
    return attend(m, q + cos, k + cos, v)


def read_twice(m: Attention, x: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    return attend(m, q, k, v) * q.sum()


LEFT: dict[str, tuple[Callable[[Attention, Tensor], Tensor], str]] = {
    "norm": (normed, "no product in the graph has the queries"),
    "other pairs": (other_pairs, "no product in the graph has the queries"),
    "something added": (lifted, "no product in the graph has the queries"),
    "three together": (three_turned, "neither halves nor neighbours"),
    "read twice": (read_twice, "computes what goes to 'sum_1' as well"),
}


class Known(fx.Interpreter):
    """Notes dimensions and widths of nodes, as every capture does."""

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if isinstance(found, Tensor):
            n.meta |= {"ndim": found.ndim, "last": found.shape[-1] if found.ndim else 0}
        return found


def graph(way: Any, heads: int = 2, kv: int = 2, fused: bool = False) -> fx.GraphModule:
    gm = fx.symbolic_trace(wide(way, heads, kv, fused))
    Known(gm).run(inputs())
    ends = [0, heads * D, (heads + kv) * D, (heads + 2 * kv) * D]
    sites: dict[str, SplitSite] = {}
    for call in linear_calls(gm):
        rows = (Rows(call.name, 0, len(call.weight_OI)),)
        if call.name == "qkv":
            rows = tuple(Rows(f"qkv.{p}", *ends[at : at + 2]) for at, p in enumerate("qkv"))
        sites.setdefault(call.name, SplitSite((call.name,), rows))
    return split(gm, *sites.values())


def wide(way: Any, heads: int, kv: int, fused: bool) -> Attention:
    """An attention whose heads have eight numbers."""
    made = Attention(way, heads, kv, fused)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made.o = nn.Linear(heads * D, 5)
        if fused:
            made.qkv = nn.Linear(IN, (heads + 2 * kv) * D)
        else:
            made.q = nn.Linear(IN, heads * D)
            made.k, made.v = nn.Linear(IN, kv * D), nn.Linear(IN, kv * D)
    return made.double().eval()


def selection(
    gm: fx.GraphModule, heads: int, kv: int, kept: tuple[int, ...] = (1, 2, 5, 6)
) -> NarrowedKeys:
    q, k = ("qkv.q", "qkv.k") if "qkv.q" in slices(gm) else ("q", "k")
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = {q: heads * len(kept), k: kv * len(kept)}
    weights = {name: random(size, IN) for name, size in rows.items()}
    biases = {name: random(size) for name, size in rows.items()}
    return NarrowedKeys("keys", kept, D, {q: weights[q]}, {k: weights[k]}, biases)


def expected(way: Any, one: NarrowedKeys, x: Tensor, heads: int, kv: int, fused: bool) -> Tensor:
    """The dense module with zeros in the place of what goes."""
    dense = wide(way, heads, kv, fused)
    start = 0
    with torch.no_grad():
        for name, count in zip(one.weights, (heads, kv), strict=True):
            owner = dense.qkv if fused else getattr(dense, name)
            stays = KeptUnits("keys", D, one.kept, count)
            rows = slice(start, start + count * D) if fused else slice(None)
            owner.weight[rows] = stays.whole(one.weights[name], 0)
            owner.bias[rows] = stays.whole(one.biases[name], 0)
            start += count * D
        return dense(x)


KEPT = {"halves": (1, 2, 5, 6), "neighbours": (2, 3, 6, 7), "none": (0, 1, 2), "partly": (1, 3, 6)}


@pytest.mark.parametrize("name", FOUND)
def test_narrower_keys_are_keys_with_zeros_at_the_scale_that_it_was(name: str) -> None:
    way, heads, kv, fused, (rotary, rotated) = FOUND[name]
    gm = graph(way, heads, kv, fused).eval()
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    kept = KEPT[name if name == "partly" else rotary]
    one = selection(gm, heads, kv, kept)
    found, applied = run(gm, [NarrowKeys(selections=(one,))])
    assert applied[0].rewrites == 2
    for x in (inputs(), inputs()[:1, :3]):
        whole = expected(way, one, x, heads, kv, fused)
        torch.testing.assert_close(found(x), whole, rtol=1e-10, atol=1e-10)
    assert (found(inputs()) - gm(inputs())).abs().max() > 1e-3
    for name, count in zip(one.weights, (heads, kv), strict=True):
        assert found.get_submodule(name).out_features == count * len(kept)
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())
    dialect.check(found, "split")
    assert not [n for n, _ in found.named_buffers() if n not in before]

    def leaf(node: fx.Node) -> dict[str, int] | None:
        known = {call.node: call for call in linear_calls(gm)}
        return {known[node].name: len(known[node].weight_OI)} if node in known else None

    nodes = calls_by_slices(gm, leaf)[tuple(sorted(one.weights))]
    structure = attention_scores(gm, nodes, leaf)
    assert (structure.heads, structure.kv_heads) == (heads, kv)
    assert (structure.rotary, structure.rotated) == (rotary, rotated)


@pytest.mark.parametrize("kept", [(4, 6), (0, 1, 2, 3), (1, 3)])
def test_all_or_nothing_of_what_is_turned_may_go(kept: tuple[int, ...]) -> None:
    way, heads, kv, fused, _ = FOUND["partly"]
    gm = graph(way, heads, kv, fused).eval()
    one = selection(gm, heads, kv, kept)
    found, _ = run(gm, [NarrowKeys(selections=(one,))])
    whole = expected(way, one, inputs(), heads, kv, fused)
    torch.testing.assert_close(found(inputs()), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "halves", "in thirds"])
def test_the_whole_width_is_the_graph_as_it_was(name: str) -> None:
    way, heads, kv, fused, _ = FOUND[name]
    gm = graph(way, heads, kv, fused)
    one = selection(gm, heads, kv, tuple(range(D)))
    found, applied = run(gm, [NarrowKeys(selections=(one,))])
    assert applied[0].rewrites == 0
    assert str(found.graph) == str(gm.graph)


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_narrower_is_left_alone_with_the_reason(name: str) -> None:
    way, reason = LEFT[name]
    gm = graph(way)
    with pytest.raises(RequiresError, match=rf"narrow-keys: .*{reason}.*leave 'keys' out"):
        run(gm, [NarrowKeys(selections=(selection(gm, 2, 2),))])


def test_wrong_numbers_names_and_sizes_are_refused() -> None:
    gm = graph(turned(half_turned))
    one = selection(gm, 2, 2)

    def refused(wrong: NarrowedKeys, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            run(gm, [NarrowKeys(selections=(wrong,))])

    refused(replace(one, kept=(1, 2, 5, 8)), RequiresError, "ascending numbers from 0 to 7")
    refused(replace(one, kept=(2, 1, 5, 6)), RequiresError, "ascending numbers from 0 to 7")
    refused(replace(one, kept=(1, 2, 5, 7)), RequiresError, r"some of the numbers \[2, 6\]")
    refused(replace(one, kept=(1, 5)), ShapeError, r"'q' has 16 rows .* expected \(4, 12\)")
    other = {"w": one.queries["q"]}
    refused(replace(one, queries=other), RequiresError, "'w' of 'keys' is not a slice")
    swapped = replace(one, queries=one.keys, keys=one.queries)
    refused(swapped, RequiresError, r"has heads of 8, and keys \['q'\]; the graph has 8, and")
    with pytest.raises(RequiresError, match="stands in no graph that shows"):
        run(gm, [NarrowKeys(selections=(one,), apart=True)])


def test_a_table_of_other_numbers_is_noticed() -> None:
    """What is compared is not the same for any numbers that stay."""
    way, heads, kv, fused, _ = FOUND["halves"]
    gm = graph(way, heads, kv, fused).eval()
    one = selection(gm, heads, kv)
    found, _ = run(gm, [NarrowKeys(selections=(replace(one, kept=(0, 2, 4, 6)),))])
    whole = expected(way, one, inputs(), heads, kv, fused)
    assert (found(inputs()) - whole).abs().max() > 1e-3


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sets(st.integers(0, D // 2 - 1), min_size=1, max_size=D // 2 - 1),
    st.sampled_from(["halves", "neighbours"]),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=15)
def test_any_structure(
    kv: int, group: int, pairs: set[int], rotary: Any, sdpa: bool, scaled: bool
) -> None:
    heads = kv * group

    def way(m: Attention, x: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (-1, D)).transpose(1, 2) for one in (m.q(x), m.k(x), m.v(x)))
        cos, sin = tables(x, twice=rotary)
        turn = half_turned if rotary == "halves" else pair_turned
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        if scaled:
            q = q * 0.3
        if sdpa:
            z = F.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)
        else:
            k, v = (one.repeat_interleave(group, 1) for one in (k, v))
            z = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return back(z)

    gm = graph(way, heads, kv).eval()
    groups = together(rotary, D, D)
    kept = tuple(sorted(number for at in pairs for number in groups[at]))
    one = selection(gm, heads, kv, kept)
    found, _ = run(gm, [NarrowKeys(selections=(one,))])
    whole = expected(way, one, inputs(), heads, kv, False)
    torch.testing.assert_close(found(inputs()), whole, rtol=1e-10, atol=1e-10)
