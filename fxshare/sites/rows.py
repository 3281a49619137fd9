"""How the rows of a weight split into q, k, v and heads."""

from __future__ import annotations

from torch import nn

from fxshare.config import WeightType
from fxshare.errors import MatchError
from fxshare.models.traits import HEAD_WIDTHS, HEADS, KV_HEADS, WIDTHS, number_of
from fxshare.sites.site import SliceSpec


def slices_of_rows(
    site: str, out_features: int, spec: WeightType, type_name: str, model: nn.Module
) -> tuple[SliceSpec, ...]:
    """The rows of one weight as slices, split as its weight type says.

    Raises :class:`MatchError` for heads or parts that do not divide the rows or cannot be found.
    """
    if not spec.split:
        return (SliceSpec(name=site, start=0, stop=out_features),)
    if spec.split == "gate_up":
        size = _divide(site, type_name, out_features, 2, "gate and up")
        return tuple(
            SliceSpec(name=f"{site}.{part}", part=part, start=i * size, stop=(i + 1) * size)
            for i, part in enumerate(("gate", "up"))
        )
    order = spec.order
    if order is None:
        heads = spec.n_head or _unfused_heads(model, out_features)
        size = _divide(site, type_name, out_features, heads, "n_head")
        assert heads is not None
        return tuple(
            SliceSpec(name=f"{site}.{h}", head=h, start=h * size, stop=(h + 1) * size)
            for h in range(heads)
        )
    heads, kv_heads = _head_counts(site, type_name, out_features, spec, model)
    if spec.split == "qkv" and heads is None:
        size = _divide(site, type_name, out_features, 3, "q, k and v together")
        return tuple(
            SliceSpec(name=f"{site}.{p}", part=p, start=i * size, stop=(i + 1) * size)
            for i, p in enumerate(order)
        )
    total = None if heads is None else heads + 2 * (kv_heads or heads)
    size = _divide(site, type_name, out_features, total, "n_head + 2 · n_kv_head")
    assert heads is not None
    if spec.interleaved:
        return _interleaved(site, order, size, heads, kv_heads or heads, type_name)
    slices: list[SliceSpec] = []
    at = 0
    for part in order:
        count = heads if part == "q" else (kv_heads or heads)
        if spec.split == "qkv":
            stop = at + count * size
            slices.append(SliceSpec(name=f"{site}.{part}", part=part, start=at, stop=stop))
            at = stop
            continue
        for h in range(count):
            slices.append(
                SliceSpec(name=f"{site}.{part}.{h}", part=part, head=h, start=at, stop=at + size)
            )
            at += size
    return tuple(slices)


def _interleaved(
    site: str, order: str, size: int, heads: int, kv_heads: int, type_name: str
) -> tuple[SliceSpec, ...]:
    """Per key head the rows of its q heads, its k and its v, in the given order."""
    readers = _divide(site, type_name, heads, kv_heads, "n_kv_head", of="heads")
    found: list[SliceSpec] = []
    for group in range(kv_heads):
        for part in order:
            for h in range(group * readers, (group + 1) * readers) if part == "q" else [group]:
                at = len(found) * size
                name = f"{site}.{part}.{h}"
                found.append(SliceSpec(name=name, part=part, head=h, start=at, stop=at + size))
    return tuple(found)


def _head_counts(
    site: str, type_name: str, out_features: int, spec: WeightType, model: nn.Module
) -> tuple[int | None, int | None]:
    """Heads of q and of k and v in a fused projection; None where only thirds are needed."""
    heads = spec.n_head or number_of(model, HEADS)
    kv_heads = spec.n_kv_head or (1 if _is_multi_query(model) else number_of(model, KV_HEADS))
    if spec.split == "qkv" and (spec.n_kv_head is None and (kv_heads is None or kv_heads == heads)):
        return None, None
    if heads is None:
        raise MatchError(
            f"weight type {type_name!r}: the number of heads of {site!r} is not known; the model "
            "has no config that tells it, add n_head"
        )
    return heads, kv_heads


def _is_multi_query(model: nn.Module) -> bool:
    """Whether all heads read one key head (Falcon-7B, GPTBigCode), whatever the head counts say."""
    config = getattr(model, "config", None)
    return getattr(config, "multi_query", None) is True and not getattr(
        config, "new_decoder_architecture", False
    )


def _unfused_heads(model: nn.Module, out_features: int) -> int | None:
    """Heads of a separate q, k or v projection: its width over the head width of the config."""
    heads = number_of(model, HEADS)
    width = number_of(model, HEAD_WIDTHS)
    hidden = number_of(model, WIDTHS)
    if width is None and heads is not None and hidden is not None and hidden % heads == 0:
        width = hidden // heads
    if width is not None and out_features % width == 0:
        return out_features // width
    return heads


def _divide(
    site: str, type_name: str, rows: int, parts: int | None, what: str, *, of: str = "rows"
) -> int:
    if parts is None:
        raise MatchError(
            f"weight type {type_name!r}: the number of heads of {site!r} is not known; the model "
            "has no config that tells it, add n_head"
        )
    if rows % parts:
        near = [n for n in range(1, rows + 1) if rows % n == 0]
        nearest = min(near, key=lambda n: abs(n - parts))
        raise MatchError(
            f"weight type {type_name!r}: the {rows} {of} of {site!r} do not divide by {parts} "
            f"({what}); the nearest number that does is {nearest}"
        )
    return rows // parts
