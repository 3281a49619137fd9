"""``fxshare.propose``: a configuration from the model itself.

A weight type is what comes again in every layer: one name, one shape. What is left out is said
with the reason; nothing is decided by the class of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fxshare.base.progress import stage
from fxshare.base.surroundings import plain_surroundings
from fxshare.capture import Captured, capture
from fxshare.config import ShareConfig, WeightType
from fxshare.errors import CaptureError, ConfigError, MatchError
from fxshare.models.wrapped import unwrapped
from fxshare.proposing.layout import Layout, heads_of, layout_of
from fxshare.proposing.optional import OptionalType, optional_types
from fxshare.proposing.patterns import block_pattern_of, matchable, pattern_of, type_names
from fxshare.proposing.proposal import LeftOut, Proposal, ProposedType
from fxshare.proposing.rows import Rows, rows_read_together
from fxshare.proposing.same_input import seen_in_graph, told_by_names
from fxshare.proposing.unfit import set_apart
from fxshare.proposing.weights import Weight, alike, total_numbers, weights_of
from fxshare.sites.match import matching
from fxshare.sites.site import Site
from fxshare.sites.visible import seen
from passes import stacks

_LOG = logging.getLogger(__name__)
_WORTH = 1e-3
"""Share of the model's parameters below which a weight type is left out."""


def init(model: nn.Module) -> ShareConfig:
    """The configuration that ``fxshare init`` writes: exact mode, every weight worth compressing.

    What ``fxshare.compile`` and ``fxshare.plan`` use where ``cfg`` is None. Nothing is run, so a
    model on the meta device will do.

    Raises :class:`MatchError` where the model has no weight that could be rewritten.
    """
    return propose(model).config


@plain_surroundings()
@stage("propose", _LOG)
def propose(model: nn.Module, *, example: object = None) -> Proposal:
    """What to compress in ``model``, by structure: the weights of its layers, how their rows are
    fused, and what is left out and why.

    ``example`` is one batch to capture the model with, which shows what reads the same activation;
    without it names tell that. Raises :class:`MatchError` where nothing could be rewritten, and
    :class:`ConfigError` for what is not a model.
    """
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"expected an nn.Module to look at, found {type(model).__name__}; load the model first"
        )
    captured, unseen = (None, "") if example is None else _captured(model, example)
    graph = None if captured is None or captured.side_by_side else captured
    weights = weights_of(model, {} if graph is None else _stacks_of(graph))
    total = total_numbers(model)
    own, apart = set_apart(model, alike(weights))
    groups, left_out = _worth(model, own, total)
    left_out += [_left_out(group, reason) for group, reason in apart]
    named = dict(zip(type_names(groups), groups, strict=True))
    names = matchable(model)
    together: Mapping[str, list[Rows]] = {}
    if graph is not None:
        together = rows_read_together(graph, [group[0].name for group in groups])
    specs, layouts = {}, {}
    for name, group in named.items():
        first = group[0]
        beside = _same_layer(first, weights)
        layouts[name] = layout_of(model, first, beside, together.get(first.name, ()))
        specs[name] = WeightType(pattern=pattern_of(group, names), **layouts[name].keys)
    refused = _refused(model, specs)
    sites = _sites(model, {n: s for n, s in specs.items() if n not in refused}, captured, example)
    refused |= {name: reason for name, reason in sites.items() if isinstance(reason, str)}
    left_out += [_left_out(named.pop(name), reason) for name, reason in refused.items()]
    if not named:
        raise MatchError(_nothing(model, left_out))
    config = ShareConfig(
        weight_types={name: specs[name] for name in named},
        block_pattern=block_pattern_of(w for group in named.values() for w in group),
    )
    optional: tuple[OptionalType, ...] = ()
    if config.block_pattern is not None:
        optional = optional_types(model, named, _WORTH * total)
    offered = {reader for one in optional for reader in one.readers}
    return Proposal(
        model=type(model).__name__,
        parameters=total,
        config=config,
        types=_counted(model, config, named, layouts, weights, sites),
        left_out=tuple(one for one in left_out if one.name not in offered),
        same_input=told_by_names(named) if graph is None else seen_in_graph(graph, named),
        seen=graph is not None,
        unseen=unseen,
        optional=optional,
    )


def _stacks_of(captured: Captured) -> dict[str, bool]:
    """The parameters that the graph reads as stacks, and whether each is ``(E, in, out)``."""
    found = stacks(captured.graph)
    return {name: reads[0].transposed for name, reads in found.items()}


def _captured(model: nn.Module, example: object) -> tuple[Captured | None, str]:
    """The model captured, and why there is no graph of it."""
    try:
        captured = capture(model, example)
    except CaptureError as error:
        return None, str(error).splitlines()[0]
    if captured.side_by_side:
        return captured, captured.notes[0] if captured.notes else "captured module by module only"
    return captured, ""


def _sites(
    model: nn.Module, specs: Mapping[str, WeightType], captured: Captured | None, example: object
) -> dict[str, tuple[Site, ...] | str]:
    """The sites of each type, as the captured model shows them where there is one; why there are
    none, where it shows none."""
    if not specs:
        return {}
    found_by_name = matching(model, ShareConfig(weight_types=dict(specs)))
    sites, skipped = found_by_name.sites, found_by_name.skipped
    if captured is not None:
        shown = seen(captured, found_by_name, [example])
        sites, skipped = shown.sites, shown.skipped
    found: dict[str, tuple[Site, ...] | str] = {}
    for name in specs:
        own = tuple(site for site in sites if site.type == name)
        found[name] = own or next(s.reason for s in skipped if s.type == name)
    return found


def _same_layer(weight: Weight, weights: Sequence[Weight]) -> list[Weight]:
    return [w for w in weights if (w.stack, w.layer) == (weight.stack, weight.layer)]


def _worth(
    model: nn.Module, groups: Sequence[list[Weight]], total: int
) -> tuple[list[list[Weight]], list[LeftOut]]:
    """The groups worth compressing, and the others with the reason."""
    in_layers = any(w.layer is not None for group in groups for w in group)
    kept, left = [], []
    for group in groups:
        first = group[0]
        experts = {
            w.matrices for g in groups for w in g if w.matrices > 1 and w.layer == first.layer
        }
        numbers = sum(w.numbers for w in group)
        if in_layers and first.layer is None:
            reason = "is in no layer: nothing to share with" + _tied(model, first)
        elif first.out_features * first.in_features <= first.out_features + first.in_features:
            reason = "one rank stores as much as the weight"
        elif first.matrices == 1 and first.out_features in experts:
            reason = f"chooses among {first.out_features} experts; small, and sensitive to errors"
        elif numbers < _WORTH * total and in_layers:
            reason = f"less than {_WORTH:.1%} of the parameters"
        else:
            kept.append(group)
            continue
        left.append(_left_out(group, reason))
    return kept, left


def _tied(model: nn.Module, weight: Weight) -> str:
    tied = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) == weight.parameter and name not in (weight.name, f"{weight.name}.weight")
    ]
    return f", and its weight is tied to {tied[0]!r}" if tied else ""


def _left_out(group: Sequence[Weight], reason: str) -> LeftOut:
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    return LeftOut(group[0].name + more, group[0].shape, sum(w.numbers for w in group), reason)


def _refused(model: nn.Module, specs: Mapping[str, WeightType]) -> dict[str, str]:
    """The types that cannot be rewritten in this model, with what matching says."""
    found = {}
    for name, spec in specs.items():
        try:
            matching(model, ShareConfig(weight_types={name: spec}))
        except MatchError as error:
            found[name] = str(error)
    return found


def _nothing(model: nn.Module, left_out: Sequence[LeftOut]) -> str:
    if left_out:
        one = left_out[0]
        return (
            f"{type(model).__name__} has no weight worth rewriting: {one.name!r} {one.reason}; "
            "write the configuration by hand if you want it nevertheless"
        )
    kinds = sorted({type(m).__name__ for m in model.modules() if m._parameters})
    return (
        f"{type(model).__name__} has no linear weight that could be rewritten: expected nn.Linear, "
        f"Conv1D, nn.MultiheadAttention or stacked experts, found "
        f"{', '.join(kinds[:6]) or 'no parameters'}"
    )


def _counted(
    model: nn.Module,
    config: ShareConfig,
    named: Mapping[str, list[Weight]],
    layouts: Mapping[str, Layout],
    weights: Sequence[Weight],
    sites: Mapping[str, tuple[Site, ...] | str],
) -> tuple[ProposedType, ...]:
    numbered = {site.name: site.layer for site in matching(model, config).sites}
    found: list[ProposedType] = []
    for name, group in named.items():
        own = [site for site in sites[name] if isinstance(site, Site)]
        layers = {numbered.get(site.name.partition(".rows_")[0]) for site in own}
        beside = _same_layer(group[0], weights)
        values: dict[str, Any] = {
            "sites": len(own),
            "slices": sum(len(site.slices) for site in own),
            "layers": tuple(sorted(layer for layer in layers if layer is not None)),
            "numbers": sum(site.weights for site in own),
        }
        heads = heads_of(model, group[0], beside) if layouts[name].kind == "one" else None
        found.append(
            ProposedType(
                name, config.weight_types[name], tuple(group), layouts[name], heads, **values
            )
        )
    return tuple(found)
