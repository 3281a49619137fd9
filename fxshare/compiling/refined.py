"""Plans compared by what they lose after a short refinement (``planner: {search: refined}``).

How much of a plan's loss closed forms leave and how much training gets back are two things: the
order of plans can flip (2604.02119). Each of a few plans is refined for some steps, the better half
of them for more (successive halving, Jamieson & Talwalkar 2016); the best one is kept, as it was
before refining, with its factors in closed form.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from fxshare.base.processes import here
from fxshare.base.progress import stage, track
from fxshare.base.spent import part
from fxshare.calibration.losses import Loss
from fxshare.compiling.build import built
from fxshare.compiling.stages import Stages
from fxshare.errors import PlanError, RefineError
from fxshare.factors.realise import planned_factors
from fxshare.generation.shell import generate
from fxshare.planning.held_back import Parts
from fxshare.planning.offered import Offered
from fxshare.planning.trials import REFINED_STEPS, AfterRefining
from fxshare.refining.refine import refine
from fxshare.result.face import Verbs
from fxshare.result.module import Compiled, attach
from fxshare.sites.tensors import site_biases
from fxshare.store.pretrained import save_pretrained

_LOG = logging.getLogger(__name__)
_RATE = 3e-3
"""Of :func:`fxshare.refine`; to test rates for every plan would take longer than its steps."""


def after_refining(
    stages: Stages,
    weights: Mapping[str, Tensor],
    plans: Sequence[Offered],
    data: Parts,
    *,
    loss: Loss | None,
    seed: int,
) -> list[AfterRefining]:
    """What each plan loses after refinement, on what is held back of the calibration data: the
    divergence from the dense model's logits, or the distance to its outputs; see
    :func:`fxshare.refine`, of which ``loss`` is as well. One that cannot be refined loses
    infinitely much.

    Raises :class:`PlanError` where none can be.
    """
    batches = data.fit
    held_out = [batch for _, batch in data.held_back]

    def refined(gm: Compiled, steps: int) -> Compiled:
        return refine(
            gm,
            stages.model,
            batches,
            heldout=held_out,
            steps=steps,
            learning_rate=_RATE,
            loss=loss,
            accumulate=here().size,
            seed=seed,
        )

    with stage("plan: refining", _LOG) as running, part("refine plans"):
        found: list[AfterRefining] = []
        made: dict[int, Compiled] = {}
        failures = []
        for at, one in enumerate(track(list(plans), "refining plans", total=len(plans))):
            try:
                made[at] = refined(_compiled(stages, weights, one), REFINED_STEPS[0])
            except RefineError as error:  # such as a loss that is not finite: others may do
                failures.append(f"{one.name}: {error}")
                _LOG.info("plan: %s is not refined, %s", one.name, error)
                found.append(AfterRefining(math.inf, REFINED_STEPS[0]))
                continue
            found.append(_after(made[at], REFINED_STEPS[0], one))
        if not made:
            raise PlanError(f"search: refined: no plan can be refined; {'; '.join(failures)}")
        order = sorted(made, key=lambda at: found[at].loss)
        better = order[: -(-len(order) // 2)] if len(order) > 1 else []
        for at in track(better, "refining the better plans", total=len(better)):
            found[at] = _after(refined(made[at], REFINED_STEPS[1]), sum(REFINED_STEPS), plans[at])
        best = min(better or order, key=lambda at: found[at].loss)
        running.found(f"best of {len(plans)}: {plans[best].name}")
    return found


def _compiled(stages: Stages, weights: Mapping[str, Tensor], one: Offered) -> Compiled:
    biases = site_biases(stages.model, one.plan.sites)
    factors = planned_factors(one.plan, weights, biases, one.factors, one.units)
    start = time.perf_counter()
    result, record = built(stages, one.plan, factors, None, (), copy=False, start=start)
    return attach(result, record, Verbs(generate, save_pretrained))


def _after(gm: Compiled, steps: int, one: Offered) -> AfterRefining:
    lost = gm.fxshare.refined[-1].after.objective
    _LOG.info("plan: %s: loss %.4g after %d steps of refinement", one.name, lost, steps)
    return AfterRefining(lost, steps)


__all__ = ["after_refining"]
