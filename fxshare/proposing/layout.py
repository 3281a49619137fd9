"""What the rows of a weight are: fused q, k and v, gate and up, or one projection.

Widths decide, with the number of heads that the attention module or a configuration states: a
weight of ``(heads + 2 · key heads) · head width`` rows beside an output projection that reads
``heads · head width`` is fused, whatever it is called. Only the order inside is not in the widths:
blocks ``[q | k | v]``, or ``[q k v]`` per head. A captured graph shows it
(:mod:`fxshare.proposing.rows`); without one the name of the weight decides.

Legend: D head width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from fxshare.models.traits import DECODER_HEADS, HEAD_WIDTHS, HEADS, number_in
from fxshare.proposing.rows import Rows
from fxshare.proposing.weights import Weight

_ATTENTION = re.compile(r"attn|attention|qkv|query_key_value", re.IGNORECASE)
# Megatron's name and order of rows, which GPT-NeoX, BLOOM, Falcon and Persimmon took over together
_PER_HEAD = re.compile(r"query_key_value$")
_SEPARATE = re.compile(r"w?(q|k|v|query|key|value)(?:_?(?:proj|lin|linear|projection))?")
Kind = Literal["qkv", "gate_up", "one"]


@dataclass(frozen=True)
class Layout:
    """The rows of a weight. ``heads`` is None where nothing tells them; ``source`` says what
    did."""

    kind: Kind = "one"
    heads: int | None = None
    kv_heads: int | None = None
    interleaved: bool = False
    order: str = "qkv"
    source: str = ""
    seen: bool = False
    """Whether a graph showed the order of the rows."""

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of a weight type that describe it."""
        if self.kind == "gate_up":
            return {"split": "gate_up"}
        if self.kind == "one":
            return {}
        if self.heads is None:
            return {"split": "qkv"}
        found: dict[str, Any] = {
            "split": "heads",
            "qkv_order": self.order,
            "n_head": self.heads,
        }
        if self.kv_heads != self.heads:
            assert self.kv_heads is not None
            found["n_kv_head"] = self.kv_heads
        if self.interleaved and self.kv_heads != 1:
            found["interleaved"] = True  # around one key head it is the same as blocks
        return found


def layout_of(
    model: nn.Module, weight: Weight, beside: Sequence[Weight], together: Sequence[Rows] = ()
) -> Layout:
    """The rows of ``weight``; ``beside`` are the weights of the same layer, itself included, and
    ``together`` the sets of its rows that one operation reads in a graph."""
    owner, _, field = weight.name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, nn.MultiheadAttention):
        heads = module.num_heads
        if field == "in_proj_weight":
            return Layout("qkv", heads, heads, source="nn.MultiheadAttention")
        return Layout()
    siblings = [w for w in beside if w is not weight and w.name.startswith(f"{owner}.")]
    if _is_attention(model, owner, field):
        return _fused(model, weight, siblings, together)
    if getattr(module, "is_concatenated", True) is False:
        return Layout()  # gate and up alternate row by row (GPT-OSS): no two halves
    # the way back: reads half of the rows, where no other reads them all
    back = [w for w in siblings if w.matrices == weight.matrices]
    back = [w for w in back if w.out_features == weight.in_features]
    widths = {w.in_features for w in back}
    halved = 2 * min(widths, default=0) == weight.out_features and len(widths) == 1
    return Layout("gate_up") if halved else Layout()


def heads_of(model: nn.Module, weight: Weight, beside: Sequence[Weight]) -> tuple[int, int] | None:
    """``(heads, D)`` of a separate q, k or v projection; None where it is none, or nothing says."""
    owner, _, field = weight.name.rpartition(".")
    stated = _stated(model, owner)
    if stated is None or not _is_attention(model, owner, field):
        return None
    if _SEPARATE.fullmatch(field) is None:
        return None
    width = _number(model, owner, HEAD_WIDTHS)
    if width is None:
        named = [(w, _SEPARATE.fullmatch(w.name.rpartition(".")[2])) for w in beside]
        queries = [w for w, found in named if found is not None and found[1][0] == "q"]
        widths = {w.out_features for w in queries if w.name.startswith(f"{owner}.")}
        if len(widths) != 1 or min(widths) % stated[0]:
            return None
        width = min(widths) // stated[0]
    return (weight.out_features // width, width) if weight.out_features % width == 0 else None


def _is_attention(model: nn.Module, owner: str, field: str) -> bool:
    if _ATTENTION.search(field) or _ATTENTION.search(".".join(owner.split(".")[-2:])):
        return True
    module = model.get_submodule(owner)
    return bool(_ATTENTION.search(type(module).__name__)) or number_in(module, HEADS) is not None


def _fused(
    model: nn.Module, weight: Weight, siblings: Sequence[Weight], together: Sequence[Rows]
) -> Layout:
    rows = weight.out_features
    if weight.matrices != 1 or any(w.in_features == rows for w in siblings):
        return Layout()
    owner, _, field = weight.name.rpartition(".")
    per_head = _PER_HEAD.search(field) is not None
    stated = _stated(model, owner)
    for reader in siblings:
        width = reader.in_features
        if reader.out_features != weight.in_features or rows <= width:
            continue
        if stated is None:
            if rows == 3 * width:
                return Layout("qkv", source="its width is three times what is read")
            continue
        heads, source = stated
        if width % heads:
            continue
        size = width // heads
        kv_heads, rest = divmod(rows - width, 2 * size)
        if rest == 0 and kv_heads and heads % kv_heads == 0:
            named = Layout("qkv", heads, kv_heads, per_head, source=source)
            return _shown(named, size, together)
    return Layout()


def _shown(named: Layout, size: int, together: Sequence[Rows]) -> Layout:
    """The order of rows that ``together`` shows, else the one that the name promised."""
    orders = [named, replace(named, interleaved=not named.interleaved)]
    if named.heads != named.kv_heads:  # of equal height, their order is no more than their names
        orders += [replace(named, interleaved=False, order=order) for order in ("kvq", "kqv")]
    fitting = [o for o in orders if all(_within_one(rows, o, size) for rows in together)]
    if not together or not fitting:
        return named
    return replace(fitting[0], seen=len(fitting) < len(orders))


def _within_one(rows: Rows, layout: Layout, size: int) -> bool:
    """Whether rows are all of q, all of k or all of v under a layout with heads of ``size``."""
    parts = parts_of(layout)
    return len({parts[row // size] for row in rows}) == 1


def parts_of(layout: Layout) -> str:
    """``q``, ``k`` or ``v`` of every head's rows, in the order of the rows."""
    assert layout.heads is not None
    assert layout.kv_heads is not None
    count = {"q": layout.heads, "k": layout.kv_heads, "v": layout.kv_heads}
    if not layout.interleaved:
        return "".join(part * count[part] for part in layout.order)
    group = "".join(part * (count[part] // layout.kv_heads) for part in layout.order)
    return group * layout.kv_heads


def _stated(model: nn.Module, owner: str) -> tuple[int, str] | None:
    """The number of (query) heads and who states it: the module, else the nearest configuration."""
    names = (*DECODER_HEADS, *HEADS) if "decoder" in owner.split(".") else HEADS
    module = model.get_submodule(owner)
    own = number_in(module, names)
    if own is not None:
        return own, f"{type(module).__name__} states them"
    for config in _configs(model, owner):
        found = number_in(config, names)
        if found is not None:
            return found, "the configuration of the model states them"
    return None


def _number(model: nn.Module, owner: str, names: tuple[str, ...]) -> int | None:
    for holder in (model.get_submodule(owner), *_configs(model, owner)):
        found = number_in(holder, names)
        if found is not None:
            return found
    return None


def _configs(model: nn.Module, owner: str) -> Iterator[object]:
    """Configurations from the module up to the model; the nearer one knows its own tower."""
    steps = owner.split(".") if owner else []
    for depth in range(len(steps), -1, -1):
        config = getattr(model.get_submodule(".".join(steps[:depth])), "config", None)
        if config is not None:
            yield config
