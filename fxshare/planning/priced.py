"""In which precision groups are priced, and the budget that plans keep."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
from fxshare.planning.search import Problems, Search, SpectraByMetric
from fxshare.planning.solver.solve import least_cost
from fxshare.planning.trials import Trial

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Known:
    """What was computed for plans on the statistics of one model, for others on them."""

    spectra: dict[bool, SpectraByMetric] = field(default_factory=dict)
    """By whether they are in float64."""
    priced: dict[int, RoundingPrice] = field(default_factory=dict)
    problems: dict[str, Problems] = field(default_factory=dict)

    def problems_of(self, search: Search, cfg: ShareConfig) -> Problems:
        """What was solved for searches that differ from this one in their budget alone."""
        planner = cfg.planner.model_dump_json(exclude={"search", "remeasure"})
        return self.problems.setdefault(f"{planner} {search.options}", {})


def priced(
    search: Search,
    slices: Mapping[str, SliceStatistics],
    model: nn.Module,
    cfg: ShareConfig,
    first: Trial,
    known: Known,
) -> tuple[Search, SpectraByMetric]:
    """The search with its budget, and the spectra of the first statistics; in float64 where float32
    does not tell what the plan of the ``first`` trial loses, or that of an earlier search did
    not."""
    problems = known.problems_of(search, cfg)
    for exact in (False, True):
        if not exact and True in known.spectra:
            continue
        search = replace(search, exact=exact, problems=problems, priced=known.priced)
        if exact not in known.spectra:
            known.spectra[exact] = search.spectra(slices)
        spectra = known.spectra[exact]
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
