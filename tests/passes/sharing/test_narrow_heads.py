"""NarrowHeads: narrower values of the same structure, found in a graph, and what it refuses."""

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
    NarrowedHeads,
    NarrowHeads,
    NotHeads,
    RequiresError,
    Rows,
    ShapeError,
    SplitSite,
    attention_heads,
    dialect,
    linear_calls,
    run,
    slices,
)
from passes.errors import DialectError
from passes.graph.slices import set_slices, slice_weight
from tests.passes.build import split

IN, D = 12, 4


class Attention(nn.Module):
    """An attention whose way from ``x`` to what ``o`` reads is given."""

    def __init__(
        self, way: Callable[[Attention, Tensor], Tensor], heads: int, kv: int, fused: bool
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.heads, self.kv = way, heads, kv
        if fused:
            self.qkv = nn.Linear(IN, (heads + 2 * kv) * D)
        else:
            self.q, self.k = nn.Linear(IN, heads * D), nn.Linear(IN, kv * D)
            self.v = nn.Linear(IN, kv * D)
        self.o = nn.Linear(heads * D, 5)
        self.norm, self.drop = nn.LayerNorm(D), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.way(self, x))


def by_heads(m: Attention, x: Tensor, heads: int) -> Tensor:
    return x.view(x.size(0), x.size(1), heads, -1).transpose(1, 2)


def back(z: Tensor) -> Tensor:
    return z.transpose(1, 2).flatten(2)


def usual(m: Attention, x: Tensor) -> Tensor:
    q, k, v = by_heads(m, m.q(x), m.heads), by_heads(m, m.k(x), m.kv), by_heads(m, m.v(x), m.kv)
    return back(F.scaled_dot_product_attention(q, k, v, enable_gqa=m.heads != m.kv))


def scores(m: Attention, x: Tensor, group: int) -> Tensor:
    q = by_heads(m, m.q(x), m.heads)
    k = by_heads(m, m.k(x), m.kv).repeat_interleave(group, dim=1)
    return (q @ k.transpose(-1, -2)).softmax(-1)


def eager(m: Attention, x: Tensor) -> Tensor:
    v = by_heads(m, m.v(x), m.kv).repeat_interleave(2, dim=1)
    z = torch.matmul(m.drop(scores(m, x, 2)), v).transpose(1, 2).contiguous()
    return z.view(z.size(0), z.size(1), m.heads * D)


def expanded(m: Attention, x: Tensor) -> Tensor:
    v = m.v(x).view(x.shape[0], x.shape[1], m.kv, D).permute(0, 2, 1, 3)
    b, h, t, d = (v.size(at) for at in range(4))
    v = v[:, :, None].expand(b, h, 2, t, d).reshape(b, h * 2, t, d)
    return (scores(m, x, 2) @ v).transpose(1, 2).reshape(b, t, -1)


def flat_batch(m: Attention, x: Tensor) -> Tensor:
    b, t = x.size(0), x.size(1)
    v = by_heads(m, m.v(x), m.kv).reshape(b * m.kv, t, D)
    z = torch.bmm(scores(m, x, 1).view(b * m.kv, t, t), v).view(b, m.kv, t, D)
    return z.permute(0, 2, 1, 3).reshape(b, t, m.kv * D)


def tokens_first(m: Attention, x: Tensor) -> Tensor:
    v = by_heads(m, m.v(x.flatten(0, 1)).view(x.size()[:-1] + (m.kv * D,)), m.kv)  # noqa: RUF005 - as it is written there
    return back(scores(m, x, 1) @ v)


def in_thirds(m: Attention, x: Tensor) -> Tensor:
    parts = m.qkv(x).split([m.heads * D, m.kv * D, m.kv * D], dim=-1)
    q, k, v = (by_heads(m, parts[at], n) for at, n in enumerate((m.heads, m.kv, m.kv)))
    return back(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def chunked(m: Attention, x: Tensor) -> Tensor:
    parts = m.qkv(x).chunk(3, dim=-1)
    q, k, v = (by_heads(m, parts[at], m.heads) for at in range(3))
    return back(F.scaled_dot_product_attention(q, k, v))


def stacked(m: Attention, x: Tensor) -> Tensor:
    whole = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, m.heads, D).permute(2, 0, 3, 1, 4)
    parts = whole.unbind(0)
    return back(F.scaled_dot_product_attention(parts[0], parts[1], parts[2]))


def indexed(m: Attention, x: Tensor) -> Tensor:
    whole = m.qkv(x)
    wide = m.heads * D
    parts = whole[..., :wide], whole[..., wide : 2 * wide], whole[..., 2 * wide :]
    q, k, v = (by_heads(m, part, m.heads) for part in parts)
    return back(F.scaled_dot_product_attention(q, k, v))


FOUND: dict[str, tuple[Callable[[Attention, Tensor], Tensor], int, int, bool]] = {
    "usual": (usual, 3, 3, False),
    "grouped by the attention": (usual, 4, 2, False),
    "one for all": (usual, 4, 1, False),
    "eager": (eager, 4, 2, False),
    "expanded": (expanded, 4, 2, False),
    "batch and heads as one": (flat_batch, 3, 3, False),
    "tokens of all rows": (tokens_first, 3, 3, False),
    "in thirds": (in_thirds, 4, 2, True),
    "chunked": (chunked, 3, 3, True),
    "stacked": (stacked, 3, 3, True),
    "indexed": (indexed, 3, 3, True),
}


def also_read(m: Attention, x: Tensor) -> Tensor:
    v = by_heads(m, m.v(x), m.kv)
    return back(scores(m, x, 1) @ v) * v.sum()


LEFT: dict[str, tuple[Callable[[Attention, Tensor], Tensor], str]] = {
    "no attention": (lambda m, x: m.v(x), "by no attention"),
    "norm": (
        lambda m, x: back(scores(m, x, 1) @ m.norm(by_heads(m, m.v(x), m.kv))),
        "'norm' .*moves no rows",
    ),
    "gate": (lambda m, x: usual(m, x) * m.q(x).sigmoid(), "'mul' .*moves no rows"),
    "dropout": (lambda m, x: m.drop(usual(m, x)), "'drop' .*moves no rows"),
    "width turned": (
        lambda m, x: back(scores(m, x, 1) @ by_heads(m, m.v(x), m.kv)[..., [3, 2, 1, 0]]),
        "takes a part|cannot be told|ends are computed",
    ),
    "half of the width": (
        lambda m, x: usual(m, x)[..., ::2].repeat_interleave(2, -1),
        "told from heads|another order",
    ),
    "positions": (
        lambda m, x: (by_heads(m, m.v(x), m.kv).mT @ scores(m, x, 1)).mT.transpose(1, 2).flatten(2),
        "moves no rows|no rows along|no heads",
    ),
    "two attentions": (lambda m, x: usual(m, x) + usual(m, x), "'add' .*moves no rows"),
    "width as a number": (
        lambda m, x: back(scores(m, x, 1) @ by_heads(m, m.v(x), m.kv)) / m.v(x).size(-1),
        "moves no rows|goes to",
    ),
    "keys are values": (
        lambda m, x: back(
            F.scaled_dot_product_attention(
                by_heads(m, m.q(x), m.heads), *[by_heads(m, m.v(x), m.kv)] * 2
            )
        ),
        "are queries or keys of .* as well",
    ),
}


class Dimensions(fx.Interpreter):
    """Notes how many dimensions a node has, as every capture does."""

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if isinstance(found, Tensor):
            n.meta["ndim"] = found.ndim
        return found


def graph(
    way: Callable[[Attention, Tensor], Tensor], heads: int = 3, kv: int = 3, fused: bool = False
) -> fx.GraphModule:
    made = Attention(way, heads, kv, fused).double()
    gm = fx.symbolic_trace(made)
    Dimensions(gm).run(inputs())
    ends = [0, heads * D, (heads + kv) * D, (heads + 2 * kv) * D]
    sites = []
    for call in linear_calls(gm):
        rows = (Rows(f"{call.name}", 0, len(call.weight_OI)),)
        if call.name == "qkv":
            rows = tuple(
                Rows(f"qkv.{part}", *ends[at : at + 2]) for at, part in enumerate(("q", "k", "v"))
            )
        if not any(site.calls == (call.name,) for site in sites):
            sites.append(SplitSite((call.name,), rows))
    return split(gm, *sites)


def selection(gm: fx.GraphModule, heads: int, kv: int, kept: int = 3) -> NarrowedHeads:
    value = "qkv.v" if "qkv.v" in slices(gm) else "v"
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values, consumers = {value: random(kv * kept, IN)}, {"o": random(5, heads * kept)}
    biases = {value: random(kv * kept), "o": random(5)}
    return NarrowedHeads("heads", kept, D, values, consumers, biases)


def expected(
    way: Callable[[Attention, Tensor], Tensor], one: NarrowedHeads, x: Tensor, of: tuple[int, int]
) -> Tensor:
    """The dense module with zeros where the width ends."""
    (value,) = one.values
    dense = Attention(way, *of, value != "v").double().eval()
    heads, kv = of

    def filled(tensor: Tensor, dim: int, count: int) -> Tensor:
        return KeptUnits("heads", D, tuple(range(one.kept)), count).whole(tensor, dim)

    with torch.no_grad():
        owner = dense.qkv if value != "v" else dense.v
        rows = slice(-kv * D, None)
        owner.weight[rows] = filled(one.values[value], 0, kv)
        owner.bias[rows] = filled(one.biases[value], 0, kv)
        dense.o.weight.copy_(filled(one.consumers["o"], 1, heads))
        dense.o.bias.copy_(one.biases["o"])
        return dense(x)


def inputs() -> Tensor:
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("name", FOUND)
def test_narrower_heads_are_heads_with_zeros(name: str) -> None:
    way, heads, kv, fused = FOUND[name]
    gm = graph(way, heads, kv, fused).eval()
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    one = selection(gm, heads, kv)
    found, applied = run(gm, [NarrowHeads(selections=(one,))])
    assert applied[0].rewrites == 2
    x = inputs()
    torch.testing.assert_close(found(x), expected(way, one, x, (heads, kv)), rtol=1e-10, atol=1e-10)
    assert (found(x) - gm(x)).abs().max() > 1e-3
    (value,) = one.values
    assert found.get_submodule(value).out_features == kv * 3
    assert found.get_submodule("o").in_features == heads * 3
    assert slice_weight(found, value).shape == (kv * D, IN)
    assert slice_weight(found, "o").shape == (5, heads * D)
    # the source is as it was, and the result is legal
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())
    dialect.check(found, "split")
    # nothing is put together to be taken apart
    assert not fused or all(node.target is not torch.cat for node in found.graph.nodes)
    shorter = inputs()[:1, :3]
    torch.testing.assert_close(
        found(shorter), expected(way, one, shorter, (heads, kv)), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", FOUND)
def test_the_whole_width_is_the_graph_as_it_was(name: str) -> None:
    way, heads, kv, fused = FOUND[name]
    gm = graph(way, heads, kv, fused)
    one = selection(gm, heads, kv, D)
    found, applied = run(gm, [NarrowHeads(selections=(one,))])
    assert applied[0].rewrites == 0
    assert str(found.graph) == str(gm.graph)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_attention_is_left_alone_with_the_reason(name: str) -> None:
    way, reason = LEFT[name]
    gm = graph(way)
    reading = [call.node for call in linear_calls(gm) if call.name == "o"]
    made = {call.node: call for call in linear_calls(gm)}

    def leaf(node: fx.Node) -> dict[str, int] | None:
        return {made[node].name: len(made[node].weight_OI)} if node in made else None

    with pytest.raises(NotHeads, match=reason):
        attention_heads(gm, reading, leaf, 3 * D)
    with pytest.raises(RequiresError, match=r"narrow-heads: 'o' .*leave 'heads' out"):
        run(gm, [NarrowHeads(selections=(selection(gm, 3, 3),))])


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, D - 1),
    st.booleans(),
    st.sampled_from(["split", "thirds"]),
    st.booleans(),
)
@settings(deadline=None, max_examples=20)
def test_any_structure(
    kv: int, group: int, kept: int, sdpa: bool, order: str, transposed: bool
) -> None:
    """Heads and groups of any number, attention in one call or written out."""
    heads = kv * group
    fused = order == "thirds"

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
        z = z.permute(0, 2, 1, 3) if transposed else z.swapaxes(1, 2)
        return z.reshape(x.size(0), x.size(1), -1)

    gm = graph(way, heads, kv, fused).eval()
    one = selection(gm, heads, kv, kept)
    found, _ = run(gm, [NarrowHeads(selections=(one,))])
    x = inputs()
    torch.testing.assert_close(found(x), expected(way, one, x, (heads, kv)), rtol=1e-10, atol=1e-10)


def test_wrong_sizes_and_names_are_refused() -> None:
    gm = graph(usual)
    one = selection(gm, 3, 3)

    def refused(wrong: NarrowedHeads, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            run(gm, [NarrowHeads(selections=(wrong,))])

    refused(replace(one, kept=5), RequiresError, "a width of 5 of 4, expected 1 to 4")
    refused(replace(one, kept=2), ShapeError, r"'v' has 12 rows .* expected \(6, 12\)")
    cut = {"o": one.consumers["o"][:, :-1]}
    refused(replace(one, consumers=cut), ShapeError, r"'o' reads 12 inputs .* expected \(5, 9\)")
    other = {"w": one.values["v"]}
    refused(
        replace(one, values=other), RequiresError, "'w' of 'heads' is not a slice that is still"
    )
    keys = {"k": one.values["v"]}
    refused(replace(one, values=keys), RequiresError, r"heads of 4 in \['k'\]; the graph has 4 in")
    with pytest.raises(RequiresError, match="stands in no graph that shows"):
        run(gm, [NarrowHeads(selections=(one,), apart=True)])


def test_values_that_something_else_computes_with_are_refused() -> None:
    gm = graph(also_read)
    with pytest.raises(RequiresError, match=r"'o' reads .*leave 'heads' out"):
        run(gm, [NarrowHeads(selections=(selection(gm, 3, 3),))])


def test_a_width_that_is_not_recorded_breaks_a_rule() -> None:
    gm = graph(usual)
    found, _ = run(gm, [NarrowHeads(selections=(selection(gm, 3, 3),))])
    place = slices(found)["v"]
    assert place.unit_rows is not None
    wrong = replace(place.unit_rows, kept=(0, 1))
    set_slices(found, {"v": replace(place, unit_rows=wrong)})
    with pytest.raises(DialectError, match="9 where 3 times 2 are recorded"):
        dialect.check(found, "split")
