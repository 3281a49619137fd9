"""What refining adds to ``fxshare bench frontier``: everything and the best single method at each
size, trained for some minutes.

Norms and biases are trained as well as factors, of plans in few bits these alone: codes stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import nn

from fxshare.bench.refined import Refined
from fxshare.errors import RefineError
from fxshare.refining.refine import refine

_LOG = logging.getLogger(__name__)
_ALSO = ("norms", "biases")


def refined_on(
    gm: nn.Module,
    model: nn.Module,
    batches: Sequence[object],
    increase: Callable[[nn.Module], float],
    *,
    minutes: float,
    seed: int,
) -> Refined | None:
    """``gm`` refined on calibration data; None where nothing of it can be trained."""
    try:
        result = refine(gm, model, batches, minutes=minutes, also=_ALSO, seed=seed)
    except RefineError as error:
        _LOG.info("not refined: %s", error)
        return None
    done = result.fxshare.refined[-1]
    return Refined(increase(result), done.steps, done.tokens, done.seconds)


__all__ = ["refined_on"]
