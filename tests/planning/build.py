"""Small planning problems with known answers, and brute force to know them by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxshare.factors.metric import SliceStatistics
from fxshare.planning.solver.curve import DENSE, Curve
from fxshare.planning.solver.problem import Node, Part, Problem
from fxshare.plans.cost import Shape, numbers, ranks
from fxshare.plans.storage import PLAIN

WIDTH = 6


def node(name: str, **changes: Any) -> Node:
    """A node that reads an input of its own unless told otherwise."""
    given = {"site": name, "type": "w", "label": "", "layer": 0, "head": None, "input": name}
    sizes = {"in_features": WIDTH, "out_features": WIDTH}
    return Node(name=name, **{**given, **sizes, **changes})


def stack(layers: int, types: Sequence[str] = ("q",), heads: int | None = None) -> dict[str, Node]:
    """Nodes of a transformer: every type reads the layer's one input; ``heads`` slices each."""
    found = {}
    for layer, type_name in itertools.product(range(layers), types):
        for head in [None] if heads is None else range(heads):
            name = f"h.{layer}.{type_name}" + ("" if head is None else f".{head}")
            label = "" if head is None else str(head)
            site = f"h.{layer}.{type_name}"
            found[name] = node(
                name, site=site, type=type_name, label=label, layer=layer, head=head, input=layer
            )
    return found


def spectral_curve(weights: Mapping[str, np.ndarray[Any, Any]], part: Part) -> Curve:
    """Plain storage: loss from the singular values of the stacked weights, dense at the end."""
    stacked = np.concatenate([weights[name] for name in sorted(part)])
    shape = Shape(stacked.shape[1], stacked.shape[0])
    power = np.linalg.svd(stacked, compute_uv=False) ** 2
    tail = np.concatenate([np.cumsum(power[::-1])[::-1], [0.0]]) / 2
    rank = ranks(shape)
    cost = numbers(shape, rank, PLAIN)
    keep = cost < shape.dense_numbers
    return Curve(
        np.concatenate([cost[keep], [shape.dense_numbers]]),
        np.concatenate([tail[rank[keep]], [0.0]]),
        np.concatenate([rank[keep], [DENSE]]),
    )


def random_weights(nodes: Mapping[str, Node], seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Weights with something in common: sometimes sharing pays, sometimes it does not."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(2, WIDTH))
    return {
        name: rng.normal(size=(one.out_features, 2)) @ common * rng.uniform(0, 2)
        + rng.normal(size=(one.out_features, WIDTH)) * rng.uniform(0.05, 1.0)
        for name, one in nodes.items()
    }


def random_problem(nodes: Mapping[str, Node], seed: int, **options: Any) -> Problem:
    weights = random_weights(nodes, seed)
    return Problem(nodes, lambda part: spectral_curve(weights, part), **options)


def total(problem: Problem, parts: Sequence[Part], price: float) -> float:
    return sum(problem.value(part, price) for part in parts)


def all_partitions(items: Sequence[Part]) -> Iterator[list[Part]]:
    """All set partitions, each as its unions; no code shared with the planner."""
    if not items:
        yield []
        return
    for partition in all_partitions(items[1:]):
        yield [items[0], *partition]
        for at, block in enumerate(partition):
            yield [*partition[:at], items[0] | block, *partition[at + 1 :]]


def legal(problem: Problem, part: Part, types: Callable[[str, str], bool]) -> bool:
    """Types may meet in pairs, pairs that may meet link all, and at most ``max_group`` layers."""
    nodes = [problem.nodes[name] for name in part]
    if problem.max_group is not None and len({n.layer for n in nodes}) > problem.max_group:
        return False
    if not all(types(a.type, b.type) for a, b in itertools.combinations(nodes, 2)):
        return False
    reached = {nodes[0].name}
    while True:
        more = {
            b.name
            for a, b in itertools.product(nodes, nodes)
            if a.name in reached and b.name not in reached and problem.may_meet(a, b)
        }
        if not more:
            return len(reached) == len(nodes)
        reached |= more


def gram(features: int, seed: int, *, tokens: int = 200) -> Tensor:
    """``E[x xᵀ]``; of few tokens singular."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.3, 2.0, features, dtype=torch.float64)
    return x.T @ x / tokens


def slice_of(
    out: int, features: int, seed: int, *, input: object = "x", **given: Any
) -> SliceStatistics:
    """Random statistics of one slice."""
    generator = torch.Generator().manual_seed(1000 + seed)
    fields: dict[str, Any] = {
        "weight_OI": torch.randn(out, features, generator=generator, dtype=torch.float64),
        "gram_II": gram(features, 7),
        "moment_OO": gram(out, 2000 + seed),
        "input": input,
        **given,
    }
    return SliceStatistics(**fields)


def quadratic(one: SliceStatistics, product_OI: Tensor, gram_II: Tensor | None = None) -> float:
    """``½ tr(A (W − Ŵ) G (W − Ŵ)ᵀ)``."""
    gap = one.weight_OI - product_OI
    inner = gap @ (one.gram_II if gram_II is None else gram_II) @ gap.T
    return 0.5 * float((inner if one.moment_OO is None else one.moment_OO @ inner).trace())
