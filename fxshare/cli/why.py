"""What became of a module or slice, or why nothing did: ``fxshare inspect --why``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import fxshare

if TYPE_CHECKING:
    from torch import nn

    from fxshare.compiling.shown import Shown
    from fxshare.config import ShareConfig
    from fxshare.plans.bits import Rounded
    from fxshare.plans.plan import Group, Plan
    from fxshare.plans.units import Units
    from fxshare.result.record import Record
    from fxshare.sites.site import Site, Skipped, SliceSpec

_LISTED = 6


def explain(
    model: nn.Module, name: str, cfg: ShareConfig | None, record: Record | None
) -> list[str]:
    """Lines about the module or slice ``name``; a ``ConfigError`` if there is none."""
    matching = None if record is not None or cfg is None else _shown(model, cfg)
    plan = _plan(matching, cfg, record)
    sites = () if plan is None else plan.sites
    found = [] if plan is None else _planned(plan, name, cfg, record)
    if found:
        return [*found, *_of_an_mlp(matching, name)]
    modules = dict(model.named_modules(remove_duplicate=False))
    if name in modules and name:
        inside = [call for site in sites for call in site.readers if call.startswith(f"{name}.")]
        if inside:
            return [f"not a linear module; rewritten inside it: {', '.join(inside)}"]
        return _untouched(name, modules[name], cfg)
    known = [n for n in modules if n] + [s.name for site in sites for s in site.slices]
    raise fxshare.errors.ConfigError(
        f"--why {name}: the model has no module{' or slice' if sites else ''} of this name."
        f"{_nearest(name, known)}"
    )


def explain_in_plan(plan: Plan, name: str) -> list[str]:
    """Lines about a site, slice, group or skipped module of a plan that was read from a file;
    :class:`~fxshare.errors.ConfigError` if it has none of this name."""
    found = _planned(plan, name, None, None)
    if found:
        return found
    known = [call for site in plan.sites for call in site.readers]
    known += [s.name for site in plan.sites for s in site.slices]
    known += [group.name for group in plan.groups] + [one.name for one in plan.units]
    known += [s.name for s in plan.skipped]
    raise fxshare.errors.ConfigError(
        f"--why {name}: the plan has no module, slice or group of this name.{_nearest(name, known)}"
    )


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.4)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _planned(plan: Plan, name: str, cfg: ShareConfig | None, record: Record | None) -> list[str]:
    """What a plan says about a name; nothing where it has no such name."""
    for site in plan.sites:
        if name in site.readers:
            return _site(name, site, plan, cfg, record)
        for s in site.slices:
            if name == s.name:
                return [_slice_place(site, s), *_basis(plan, site, s, cfg, record)]
    for group in plan.groups:
        if name == group.name:
            return [f"a basis of {_few(group.slices)}", *_numbers(group, record)]
    for one in plan.units:
        if name == one.name:
            return _units(one)
    for skipped in plan.skipped:
        if skipped.name == name:
            return _skipped(skipped, cfg)
    return []


def _shown(model: nn.Module, cfg: ShareConfig) -> Shown:
    from fxshare.compiling.shown import shown

    return shown(model, cfg)


def _of_an_mlp(matching: Shown | None, name: str) -> list[str]:
    """Whether hidden units of a site may go, where they compete; why not, of what reads none."""
    if matching is None or matching.mlps is None:
        return []
    for one in matching.mlps.found:
        sites = (*one.producers, one.consumer)
        if any(name in (*x.readers, *(s.name for s in x.slices)) for x in sites):
            made = _few([site.name for site in one.producers])
            return [
                f"of an MLP with {one.units} hidden units: {made}, read by {one.consumer.name}; "
                "some of them may go"
            ]
    for site in matching.sites:
        reason = matching.mlps.reasons.get(site.name)
        if reason is not None and name in (*site.readers, *(s.name for s in site.slices)):
            return [f"no hidden units are told from what it reads: it {reason}"]
    return []


def _plan(matching: Shown | None, cfg: ShareConfig | None, record: Record | None) -> Plan | None:
    from fxshare.planning.rules import exact_plan, make_plan

    if record is not None:
        return record.plan
    if cfg is None or matching is None:
        return None
    if cfg.mode == "planned":  # what shares is decided by data; what matches is not
        return exact_plan(matching.sites, matching.skipped).model_copy(update={"mode": "planned"})
    return make_plan(cfg, matching.sites, matching.skipped)


def _site(
    name: str, site: Site, plan: Plan, cfg: ShareConfig | None, record: Record | None
) -> list[str]:
    layer = "" if site.layer is None else f", layer {site.layer}"
    lines = [
        f"weight type {site.type}{layer}, {site.in_features}→{site.out_features}, "
        f"{'with' if site.bias else 'without'} bias"
    ]
    if cfg is not None and site.type in cfg.weight_types:
        lines.append(f"matched by the pattern {cfg.weight_types[site.type].pattern}")
    others = [call for call in site.readers if call != name]
    if others:
        lines.append(f"one weight with {', '.join(others)}: rewritten together")
    if len(site.slices) == 1:
        return [*lines, *_basis(plan, site, site.slices[0], cfg, record)]
    # a line a slice: the slice's own name tells the rest
    return lines + [f"slice {s.name}: {_basis(plan, site, s, cfg, record)[0]}" for s in site.slices]


def _slice_place(site: Site, s: SliceSpec) -> str:
    layer = "" if site.layer is None else f", layer {site.layer}"
    return (
        f"rows {s.start}:{s.stop} of {site.name} (weight type {site.type}{layer}), "
        f"{site.in_features}→{s.out_features}"
    )


def _basis(
    plan: Plan, site: Site, s: SliceSpec, cfg: ShareConfig | None, record: Record | None
) -> list[str]:
    from fxshare.views.table import why_dense

    group = next((group for group in plan.groups if s.name in group.slices), None)
    units = next((x for x in plan.units if s.name in x.slices_among(plan.sites)), None)
    error = None if record is None else record.slice_errors.get(s.name)
    tail = "" if error is None else f"; relative error {error:.3e}"
    if units is not None:
        return [
            f"{units.words.storage} {units.name}: keeps {units.kept} of {units.of}{tail}",
            *_units(units),
        ]
    few = next((one for one in plan.rounded if s.name in one.slices), None)
    if few is not None:
        return _few_bits(few, s.name, record)
    if group is None:
        kept = "in no group: keeps its original weight rows"
        if record is None and cfg is not None and cfg.mode == "planned":
            return [
                "what it shares and keeps is decided with data: 'fxshare plan ... --calibration "
                "SPEC -o plan.json', then 'fxshare inspect plan.json --why NAME'"
            ]
        return [f"{kept}: {why_dense(plan, site, s, cfg)}"]
    others = [name for name in group.slices if name != s.name]
    shared = f"shared with {_few(others)}" if others else "shared with nothing"
    return [f"basis {group.name} of rank {group.rank}, {shared}{tail}", *_numbers(group, record)]


def _few_bits(few: Rounded, name: str, record: Record | None) -> list[str]:
    """A dense slice that is stored in few bits."""
    error = None if record is None else record.slice_errors.get(name)
    tail = "" if error is None else f"; relative error {error:.3e}"
    lines = [f"dense, in no group: its own weight rows in {few.bits} bits{tail}"]
    if few.loss is not None:
        others = len(few.slices) - 1
        of = "it" if not others else f"it and {others} more"
        lines.append(f"predicted loss increase of {of}: {few.loss:.3e} per token")
    return lines


def _units(one: Units) -> list[str]:
    """Which part of the model it is, its sizes and its loss."""
    from fxshare.views.table import bits_text

    share = one.kept / one.of
    lines = [
        f"{one.words.what} of {_few(one.producers)}, read by {one.consumer}: {one.kept} of "
        f"{one.of} stay, {one.stored_numbers:,} of {one.dense_numbers:,} numbers ({share:.3f})"
        f"{bits_text(one.bits)}"
    ]
    if one.loss is not None:
        lines.append(f"predicted loss increase of {one.words.parts}: {one.loss:.3e} per token")
    return lines


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _numbers(group: Group, record: Record | None) -> list[str]:
    """Sizes and losses of a group."""
    from fxshare.plans.storage import PLAIN
    from fxshare.views.table import bits_text

    kept = group.stored_numbers / group.dense_numbers
    lines = [
        f"the group: {group.in_features}→{group.out_features}, {group.storage} storage"
        f"{bits_text(group.bits)}, "
        f"{group.stored_numbers:,} of {group.dense_numbers:,} numbers ({kept:.3f}); plain storage "
        f"breaks even at rank {PLAIN.break_even_rank(group.in_features, group.out_features)}"
    ]
    if group.loss is not None:
        lines.append(f"the group's predicted loss increase: {group.loss:.3e} per token")
    reports = () if record is None else record.report.groups
    errors = [g.weighted_error for g in reports if g.name == group.name]
    if errors and errors[0] is not None:
        lines.append(f"the group's weighted error: {errors[0]:.3e}")
    return lines


def _skipped(skipped: Skipped, cfg: ShareConfig | None) -> list[str]:
    lines = [f"not rewritten: {skipped.reason}"]
    if cfg is not None and skipped.type in cfg.weight_types:
        pattern = cfg.weight_types[skipped.type].pattern
        lines.append(f"matched by weight type {skipped.type} ({pattern})")
    return lines


def _untouched(name: str, module: nn.Module, cfg: ShareConfig | None) -> list[str]:
    from passes.graph.graph import is_linear

    kind = type(module).__name__
    if not is_linear(module):
        inside = sum(is_linear(m) for m in module.modules())
        about = f", with {inside} linear modules inside it" if inside else ""
        return [f"not rewritten: a {kind}{about}; only nn.Linear and Conv1D modules are"]
    if cfg is None:
        return [f"a {kind}; give -c FILE.yaml to see what a configuration makes of it"]
    return [
        f"not rewritten: no pattern matches this {kind} (re.match, from the start of the name)",
        *(_mismatch(t, spec.pattern, name) for t, spec in cfg.weight_types.items()),
    ]


def _mismatch(type_name: str, pattern: str, name: str) -> str:
    from fxshare.sites.patterns import Pattern

    inside = Pattern(pattern).search(name)
    hint = "" if inside is None else "; it matches further inside: begin the pattern with .*"
    return f"{type_name}: {pattern} does not match{hint}"
