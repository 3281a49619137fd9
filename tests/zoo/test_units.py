"""Hidden units in every family of the zoo whose MLPs the graph shows: half of them go."""

from __future__ import annotations

from typing import Any

import pytest

from fxshare.plans.units import units_of
from fxshare.sites.mlps import mlps
from tests.zoo.families import FAMILIES, Family
from tests.zoo.narrowed import check_carried_out, prepared

# one of each kind of MLP; the others repeat what these show and are run with -m slow
_KINDS = ("qwen2", "opt", "t5")
NONE = {
    "bloom": "'autograd_function_",  # its gelu has a gradient of its own
    "nn_multihead": "'layers_",
}
"""Families in which no MLP is found, and what lies between."""


def _all() -> list[Any]:
    return [
        pytest.param(f, id=f.name, marks=() if f.name in _KINDS else pytest.mark.slow)
        for f in FAMILIES
    ]


@pytest.mark.parametrize("one", _all())
def test_half_the_units_of_every_mlp_go_and_the_rest_is_what_it_says(one: Family) -> None:
    stages = prepared(one)
    graph = stages.captured.graph
    found = mlps(graph, stages.sites, side_by_side=stages.captured.side_by_side)
    if one.name in NONE:
        assert not found.found
        assert any(NONE[one.name] in reason for reason in found.reasons.values())
        return
    assert found.found
    entries = [
        units_of(
            x.producers,
            x.consumer,
            kept=max(x.units // 2, 1),
            name=f"units_{number}",
            alternating=x.alternating,
        )
        for number, x in enumerate(found.found)
    ]
    check_carried_out(one, stages, entries)
