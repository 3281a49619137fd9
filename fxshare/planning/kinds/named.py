"""Kinds of candidates by the names that a configuration gives them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import cast

from fxshare.base.imported import imported
from fxshare.base.names import as_group_name
from fxshare.capture import Captured
from fxshare.config import Planner
from fxshare.errors import ConfigError, FxShareWarning, PlanError
from fxshare.factors.codes import units_in_bits
from fxshare.factors.factored import Factored
from fxshare.factors.units import UnitFactors
from fxshare.planning.kinds.heads import AttentionHeads
from fxshare.planning.kinds.keys import AttentionKeys
from fxshare.planning.kinds.kind import BASIS, FoundPart, Kind, Scene
from fxshare.planning.kinds.units import HiddenUnits
from fxshare.planning.rules import named_apart
from fxshare.planning.solver.problem import Other, Part
from fxshare.planning.solver.solve import Solution
from fxshare.plans.heads import Heads
from fxshare.plans.keys import Keys
from fxshare.plans.plan import Plan
from fxshare.plans.units import Units
from fxshare.plans.whole_heads import WholeHeads
from fxshare.sites.attention import Attentions, attentions
from fxshare.sites.head_groups import AllHeadGroups, head_groups
from fxshare.sites.mlps import Mlps, mlps
from fxshare.sites.scores import AllScores, all_scores
from fxshare.sites.site import Site

_KINDS: Mapping[type[Units], str] = {
    Units: "units",
    Heads: "heads",
    WholeHeads: "heads",
    Keys: "keys",
}
"""Which of our kinds an entry is of, by its keys."""

_METHODS = ("candidates", "entry", "carry_out")


def kinds_named(names: Sequence[str]) -> tuple[Kind, ...]:
    """The kinds beside the basis, in the order of their names; one's own as
    ``package.module:Name``.

    Raises :class:`ConfigError` for a name that says nothing, or what is no kind.
    """
    found: list[Kind] = []
    for name in names:
        if name == BASIS:
            continue
        own = next((kind for kind in _own() if kind.name == name), None)
        made = own or _imported(name)
        if any(one.name == made.name for one in found) or made.name == BASIS:
            raise ConfigError(f"planner.kinds: two kinds are called {made.name!r}")
        found.append(made)
    return tuple(found)


def _own() -> tuple[Kind, ...]:
    """Those that come with this package."""
    return HiddenUnits(), AttentionHeads(), AttentionKeys()


def _imported(name: str) -> Kind:
    if ":" not in name:
        raise ConfigError(
            "planner.kinds: expected basis, units, heads, keys or 'package.module:Name'; found "
            f"{name!r}"
        )
    made = imported(name, "planner.kinds")
    missing = [method for method in _METHODS if not callable(getattr(made, method, None))]
    if missing or not isinstance(getattr(made, "name", None), str):
        raise ConfigError(
            f"planner.kinds: {name!r} is a {type(made).__name__} without "
            f"{missing[0] if missing else 'a name'}; expected a kind as "
            "fxshare.planning.kinds.kind.Kind says"
        )
    kind = cast(Kind, made)
    try:
        as_group_name(kind.name)  # plan files have it
    except ValueError as error:
        raise ConfigError(f"planner.kinds: the name of {name!r}: {error}") from error
    if any(kind.name == one.name for one in _own()):
        raise ConfigError(
            f"planner.kinds: {name!r} is called {kind.name!r}, which is a kind of fxshare; give it "
            "another name"
        )
    return kind


def kinds_and_parts(
    planner: Planner, captured: Captured, sites: Sequence[Site]
) -> tuple[tuple[Kind, ...], tuple[FoundPart, ...]]:
    """The kinds that a configuration names beside the basis, and what they may take; a warning
    for a kind of ours for which there is nothing, with the reason."""
    kinds = kinds_named(planner.kinds)
    if not kinds:
        return (), ()
    own, heads, whole, scores = _looked_for(captured, sites)
    names = [kind.name for kind in kinds]
    missing = []
    if not own.found and set(names) - {"heads", "keys"}:
        missing.append(("MLP", own.reasons))
    if not heads.found and "heads" in names:
        missing.append(("attention", heads.reasons))
    if not scores.found and "keys" in names:
        missing.append(("queries and keys that may be narrower", scores.reasons))
    elif "keys" in names and 16 not in planner.bits:
        warnings.warn(
            f"planner.kinds {names}: narrower queries and keys keep the model's dtype, so that "
            f"with planner.bits {list(planner.bits)} none compete; add 16",
            FxShareWarning,
            stacklevel=2,
        )
    based = "basis" in planner.kinds
    competes = "but bases competes" if based else "of that competes (add 'basis', which any may)"
    for what, reasons in missing:
        site, reason = next(iter(reasons.items()), ("the model", "has no linears"))
        warnings.warn(
            f"planner.kinds {names}: found no {what}, so that nothing {competes}"
            f"{' for its weights' if len(names) > 1 else ''}; {site!r} {reason}",
            FxShareWarning,
            stacklevel=2,
        )
    return kinds, (*own.found, *heads.found, *whole.found, *scores.found)


def all_parts(captured: Captured, sites: Sequence[Site]) -> tuple[FoundPart, ...]:
    """What any kind may take, whichever are named."""
    return tuple(part for one in _looked_for(captured, sites) for part in one.found)


def _looked_for(
    captured: Captured, sites: Sequence[Site]
) -> tuple[Mlps, Attentions, AllHeadGroups, AllScores]:
    side_by_side = captured.side_by_side
    heads = attentions(captured.graph, sites, side_by_side=side_by_side)
    return (
        mlps(captured.graph, sites, side_by_side=side_by_side),
        heads,
        head_groups(captured.graph, sites, side_by_side=side_by_side, among=heads),
        all_scores(captured.graph, sites, side_by_side=side_by_side),
    )


def others_of(kinds: Sequence[Kind], scene: Scene) -> dict[Part, Other]:
    """The candidates of all kinds by what the solver calls them."""
    return {one.key: one for kind in kinds for one in kind.candidates(scene)}


def entries_of(kinds: Sequence[Kind], solution: Solution) -> tuple[Units, ...]:
    """The plan's entries of all kinds but the basis; what stays dense has none."""
    by_name = {kind.name: kind for kind in kinds}
    found = []
    for choice in solution.choices:
        one = choice.candidate
        if isinstance(one, Other) and choice.meaning is not None:
            found.append(by_name[one.kind].entry(one, choice.meaning, choice.loss))
    return named_apart(found)


def carried_out(plan: Plan, factors: Factored, kinds: Sequence[Kind]) -> Mapping[str, UnitFactors]:
    """What carries out the entries of a plan that was read from a file, on the statistics of its
    groups' factors.

    Raises :class:`PlanError` for an entry of a kind that is not named.
    """
    by_name = {kind.name: kind for kind in (*_own(), *kinds)}
    sites = {site.name: site for site in plan.sites}
    found = {}
    for entry in plan.units:
        if entry.kind not in by_name:
            raise PlanError(
                f"units {entry.name!r} are of kind {entry.kind!r}, which is not known; name it in "
                f"planner.kinds as 'package.module:Name'. Known: {', '.join(by_name)}"
            )
        own = _KINDS[type(entry)]
        if entry.kind in _KINDS.values() and entry.kind != own:
            raise PlanError(
                f"units {entry.name!r} are of kind {entry.kind!r}, and the entry is one of "
                f"{own!r}; give it that kind, or one of your own"
            )
        slices = factors.spectra.slices
        consumer = {name: slices[name] for name in entry.read_by(sites[entry.consumer])}
        kind = by_name[entry.kind]
        made = kind.carry_out(entry, consumer, factors.spectra, bias=factors.bias)
        found[entry.name] = units_in_bits(made, sites, slices)
    return found


__all__ = ["all_parts", "carried_out", "entries_of", "kinds_and_parts", "kinds_named", "others_of"]
