"""Which weights a configuration means, and how their rows are split.

A site is a *parameter*, not a module: modules that share one weight are one site, since rewriting
one of them alone would store the weight twice.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from fxshare.base.progress import stage
from fxshare.config import ShareConfig, WeightType
from fxshare.errors import MatchError
from fxshare.sites.patterns import Pattern
from fxshare.sites.refusals import (
    every_type_has_sites,
    holds_weight,
    not_rewritable,
    refuse_quantised,
    tie_refusal,
)
from fxshare.sites.rows import slices_of_rows
from fxshare.sites.site import Site, Skipped, SliceSpec
from fxshare.sites.stacked import stores_columns
from fxshare.sites.tensors import stored_bias
from passes import is_linear, weight_and_bias
from passes.graph.names import shortened, unwritable

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Matching:
    """The sites of a model under a configuration, and the matched modules left alone."""

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    parameters: frozenset[str] = frozenset()
    """The sites that are bare parameters: only a graph tells whether they are used as linears."""
    turned: Mapping[str, Site | str] = field(default_factory=dict)
    """Of these the site where the graph shows that its rows are columns, or why there is none."""


def match(model: nn.Module, cfg: ShareConfig) -> Matching:
    """Find the sites; ``re.match`` of each pattern on the qualified module names.

    Raises :class:`MatchError` for a pattern that matches no linear (with the nearest names), a
    module matched by two types, a layer number that cannot be found, heads that do not divide.
    """
    with stage("match", _LOG) as running:
        found = matching(model, cfg)
        running.found(f"{len(found.sites)} sites")
    return found


def matching(model: nn.Module, cfg: ShareConfig) -> Matching:
    """:func:`match` without a word about it, for those who try many patterns."""
    refuse_quantised(model)
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    types = _types(modules, cfg)
    owners = _owners(model)
    alone = _alone(types, modules)
    block = None if cfg.block_pattern is None else Pattern(cfg.block_pattern)
    sites: list[Site] = []
    skipped: list[Skipped] = []
    done: set[int] = set()
    for name, type_name in types.items():
        module = modules[name]
        looked_up = cfg.weight_types[type_name].embedding
        reason = not_rewritable(module, looked_up=looked_up)
        if reason is None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            if id(weight) in done:
                continue
            readers = owners[id(weight)]
            reason = tie_refusal(readers, modules, looked_up=looked_up)
        if reason is not None:
            skipped.append(Skipped(name=name, type=type_name, reason=reason))
            continue
        done.add(id(weight))
        layer = _layer(cfg, block, name, type_name, alone=type_name in alone)
        sites.append(_site(model, cfg, type_name, layer, readers))
    parameters: set[str] = set()
    turned: dict[str, Site | str] = {}
    for name, type_name in _parameter_types(model, modules, cfg).items():
        found = _parameter_sites(model, cfg, block, name, type_name, owners)
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            for usual, other in found:
                if isinstance(usual, str):
                    usual, other = other, usual
                if isinstance(usual, str):
                    raise MatchError(other)
                sites.append(usual)
                parameters.add(usual.name)
                turned[usual.name] = other
    every_type_has_sites(cfg, sites, skipped, modules)
    return Matching(tuple(sites), tuple(skipped), frozenset(parameters), turned)


def _types(modules: Mapping[str, nn.Module], cfg: ShareConfig) -> dict[str, str]:
    """The weight type of every matched module that is a linear, or would be one."""
    found: dict[str, str] = {}
    patterns = {t: Pattern(spec.pattern) for t, spec in cfg.weight_types.items()}
    for name, module in modules.items():
        matching = [t for t, pattern in patterns.items() if pattern.match(name)]
        if not matching or not holds_weight(module):
            continue
        if len(matching) > 1:
            raise MatchError(
                f"module {name!r} is matched by two weight types, {matching[0]!r} "
                f"({cfg.weight_types[matching[0]].pattern}) and {matching[1]!r} "
                f"({cfg.weight_types[matching[1]].pattern}); make the patterns disjoint"
            )
        _check_name(name)
        found[name] = matching[0]
    return found


def _check_name(name: str) -> None:
    reason = unwritable(name)
    if reason is not None:
        raise MatchError(
            f"{shortened(name)} is matched, but its name {reason}; rename it, or let the pattern "
            "leave it out: the code of a graph would hold the name as it is"
        )


def _parameter_types(
    model: nn.Module, modules: Mapping[str, nn.Module], cfg: ShareConfig
) -> dict[str, str]:
    """The weight type of every matched parameter that is not the weight of a matched module."""
    found: dict[str, str] = {}
    patterns = {t: Pattern(spec.pattern) for t, spec in cfg.weight_types.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, field = name.rpartition(".")
        module = modules.get(owner, model)
        if parameter.ndim not in (2, 3) or (field == "weight" and is_linear(module)):
            continue
        for type_name, pattern in patterns.items():
            # a pattern that matches the module as well means the module
            if pattern.match(name) and not (owner and pattern.match(owner)):
                if name in found:
                    raise MatchError(
                        f"parameter {name!r} is matched by two weight types, {found[name]!r} and "
                        f"{type_name!r}; make the patterns disjoint"
                    )
                _check_name(name)
                found[name] = type_name
    return found


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _alone(types: Mapping[str, str], modules: Mapping[str, nn.Module]) -> set[str]:
    """The weight types of one weight each."""
    weights: dict[str, set[int]] = {}
    for name, type_name in types.items():
        weights.setdefault(type_name, set()).add(id(modules[name].weight))
    return {type_name for type_name, found in weights.items() if len(found) == 1}


def _site(
    model: nn.Module,
    cfg: ShareConfig,
    type_name: str,
    layer: int | None,
    readers: list[str],
) -> Site:
    names = [reader.rpartition(".")[0] for reader in readers]
    modules = {name: model.get_submodule(name) for name in names}
    calls = tuple(name for name in names if is_linear(modules[name]))
    lookups = tuple(name for name in names if name not in calls)
    if calls:
        weight_OI, bias = weight_and_bias(modules[calls[0]])
    else:
        weight_OI, bias = modules[names[0]].get_parameter("weight"), None
    out_features, in_features = weight_OI.shape
    spec = cfg.weight_types[type_name]
    slices = slices_of_rows(names[0], out_features, spec, type_name, model)
    if lookups:
        slices = (SliceSpec(name=_owner_of_rows(names, modules), start=0, stop=out_features),)
    return Site(
        name=names[0],
        calls=calls,
        type=type_name,
        layer=layer,
        in_features=in_features,
        out_features=out_features,
        bias=bias is not None,
        slices=slices,
        lookups=lookups,
    )


def _owner_of_rows(names: Sequence[str], modules: Mapping[str, nn.Module]) -> str:
    """The name of the rows of an embedding: its own, unless the module holds more than its weight
    (Gemma's has a scale)."""
    module = modules[names[0]]
    more = len(module._parameters) + len(module._buffers) > 1 and not is_linear(module)
    return f"{names[0]}.rows" if more else names[0]


def _parameter_sites(
    model: nn.Module,
    cfg: ShareConfig,
    block: Pattern | None,
    name: str,
    type_name: str,
    owners: Mapping[int, list[str]],
) -> list[tuple[Site | str, Site | str]] | Skipped:
    """The sites of a parameter that a model multiplies by itself: one for a matrix, one for each
    matrix of a stack ``(experts, out, in)``, and what each is where the rows are columns. That it
    is used as a linear, and which of the two it is, the graph has to show."""
    owner, _, field = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = getattr(module, field)
    if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
        reason = f"belongs to a {type(module).__name__}, which looks up or convolves"
        if isinstance(module, nn.Embedding):
            reason += "; match the module, with `embedding: true`"
        return Skipped(name=name, type=type_name, reason=reason)
    if not parameter.is_floating_point() or type(parameter.data) is not Tensor:
        reason = f"is a {type(parameter.data).__name__} of {parameter.dtype}, not floating-point"
        return Skipped(name=name, type=type_name, reason=reason)
    if len(owners[id(parameter)]) > 1:
        reason = f"is tied to {next(n for n in owners[id(parameter)] if n != name)!r}"
        return Skipped(name=name, type=type_name, reason=reason)
    columns = parameter.ndim == 3 and stores_columns(model, module, field)
    linear = owner if field == "weight" and owner else name
    names = [linear] if parameter.ndim == 2 else [f"{name}.{e}" for e in range(len(parameter))]
    made = [
        _parameter_site(
            model,
            cfg.weight_types[type_name],
            Site(
                name=one,
                calls=(one,),
                type=type_name,
                layer=_layer(cfg, block, name, type_name),
                in_features=parameter.shape[-1],
                out_features=parameter.shape[-2],
                bias=stored_bias(module, field) is not None,
                slices=(),
            ),
            None if parameter.ndim == 2 else number,
        )
        for number, one in enumerate(names)
    ]
    return [both[::-1] if columns else both for both in made]


def _parameter_site(
    model: nn.Module, spec: WeightType, plain: Site, number: int | None
) -> tuple[Site | str, Site | str]:
    """A site as it is where its parameter is stored ``(out, in)``, and where ``(in, out)``."""
    rows, columns = plain.out_features, plain.in_features
    found: list[Site | str] = []
    for transposed, (outputs, inputs) in enumerate(((rows, columns), (columns, rows))):
        try:
            slices = slices_of_rows(plain.name, outputs, spec, plain.type, model)
        except MatchError as error:
            found.append(str(error))
            continue
        if number is not None:
            # an expert's number is what tells slices of one layer apart, as a head's is elsewhere
            slices = tuple(s.model_copy(update={"head": number}) for s in slices)
        update = {
            "in_features": inputs,
            "out_features": outputs,
            "slices": slices,
            "transposed": bool(transposed),
        }
        found.append(plain.model_copy(update=update))
    return found[0], found[1]


def _layer(
    cfg: ShareConfig, block: Pattern | None, name: str, type_name: str, *, alone: bool = False
) -> int | None:
    """The layer number in a name; None where there need not be one, as of a weight ``alone`` in its
    type, which has nothing to share with in any layer."""
    if block is None:
        if cfg.mode == "sharing" and not alone and cfg.group_size_of(type_name) > 1:
            raise MatchError(
                "sharing across layers needs block_pattern, a regular expression whose group 1 is "
                f"the layer number in names like {name!r}, for example 'h\\.(\\d+)'"
            )
        return None
    found = block.search(name)
    if found is not None and found.group(1) is not None and found.group(1).isdecimal():
        return int(found.group(1))
    if alone or (cfg.mode == "sharing" and cfg.group_size_of(type_name) == 1):
        return None
    number = re.search(r"(?:^|\.)([A-Za-z_]\w*)\.\d+\.", name)
    hint = f"; for this name try '{number.group(1)}\\.(\\d+)'" if number else ""
    raise MatchError(
        f"block_pattern {cfg.block_pattern!r} finds no layer number in module {name!r} of weight "
        f"type {type_name!r}{hint}"
    )
