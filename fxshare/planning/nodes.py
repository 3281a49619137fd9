"""The slices as nodes of the partition problem."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from fxshare.factors.metric import SliceStatistics
from fxshare.planning.solver.problem import Node, Part
from fxshare.plans.cost import Shape
from fxshare.sites.site import Site


def nodes_of(sites: Sequence[Site], slices: Mapping[str, SliceStatistics]) -> dict[str, Node]:
    """The planner's nodes. Sites without a layer number get one of their own, below all layers."""
    return nodes_for(sites, {name: one.input for name, one in slices.items()})


def nodes_for(sites: Sequence[Site], inputs: Mapping[str, Hashable]) -> dict[str, Node]:
    """:func:`nodes_of` slices that read these inputs."""
    found = {}
    for number, site in enumerate(sites):
        layer = -1 - number if site.layer is None else site.layer
        for s in site.slices:
            found[s.name] = Node(
                name=s.name,
                site=site.name,
                type=site.type,
                label=s.label,
                layer=layer,
                head=s.head,
                in_features=site.in_features,
                out_features=s.out_features,
                input=inputs[s.name],
                lookups=len(site.lookups),
                multiplied=bool(site.calls),
            )
    return found


def shape_of(nodes: Mapping[str, Node], part: Part) -> Shape:
    """The shape of a group: each site reads the basis with its input, once."""
    members = [nodes[name] for name in part]
    return Shape(
        members[0].in_features,
        sum(node.out_features for node in members),
        len({node.input for node in members if node.multiplied}),
        sum(node.lookups for node in members),
        sum(node.out_features for node in members if not node.multiplied),
    )
