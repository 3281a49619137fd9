"""A loss in which a process ends itself, in a module that all processes know by one name."""

from __future__ import annotations

import os
import signal

from torch import Tensor
from torch.nn import functional as F

KILLED_AT: list[int] = []
"""At which loss, 0 for never; after it an entry for every loss. Empty: never."""


def summed(output: Tensor, ids: Tensor) -> Tensor:
    """Next-token cross-entropy."""
    if KILLED_AT:
        KILLED_AT.append(0)
        if len(KILLED_AT) - 1 == KILLED_AT[0]:
            os.kill(os.getpid(), signal.SIGKILL)
    logits = output[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
