"""What is counted of a model: its forward pass, what reads what, and what its activations take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fxshare.calibration.activations import Activations, alive_bytes, most_bytes
from fxshare.calibration.blocks import shared_inputs
from fxshare.capture import Call, Caller, Captured, device_of, tensors
from fxshare.capture.call import as_called
from fxshare.cost_model.recorder import record_step
from fxshare.cost_model.work import Matmul, Operation
from fxshare.models.traits import vocabulary_of
from fxshare.sites.site import Site
from passes import is_linear


@dataclass(frozen=True)
class Counted:
    """One batch through a model.

    ``step`` are the operations of a forward pass, ``rows`` its tokens; ``reads`` has for every site
    what tells its input apart, ``rows_of`` how many rows reach it where that is not one a token.
    ``logits`` are the numbers a token that a next-token loss is taken of, 0 where there is none.
    ``most`` is a bound for the bytes of activations, ``alive`` a closer look, None where it was not
    taken.
    """

    step: Sequence[Operation]
    rows: int
    reads: Mapping[str, Hashable]
    rows_of: Mapping[str, int]
    logits: int
    most: int
    alive: Activations | None


def count(model: nn.Module, sites: Sequence[Site], batch: object, *, gradients: bool) -> Counted:
    """Run a model once on fake tensors: no values are needed, nothing is computed.

    What cannot be run so is counted by its linears, as :func:`count_captured` does.
    """
    call = Caller(model)(batch)
    reads: dict[str, Hashable] = {}
    rows_of: dict[str, int] = {}
    try:
        with ExitStack() as hooks:
            _watch(model, sites, reads, rows_of, hooks)
            step: Sequence[Operation] = record_step(model, call)
    except Exception:  # whatever the model's code makes of tensors without values
        step = ()
        rows_of.clear()

    def run(fake: Call) -> object:
        args, kwargs = as_called(model, fake)
        return model(*args, **kwargs)

    alive = alive_bytes(run, call, gradients=gradients) if step else None
    return Counted(
        step=step or _linears(model, _rows(call)),
        rows=max(rows_of.values(), default=_rows(call)),
        reads={site.name: reads.get(site.name, site.name) for site in sites},
        rows_of=rows_of,
        logits=_logits(model),
        most=most_bytes(model, call),
        alive=alive,
    )


def count_captured(captured: Captured, sites: Sequence[Site], batch: object) -> Counted:
    """What a capture shows, without running anything: the products of linears, attention apart."""
    call = captured.caller(batch)
    return Counted(
        step=_linears(captured.model, _rows(call)),
        rows=_rows(call),
        reads={site.name: site.name for site in sites} | shared_inputs(captured, sites),
        rows_of={},
        logits=_logits(captured.model),
        most=most_bytes(captured.module, call),
        alive=None,
    )


def made_up(model: nn.Module, batch_size: int, length: int) -> Tensor:
    """Token ids without meaning, where the model is."""
    return torch.zeros((batch_size, length), dtype=torch.int64, device=device_of(model))


def _watch(
    model: nn.Module,
    sites: Sequence[Site],
    reads: dict[str, Hashable],
    rows_of: dict[str, int],
    hooks: ExitStack,
) -> None:
    """Note which tensor every linear of a site is given while the hooks are there."""
    # tensors are gone soon, and another one may have the number of what is in there
    known: WeakIdKeyDictionary = WeakIdKeyDictionary()
    numbers = itertools.count()
    modules = dict(model.named_modules())

    def watch(site: str, module: nn.Module) -> None:
        def look(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            x = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
            if x is not None:
                if x not in known:
                    known[x] = next(numbers)
                reads.setdefault(site, ("input", known[x]))
                rows_of[site] = rows_of.get(site, 0) + x.numel() // max(x.shape[-1], 1)

        handle = module.register_forward_pre_hook(look, with_kwargs=True)
        hooks.callback(handle.remove)

    for site in sites:
        for name in site.calls:
            module = modules.get(name)
            if module is not None:
                watch(site.name, module)


def _linears(model: nn.Module, rows: int) -> list[Operation]:
    found: list[Operation] = []
    for module in model.modules():
        if is_linear(module):
            weight = module.weight
            assert isinstance(weight, Tensor)
            found.append(Matmul(rows, *weight.shape[::-1]))
    seen = {id(m.weight) for m in model.modules() if is_linear(m)}
    for parameter in model.parameters():
        # stacked experts, of which a token sees some, and what functions multiply by
        if parameter.ndim == 3 and id(parameter) not in seen:
            found.append(Matmul(rows, parameter.shape[-1], parameter.shape[-2]))
    return found


def _rows(call: Call) -> int:
    """Tokens of a call: rows and columns of its first tensor of ids, the rows of others."""
    first = next(iter(tensors(call)), None)
    if first is None:
        return 1
    return first.numel() if first.ndim == 2 else max(math.prod(first.shape[:1]), 1)


def _logits(model: nn.Module) -> int:
    """The vocabulary, where a linear has that many outputs."""
    vocabulary = vocabulary_of(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == vocabulary:
            return module.out_features
    return 0


__all__ = ["Counted", "count", "count_captured", "made_up"]
