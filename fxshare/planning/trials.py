"""The candidates that the search realises and judges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fxshare.planning.kinds.kind import BASIS

Effort = Literal["off", "kinds", "quick", "thorough", "refined"]


MOST_REFINED = 4
"""Plans that are refined for a while, with ``search: refined``."""
REFINED_STEPS = (20, 60)
"""Of each of them, and further ones of the better half."""
Among = tuple[tuple[str, ...], bool, tuple[int, ...]]
"""What a trial chooses from: the kinds that it does without, whether others than bases are taken
wherever they fit, and the widths of numbers, where it has not all."""


@dataclass(frozen=True)
class Trial:
    """One way to plan."""

    name: str
    strategy: str = "layers"
    floor: float = 0.0
    """Least share of every group's dense cost, as a share of the budget's."""
    blend: float = 0.0
    """How far ranks are drawn towards uniform ones; 1 is uniform."""
    merge: bool = False
    """Whether types that read one activation may share a basis."""
    loss_aware: bool = True
    """Whether the gradient statistics are used; without them errors of activations count."""
    without: tuple[str, ...] = ()
    """Kinds whose candidates are left out: far from dense a prediction may favour the wrong kind,
    so every set of kinds is tried that has one fewer, and each kind alone."""
    insists: bool = False
    """Whether candidates of other kinds are taken wherever there are some."""
    bits: tuple[int, ...] = ()
    """The widths that numbers may have; all that the configuration has where there are none."""
    alone: bool = False
    """One kind, or none, in one width: a plan of all kinds and widths is held to be no worse. It
    is carried out where that is not said already by what it is predicted to lose."""

    @property
    def among(self) -> Among:
        """What it chooses from."""
        return self.without, self.insists, self.bits


@dataclass(frozen=True)
class AfterRefining:
    """What a plan loses per token of the held-back data after so many steps of refinement."""

    loss: float
    steps: int


@dataclass(frozen=True)
class Tried:
    """A trial's outcome. ``measured`` is the loss increase per token on ``tokens`` of the held-back
    data: all of it, or the first share for a trial that went no further."""

    trial: str
    predicted: float
    measured: float
    tokens: int
    cost: int
    groups: int
    seconds: float
    after: AfterRefining | None = None


def trials(
    effort: Effort,
    *,
    mergeable: bool,
    kinds: Sequence[str] = (),
    bits: Sequence[int] = (),
    based: bool = True,
) -> list[Trial]:
    """The trials of each effort; the first is the plain optimum of the quadratic model. ``kinds``
    compete with bases: then some trials do without one of them, or without all; and each kind is
    tried alone, in each of ``bits`` where numbers may have several. Bases are no candidates where a
    plan is not ``based`` on them."""
    if effort == "kinds":
        found = trials("quick", mergeable=False, kinds=kinds, bits=bits, based=based)
        return [t for t in found if not (t.floor or t.blend or t.insists)]
    found = _trials(effort, mergeable=mergeable)
    if effort == "off":
        return found
    if not kinds or not based:
        return found + _alone(found, kinds, bits, based)
    first = [t for t in found if t.strategy != "separate"]
    plain = [replace(t, without=tuple(kinds)) for t in found if t.strategy == "separate"]
    some = [t for t in found if t.name in ("planned", "blend 0.5")]
    fewer = [
        replace(t, name=f"{t.name}, without {kind}", without=(kind,))
        for kind in (kinds if len(kinds) > 1 else ())
        for t in some
    ]
    alone = [replace(t, name=f"{t.name}, bases alone", without=tuple(kinds)) for t in some]
    every = [
        replace(t, name=f"{t.name}, others wherever they fit", insists=True)
        for t in (*some, *fewer)
    ]
    return first + alone + fewer + every + plain + _alone(found, kinds, bits, based)


def _alone(
    found: Sequence[Trial], kinds: Sequence[str], bits: Sequence[int], based: bool
) -> list[Trial]:
    """Trials of each kind in each width, and of dense weights in few bits, which methods of one
    kind are; those that others are already left out."""
    every = ([BASIS] if based else []) + list(kinds)
    widths = [(one,) for one in bits] if len(bits) > 1 else [()]
    sets = [(kind, bit) for kind in every for bit in widths if len(every) > 1 or bit]
    if len(widths) == 1 and based:
        sets = [one for one in sets if one[0] != BASIS]  # bases alone are tried
    plans = [t for t in found if t.strategy != "separate" and not t.merge and t.loss_aware]
    made = [
        replace(
            t,
            name=f"{t.name}, {_CALLED.get(kind, kind)} alone{f', {bit[0]} bits' if bit else ''}",
            without=tuple(other for other in every if other != kind),
            bits=bit,
            alone=True,
        )
        for kind, bit in sets
        for t in plans
    ]
    few = [bit for bit in bits if bit < _WHOLE]
    rounded = [(bit,) for bit in few] + ([tuple(few)] if len(few) > 1 else [])
    return made + [
        replace(
            found[0],
            name=f"dense in {' or '.join(str(bit) for bit in own)} bits",
            without=tuple(every),
            bits=own,
            alone=True,
        )
        for own in rounded
    ]


_CALLED = {BASIS: "bases"}
_WHOLE = 16
"""The width that stands for the model's own dtype."""


_OUTDONE = 4.0
"""So many times what another plan is predicted to lose is certainly worse, whatever of the plan's
ranks were chosen by. Far from dense, where plans by activation error were the best of those on the
dense model's statistics, predictions are within a factor of 2 of each other."""
_BEHIND = 2.0
"""So many times what another plan measures is that of a kind with which no floor helps."""


def is_outdone(trial: Trial, predicted: Mapping[Trial, float]) -> bool:
    """Whether a trial by activation error is not worth its spectra, which are as many as those by
    the loss: the same trial by the loss is predicted to lose far more than another one."""
    if trial.loss_aware:
        return False
    by_loss = [one for one in predicted if replace(one, name=trial.name, loss_aware=False) == trial]
    return any(predicted[one] > _OUTDONE * min(predicted.values()) for one in by_loss)


def is_far(loss: float, others: Iterable[float], *, tried: bool = False) -> bool:
    """Whether a plan of one kind alone loses so much more than others that it is certainly no
    better, by predictions; where it was ``tried``, whether others like it are not worth a try."""
    return loss > (_BEHIND if tried else _OUTDONE) * min(others, default=math.inf)


def again(todo: Sequence[Trial], tried: Sequence[Tried]) -> list[Trial]:
    """The trials on statistics that are measured again. Which is best on those near the plan, the
    first round does not say; but ranks by activation error, which need spectra of their own, are
    chosen again only where they were in its better half, and of other sets of kinds those that were
    not far worse."""
    ranked = sorted(tried, key=lambda one: one.measured)
    better = {one.trial for one in ranked[: -(-len(ranked) // 2)]}
    least = ranked[0].measured if ranked else 0.0
    behind = {one.trial for one in ranked if one.measured > _OUTDONE * least > 0}
    known = {one.trial for one in ranked}
    return [
        trial
        for trial in todo
        if (trial.loss_aware or trial.name in better)
        and not ((trial.without or trial.insists or trial.alone) and trial.name in behind)
        and (trial.name in known or not trial.alone)
    ]


def _trials(effort: Effort, *, mergeable: bool) -> list[Trial]:
    first = Trial("planned")
    if effort == "off":
        return [first]
    found = [
        first,
        Trial("floor 0.3", floor=0.3),
        Trial("floor 0.6", floor=0.6),
        Trial("blend 0.5", blend=0.5),
        Trial("uniform", strategy="separate", blend=1.0),
        Trial("uniform, activation error", strategy="separate", blend=1.0, loss_aware=False),
    ]
    if mergeable:
        found.append(Trial("same input merged", strategy="same_input", merge=True))
    if effort == "thorough":
        found += [
            Trial("floor 0.15", floor=0.15),
            Trial("floor 0.8", floor=0.8),
            Trial("blend 0.25", blend=0.25),
            Trial("blend 0.75", blend=0.75),
            Trial("floor 0.3, blend 0.25", floor=0.3, blend=0.25),
        ]
        if mergeable:
            found.append(
                Trial("same input merged, floor 0.3", strategy="same_input", merge=True, floor=0.3)
            )
    return found
