"""From a plan to the tensors that the passes put into the graph."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fxshare.base.numerics import relative_error
from fxshare.base.progress import track
from fxshare.base.quantised import Quantised
from fxshare.calibration.gram import pooled_gram
from fxshare.calibration.statistics import Statistics
from fxshare.config import ShareConfig
from fxshare.errors import FactoriseError, FxShareWarning, PlanError
from fxshare.factors.codes import CodedSlices
from fxshare.factors.empty import selected
from fxshare.factors.factored import Factored
from fxshare.factors.factorise import Whitening, factorise, identity_whitening, whiten
from fxshare.factors.group import GroupFactors
from fxshare.factors.heads import HeadFactors, Stored, stored_heads
from fxshare.factors.keys import KeyFactors, stored_keys
from fxshare.factors.metric import slice_statistics
from fxshare.factors.pivots import Pivoted, pivot
from fxshare.factors.spectra import Spectra
from fxshare.factors.units import UnitFactors
from fxshare.factors.whole_heads import WholeHeadFactors, stored_whole_heads
from fxshare.plans.plan import Group, Plan
from passes import PivotedGroup, SharedGroup
from passes.pipeline import Narrower


@dataclass
class Factorised:
    """The factors of every group in the model's dtype, and what is known about them."""

    groups: list[SharedGroup] = field(default_factory=list)
    pivots: list[PivotedGroup] = field(default_factory=list)
    units: list[Narrower] = field(default_factory=list)
    codes: dict[str, Quantised] = field(default_factory=dict)
    """What is stored in few bits: bases by the names of their groups, all else by slices."""
    code_biases: dict[str, Tensor] = field(default_factory=dict)
    """New biases of dense slices in few bits."""
    weighted_errors: dict[str, float] = field(default_factory=dict)
    slice_errors: dict[str, float] = field(default_factory=dict)
    bias_shifts: dict[str, float] = field(default_factory=dict)
    """``‖b' − b‖`` of every slice whose bias was moved."""
    floored: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(
        self,
        group: Group,
        basis_RI: Tensor,
        coefficients: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        *,
        pivoted: Pivoted | None = None,
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take in one group's float64 factors, cast to the dtype of ``weights`` (by slice)."""
        dtype = weights[group.slices[0]].dtype
        basis = basis_RI.to(dtype)
        plain = {name: c.to(dtype) for name, c in coefficients.items()}
        self.groups.append(SharedGroup(group.name, basis, plain, dict(biases or {})))
        stored, held, kept = plain, basis, None
        if pivoted is not None:
            table = pivoted.table_RT.to(dtype)
            stored = {name: (c @ pivoted.block_RR).to(dtype) for name, c in coefficients.items()}
            held, kept = table, pivoted.kept_J
            self.pivots.append(PivotedGroup(group.name, kept.to(torch.int32), table, stored))
            for fault in group.stored_as.faults(pivoted.table_RT):
                warnings.warn(f"group {group.name!r}: {fault}", FxShareWarning, stacklevel=2)
        if group.bits is not None:  # codes stand for the values that they were made with
            stored = {name: c.double() for name, c in coefficients.items()}
            held = basis_RI.double() if pivoted is None else pivoted.table_RT
        effective = group.stored_as.whole_basis(held.double(), kept)
        for name, c in stored.items():
            self.slice_errors[name] = relative_error(weights[name], c.double() @ effective)

    def add_dense(
        self,
        plan: Plan,
        coded: CodedSlices,
        rows: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
    ) -> None:
        """Take in the codes of dense slices; ``rows`` are their weights."""
        for name in track(plan.dense_bits, "rounding", total=len(plan.dense_bits)):
            self.codes[name] = coded[name]
            self.slice_errors[name] = relative_error(rows[name], coded[name].values(torch.float64))
            shift = coded.shift(name)
            if shift is not None:
                old = _bias_rows(plan, name, biases)
                self.code_biases[name] = (old + shift).to(rows[name].dtype)
                self.bias_shifts[name] = float((self.code_biases[name].double() - old).norm())

    def add_units(
        self,
        plan: Plan,
        made: UnitFactors,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
    ) -> None:
        """Take in what carries an entry of units out, and how far it is from the dense weights,
        with zeros where units go."""
        entry = made.entry
        sites = {site.name: site for site in plan.sites}
        rows = _rows(plan, weights)
        self.weighted_errors[entry.name] = made.lost / made.total if made.total > 0 else 0.0
        if isinstance(made, (HeadFactors, KeyFactors, WholeHeadFactors)):
            own = (s for x in sites.values() if x.bias for s in x.slices)
            known = {s.name: _bias_rows(plan, s.name, biases) for s in own}
            heads = _stored(made, rows, known)
            self.units.append(heads.narrowed)
            self.slice_errors.update(heads.slice_errors)
            self.bias_shifts.update(heads.bias_shifts)
            return
        stored, moved = {}, {}
        for s in sites[entry.consumer].slices:
            dtype = rows[s.name].dtype
            stored[s.name] = made.weights[s.name].to(dtype)
            # codes stand for the values that they were made with
            held = made.weights if made.quantised else stored
            whole = replace(made, weights=held).whole(s.name, torch.float64)
            self.slice_errors[s.name] = relative_error(rows[s.name], whole)
            if s.name in made.bias_shift:
                old = _bias_rows(plan, s.name, biases)
                moved[s.name] = (old + made.bias_shift[s.name]).to(dtype)
                self.bias_shifts[s.name] = float((moved[s.name].double() - old).norm())
        one = selected(plan, entry, made.kept, stored, moved)
        self.units.append(one)
        self.codes |= made.quantised
        self.weighted_errors[entry.name] = made.lost / made.total if made.total > 0 else 0.0
        if entry.kept == entry.of and not made.quantised:
            return
        for name in one.producers:
            kept = one.rows(name)
            at = kept.places().to(rows[name].device)
            there = rows[name].index_select(0, at).double()
            if name in made.quantised:
                there = made.quantised[name].values(torch.float64)
            whole = kept.whole(there, 0)
            self.slice_errors[name] = relative_error(rows[name], whole)
            if sites[plan.site_of(name).name].bias:
                old = _bias_rows(plan, name, biases)
                gone = old - kept.whole(old.index_select(0, at), 0)
                self.bias_shifts[name] = float(gone.norm())


def _stored(
    made: HeadFactors | KeyFactors | WholeHeadFactors,
    rows: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
) -> Stored:
    if isinstance(made, HeadFactors):
        return stored_heads(made, rows, biases)
    if isinstance(made, KeyFactors):
        return stored_keys(made, rows, biases)
    return stored_whole_heads(made, rows, biases)


def sharing_factors(
    plan: Plan, weights: Mapping[str, Tensor], statistics: Statistics | None, cfg: ShareConfig
) -> Factorised:
    """Basis Sharing, group by group; groups with the same inputs share one whitening."""
    rows = _rows(plan, weights)
    sites_of = {
        group.name: tuple(dict.fromkeys(plan.site_of(name).name for name in group.slices))
        for group in plan.groups
    }
    order = list(plan.groups)
    if statistics is not None:
        order.sort(key=lambda group: statistics.key(sites_of[group.name]))
    result = Factorised()
    key: object = None
    whitening: Whitening | None = None
    for group in track(order, "factorising", total=len(order)):
        start = time.perf_counter()
        if statistics is None:
            whitening = identity_whitening(group.in_features)
        elif whitening is None or key != statistics.key(sites_of[group.name]):
            key = statistics.key(sites_of[group.name])
            pooled = pooled_gram(statistics.gram(name) for name in sites_of[group.name])
            whitening = whiten(pooled, relative_floor=cfg.calibration.relative_floor)
        try:
            factors = factorise([rows[name] for name in group.slices], whitening, group.rank)
        except FactoriseError as error:
            raise FactoriseError(f"group {group.name!r}: {error}") from error
        coefficients = dict(zip(group.slices, factors.coefficients, strict=True))
        pivoted = pivot(factors.basis_RI) if group.stored_as.keeps_inputs else None
        result.add(group, factors.basis_RI, coefficients, rows, pivoted=pivoted)
        result.weighted_errors[group.name] = factors.weighted_error
        result.floored[group.name] = whitening.floored
        result.seconds[group.name] = time.perf_counter() - start
    return _in_order(result, plan)


def planned_factors(
    plan: Plan,
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    made: Mapping[str, GroupFactors],
    units: Mapping[str, UnitFactors] | None = None,
    coded: CodedSlices | None = None,
) -> Factorised:
    """The factors that a search has already made, and what carries the choice of units out."""
    rows = _rows(plan, weights)
    result = Factorised()
    for group in track(plan.groups, "factorising", total=len(plan.groups)):
        one = made[group.name]  # which may be made only now: one after the other, then
        moved = {
            name: (_bias_rows(plan, name, biases) + shift).to(rows[name].dtype)
            for name, shift in one.bias_shift.items()
        }
        for name, bias in moved.items():
            gap = bias.double() - _bias_rows(plan, name, biases)
            result.bias_shifts[name] = float(gap.norm())
        result.add(group, one.basis_RI, one.coefficients, rows, pivoted=one.pivoted, biases=moved)
        result.weighted_errors[group.name] = one.lost / one.total if one.total > 0 else 0.0
        result.floored[group.name] = one.floored
        result.codes |= {name or group.name: codes for name, codes in one.quantised.items()}
    for entry in plan.units:
        start = time.perf_counter()
        assert units is not None
        result.add_units(plan, units[entry.name], weights, biases)
        result.seconds[entry.name] = time.perf_counter() - start
    if coded is not None:
        result.add_dense(plan, coded, rows, biases)
    return result


def remade_factors(
    plan: Plan,
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    statistics: Statistics,
    cfg: ShareConfig,
) -> Factored:
    """Factors of a planned plan that was read from a file, from fresh statistics."""
    if not statistics.gradients:
        raise PlanError("a planned plan needs gradient statistics to be carried out")
    centred = cfg.planner.bias
    slices = slice_statistics(plan.sites, weights, statistics, biases=biases, centred=centred)
    spectra = Spectra(slices, relative_floor=cfg.calibration.relative_floor)
    refit = cfg.planner.refit
    if refit is None:
        refit = plan.outlook.refit if plan.outlook is not None else True
    return Factored(plan.groups, spectra, refit, cfg.planner.bias)


def _rows(plan: Plan, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {s.name: weights[x.name][s.start : s.stop] for x in plan.sites for s in x.slices}


def _bias_rows(plan: Plan, name: str, biases: Mapping[str, Tensor]) -> Tensor:
    site = plan.site_of(name)
    s = next(s for s in site.slices if s.name == name)
    return biases[site.name][s.start : s.stop].double()


def _in_order(result: Factorised, plan: Plan) -> Factorised:
    position = {group.name: at for at, group in enumerate(plan.groups)}
    result.groups.sort(key=lambda group: position[group.name])
    result.pivots.sort(key=lambda group: position[group.name])
    return result
