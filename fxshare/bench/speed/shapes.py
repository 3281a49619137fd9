"""``fxshare bench device MODEL``: seconds of the products and attentions of one model, at the ranks
that a plan may choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxshare.bench.speed.device import device_of_name, dtype_of_name, numbers, quickest
from fxshare.cost_model import PREFILL, Attention, Matmul, Rates, Step
from fxshare.cost_model.measured import AttentionKey, Measured, ProductKey
from fxshare.cost_model.whole import dense_steps
from fxshare.errors import ConfigError
from fxshare.models.traits import context_of
from passes.packing.lay_out import wants_columns

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Ranks, as shares of the full one; rounded up to a multiple of 64, or of 8 where that is all."""
_SET = 64 << 20


def measured_shapes(
    model: nn.Module,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    prompt: int = PREFILL,
    batches: Sequence[int] = (1,),
    repeats: int = 15,
    launch: float = 0.0,
) -> Measured:
    """Measure the products of ``model``, dense, of low rank and pivoted, and its attentions: of
    prompts of ``prompt`` tokens, or as many as the model takes, and of one token, ``batches`` at a
    time. Medians of ``repeats`` rounds in turn, without ``launch``, which is counted apart.

    A product of few rows takes its weights in turn from 64 MB, as a model's come from memory. Tall
    factors lie as lowering lays them out.

    Raises :class:`ConfigError` for a batch or a prompt below 1, and for a model that reads no token
    ids or cannot be run on tensors without values.
    """
    place, kind = device_of_name(device), dtype_of_name(dtype)
    if min(prompt, *batches) < 1:
        found = ", ".join(map(str, batches))
        raise ConfigError(f"--batch, --prompt: expected at least 1; found {found} and {prompt}")
    products: dict[ProductKey, bool] = {}
    attentions: set[AttentionKey] = set()
    length = min(prompt, context_of(model) or prompt)
    for batch in batches:
        steps = dense_steps(model, length, batch=batch)
        if not steps:
            raise ConfigError(
                f"{type(model).__name__}: expected a model that reads token ids, whose products "
                "can be counted; leave MODEL out to measure the device's constants alone"
            )
        for step in steps.values():
            products = _products(step) | products
            attentions |= {o.key for o in step if isinstance(o, Attention)}
    with torch.no_grad():
        most = max(inner * out for _, inner, out in products)
        whole = numbers(place, kind, max(most, _SET // kind.itemsize))
        work = {key: _product(whole, key, dense) for key, dense in products.items()}
        seconds = quickest({k: call for k, (call, _) in work.items()}, place, repeats, median=True)
        calls = {key: _attention(place, kind, key) for key in attentions}
        others = quickest(calls, place, repeats, median=True)
    net = {key: _net(seconds[key] / count, launch) for key, (_, count) in work.items()}
    rest = {key: _net(taken, launch) for key, taken in others.items()}
    return Measured(tuple(sorted(net.items())), tuple(sorted(rest.items())))


def with_shapes(rates: Rates, found: Measured, before: Rates | None) -> Rates:
    """The constants with what was measured, and with what another run with this torch had found
    of other shapes."""
    if before is not None and before.torch == rates.torch:
        found = found.with_others(before.measured)
    return replace(rates, measured=found)


def _products(step: Step) -> dict[ProductKey, bool]:
    """Those of a step, and of factors in the place of each; which ones are dense."""
    dense = {(o.rows, o.inner, o.out): True for o in step if isinstance(o, Matmul) and o.batch == 1}
    low: dict[ProductKey, bool] = {}
    for rows, inner, out in dense:
        full = min(inner, out)
        multiple = 64 if full >= 256 else 8
        for rank in {-(-int(share * full) // multiple) * multiple for share in SHARES}:
            if rank < full:
                three = ((inner, rank), (rank, out), (inner - rank, rank))
                low |= {(rows, *sizes): False for sizes in three}
    return low | dense


def _product(whole: Tensor, key: ProductKey, dense: bool) -> tuple[Callable[[], None], int]:
    """A call of several products in turn, and of how many."""
    rows, inner, out = key
    size = inner * out
    count = min(len(whole) // size, int(2e9 / (2 * rows * size)))
    weights = []
    for at in range(max(count, 1)):
        flat = whole[at * size : (at + 1) * size]
        weight_OI = flat.view(out, inner)
        by_columns = not dense and wants_columns(weight_OI)
        weights.append(flat.view(inner, out).t() if by_columns else weight_OI)
    x = numbers(whole.device, whole.dtype, rows, inner)

    def in_turn() -> None:
        for weight in weights:
            F.linear(x, weight)

    return in_turn, len(weights)


def _attention(device: torch.device, dtype: torch.dtype, key: AttentionKey) -> Callable[[], object]:
    heads, rows, keys, width, causal = key
    q = numbers(device, dtype, 1, heads, rows, width)
    k, v = (numbers(device, dtype, 1, heads, keys, width) for _ in range(2))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal))


def _net(seconds: float, launch: float) -> float:
    return max(seconds - launch, seconds / 2)
