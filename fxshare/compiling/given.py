"""What the user gives beside a configuration, checked: passes by name, and a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fxshare.base.imported import imported
from fxshare.capture import Captured
from fxshare.config import ShareConfig
from fxshare.errors import ConfigError, FactoriseError, PlanError
from fxshare.planning.structure import Structure
from fxshare.plans.plan import Plan
from fxshare.sites.site import Site
from passes import Pass


def named_passes(cfg: ShareConfig) -> tuple[Pass, ...]:
    """The passes that the configuration names; each is imported from the user's own module."""
    found = []
    for name in cfg.passes:
        made = imported(name, "passes", of=Pass)
        if not isinstance(made, Pass):
            raise ConfigError(
                f"passes: {name!r} is a {type(made).__name__}; expected a subclass or an instance "
                "of passes.Pass"
            )
        found.append(made)
    return tuple(found)


def check_values(weights: Mapping[str, Tensor]) -> None:
    """Raise :class:`FactoriseError` for weights without values, which nothing can be made of."""
    for name, weight in weights.items():
        if weight.device.type == "meta":
            raise FactoriseError(
                f"the weight of {name!r} is on the meta device and has no values to factorise; "
                "load the model with its weights (from_pretrained, load_state_dict(assign=True)). "
                "Without values there is exact mode, and fxshare.plan without data for sizes"
            )


def check_plan(plan: Plan, sites: Sequence[Site]) -> None:
    """Raise :class:`PlanError` for a given plan whose sites are not those that the configuration
    matches in the model."""
    found = {site.name: site for site in sites}
    for site in plan.sites:
        real = found.get(site.name)
        if real is None or real.slices != site.slices or real.in_features != site.in_features:
            raise PlanError(
                f"the plan's site {site.name!r} with {len(site.slices)} slices is not what the "
                "configuration matches in this model and its graph calls; make the plan again with "
                "the same configuration and the same example or calibration data"
            )


def check_plan_units(plan: Plan, captured: Captured) -> None:
    """Raise :class:`PlanError` for units of a given plan that are none in the captured graph."""
    if not plan.units:
        return
    structure = Structure(captured.graph, plan.sites, captured.side_by_side)
    for one in plan.units:
        fault = structure.fault(one)
        if fault is not None:
            raise PlanError(f"units {one.name!r}: {fault}")
