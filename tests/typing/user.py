"""What a user's type checker knows of a compiled model. Nothing here is run: ``mypy`` reads it.

Strict mypy warns of an ``ignore`` that ignores nothing, so each one below says that there is an
error.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from typing_extensions import assert_type

import fxshare
from fxshare.config import ShareConfig
from fxshare.result.report import Report


def use(model: nn.Module, ids: Tensor) -> fxshare.Compiled:
    gm = fxshare.compile(model, "cfg.yaml", calibration=[ids])
    assert_type(gm, fxshare.Compiled)
    assert_type(gm.fxshare, fxshare.Record)
    assert_type(gm.fxshare.report, Report)
    assert_type(gm.fxshare.plan, fxshare.Plan)
    assert_type(gm.fxshare.config, ShareConfig)
    assert_type(fxshare.load("out/"), fxshare.Compiled)
    assert_type(fxshare.lower(gm, prefer="speed"), fxshare.Compiled)
    assert_type(fxshare.readable(gm), fxshare.Compiled)
    fxshare.save(gm, "out/")
    fxshare.verify(model, gm, [ids])
    gm.save_pretrained("out/")
    gm.generate(ids, max_new_tokens=2)
    assert_type(gm.can_generate(), bool)
    assert_type(gm.device, torch.device)
    return gm


def as_a_module(gm: fxshare.Compiled, ids: Tensor) -> None:
    gm(ids)
    assert_type(gm.half().to("cuda").train().eval(), fxshare.Compiled)
    assert_type(copy.deepcopy(gm), fxshare.Compiled)
    weights: dict[str, Any] = gm.state_dict()
    parameters: Iterator[nn.Parameter] = gm.parameters()
    torch.save(weights, "weights.pt")
    torch.optim.SGD(parameters, lr=0.1)
    torch.compile(gm)(ids)
    nn.Sequential(gm)


def by_kind(gm: fxshare.Compiled) -> fx.Graph | None:
    if isinstance(gm, fxshare.ShareModule):
        assert_type(gm.fxshare.plan, fxshare.Plan)
        return gm.graph
    if isinstance(gm, fx.GraphModule):
        return gm.graph
    return None


def told_apart(model: nn.Module) -> fxshare.Plan | None:
    return model.fxshare.plan if isinstance(model, fxshare.Compiled) else None


def mistakes(gm: fxshare.Compiled, ids: Tensor) -> None:
    print(gm.fxshare.reprot)  # type: ignore[attr-defined]
    print(gm.fxshare.plan.grops)  # type: ignore[attr-defined]
    gm.fxshare.report = None  # type: ignore[misc, assignment]
    print(gm.fxshar.report)  # type: ignore[union-attr]
    gm.generat(ids)  # type: ignore[operator]
