"""Small compiled models to refine, and data for them."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fxshare
from tests.strategies import no_warnings_of_ours
from tests.toys import VOCABULARY, WIDTH, toy

How = Literal["shared", "planned", "exact"]
_KEYS: dict[str, dict[str, Any]] = {
    "shared": {"group_size": 2, "compression_rate": 0.35},
    "planned": {
        "budget": {"params_kept": 0.35},
        "planner": {"storage": "pivoted", "search": "off"},
    },
    "exact": {},
}


def ids(count: int = 8, rows: int = 4, length: int = 8, seed: int = 0) -> list[Tensor]:
    """Batches of token ids ``(rows, length)``."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(VOCABULARY, (count, rows, length), generator=generator)
    return list(made.unbind(0))


def features(count: int = 8, rows: int = 4, length: int = 8, seed: int = 0) -> list[Tensor]:
    """Batches of numbers ``(rows, length, width)``."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, rows, length, WIDTH, generator=generator).unbind(0))


def subject(
    name: str = "llama",
    how: How = "shared",
    *,
    capture: str = "auto",
    dtype: torch.dtype = torch.float32,
    **keys: Any,
) -> tuple[nn.Module, Any]:
    """A toy and what was compiled from it; a fresh copy of both."""
    return copy.deepcopy(_compiled(name, how, capture, dtype, json.dumps(keys)))


@functools.cache
def _compiled(
    name: str, how: How, capture: Any, dtype: torch.dtype, keys: str
) -> tuple[nn.Module, Any]:
    with no_warnings_of_ours():
        model = toy(name).model(dtype=dtype)
        if name in (
            "llama",
            "gpt2",
        ):  # what they compute as they are initialised is next to nothing
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(8)
        data = ids(4) if toy(name).tokens else [x.to(dtype) for x in features(4)]
        found = fxshare.init(model)
        cfg = [found, {**_KEYS[how], **json.loads(keys)}]
        gm = fxshare.compile(model, cfg, calibration=data, capture=capture)
    return model, gm


@functools.cache
def usual() -> tuple[nn.Module, Any]:
    """The llama toy under Basis Sharing, compiled once: not to be changed."""
    return subject()


def everything(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, by all names."""
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return {name: tensor.detach().clone() for name, tensor in named}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def refined(gm: Any, model: nn.Module, batches: Any = None, **options: Any) -> Any:
    """A few steps on the usual data at a rate that needs no test."""
    given = {"steps": 12, "learning_rate": 3e-3, **options}
    return fxshare.refine(gm, model, ids() if batches is None else batches, **given)
