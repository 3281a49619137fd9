"""``--storage int8`` and ``int4``: dense weights in few bits, all of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from fxshare.compiling.compile import compile as compile_model
from fxshare.compiling.stages import prepare
from fxshare.config import load_config
from fxshare.errors import FxShareWarning
from fxshare.plans.bits import Bits, Rounded
from fxshare.plans.plan import Plan

CODES: Mapping[str, Bits] = {"int8": 8, "int4": 4}
_BUDGET = {"budget": {"params_kept": 1.0}}  # which a given plan has no need of


def with_codes(model: nn.Module, types: dict[str, Any], bits: Bits, example: object) -> nn.Module:
    """The model with all of its matched weights dense, in so many bits."""
    sites = prepare(model, load_config(types), None, example, None).sites
    slices = tuple(s.name for site in sites for s in site.slices)
    plan = Plan(mode="planned", sites=sites, rounded=(Rounded(bits=bits, slices=slices),))
    return rounded_as(model, types, plan, example)


def rounded_as(model: nn.Module, types: dict[str, Any], plan: Plan, example: object) -> nn.Module:
    """The model under a plan in few bits."""
    with warnings.catch_warnings():
        # of few tokens: which codes there are makes no difference to the speed
        warnings.simplefilter("ignore", FxShareWarning)
        made: nn.Module = compile_model(
            model, [types, _BUDGET], plan=plan, calibration=[example], example=example
        )
    return made


__all__ = ["CODES", "rounded_as", "with_codes"]
