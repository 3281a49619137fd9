"""What encoder-decoder models have beside a decoder: an encoder, run once, and its place in the
model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshare.capture import device_of, dtype_of
from fxshare.capture.call import MASK
from fxshare.errors import CaptureError
from fxshare.generation.step import ENCODED, Kind, Values, decoder_arguments, nested
from fxshare.models.structure import structure_of
from fxshare.plans.plan import Plan
from fxshare.result.module import record_of
from passes import linear_calls, lookups

Run = Callable[[nn.Module, dict[str, Any]], Any]
"""Runs the encoder on the arguments it is called with; the shell is the first argument."""


def encoder_of(model: Any) -> tuple[str, Any]:
    """The encoder of a model, and its qualified name.

    Raises :class:`CaptureError` where the model has none below it.
    """
    encoder = model.get_encoder()
    name = next((n for n, module in model.named_modules() if module is encoder), "")
    if not name:
        raise CaptureError(f"{type(model).__name__} has no module that is its encoder")
    return name, encoder


def source_like(gm: nn.Module, kind: Kind, number: int = 0) -> dict[str, Tensor]:
    """A random input of the encoder, of the size of example ``number`` that ``gm`` was captured
    with; with a mask, whose first row is padded, where the kind has one.

    Raises :class:`CaptureError` where that example shows no such input.
    """
    structure = structure_of(gm)
    assert structure is not None
    main = encoder_of(structure.model)[1].main_input_name
    record = record_of(gm)
    call = record.random_call(number, seed=number, device=device_of(gm)) if record.inputs else {}
    given = [name for name, _, _ in kind.tensors] if kind.cache is None else [main]
    missing = next((name for name in given if name not in (MASK, main)), None)
    if missing is not None or not isinstance(call.get(main), Tensor):
        raise CaptureError(f"the model was captured without an example of {missing or main!r}")
    value: Tensor = call[main]
    if value.is_floating_point():
        value = value.to(dtype_of(gm))
    if not kind.takes(MASK):
        return {main: value}
    mask = torch.ones(value.shape[0], value.shape[-1], dtype=torch.long, device=value.device)
    mask[0, -(mask.shape[1] // 3) :] = 0
    return {main: value, MASK: mask}


def warm_step(
    root: Any, shell: nn.Module, kind: Kind, source: dict[str, Tensor], sizes: tuple[int, int]
) -> Values:
    """A step of the decoder after others, to be traced. ``sizes`` are the tokens in the cache and
    the new ones; the first step of a generation finds the keys of the encoder missing all the
    same."""
    old, new = sizes
    assert kind.cache is not None
    assert kind.cache.cross is not None
    main = encoder_of(root)[1].main_input_name
    encoded: Tensor = root.get_encoder()(source[main]).last_hidden_state
    given = {ENCODED: encoded} | {n: t for n, t in source.items() if n == MASK}
    ids = torch.ones(encoded.shape[0], old + new, dtype=torch.long, device=encoded.device)
    config: Any = shell.config
    cache: Any = kind.cache.new(config, 2 * (old + new), encoded.shape[1])
    root(**nested(decoder_arguments(shell, kind, ids[:, :old], given, cache, old)))
    if not kind.cache.filled:
        cross = kind.cache.cross.new(config, encoded.shape[1])
        cache = type(cache)(cache.self_attention_cache, cross)
    return decoder_arguments(shell, kind, ids, given, cache, new)


def mark_filled(cache: Any) -> None:
    """Note that the keys of the encoder are in the cache, as the model's own code does."""
    layers = cache.cross_attention_cache.layers
    cache.is_updated.update({n: True for n, layer in enumerate(layers) if layer.is_initialized})


def put_encoder(shell: Any, run: Run) -> None:
    """Give the shell the modules of its structure, without values, in which the encoder is one that
    ``run`` runs. Only the path to it is copied."""
    name, encoder = encoder_of(shell)
    *path, leaf = name.split(".")
    module = shell
    for part in path:
        below = _copy(module._modules[part])
        module._modules[part] = below
        module = below
    running = _copy(encoder)
    running.__class__ = _encoder_class(type(encoder))
    running.__dict__["_run"] = lambda arguments: run(shell, arguments)
    module._modules[leaf] = running


def _copy(module: nn.Module) -> nn.Module:
    result = copy.copy(module)
    result.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    return result


def _encoder_class(cls: type) -> type:
    signature = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(list(signature.parameters)[1:], args, strict=False))
        return self._run({**named, **kwargs})

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return type(f"{cls.__name__}Shared", (cls,), {"forward": forward, "__module__": cls.__module__})


def part_of_plan(plan: Plan, graph: fx.GraphModule) -> Plan:
    """What the plan says about a graph that is a part of the model."""
    called = {call.name for call in linear_calls(graph)}
    looked_up = {lookup.name for lookup in lookups(graph)}
    sites = []
    for site in plan.sites:
        here = {
            "calls": tuple(name for name in site.calls if name in called),
            "lookups": tuple(name for name in site.lookups if name in looked_up),
        }
        if any(here.values()):
            sites.append(site.model_copy(update=here))
    there = {s.name for site in sites for s in site.slices}
    groups = (
        group.model_copy(update={"slices": tuple(n for n in group.slices if n in there)})
        for group in plan.groups
    )
    update = {
        "sites": tuple(sites),
        "groups": tuple(group for group in groups if group.slices),
        "units": tuple(one for one in plan.units if one.is_within(sites)),
    }
    return plan.model_copy(update=update)
