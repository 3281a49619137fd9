"""The record of a refined model: what ``verify`` holds it to, and what the report says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from fxshare.base.numerics import relative_error
from fxshare.refining.parameters import Trainable
from fxshare.result.module import record_of
from fxshare.result.products import site_bias, slice_product, slices_of
from fxshare.result.record import Record
from fxshare.result.refinement import Refinement
from fxshare.result.report import Report
from fxshare.sites.tensors import site_tensors


def refined_record(
    model: nn.Module, before: nn.Module, after: nn.Module, trainable: Trainable, done: Refinement
) -> Record:
    """The record of ``after``, which was ``before``: errors and shifts from ``model`` as they are
    now."""
    record = record_of(before)
    return replace(
        record,
        slice_errors=_slice_errors(model, after, record),
        bias_shifts=_bias_shifts(model, after, record) if trainable.others else record.bias_shifts,
        other_shifts=_other_shifts(model, after, record, trainable),
        refined=(*record.refined, done),
        report=_report(record.report, record, before, after, done),
    )


def site_bias_names(gm: nn.Module, record: Record) -> frozenset[str]:
    """The names in ``gm`` of the biases of the sites."""
    first = {id(p): name for name, p in gm.named_parameters()}
    found = set()
    for site in record.plan.sites:
        for s in site.slices:
            bias = getattr(gm.get_submodule(slices_of(gm)[s.name].module), "bias", None)
            if bias is not None and id(bias) in first:
                found.add(first[id(bias)])
    return frozenset(found)


def _slice_errors(model: nn.Module, gm: nn.Module, record: Record) -> dict[str, float]:
    found = {}
    places = slices_of(gm)
    for site in record.plan.sites:
        weight_OI, _ = site_tensors(model, site)
        for s in site.slices:
            rows = weight_OI[s.start : s.stop]
            error = relative_error(rows, slice_product(gm, s.name))
            own_rows = places[s.name].basis is None and s.name not in record.slice_errors
            if not own_rows or error:  # merged adapters change what the plan left as it was
                found[s.name] = error
    return found


def _bias_shifts(model: nn.Module, gm: nn.Module, record: Record) -> dict[str, float]:
    found = dict(record.bias_shifts)
    for site in record.plan.sites:
        _, bias = site_tensors(model, site)
        now = site_bias(gm, site)
        if bias is None or now is None:
            continue
        for s in site.slices:
            rows = slice(s.start, s.stop)
            gap = now[rows].double() - bias.detach()[rows].to(now.device).double()
            found[s.name] = float(gap.norm())
    return found


def _other_shifts(
    model: nn.Module, gm: nn.Module, record: Record, trainable: Trainable
) -> dict[str, float]:
    of_sites = site_bias_names(gm, record)
    then = dict(model.named_parameters(remove_duplicate=False))
    now = dict(gm.named_parameters(remove_duplicate=False))
    names = dict.fromkeys((*record.other_shifts, *trainable.others))
    found = {}
    for name in names:
        if name in of_sites or name not in then:
            continue
        gap = now[name].detach().double() - then[name].detach().to(now[name].device).double()
        found[name] = float(gap.norm())
    return found


def _report(
    report: Report, record: Record, before: nn.Module, after: nn.Module, done: Refinement
) -> Report:
    moved = _moved(record, before, after)
    groups = tuple(
        replace(group, refined=moved[group.name]) if group.name in moved else group
        for group in report.groups
    )
    return replace(report, groups=groups, notes=(*report.notes, str(done)))


def _moved(record: Record, before: nn.Module, after: nn.Module) -> Mapping[str, float]:
    """How far the weights of each group were moved, over their size."""
    found = {}
    plan = record.plan
    members = {group.name: group.slices for group in plan.groups}
    for one in plan.units:
        members[one.name] = one.slices_among(plan.sites)
    for row, names in members.items():
        gap = size = 0.0
        for name in names:
            old_OI = slice_product(before, name)
            gap += float((slice_product(after, name) - old_OI).norm()) ** 2
            size += float(old_OI.norm()) ** 2
        found[row] = (gap / size) ** 0.5 if size else 0.0
    return found


__all__ = ["refined_record", "site_bias_names"]
