"""What the planner expected of a plan, and the trials it chose it from."""

from __future__ import annotations

from typing import Literal

from fxshare.sites.site import Frozen


class TrialResult(Frozen):
    """One plan of the search, as it turned out on ``tokens`` of the held-back calibration data: all
    of them, or fewer where it was dropped after these."""

    name: str
    predicted: float
    measured: float | None
    tokens: int = 0
    cost: int
    groups: int
    seconds: float
    refined: float | None = None
    """What it loses after ``refined_steps`` of refinement, with ``search: refined``: the divergence
    from the dense model, per token of the held-back data."""
    refined_steps: int = 0


class KindOutlook(Frozen):
    """What the entries of one kind lose by themselves, all else dense: ``predicted``, and
    ``measured`` on the held-back calibration data."""

    kind: str
    """``basis``, ``bits`` for dense slices in few, or what an entry of ``units`` says."""
    entries: int
    predicted: float
    measured: float | None = None


class Outlook(Frozen):
    """What a plan is expected to lose, per token, above the dense model.

    ``bound`` is the Lagrangian dual bound: no plan over the partitions that were considered is
    predicted to lose less within the budget, the slope apart. ``gap`` is the distance to it.
    ``priced_bound`` is the bound over those partitions alone of whose groups the spectra were
    computed.
    """

    loss_name: str
    unit: Literal["numbers", "bytes", "flops"]
    budget: float
    cost: int
    price: float
    """Loss saved by one more unit of budget."""
    predicted: float
    """Of the second-order model, and the slope."""
    slope: float = 0.0
    """The first-order part: the mean gradient along the change of the weights, on the calibration
    data; 0 without a search, and for a loss that is a distance to the dense output."""
    slope_tokens: int = 0
    """On how many tokens: as few as brought its standard error to a tenth of what is predicted."""
    bound: float
    gap: float
    priced_bound: float | None = None
    priced: int = 0
    """Groups whose spectra were computed; ``unpriced`` counts those that were held by a bound."""
    unpriced: int = 0
    measured: float | None = None
    """On held-back calibration data; None without a search."""
    strategy: str
    trial: str
    refit: bool
    trials: tuple[TrialResult, ...] = ()
    kinds: tuple[KindOutlook, ...] = ()
    """Of a plan of several kinds that was searched for."""
    held_back_tokens: int = 0
    seconds: float = 0.0
