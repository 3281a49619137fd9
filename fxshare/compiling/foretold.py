"""What a compilation is about to take, said before it begins, and a refusal of what cannot fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from fxshare.compiling.stages import Stages
from fxshare.estimating.disk import check_room
from fxshare.estimating.estimate import estimate_captured

_LOG = logging.getLogger(__name__)
_LONG = 5.0


def foretell(stages: Stages, work: str | os.PathLike[str] | None) -> None:
    """Say in a line about how long it will take and what memory. Of data whose size is not known
    before it is read nothing is said.

    Raises :class:`StoreError` where the disk of the work folder has no room for what goes there.
    """
    batches = stages.batches
    if not isinstance(batches, Sequence) or not batches or stages.cfg.mode == "exact":
        return
    try:
        found = estimate_captured(
            stages.captured, stages.sites, stages.cfg, batches, work=work is not None
        )
    except Exception as error:  # what is wrong with the data its own stage says better
        _LOG.debug("no estimate: %s", error)
        return
    # what is over in a moment is not news
    _LOG.log(logging.INFO if found.seconds >= _LONG else logging.DEBUG, "%s", found.told())
    if work is not None:
        check_room(
            Path(work),
            found.disk.work,
            "statistics and decompositions",
            "give a work folder on a larger disk, or leave it out",
        )


__all__ = ["foretell"]
