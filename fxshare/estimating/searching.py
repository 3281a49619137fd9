"""What a search over plans takes: prices, factors, and judging them on what is held back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fxshare.config import Planner, ShareConfig
from fxshare.cost_model.pace import NOTHING, Amount, Pace
from fxshare.estimating import pricing
from fxshare.estimating.calibrating import backward, forward, loss
from fxshare.estimating.counted import Counted
from fxshare.estimating.pricing import Candidate, Candidates, Terms
from fxshare.planning.kinds.kind import BASIS
from fxshare.planning.trials import MOST_REFINED, REFINED_STEPS, trials
from fxshare.sites.site import Site

_PRICES = 49
DECOMPOSED, MADE, POOLED = 0.35, 0.09, 0.2
"""Shares of what is kept for decompositions, factors and roots, as
:class:`fxshare.factors.spectra.Spectra` has them."""
_AWARE = 0.75 * 0.75
"""Of what planning keeps, what the spectra by the loss have."""
_SLOPE_BATCHES = 5
"""Four at least, as many again where that is enough."""
_PER_NODE = 25
"""Calls that do next to nothing, by node and price: partitions are found in Python."""
_PER_COPY = 150
"""And by node of a graph with other weights."""
_FEWEST_TOLD = 4
"""Batches that tell two sets of kinds apart, where those held back do not."""
_BISECTED = 6
"""Plans between which a limit of the loss is found."""
_CALLS = 40
"""Operations of a small step that do next to nothing."""
_SWAPS = 8
_STEPS_BETWEEN = 4
"""Steps of refinement between two measurements."""


@dataclass(frozen=True)
class Searched:
    """What a search does how often, told by the configuration.

    ``plans`` are realised, and judged on ``held_back`` batches, the first share of them or all;
    ``copies`` of the model are made to do so.
    """

    solved: int
    plans: int
    copies: int
    judged: float
    rounds: int
    shared: Candidates

    @staticmethod
    def of(cfg: ShareConfig, parts: Candidates, batches: int) -> Searched:
        """The trials of a configuration on so many batches."""
        planner = cfg.planner
        mergeable = not planner.may_share and planner.strategy in ("auto", "same_input")
        found = trials(planner.search, mergeable=mergeable, kinds=beside_basis(planner))
        # of those of one kind most are solved, and no more
        found = [trial for trial in found if not trial.alone]
        first, sets = len(found), len({trial.without for trial in found})
        if planner.search == "off":
            return Searched(1, 1, 0, 0.0, 1, parts)
        held = max(batches // 10, 1)
        share = 1 / 3 if held > 1 else 1.0
        half = -(-first // 2)
        solved, copies = first, first + half
        judged = (first + 1) * share + half * (1 - share) + half * share
        for number in range(planner.remeasure):
            solved += first + (number == 0)
            copies += first + half + 1
            judged += first * share + half
        if cfg.budget is not None and cfg.budget.max_loss_increase is not None:
            solved, copies, judged = solved + _BISECTED, copies + _BISECTED, judged + _BISECTED
        if sets > 1:  # the best of each to the end, two of them on more data; and each kind alone
            alone = len(planner.kinds)
            copies += sets + 2 + alone
            judged += sets + alone + 2 * _FEWEST_TOLD / held
        # with merging it is mostly the plan without
        plans = solved - (1 if mergeable else 0)
        return Searched(solved, plans, copies, judged * held, 1 + planner.remeasure, parts)


@dataclass(frozen=True)
class Subject:
    """What is searched over: the model as it was counted, and what is kept of what is computed."""

    pace: Pace
    counted: Counted
    sites: Sequence[Site]
    itemsize: int
    keep: float
    kept: int
    singular: frozenset[int]
    stored: bool
    """Whether decompositions go to a work folder, from which they are read again."""


def beside_basis(planner: Planner) -> list[str]:
    """The kinds that compete with bases; none where there are no bases."""
    names = [name for name in planner.kinds if name != BASIS]
    return names if BASIS in planner.kinds else []


def others(subject: Subject, searched: Searched, kinds: Sequence[str]) -> Amount:
    """Orders of hidden units and of widths of heads, and what carries out those that are chosen.
    Their parts are found in a graph, of which there is none yet: what has fewer outputs than inputs
    counts as an MLP's last linear, and what has as many as the last one of an attention."""
    pace, found = subject.pace, NOTHING
    for site in subject.sites if set(kinds) - {BASIS} else ():
        inputs, outputs = site.in_features, site.out_features
        if outputs > inputs:
            continue
        once = pace.product(outputs, outputs, inputs) + pace.product(inputs, outputs, inputs)
        kept = max(int(subject.keep * inputs), 1)
        if outputs < inputs:
            once += pace.product(inputs, inputs, inputs) * 3 + pace.calls(20 * inputs)
            made = pace.product(inputs, kept, kept) * 1.3 + pace.product(outputs, inputs, kept)
        else:
            once += pace.product(inputs, inputs, inputs) * 2 + pace.calls(_CALLS)
            made = pace.product(inputs, kept, inputs) + pace.product(outputs, inputs, kept)
        # few plans have another width of a part
        found += (once + made * 2) * searched.rounds
    return found


def terms_of(subject: Subject, parts: Candidates) -> Terms:
    """What prices depend on: roots are kept where they fit."""
    reads = {one.read: one.inputs for part in parts.alone for one in part}
    size = sum(16 * inputs * inputs for inputs in reads.values())
    return Terms(
        subject.pace,
        subject.singular,
        pricing.readers_of(parts.alone),
        tight=size > POOLED * _AWARE * subject.kept,
        kind="double" if subject.itemsize == 8 else "single",
    )


def spectra(subject: Subject, searched: Searched) -> Amount:
    """The prices of all candidates, on the statistics of every round."""
    parts = searched.shared
    terms, found = terms_of(subject, parts), NOTHING
    for part in (*parts.alone, *parts.shared):
        found += pricing.price(terms, part, aware=True) * searched.rounds
    for part in parts.alone if searched.copies else ():
        # a trial goes by activation error, most often on the first statistics alone
        found += pricing.price(terms, part, aware=False)
    return found


def factorised(subject: Subject, searched: Searched) -> Amount:
    """The factors of every plan that is realised: those of every rank are made once for each of
    the spectra, and plans read what they take of them."""
    if subject.itemsize == 8:
        return _factorised_each(subject, searched)
    pace, terms, found = subject.pace, terms_of(subject, searched.shared), NOTHING
    spectra = searched.rounds + (1 if searched.copies else 0)
    alike: dict[object, list[Candidate]] = {}
    for part in searched.shared.alone:
        alike.setdefault((part[0].site.type, part[0].inputs, _outputs(part)), []).append(part)
    for part, *others in alike.values():
        width, rank = part[0].inputs + _outputs(part), _rank(subject, part)
        full = min(part[0].inputs, _outputs(part))
        one = pricing.make_factors(terms, part, full) * spectra
        read = pace.moved(4 * 3 * rank * width) + pace.calls(_CALLS)
        one += read * (searched.plans + searched.copies)
        # in the end those of the plan in float64
        one += pricing.make_factors(terms, part, rank)
        if subject.stored:
            one += pace.moved(8 * 4 * full**2)
        else:
            one += pricing.price(replace(terms, kind="double"), part, aware=True)
        found += one * (1 + len(others))
    return found


def _factorised_each(subject: Subject, searched: Searched) -> Amount:
    """The factors of every plan of a model in float64, each made for itself."""
    pace, alone = subject.pace, searched.shared.alone
    terms = terms_of(subject, searched.shared)
    # in float32: so plans are judged
    size = sum(4 * _rank(subject, c) * (c[0].inputs + _outputs(c)) for c in alone)
    fits = size <= MADE * _AWARE * subject.kept
    times = searched.plans if fits else searched.plans + searched.copies
    # what is kept stays; what is not is read from a work folder, or made again
    whole = pricing.decomposition_bytes(alone)
    lacking = 1 - min(DECOMPOSED * _AWARE * subject.kept / max(whole, 1), 1.0)
    found = NOTHING
    for part in alone:
        found += pricing.make_factors(terms, part, _rank(subject, part))
        if subject.stored:
            found += pace.moved(8 * 4 * min(part[0].inputs, _outputs(part)) ** 2) * lacking
        else:
            found += pricing.price(terms, part, aware=True) * lacking
    return found * times


def refitted(subject: Subject, searched: Searched) -> Amount:
    """Coefficients fitted to their own inputs, in the better half of the plans, where groups share:
    about half of them."""
    found = NOTHING
    for part in searched.shared.alone:
        inputs, rank = part[0].inputs, _rank(subject, part)
        found += subject.pace.product(rank, inputs, inputs)
        found += subject.pace.product(rank, inputs, rank + _outputs(part))
        found += subject.pace.calls(_CALLS)
    return found * (searched.plans / 2 if searched.shared.shared else 0)


def multiplied_out(subject: Subject, copies: float) -> Amount:
    """Weights of candidates, for so many copies of the model."""
    found = NOTHING
    for site in subject.sites:
        for s in site.slices:
            inputs, outputs = site.in_features, s.out_features
            rank = pricing.rank_of(inputs, outputs, subject.keep)
            found += subject.pace.product(outputs, rank, inputs, "single")
            found += subject.pace.moved(12 * rank * (inputs + outputs) + 8 * inputs * outputs)
            found += subject.pace.calls(_CALLS)
    return found * copies


def judged(subject: Subject, batches: float) -> Amount:
    """A forward pass and the loss of so many batches."""
    once = forward(subject.pace, subject.counted, subject.itemsize)
    return (once + loss(subject.pace, subject.counted, backward=False)) * batches


def refined(subject: Subject, batches: int) -> Amount:
    """Steps of refinement of the plans that are compared by it: both models forward, the compressed
    one backward with the gradients of its weights, and held-out losses along the way."""
    half = -(-MOST_REFINED // 2)
    steps = MOST_REFINED * REFINED_STEPS[0] + half * REFINED_STEPS[1]
    once = forward(subject.pace, subject.counted, subject.itemsize)
    back = backward(subject.pace, subject.counted, subject.itemsize)
    found = (once * 2 + back * 2 + loss(subject.pace, subject.counted, backward=True)) * steps
    return found + judged(subject, 2 * max(batches // 10, 1)) * (steps // _STEPS_BETWEEN)


def slope(subject: Subject, batches: int) -> Amount:
    """A central difference along the plan's change, on a few batches."""
    some = min(_SLOPE_BATCHES, batches)
    return judged(subject, 2 * some) + multiplied_out(subject, 1)


def solved(subject: Subject, searched: Searched) -> Amount:
    """Partitions at all prices."""
    nodes = len(searched.shared.alone)
    return subject.pace.calls(searched.solved * nodes * _PRICES * _PER_NODE / 2)


def copied(subject: Subject, searched: Searched) -> Amount:
    """What else a trial does: copies of the model, and what plans by activation error lose."""
    pace, nodes = subject.pace, len(searched.shared.alone)
    matched = sum(site.weights for site in subject.sites)
    found = pace.moved(12 * matched) * searched.copies
    found += pace.calls((searched.copies + searched.plans) * nodes * _PER_COPY)
    for part in searched.shared.alone:
        inputs, outputs = part[0].inputs, _outputs(part)
        one = pace.product(outputs, inputs, inputs)
        if outputs >= inputs:
            one += pace.product(inputs, outputs, inputs) * 2 + pace.root(inputs)
        found += one * searched.rounds
    return found


def moments(subject: Subject, searched: Searched) -> Amount:
    """Statistics expanded from what is kept of them: of an input and an output, for every slice."""
    found = NOTHING
    for part in searched.shared.alone:
        side = min(part[0].inputs, _outputs(part))
        found += subject.pace.moved(8 * 24 * side * side) + subject.pace.calls(_CALLS)
    inputs = {one.read: one.inputs for part in searched.shared.alone for one in part}
    for size in inputs.values():
        found += subject.pace.moved(8 * 24 * size * size) * 2
    return found * searched.rounds


def realised(subject: Subject, parts: Sequence[Candidate]) -> Amount:
    """Factors in the model's dtype, pivoted, with the error of every slice."""
    pace, found = subject.pace, NOTHING
    for part in parts:
        inputs, outputs, rank = part[0].inputs, _outputs(part), _rank(subject, part)
        found += pace.product(outputs, rank, inputs) + pace.product(outputs, rank, rank)
        # elimination, the table twice, and a few swaps
        found += pace.product(rank, rank, inputs) * 3
        found += pace.moved(8 * _SWAPS * 3 * rank * inputs) + pace.moved(8 * 9 * outputs * inputs)
        found += pace.calls(10 * _CALLS + 2 * inputs)
    return found


def _rank(subject: Subject, part: Candidate) -> int:
    return pricing.rank_of(part[0].inputs, _outputs(part), subject.keep)


def _outputs(part: Candidate) -> int:
    return sum(one.outputs for one in part)


__all__ = [
    "Searched",
    "Subject",
    "beside_basis",
    "copied",
    "factorised",
    "judged",
    "moments",
    "multiplied_out",
    "others",
    "realised",
    "refined",
    "refitted",
    "slope",
    "solved",
    "spectra",
]
