"""What became of a module or slice, or why nothing did: ``fxshare inspect --why``."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from fxshare.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from fxshare.config import ShareConfig
    from fxshare.plans import Group, Plan, Site, Skipped, SliceSpec
    from fxshare.record import Record


def explain(
    model: nn.Module, name: str, cfg: ShareConfig | None, record: Record | None
) -> list[str]:
    """Lines about the module or slice ``name``; :class:`ConfigError` if there is none."""
    plan = _plan(model, cfg, record)
    sites = () if plan is None else plan.sites
    for site in sites:
        for s in site.slices:
            if name == s.name and name not in site.calls:
                return [_slice_place(site, s), *_basis(plan, s, record)]
        if name in site.calls:
            return _site(name, site, plan, cfg, record)
    for skipped in () if plan is None else plan.skipped:
        if skipped.name == name:
            return _skipped(skipped, cfg)
    modules = dict(model.named_modules(remove_duplicate=False))
    if name in modules and name:
        inside = [call for site in sites for call in site.calls if call.startswith(f"{name}.")]
        if inside:
            return [f"not a linear module; rewritten inside it: {', '.join(inside)}"]
        return _untouched(name, modules[name], cfg)
    known = [n for n in modules if n] + [s.name for site in sites for s in site.slices]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ConfigError(
        f"--why {name}: the model has no module{' or slice' if sites else ''} of this name.{hint}"
    )


def _plan(model: nn.Module, cfg: ShareConfig | None, record: Record | None) -> Plan | None:
    from fxshare.matching import match
    from fxshare.planning import make_plan

    if record is not None:
        return record.plan
    if cfg is None:
        return None
    matching = match(model, cfg)
    return make_plan(cfg, matching.sites, matching.skipped)


def _site(
    name: str, site: Site, plan: Plan | None, cfg: ShareConfig | None, record: Record | None
) -> list[str]:
    layer = "" if site.layer is None else f", layer {site.layer}"
    lines = [
        f"weight type {site.type}{layer}, {site.in_features}→{site.out_features}, "
        f"{'with' if site.bias else 'without'} bias"
    ]
    if cfg is not None and site.type in cfg.weight_types:
        lines.append(f"matched by the pattern {cfg.weight_types[site.type].pattern}")
    others = [call for call in site.calls if call != name]
    if others:
        lines.append(f"one weight with {', '.join(others)}: rewritten together")
    for s in site.slices:
        label = f"slice {s.name}: " if len(site.slices) > 1 else ""
        lines += [f"{label}{line}" for line in _basis(plan, s, record)]
    return lines


def _slice_place(site: Site, s: SliceSpec) -> str:
    return f"rows {s.start}:{s.stop} of {site.name} (weight type {site.type})"


def _basis(plan: Plan | None, s: SliceSpec, record: Record | None) -> list[str]:
    group = _group_of(plan, s.name)
    if group is None:
        return ["in no group: keeps its original weight rows"]
    others = [name for name in group.slices if name != s.name]
    shared = f"shared with {', '.join(others)}" if others else "shared with nothing"
    error = None if record is None else record.slice_errors.get(s.name)
    tail = "" if error is None else f"; relative error {error:.3e}"
    return [f"basis {group.name} of rank {group.rank}, {shared}{tail}"]


def _group_of(plan: Plan | None, name: str) -> Group | None:
    groups = () if plan is None else plan.groups
    return next((group for group in groups if name in group.slices), None)


def _skipped(skipped: Skipped, cfg: ShareConfig | None) -> list[str]:
    lines = [f"not rewritten: {skipped.reason}"]
    if cfg is not None and skipped.type in cfg.weight_types:
        pattern = cfg.weight_types[skipped.type].pattern
        lines.append(f"matched by weight type {skipped.type} ({pattern})")
    return lines


def _untouched(name: str, module: nn.Module, cfg: ShareConfig | None) -> list[str]:
    from passes.graph import is_linear

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
    inside = re.search(pattern, name)
    hint = "" if inside is None else "; it matches further inside: begin the pattern with .*"
    return f"{type_name}: {pattern} does not match{hint}"
