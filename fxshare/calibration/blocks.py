"""Which sites are observed in one pass over the data, so that their sums fit into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import networkx as nx
import torch

from fxshare.base.placement import dtype_of
from fxshare.calibration.gradients import is_diagonal, is_projected
from fxshare.calibration.gram import DiagonalAccumulator, GramAccumulator, sums_dtype
from fxshare.capture import Captured
from fxshare.sites.site import Site, SliceSpec
from passes.observing.inputs import reads


def bytes_needed(captured: Captured, sites: Sequence[Site], *, gradients: bool = False) -> int:
    """Bytes that the statistics of these sites are: one half Gram per distinct input, and with
    ``gradients`` one per slice; diagonals and counts where rows are looked up."""
    return sum(_needed(captured, sites, gradients)[1].values())


def shared_inputs(captured: Captured, sites: Sequence[Site]) -> dict[str, str]:
    """Of every site the first of those that read the same activation."""
    together, _ = _needed(captured, sites, False)
    order = {site.name: number for number, site in enumerate(sites)}
    return {name: min(part, key=lambda one: order[one]) for name, part in together.items()}


def blocks_of(
    captured: Captured, sites: Sequence[Site], *, gradients: bool, most_bytes: int | None
) -> list[tuple[Site, ...]]:
    """The sites in blocks of at most ``most_bytes`` of statistics each, as few as their order
    allows; sites that read one activation are in one block, and those that are looked up in the
    first. At module granularity all are in one: what reads what is only known when it is run.
    """
    if most_bytes is None or captured.side_by_side:
        return [tuple(sites)] if sites else []
    together, needed = _needed(captured, sites, gradients)
    blocks: list[list[Site]] = [[site for site in sites if site.lookups]]
    placed = {site.name for site in blocks[0]}
    held = sum(needed[name] for name in placed)
    for site in sites:
        if site.name in placed:
            continue
        one = [other for other in sites if other.name in together[site.name] - placed]
        size = sum(needed[other.name] for other in one)
        if blocks[-1] and held + size > most_bytes:
            blocks.append([])
            held = 0
        blocks[-1] += one
        placed.update(other.name for other in one)
        held += size
    return [tuple(block) for block in blocks if block]


def largest_block(captured: Captured, sites: Sequence[Site], *, gradients: bool) -> int:
    """Bytes of the largest block that cannot be made smaller."""
    if captured.side_by_side:
        return bytes_needed(captured, sites, gradients=gradients)
    blocks = blocks_of(captured, sites, gradients=gradients, most_bytes=0)
    _, needed = _needed(captured, sites, gradients)
    return max((sum(needed[site.name] for site in block) for block in blocks), default=0)


def _needed(
    captured: Captured, sites: Sequence[Site], gradients: bool
) -> tuple[Mapping[str, set[str]], dict[str, int]]:
    """Which sites read an activation that another one reads too, and the bytes of each; what
    several read counts for the first of them."""
    site_of = {name: site.name for site in sites for name in site.calls}
    readers: dict[object, list[str]] = {}
    width: dict[object, int] = {}
    for activation, call in reads(captured.graph, site_of):
        readers.setdefault(activation, []).append(site_of[call.name])
        width[activation] = call.weight_OI.shape[1]
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(site.name for site in sites)
    needed = dict.fromkeys((site.name for site in sites), 0)
    dtype = sums_dtype(dtype_of(captured.model))
    for activation, found in readers.items():
        nx.add_path(graph, found)
        needed[found[0]] += GramAccumulator.bytes_needed(width[activation], dtype)
    together = {name: part for part in nx.connected_components(graph) for name in part}
    for site in sites:
        needed[site.name] += 8 * site.out_features * len(site.lookups)
        if gradients:
            needed[site.name] += GramAccumulator.bytes_needed(site.in_features) * len(site.lookups)
            needed[site.name] += sum(
                moment_bytes(site, s, dtype) for s in site.slices if site.calls
            )
    return together, needed


def moment_bytes(site: Site, s: SliceSpec, dtype: torch.dtype) -> int:
    """Of the gradient at what a slice writes, products summed up in a dtype."""
    if is_diagonal(site, s):
        return DiagonalAccumulator(s.out_features).nbytes
    if is_projected(site, s):
        return GramAccumulator.bytes_needed(site.in_features, dtype)
    return GramAccumulator.bytes_needed(s.out_features, dtype)
