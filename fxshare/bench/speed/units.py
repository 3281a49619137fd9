"""``--storage units``: MLPs that keep a share of their hidden units; all else stays dense."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxshare.compiling.compile import compile as compile_model
from fxshare.compiling.stages import prepare
from fxshare.config import load_config
from fxshare.errors import ConfigError, FxShareWarning
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.units import Order
from fxshare.planning.kinds.units import HiddenUnits
from fxshare.plans.plan import Plan
from fxshare.plans.units import units_of
from fxshare.sites.mlps import mlps

UNITS = "units"
_KIND = {
    "budget": {"params_kept": 1.0},  # which a given plan has no need of
    "planner": {"kinds": ["basis", f"{__name__}:FirstUnits"]},
}


class FirstUnits(HiddenUnits):
    """The first units stay: which ones do makes no difference to the speed."""

    def __init__(self) -> None:
        super().__init__("first_units")

    def order(self, consumer: Mapping[str, SliceStatistics]) -> Order:
        """The units as they are."""
        first = next(iter(consumer.values()))
        units = len(first.gram_II)
        return Order(torch.arange(units), torch.zeros(units + 1, dtype=torch.float64))


def with_fewer_units(
    name: str, model: nn.Module, types: dict[str, Any], kept: float, example: object
) -> nn.Module:
    """The model of whose MLPs so much of the hidden units stays.

    Raises :class:`ConfigError` where its graph shows no MLP.
    """
    cfg = load_config(types)
    stages = prepare(model, cfg, None, example, None)
    captured = stages.captured
    found = mlps(captured.graph, stages.sites, side_by_side=captured.side_by_side)
    if not found.found:
        site, reason = next(iter(found.reasons.items()), (name, "has no linears"))
        raise ConfigError(f"--storage units: {name} shows no MLP; {site!r} {reason}")
    entries = [
        units_of(
            one.producers,
            one.consumer,
            kept=max(round(kept * one.units), 1),
            alternating=one.alternating,
            name=f"units_{number}",
        ).model_copy(update={"kind": FirstUnits().name})
        for number, one in enumerate(found.found)
    ]
    plan = Plan(mode="planned", sites=stages.sites, units=tuple(entries))
    return carried_out(model, types, plan, example)


def carried_out(model: nn.Module, types: dict[str, Any], plan: Plan, example: object) -> nn.Module:
    """The model under a plan with such entries."""
    batches: Sequence[object] = [example]
    with warnings.catch_warnings():
        # of few tokens: what the weights say is not looked at
        warnings.simplefilter("ignore", FxShareWarning)
        made: nn.Module = compile_model(
            model, [types, _KIND], plan=plan, calibration=batches, example=example
        )
    return made


__all__ = ["UNITS", "FirstUnits", "carried_out", "with_fewer_units"]
