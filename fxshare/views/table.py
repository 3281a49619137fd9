"""A plan in words and tables: its groups, what stays dense and why, totals, and the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fxshare.config import Planner, ShareConfig
from fxshare.plans.cost import Shape, numbers, ranks
from fxshare.plans.outlook import Outlook, TrialResult
from fxshare.plans.plan import Plan
from fxshare.plans.storage import PLAIN, storages_of
from fxshare.plans.units import Units
from fxshare.result.group_report import GroupReport, group_reports
from fxshare.sites.site import Site, SliceSpec

if TYPE_CHECKING:
    from fxshare.cost_model import Forecast
    from fxshare.planning.sweep import Alternative, Sweep

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""
_UNITS = {"numbers": "number", "bytes": "byte", "flops": "FLOP"}
_LISTED = 6


def groups_table(plan: Plan) -> Table:
    """A row per group. FLOPs are per token, the basis counted once per site."""
    losses = any(group.loss is not None for group in plan.groups)
    losses = losses or any(one.loss is not None for one in plan.units)
    header = ["group", "type", "layers", "slices", "in→out", "rank", "break-even", "storage"]
    header += ["kept", "numbers before", "after", "FLOPs/token before", "after"]
    header += ["predicted Δloss"] if losses else []
    costs = {row.name: row for row in group_reports(plan, 1)}
    rows = []
    for group in plan.groups:
        cost = costs[group.name]
        row = [
            group.name,
            group.type,
            layers_text(group.layers),
            str(len(group.slices)),
            f"{group.in_features}→{group.out_features}",
            str(group.rank),
            str(PLAIN.break_even_rank(group.in_features, group.out_features)),
            group.storage + bits_text(group.bits),
            f"{group.stored_numbers / group.dense_numbers:.3f}",
            f"{group.dense_numbers:,}",
            f"{group.stored_numbers:,}",
            f"{cost.flops_before:,}",
            f"{cost.flops_after:,}",
        ]
        if losses:
            row.append("–" if group.loss is None else f"{group.loss:.3e}")
        rows.append(row)
    return header, rows + [_units_row(one, costs[one.name], losses) for one in plan.units]


def _units_row(one: Units, cost: GroupReport, losses: bool) -> list[str]:
    """The row of an entry of another kind: its rank is how much stays."""
    row = [one.name, one.type, layers_text(one.layers), str(cost.slices)]
    row += [
        f"{cost.in_features}→{cost.out_features}",
        f"{one.kept} of {one.of}",
        "–",
        one.words.storage + bits_text(one.bits),
    ]
    row += [f"{one.kept / one.of:.3f}", f"{one.dense_numbers:,}", f"{one.stored_numbers:,}"]
    row += [f"{cost.flops_before:,}", f"{cost.flops_after:,}"]
    if losses:
        row.append("–" if one.loss is None else f"{one.loss:.3e}")
    return row


def bits_text(bits: int | None) -> str:
    """``, 8 bits``, to be put behind something; nothing where they are the dtype's."""
    return "" if bits is None else f", {bits} bits"


def layers_text(layers: tuple[int, ...]) -> str:
    """``0-3,7``, or a dash for none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    texts = [f"{a}-{b}" if b > a + 1 else f"{a},{b}" if b > a else f"{a}" for a, b in runs]
    return ",".join(texts) or "–"


def head_lines(plan: Plan, *, element_size: int | None = None) -> list[str]:
    """Mode, counts and totals. Bytes where the size of the model's numbers is known."""
    before, after = plan.dense_numbers, plan.stored_numbers
    lines = [
        f"{plan.mode} mode: {len(plan.sites)} sites, {sum(len(s.slices) for s in plan.sites)} "
        f"slices, {len(plan.groups)} groups"
        + "".join(f", {count} {what}" for what, count in plan.others.items()),
        f"params_kept {plan.params_kept:.4f}: {before:,} weights → {after:,} stored numbers",
    ]
    costs = group_reports(plan, element_size or 1)
    flop = [sum(getattr(row, f) for row in costs) for f in ("flops_before", "flops_after")]
    lines.append(f"FLOPs per token of these linears: {flop[0]:,} → {flop[1]:,}")
    if element_size is not None:
        size = [sum(getattr(row, f) for row in costs) for f in ("bytes_before", "bytes_after")]
        lines[-1] += f"; bytes: {size[0]:,} → {size[1]:,}"
    return lines


def dense_lines(
    plan: Plan,
    cfg: ShareConfig | None = None,
    alternatives: Mapping[str, Alternative | None] | None = None,
) -> list[str]:
    """What stays dense and why, a line per reason; then the modules that are not rewritten."""
    grouped = plan.rewritten
    dense_bits = plan.dense_bits
    reasons: dict[str, list[tuple[Site, SliceSpec]]] = {}
    for site in plan.sites:
        for s in site.slices:
            if s.name not in grouped:
                reason = why_dense(plan, site, s, cfg, (alternatives or {}).get(s.name))
                if s.name in dense_bits:
                    reason = f"stored in {dense_bits[s.name]} bits"
                reasons.setdefault(reason, []).append((site, s))
    lines = []
    for reason, members in reasons.items():
        weights = sum(site.in_features * s.out_features for site, s in members)
        if len(members) == 1:
            what = members[0][1].name
        else:
            listed = [s.name for _, s in members[:_LISTED]]
            what = f"{len(members)} slices ({_some(listed, len(members))})"
        lines.append(f"dense: {what}, {weights:,} numbers: {reason}")
    skipped: dict[tuple[str, str], list[str]] = {}
    for one in plan.skipped:
        skipped.setdefault((one.type, one.reason), []).append(one.name)
    for (type_name, reason), names in skipped.items():
        what = _some(names[:_LISTED], len(names))
        lines.append(f"not rewritten: {what} ({type_name}): {reason}")
    return lines


def _some(listed: list[str], count: int) -> str:
    more = f" and {count - len(listed)} more" if count > len(listed) else ""
    return ", ".join(listed) + more


def why_dense(
    plan: Plan,
    site: Site,
    s: SliceSpec,
    cfg: ShareConfig | None = None,
    alternative: Alternative | None = None,
) -> str:
    """Why a slice that is in no group is in none, as far as it is known.

    ``cfg`` is the configuration the plan was made under, ``alternative`` the best low-rank option
    of the slice.
    """
    if plan.mode == "exact":
        return "the exact mode compresses nothing"
    if plan.mode == "sharing":
        return "it is in no group of the plan"
    planner = Planner() if cfg is None else cfg.planner
    if site.layer in planner.keep_dense:
        return f"planner.keep_dense has layer {site.layer}"
    shape = Shape(site.in_features, s.out_features)
    if not _may_be(shape, planner, 0.0):
        multiple = planner.rank_multiple
        which = "" if multiple is None else f" that is a multiple of {multiple}"
        return f"no rank{which} stores fewer numbers than the {shape.dense_numbers:,} of dense"
    if not _may_be(shape, planner, planner.floor):
        return (
            f"planner.floor {planner.floor:g}: no rank stores between that share of its numbers "
            "and all of them"
        )
    if "basis" not in planner.kinds:
        return f"planner.kinds are {', '.join(planner.kinds)}: no bases compete"
    if plan.outlook is None:
        return "the budget keeps it whole, or the plan was edited"
    return _too_dear(plan.outlook, alternative)


def _may_be(shape: Shape, planner: Planner, floor: float) -> bool:
    """Whether any rank stores less than dense and at least the floor's share of it."""
    storages = storages_of(planner.storage)
    rank = ranks(shape, planner.rank_multiple)
    costs = np.concatenate([numbers(shape, rank, storage) for storage in storages])
    dense = shape.dense_numbers
    return bool(((costs < dense) & (costs >= floor * dense)).any())


def _too_dear(outlook: Outlook, alternative: Alternative | None) -> str:
    unit = _UNITS[outlook.unit]
    if outlook.price == 0:
        return "the budget has room for it"
    price = f"at the price of {outlook.price:.3g} per {unit}"
    if alternative is None:
        return f"{price} no rank below dense is worth its loss"
    worth = outlook.price * alternative.saved
    option = (
        f"rank {alternative.rank} {alternative.storage.name} would save {alternative.saved:,} "
        f"{unit}s, worth {worth:.3g}, and lose {alternative.loss:.3g}"
    )
    if alternative.loss >= worth:
        return f"{price} no rank below dense is worth its loss: {option}"
    # ranks drawn to uniform ones, a floor of the search, or statistics that were measured again
    return f"the plan that measured best ({outlook.trial}) keeps it dense; {price} {option}"


def outlook_lines(plan: Plan, cfg: ShareConfig | None = None) -> list[str]:
    """What the plan is predicted to lose, how good it can be, what was measured."""
    o = plan.outlook
    if o is None:
        if plan.mode != "planned":
            return []
        return ["no calibration data: uniform ranks, each slice for itself; losses are not known"]
    unit = _UNITS[o.unit]
    lines = [
        f"budget {o.budget:,.0f} {unit}s, used {o.cost:,}; price {o.price:.3g} per {unit}",
        f"predicted loss increase {o.predicted:.4g} per token ({o.loss_name}); dual bound "
        f"{o.bound:.4g}, gap {o.gap:.3g}",
    ]
    if o.unpriced:
        lines.append(
            f"{o.priced} candidate groups were priced; {o.unpriced} longer ones only by a bound, "
            f"without which the dual bound is {o.priced_bound:.4g} (strategy: layers prices all)"
        )
    if o.slope:
        lines.append(
            f"of which {o.slope:.4g} is the gradient along the change, which ranks do not follow; "
            f"measured on {o.slope_tokens:,} tokens"
        )
    if o.measured is not None:
        lines.append(
            f"measured {o.measured:.4g} per token on {o.held_back_tokens:,} held-back tokens"
        )
    for one in o.kinds:
        measured = "not finite" if one.measured is None else f"measured {one.measured:.4g}"
        lines.append(f"{one.kind} alone ({one.entries}): predicted {one.predicted:.4g}, {measured}")
    effort = "" if cfg is None else f"{cfg.planner.search}, "
    count = len(o.trials)
    lines.append(
        f"search: {effort}{count} plan{'s' * (count != 1)}, {o.seconds:.1f} s; kept: {o.trial}, "
        f"strategy {o.strategy}, {'refitted' if o.refit else 'not refitted'}"
    )
    return lines


def time_table(found: Sequence[Forecast]) -> Table:
    """A row per step and mode: seconds per token, dense and of the plan, as the cost model has
    them."""
    header = ["time per token", "mode", "of", "dense µs", "plan µs", "× dense"]
    return header, [
        [
            f"{f.step}, {f.tokens} token{'s' * (f.tokens != 1)}",
            "compiled" if f.compiled else "eager",
            "the model" if f.whole else "these linears",
            f"{f.dense * 1e6:,.2f}",
            f"{f.plan * 1e6:,.2f}",
            f"{f.speedup:.2f}",
        ]
        for f in found
    ]


def slower_than_dense(found: Sequence[Forecast]) -> str | None:
    """A warning where a plan is expected to be slower than dense, of the whole model where that is
    known; None where it is not."""
    whole = [f for f in found if f.whole]
    # what is shown as 1.00 is no slower
    slow = [f for f in whole or found if f.speedup < 0.995]
    if not slow:
        return None
    cases = ", ".join(
        f"{f.step} {'compiled' if f.compiled else 'eager'} {f.speedup:.2f} times dense's speed"
        for f in slow
    )
    return (
        f"the plan is predicted to be slower than dense: {cases}. planner.never_slower leaves what "
        "would be slower dense, budget.time_kept bounds the time; torch.compile saves launches"
    )


def trials_table(plan: Plan) -> Table:
    """The plans that the search tried; a star marks the one that was kept."""
    header = ["trial", "chosen", "predicted", "measured", "on tokens", "cost", "groups", "s"]
    o = plan.outlook
    if o is None:
        return header, []
    refined = any(t.refined is not None for t in o.trials)
    if refined:
        header.insert(5, "refined")
    best = None if o.measured is None else (o.measured, o.held_back_tokens, o.cost)
    kept = next(
        (
            number
            for number, t in enumerate(o.trials)
            if (t.measured, t.tokens, t.cost) == best and t.name.startswith(o.trial)
        ),
        None,
    )
    rows = [
        [
            t.name,
            "*" if number == kept else "",
            f"{t.predicted:.4g}",
            "–" if t.measured is None else f"{t.measured:.4g}",
            "–" if t.measured is None else f"{t.tokens:,}",
            *(["–" if t.refined is None else _after(t)] if refined else []),
            f"{t.cost:,}",
            str(t.groups),
            f"{t.seconds:.1f}",
        ]
        for number, t in enumerate(o.trials)
    ]
    return header, rows


def _after(trial: TrialResult) -> str:
    return f"{trial.refined:.4g} ({trial.refined_steps} steps)"


def sweep_table(sweep: Sweep) -> Table:
    """A row per budget: the planned and the uniform plan. What was measured has a column where
    anything was."""
    header = ["budget", "kept", "bases", "predicted Δloss", "dual bound", "uniform kept", "Δloss"]
    measured = any(point.measured is not None for point in sweep.planned)
    if measured:
        header.append("planned, measured Δloss")
    uniform = {point.budget: point for point in sweep.uniform}
    rows = []
    for point in sweep.planned:
        other = uniform.get(point.budget)
        rows.append(
            [
                f"{point.budget:.4f}",
                f"{point.kept:.4f}",
                str(point.bases),
                f"{point.loss:.4g}",
                f"{point.bound:.4g}",
                "–" if other is None else f"{other.kept:.4f}",
                "–" if other is None else f"{other.loss:.4g}",
            ]
        )
        if measured:
            rows[-1].append("–" if point.measured is None else f"{point.measured:.4g}")
    return header, rows


__all__ = [
    "dense_lines",
    "groups_table",
    "head_lines",
    "layers_text",
    "outlook_lines",
    "slower_than_dense",
    "sweep_table",
    "time_table",
    "trials_table",
    "why_dense",
]
