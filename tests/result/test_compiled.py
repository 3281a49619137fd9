"""``fxshare.Compiled``: what every verb returns, whatever class it is of."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from torch import fx, nn

import fxshare
from fxshare.config import load_config
from tests.strategies import gpt, gpt_config, token_batches

CFG = load_config(gpt_config())


class OneOfOurs(fxshare.Compiled):
    """A class of the user's own."""


@pytest.mark.parametrize("front_end", ["fx", "modules"])
def test_what_the_verbs_return_is_compiled(front_end: Any) -> None:
    model = gpt()
    gm = fxshare.compile(model, CFG, example=token_batches()[0], capture=front_end)
    lowered = fxshare.lower(gm)
    made = [gm, lowered, fxshare.readable(lowered), copy.deepcopy(gm)]
    if front_end == "fx":
        made.append(pickle.loads(pickle.dumps(gm)))
    for one in made:
        assert isinstance(one, fxshare.Compiled)
        assert isinstance(one, fxshare.ShareModule) is (front_end == "fx")
        assert not isinstance(one, OneOfOurs)
        assert one.fxshare.plan == gm.fxshare.plan


def test_what_was_not_compiled_is_not() -> None:
    graph = fx.symbolic_trace(nn.Linear(2, 2))
    for other in (gpt(), graph, fxshare.ShareModule(graph, graph.graph), object(), None):
        assert not isinstance(other, fxshare.Compiled)
