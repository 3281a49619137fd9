"""In which precision groups are priced, and the budget that plans keep."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from fxshare.base.processes import here
from fxshare.config import ShareConfig
from fxshare.factors.entries import note_exact
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.spectra import Spectra
from fxshare.planning.kinds.basis import make_problem
from fxshare.planning.nodes import nodes_of
from fxshare.planning.options import bytes_of, limit_of
from fxshare.planning.rounding_price import RoundingPrice
from fxshare.planning.search import Search, SpectraByMetric
from fxshare.planning.solver.solve import least_cost
from fxshare.planning.trials import Trial

_LOG = logging.getLogger(__name__)


def priced(
    search: Search,
    slices: Mapping[str, SliceStatistics],
    model: nn.Module,
    cfg: ShareConfig,
    first: Trial,
) -> tuple[Search, SpectraByMetric]:
    """The search with its budget, and the spectra of the first statistics; in float64 where float32
    does not tell what the plan of the ``first`` trial loses."""
    for exact in (False, True):
        search = replace(search, exact=exact, problems={}, priced={})
        spectra = search.spectra(slices)
        search = replace(search, budget=_budget_in_unit(model, cfg, search, spectra[True]))
        if exact or search.tells(first, spectra[True]):
            break
        _LOG.info("plan: groups lose less than float32 tells, and are priced in float64")
        if search.work is not None and here().is_first:
            note_exact(search.work.spectra(0))
    return search, spectra


def _budget_in_unit(model: nn.Module, cfg: ShareConfig, search: Search, spectra: Spectra) -> float:
    """The budget in the options' unit; for a limit of the loss the least cost predicted to keep it,
    from which the search starts."""
    assert cfg.budget is not None
    budget = limit_of(bytes_of(model), cfg.budget, search.sites, search.options)
    if cfg.budget.max_loss_increase is None:
        return budget
    nodes = nodes_of(search.sites, spectra.slices)
    problem = make_problem(nodes, spectra, search.options, rounding=RoundingPrice(spectra, nodes))
    limit = cfg.budget.max_loss_increase
    return float(least_cost(problem, limit, strategy=cfg.planner.strategy).cost)


__all__ = ["priced"]
