"""What a plan of units, heads, keys or whole heads is held to in a family of the zoo."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import fxshare
from fxshare import Plan
from fxshare.compiling.stages import Stages, prepare
from fxshare.config import load_config
from fxshare.plans.units import Units
from fxshare.verifying.multiplied import multiplied_out
from tests.strategies import no_warnings_of_ours
from tests.zoo.families import Family


def prepared(one: Family) -> Stages:
    """A family's model with its configuration, captured and matched."""
    subject = one.subject()
    return prepare(subject.model, load_config(subject.config), one.batches(), None, None)


def check_carried_out(one: Family, stages: Stages, entries: Sequence[Units]) -> None:
    """The plan is verified, lowered too, and generates what its weights multiply out to."""
    plan = Plan(mode="planned", sites=stages.sites, units=tuple(entries))
    with no_warnings_of_ours():
        gm = fxshare.compile(
            stages.model, stages.cfg, calibration=one.batches(), plan=plan, check=False
        )
    call = one.call(seed=3)
    assert fxshare.verify(stages.model, gm, call).ok
    assert fxshare.verify(stages.model, fxshare.lower(gm, prefer="speed"), call).ok
    expected = multiplied_out(stages.model, gm)
    if getattr(gm, "can_generate", lambda: False)() and "input_ids" in call:
        ids = call["input_ids"][:1, :5]
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(gm.generate(ids, **options), expected.generate(ids, **options))
