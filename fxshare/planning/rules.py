"""From sites and a configuration to a plan. Pure: neither torch nor weights in it."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from typing import TypeVar

from fxshare.base.progress import stage
from fxshare.config import Planner, ShareConfig
from fxshare.errors import FxShareWarning, PlanError
from fxshare.plans.plan import Group, Plan
from fxshare.plans.storage import storages_of, usable
from fxshare.plans.units import Units
from fxshare.sites.site import Site, Skipped, SliceSpec

_LOG = logging.getLogger(__name__)


def exact_plan(sites: Sequence[Site], skipped: Sequence[Skipped] = ()) -> Plan:
    """Every slice over its original rows: nothing is saved, nothing is lost."""
    return Plan(mode="exact", sites=tuple(sites), skipped=tuple(skipped))


def sharing_plan(cfg: ShareConfig, sites: Sequence[Site], skipped: Sequence[Skipped] = ()) -> Plan:
    """Basis Sharing as published (arXiv 2410.03765): consecutive layers of each weight type and
    slice form groups of ``group_size``, all at the rank ``int(rate · in · O / (in + O))``.

    Warns (:class:`FxShareWarning`) where a group stores more than its dense weights.
    """
    assert cfg.compression_rate is not None
    groups: list[Group] = []
    for type_name, label, members in _families(cfg, sites):
        size = cfg.group_size_of(type_name)
        if size == 1 or all(site.layer is None for site, _ in members):
            # one basis per matrix, whatever layer it is in
            for site in dict.fromkeys(site for site, _ in members):
                alone = [(x, s) for x, s in members if x is site]
                groups.append(_group(cfg.compression_rate, type_name, label, alone))
            continue
        layers = sorted({site.layer for site, _ in members if site.layer is not None})
        for at in range(0, len(layers), size):
            chosen = layers[at : at + size]
            part = [(x, s) for x, s in members if x.layer in chosen]
            groups.append(_group(cfg.compression_rate, type_name, label, part))
    plan = Plan(
        mode="sharing", sites=tuple(sites), groups=named_apart(groups), skipped=tuple(skipped)
    )
    _warn_above_dense(plan)
    return plan


def make_plan(cfg: ShareConfig, sites: Sequence[Site], skipped: Sequence[Skipped] = ()) -> Plan:
    """The plan that the configuration asks for."""
    with stage("plan", _LOG) as running:
        exact = cfg.mode == "exact"
        plan = exact_plan(sites, skipped) if exact else sharing_plan(cfg, sites, skipped)
        running.found(f"{plan.mode} mode, {len(plan.groups)} groups")
    return plan


def uniform_plan(cfg: ShareConfig, sites: Sequence[Site], skipped: Sequence[Skipped] = ()) -> Plan:
    """For a budget without data: every slice for itself, all at the share of numbers (or FLOPs)
    that the budget keeps. Sizes and FLOPs are those of a planned result; losses are not known."""
    with stage("plan", _LOG) as running:
        plan = _uniform(cfg, sites, skipped)
        running.found(f"uniform ranks, {len(plan.groups)} groups")
    return plan


def _uniform(cfg: ShareConfig, sites: Sequence[Site], skipped: Sequence[Skipped]) -> Plan:
    assert cfg.budget is not None
    kept = cfg.budget.params_kept or cfg.budget.flops_kept
    if kept is None:
        raise PlanError(
            "this budget needs calibration data to be planned: bytes_kept, max_bytes and "
            "max_loss_increase say nothing about single matrices; give calibration data "
            "(--calibration SPEC), or params_kept"
        )
    storages = storages_of(cfg.planner.storage)
    groups = []
    check_layers(cfg.planner, sites)
    for site in sites:
        if site.layer in cfg.planner.keep_dense:
            continue
        for s in site.slices:
            sizes = (site.in_features, s.out_features)
            numbers = int(kept * sizes[0] * sizes[1])
            if numbers >= sizes[0] * sizes[1]:
                continue
            # the last one stores no more numbers than the others at any rank
            storage = usable(storages, looked_up=bool(site.lookups))[-1]
            group = _group(kept, site.type, s.label, [(site, s)])
            rank = max(1, storage.largest_rank(*sizes, numbers=numbers))
            groups.append(group.model_copy(update={"rank": rank, "storage": storage.name}))
    return Plan(
        mode="planned",
        sites=tuple(sites),
        groups=named_apart(groups),
        skipped=tuple(skipped),
    )


def check_layers(planner: Planner, sites: Sequence[Site]) -> None:
    """:class:`PlanError` for a layer to keep dense that is none."""
    layers = {site.layer for site in sites}
    unknown = [layer for layer in planner.keep_dense if layer not in layers]
    if unknown:
        known = sorted(layer for layer in layers if layer is not None)
        raise PlanError(f"planner.keep_dense: there is no layer {unknown[0]}; layers are {known}")


Member = tuple[Site, SliceSpec]


def _families(cfg: ShareConfig, sites: Sequence[Site]) -> list[tuple[str, str, list[Member]]]:
    """Slices that may meet in a group: same weight type, same label, same input width."""
    families: dict[tuple[str, str, int], list[Member]] = {}
    for site in sites:
        pooled = cfg.weight_types[site.type].basis
        for s in site.slices:
            label = {"slice": s.label, "part": s.part, "site": ""}[pooled]
            families.setdefault((site.type, label, site.in_features), []).append((site, s))
    return [(type_name, label, members) for (type_name, label, _), members in families.items()]


def _group(rate: float, type_name: str, label: str, members: Sequence[Member]) -> Group:
    in_features = members[0][0].in_features
    out_features = sum(s.out_features for _, s in members)
    layers = tuple(sorted({site.layer for site, _ in members if site.layer is not None}))
    where = f"{layers[0]}_{layers[-1]}" if layers else re.sub(r"\W", "_", members[0][0].name)
    parts = [type_name, label.replace(".", "_"), where]
    return Group(
        name="basis_" + "_".join(filter(None, (re.sub(r"\W", "_", part) for part in parts))),
        type=type_name,
        label=label,
        layers=layers,
        slices=tuple(s.name for _, s in members),
        in_features=in_features,
        out_features=out_features,
        rank=sharing_rank(rate, in_features, out_features),
    )


Entry = TypeVar("Entry", Group, Units)


def named_apart(groups: Sequence[Entry]) -> tuple[Entry, ...]:
    """Groups of one type over inputs of different width, or of types ``a-b`` and ``a_b``, would
    have one name: a number is added from the second on."""
    named: dict[str, Entry] = {}
    for group in groups:
        name, number = group.name, 2
        while name in named:
            name, number = f"{group.name}_{number}", number + 1
        named[name] = group.model_copy(update={"name": name})
    return tuple(named.values())


def sharing_rank(rate: float, in_features: int, out_features: int) -> int:
    """``int(rate · in · O / (in + O))``, at least 1 and at most ``min(in, O)``."""
    limit = min(in_features, out_features)
    # the minimum first: a huge rate is infinite here, and int(inf) raises
    rank = min(rate * in_features * out_features / (in_features + out_features), limit)
    return max(1, int(rank))


def _warn_above_dense(plan: Plan) -> None:
    above = [g for g in plan.groups if g.stored_numbers > g.dense_numbers]
    if above:
        first = above[0]
        warnings.warn(
            f"{len(above)} of {len(plan.groups)} groups store more than their dense weights: "
            f"{first.name} keeps rank {first.rank}, {first.stored_numbers} numbers instead of "
            f"{first.dense_numbers}; break-even is rank "
            f"{first.stored_as.break_even_rank(first.in_features, first.out_features)}",
            FxShareWarning,
            stacklevel=3,
        )
