"""The dense model's own passes, counted once for all that is not rewritten."""

from __future__ import annotations

import torch
from torch import nn

from fxshare.capture import Caller, device_of
from fxshare.cost_model.forecast import DECODE, PREFILL
from fxshare.cost_model.recorder import record_step
from fxshare.cost_model.work import Step
from fxshare.models.traits import context_of, example_ids


def prompt_length(model: nn.Module) -> int:
    """Tokens of the prompt that times are predicted for: 512, or what the model was made for."""
    return min(PREFILL, context_of(model) or PREFILL)


def dense_steps(model: nn.Module, prefill: int, *, batch: int = 1) -> dict[int, Step]:
    """The operations of ``batch`` prompts and of one token each, by number of tokens; empty where
    the model reads something else than token ids, or cannot be run on tensors without values."""
    if example_ids(model) is None:
        return {}
    found: dict[int, Step] = {}
    for tokens in (prefill, DECODE):
        ids = torch.zeros((batch, tokens), dtype=torch.int64, device=device_of(model))
        try:
            found[tokens] = record_step(model, Caller(model)(ids))
        except Exception:  # whatever the model's code makes of tensors without values
            return {}
    return found
