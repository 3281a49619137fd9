"""What ``fxshare.propose`` found, as data and as the commented YAML file of ``fxshare init``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fxshare.config import ShareConfig, WeightType
from fxshare.proposing.layout import Layout
from fxshare.proposing.optional import OptionalType
from fxshare.proposing.same_input import Groups
from fxshare.proposing.weights import Weight

_WIDTH = 98


@dataclass(frozen=True)
class ProposedType:
    """A weight type and what it matches: ``sites``, ``slices`` and ``layers`` are counted by
    matching the configuration, not by what the proposal expects."""

    name: str
    spec: WeightType
    weights: tuple[Weight, ...]
    layout: Layout
    heads: tuple[int, int] | None
    sites: int
    slices: int
    layers: tuple[int, ...]
    numbers: int


@dataclass(frozen=True)
class LeftOut:
    """A weight that could be matched and is not."""

    name: str
    shape: tuple[int, int, int]
    numbers: int
    reason: str


@dataclass(frozen=True)
class Proposal:
    """What ``fxshare init`` writes, as data. ``same_input`` are types that read one activation,
    seen in a graph where ``seen``, else told by their names; ``unseen`` says why not."""

    model: str
    parameters: int
    config: ShareConfig
    types: tuple[ProposedType, ...]
    left_out: tuple[LeftOut, ...]
    same_input: Groups
    seen: bool
    unseen: str = ""
    optional: tuple[OptionalType, ...] = ()
    """Embeddings and heads: off unless asked for."""

    @property
    def with_optional(self) -> ShareConfig:
        """The configuration with what is off unless asked for."""
        types = self.config.weight_types | {one.name: one.spec for one in self.optional}
        return self.config.model_copy(update={"weight_types": types})

    @property
    def text(self) -> str:
        """The commented YAML file."""
        return "\n".join(_lines(self)) + "\n"


def _lines(proposal: Proposal) -> Iterator[str]:
    matched = sum(t.numbers for t in proposal.types)
    sites = sum(t.sites for t in proposal.types)
    yield from _comment(
        f"What fxshare init found in {proposal.model}: {sites} weights with {_count(matched)} of "
        f"its {_count(proposal.parameters)} parameters ({matched / proposal.parameters:.1%})."
    )
    yield "#"
    yield from _comment(
        "As it stands: exact mode, the same outputs from slices of the same weights. To make the "
        "model smaller, take the # off one of these, or give it with --set:"
    )
    yield "# budget: {params_kept: 0.8}   # planned: what shares, and every rank, chosen on data"
    if proposal.config.block_pattern is not None:
        yield "# group_size: 2               # Basis Sharing: two consecutive layers share a basis,"
        yield "# compression_rate: 0.8       #   and 80 % of the parameters are kept (both lines)"
    yield "weight_types:"
    for one in proposal.types:
        yield from _comment(_told(one, proposal.parameters), indent=4)
        yield from _entry(one.name, one.spec)
    yield from _optional(proposal)
    layers = proposal.config.block_pattern
    if layers is not None:
        yield f"block_pattern: {_quoted(layers)} # group 1 is the layer number"
    yield from _reading(proposal)
    if proposal.left_out:
        yield from _comment("Left as they are:")
        for left in proposal.left_out:
            yield from _comment(_missed(left, proposal.parameters), hanging="    ")


def _optional(proposal: Proposal) -> Iterator[str]:
    if not proposal.optional:
        return
    yield from _comment(
        "Off unless asked for, as errors in them reach every token; take the # off:", indent=4
    )
    for one in proposal.optional:
        rows, columns = one.shape
        share = one.numbers / proposal.parameters
        what = f"{rows} × {columns}, {share:.1%} of the parameters"
        if len(one.readers) > 1:
            what += f", one weight for {', '.join(one.readers)}"
        yield from (f"    # {line.strip()}" for line in _entry(one.name, one.spec))
        yield from _comment(f"  {what}", indent=4, hanging="    ")


def _told(one: ProposedType, total: int) -> str:
    first = one.weights[0]
    shape = f"{first.in_features} → {first.out_features}"
    what = f"{one.sites} of {shape}"
    if first.matrices > 1:
        what = (
            f"{len(one.weights)} stacks of {first.matrices} experts, {one.sites} matrices {shape}"
        )
    parts = [what + _layers(one.layers), f"{one.numbers / total:.1%} of the parameters"]
    layout = one.layout
    if layout.kind == "gate_up":
        parts.append(f"gate and up in one weight: {one.slices} slices")
    elif layout.kind == "qkv" and layout.heads is None:
        parts.append(f"q, k and v in one weight: {one.slices} slices")
    elif layout.kind == "qkv":
        assert layout.heads is not None
        keys = layout.heads if layout.kv_heads is None else layout.kv_heads
        kv = "" if keys == layout.heads else f", {keys} key {'head' if keys == 1 else 'heads'}"
        rows = "rows per head" if one.spec.interleaved else "rows in blocks"
        rows += ", seen in the captured graph" if layout.seen else ""
        parts.append(
            f"q, k and v of {layout.heads} heads{kv} in one weight ({layout.source}), {rows}: "
            f"{one.slices} slices"
        )
    elif one.heads is not None:
        heads, width = one.heads
        named = "1 head" if heads == 1 else f"{heads} heads"
        parts.append(f"{named} of {width}; 'split: heads' makes each a slice")
    return "; ".join(parts)


def _reading(proposal: Proposal) -> Iterator[str]:
    if not proposal.same_input:
        yield "#"
        return
    how = "seen in the captured graph" if proposal.seen else "told by their names"
    yield "#"
    yield from _comment(
        f"Types that read one activation ({how}) and may share a basis within a layer; with a "
        "budget, take the # off:"
    )
    groups = ", ".join(f"[{', '.join(group)}]" for group in proposal.same_input)
    yield from _comment(f"planner: {{may_share: [{groups}]}}", hanging="    ")
    yield "#"


def _missed(left: LeftOut, total: int) -> str:
    matrices, rows, columns = left.shape
    stacked = f"{matrices} × " if matrices > 1 else ""
    return f"  {left.name} ({stacked}{columns} → {rows}, {left.numbers / total:.1%}): {left.reason}"


def _layers(layers: Sequence[int]) -> str:
    if not layers:
        return ""
    if len(layers) == 1:
        return f" in layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f" in layers {layers[0]} to {layers[-1]}"
    return f" in {len(layers)} layers from {layers[0]} to {layers[-1]}"


def _entry(name: str, spec: WeightType) -> Iterator[str]:
    values = {k: v for k, v in spec.model_dump(exclude_defaults=True).items() if k != "pattern"}
    parts = [f"pattern: {_quoted(spec.pattern)}"]
    parts += [f"{k}: {str(v).lower() if isinstance(v, bool) else v}" for k, v in values.items()]
    line = f"    {name}: {{{', '.join(parts)}}}"
    if len(line) <= _WIDTH:
        yield line
        return
    yield f"    {name}:"
    yield from (f"        {part}" for part in parts)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _count(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _comment(text: str, indent: int = 0, hanging: str = "") -> Iterator[str]:
    start = f"{' ' * indent}# "
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=start + hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
