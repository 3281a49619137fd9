"""From a toy to what the passes take: a captured graph, its sites, and exact factors.

Legend for shapes: I input features, O output features, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn

from fxshare.capture import capture
from passes import (
    PivotedGroup,
    Rows,
    SharedGroup,
    SplitLinear,
    SplitSite,
    linear_calls,
    run,
    slice_weight,
    slices,
)
from tests.toys import HEADS, Toy

Cut = Literal["whole", "parts", "heads", "uneven"]


@functools.cache
def captured(toy: Toy, mode: Literal["fx", "export"] = "fx") -> fx.GraphModule:
    """The float64 graph of a toy; shared between tests, which may do so because no pass writes."""
    model, example = toy.model(dtype=torch.float64), toy.inputs(dtype=torch.float64)
    if mode == "fx":
        return capture(model, example, mode="fx").graph
    # by position, which fxshare's own export front end does not do
    free = tuple(dict.fromkeys((0, 1), torch.export.Dim.AUTO) for _ in example)
    gm = torch.export.export(model, example, dynamic_shapes=free, strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    return gm


def inputs(toy: Toy, batch: int = 3, length: int = 7) -> tuple[Tensor, ...]:
    """Inputs of another shape than the captured one."""
    return toy.inputs(batch, length, seed=5, dtype=torch.float64)


def cut_rows(toy: Toy, name: str, out_features: int, cut: Cut) -> list[tuple[str, int]]:
    """The suffixes and heights of the slices of one linear."""
    if cut == "uneven" and out_features > 2:
        return [(".a", 1), (".b", out_features - 2), (".c", 1)]
    parts = toy.fused.get(name, {})
    heads = toy.heads.get(name, 0)
    if cut == "parts" and parts:
        return [(f".{part}", height) for part, height in parts.items()]
    if cut == "heads" and parts:
        return [(f".{p}.{h}", rows // HEADS) for p, rows in parts.items() for h in range(HEADS)]
    if cut == "heads" and heads:
        return [(f".{h}", out_features // heads) for h in range(heads)]
    return [("", out_features)]


def sites(toy: Toy, gm: fx.GraphModule, cut: Cut = "parts") -> tuple[SplitSite, ...]:
    """One site per weight, not per module: modules that share a parameter are one site."""
    by_weight: dict[object, list[str]] = {}
    heights: dict[str, int] = {}
    for call in linear_calls(gm):
        weight = call.weight_OI
        key = (weight.untyped_storage()._cdata, weight.storage_offset())
        if call.name not in by_weight.setdefault(key, []):
            by_weight[key].append(call.name)
        heights[call.name] = weight.shape[0]
    tied_to_embedding = {"lm_head", "transformer.wte"}
    return tuple(
        site_of(names, cut_rows(toy, names[0], heights[names[0]], cut))
        for names in by_weight.values()
        if not set(names) & tied_to_embedding
    )


def site_of(calls: Sequence[str], heights: Iterable[tuple[str, int]]) -> SplitSite:
    """A site whose slices are named after its first call."""
    rows, at = [], 0
    for suffix, height in heights:
        rows.append(Rows(f"{calls[0]}{suffix}", at, at + height))
        at += height
    return SplitSite(tuple(calls), tuple(rows))


def split(gm: fx.GraphModule, *wanted: SplitSite) -> fx.GraphModule:
    """The graph with these sites split."""
    return run(gm, [SplitLinear(sites=wanted)])[0]


def exact_factors(weights: Mapping[str, Tensor], name: str) -> SharedGroup:
    """A basis at full rank: ``coefficients[i] @ basis_RI`` is the weight up to rounding."""
    stacked_OI = torch.cat(list(weights.values())).detach()
    left_OR, sizes_R, basis_RI = torch.linalg.svd(stacked_OI, full_matrices=False)
    coefficients = (left_OR * sizes_R).split([w.shape[0] for w in weights.values()])
    return SharedGroup(name, basis_RI, dict(zip(weights, coefficients, strict=True)))


def pivoted(group: SharedGroup) -> PivotedGroup:
    """The same product from kept inputs and a table; the pivots by modified Gram-Schmidt."""
    left_RI, kept = group.basis_RI.clone(), []
    for _ in range(left_RI.shape[0]):
        at = int(left_RI.norm(dim=0).argmax())
        direction_R = left_RI[:, at] / left_RI[:, at].norm()
        left_RI -= direction_R[:, None] * (direction_R @ left_RI)
        left_RI[:, at] = 0.0
        kept.append(at)
    kept.sort()
    rest = [i for i in range(left_RI.shape[1]) if i not in kept]
    block_RR = group.basis_RI[:, kept]
    table_RT = torch.linalg.solve(block_RR, group.basis_RI[:, rest])
    coefficients = {name: c @ block_RR for name, c in group.coefficients.items()}
    return PivotedGroup(group.name, torch.tensor(kept), table_RT, coefficients)


def layer_key(name: str) -> str:
    """The name without its layer number: ``h.3.c_attn.q.2`` → ``h.*.c_attn.q.2``."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join("*" if i == at else part for i, part in enumerate(parts))


def groups(gm: fx.GraphModule, pool: bool = False) -> tuple[SharedGroup, ...]:
    """Exact factors for every slice of a split graph: one basis over all layers.

    ``pool`` puts all slices of a linear, and all linears of one input width below one parent, on
    one basis as well, so that products are there to reuse and coefficients to fuse.
    """
    members: dict[str, dict[str, Tensor]] = {}
    for name in slices(gm):
        weight_OI = slice_weight(gm, name)
        key = layer_key(name)
        if pool:
            module = ".".join(part for part in key.split(".") if part != "*")
            key = f"{module.split('.')[0]}_{weight_OI.shape[1]}"
        members.setdefault(key, {})[name] = weight_OI
    return tuple(
        exact_factors(weights, "basis_" + key.replace(".", "_").replace("*", "all"))
        for key, weights in members.items()
    )


class Three(nn.Module):
    """q, k, v of unequal heights over one input, in a module that holds nothing else."""

    def __init__(
        self, heights: Sequence[int] = (4, 3, 2), biases: Sequence[bool] = (True,) * 3
    ) -> None:
        super().__init__()
        self.attn = nn.Module()
        for name, height, bias in zip("qkv", heights, biases, strict=True):
            self.attn.add_module(name, nn.Linear(6, height, bias=bias))
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three products."""
        return self.attn.q(x), self.attn.k(x), self.attn.v(x)


def whole_sites(gm: fx.GraphModule) -> tuple[SplitSite, ...]:
    """Every linear module of the graph as one slice."""
    names = dict.fromkeys((c.name, c.weight_OI.shape[0]) for c in linear_calls(gm))
    return tuple(site_of([name], [("", height)]) for name, height in names)


def shared_on_one_basis(gm: fx.GraphModule, name: str = "basis") -> tuple[SharedGroup, ...]:
    """One exact group of all slices, which must have one input width."""
    return (exact_factors({n: slice_weight(gm, n) for n in slices(gm)}, name),)


def x_of(width: int, seed: int = 0) -> Tensor:
    """A float64 input ``(2, 3, width)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, width, generator=generator, dtype=torch.float64)
