"""Which sites a compilation would find, for those who only ask."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fxshare.base.surroundings import outside_inference, plain_surroundings
from fxshare.compiling.stages import Stages, prepare
from fxshare.config import ShareConfig
from fxshare.errors import CaptureError
from fxshare.models.traits import example_ids
from fxshare.models.wrapped import unwrapped
from fxshare.sites.match import match
from fxshare.sites.mlps import Mlps, mlps
from fxshare.sites.site import Site, Skipped


@dataclass(frozen=True)
class Shown:
    """The sites, and what was matched and is none; ``by_names`` says why only names tell it, where
    no call of the model could be made up."""

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    by_names: str = ""
    mlps: Mlps | None = None
    """Whose hidden units may go, where they are a kind that competes."""


@plain_surroundings()
def shown(model: nn.Module, cfg: ShareConfig) -> Shown:
    """What compiling finds on a call with made-up token ids, by the rule of :func:`prepare`: a
    linear that no call reaches is no site.

    Raises :class:`MatchError` where nothing is left to rewrite.
    """
    example = example_ids(unwrapped(model))
    if example is None:
        reason = "its inputs are not token ids, which could be made up"
    else:
        try:
            stages = prepare(outside_inference(unwrapped(model)), cfg, None, example, None)
            return Shown(stages.sites, stages.skipped, mlps=_mlps(stages))
        except CaptureError as error:
            reason = str(error).splitlines()[0]
    matching = match(model, cfg)
    return Shown(matching.sites, matching.skipped, reason)


def _mlps(stages: Stages) -> Mlps | None:
    if "units" not in stages.cfg.planner.kinds:
        return None
    captured = stages.captured
    return mlps(captured.graph, stages.sites, side_by_side=captured.side_by_side)
