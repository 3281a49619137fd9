"""Which weights a configuration means, and how their rows are split.

A site is a *parameter*, not a module: modules that share one weight are one site, since rewriting
one of them alone would store the weight twice.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxshare.config import ShareConfig, WeightType
from fxshare.errors import MatchError
from fxshare.plans import Site, Skipped, SliceSpec
from fxshare.sites import site_tensors, stored_bias
from passes import is_embedding, is_linear, lookup_refusal, weight_and_bias
from passes.graph import is_conv1d

_HEADS = ("num_attention_heads", "n_head", "num_heads")
_KV_HEADS = ("num_key_value_heads", "n_kv_head", "num_kv_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True)
class Matching:
    """The sites of a model under a configuration, and the matched modules left alone."""

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    parameters: frozenset[str] = frozenset()
    """The sites that are bare parameters: only a graph tells whether they are used as linears."""


def match(model: nn.Module, cfg: ShareConfig) -> Matching:
    """Find the sites; ``re.match`` of each pattern on the qualified module names.

    Raises :class:`MatchError` for a pattern that matches no linear (with the nearest names), a
    module matched by two types, a layer number that cannot be found, heads that do not divide.
    """
    _refuse_quantised(model)
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    types = _types(modules, cfg)
    owners = _owners(model)
    alone = _alone(types, modules)
    sites: list[Site] = []
    skipped: list[Skipped] = []
    done: set[int] = set()
    for name, type_name in types.items():
        module = modules[name]
        looked_up = cfg.weight_types[type_name].embedding
        reason = _not_rewritable(module, looked_up=looked_up)
        if reason is None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            if id(weight) in done:
                continue
            readers = owners[id(weight)]
            reason = _tie_refusal(readers, modules, looked_up=looked_up)
        if reason is not None:
            skipped.append(Skipped(name=name, type=type_name, reason=reason))
            continue
        done.add(id(weight))
        layer = _layer(cfg, name, type_name, alone=type_name in alone)
        sites.append(_site(model, cfg, type_name, layer, readers))
    parameters: set[str] = set()
    for name, type_name in _parameter_types(model, modules, cfg).items():
        found = _parameter_sites(model, cfg, name, type_name, owners)
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            sites.extend(found)
            parameters.update(site.name for site in found)
    _every_type_has_sites(cfg, sites, skipped, modules)
    return Matching(tuple(sites), tuple(skipped), frozenset(parameters))


def _refuse_quantised(model: nn.Module) -> None:
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    method = method or getattr(found, "quant_method", type(found).__name__)
    raise MatchError(
        f"{type(model).__name__} is quantised ({getattr(method, 'value', method)}): its weights "
        "are integers with scales, which cannot be factorised. Load the original in floating "
        "point, compile that, and quantise the result (torchao does it)"
    )


def _types(modules: Mapping[str, nn.Module], cfg: ShareConfig) -> dict[str, str]:
    """The weight type of every matched module that is a linear, or would be one."""
    found: dict[str, str] = {}
    for name, module in modules.items():
        matching = [t for t, spec in cfg.weight_types.items() if re.match(spec.pattern, name)]
        if not matching or not _holds_weight(module):
            continue
        if len(matching) > 1:
            raise MatchError(
                f"module {name!r} is matched by two weight types, {matching[0]!r} "
                f"({cfg.weight_types[matching[0]].pattern}) and {matching[1]!r} "
                f"({cfg.weight_types[matching[1]].pattern}); make the patterns disjoint"
            )
        found[name] = matching[0]
    return found


def _parameter_types(
    model: nn.Module, modules: Mapping[str, nn.Module], cfg: ShareConfig
) -> dict[str, str]:
    """The weight type of every matched parameter that is not the weight of a matched module."""
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, field = name.rpartition(".")
        module = modules.get(owner, model)
        if parameter.ndim not in (2, 3) or (field == "weight" and is_linear(module)):
            continue
        for type_name, spec in cfg.weight_types.items():
            # a pattern that matches the module as well means the module
            if re.match(spec.pattern, name) and not (owner and re.match(spec.pattern, owner)):
                if name in found:
                    raise MatchError(
                        f"parameter {name!r} is matched by two weight types, {found[name]!r} and "
                        f"{type_name!r}; make the patterns disjoint"
                    )
                found[name] = type_name
    return found


def _holds_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)


def _not_rewritable(module: nn.Module, *, looked_up: bool) -> str | None:
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        return "its weight is computed (torch.nn.utils.parametrize); remove the parametrization"
    if is_embedding(module):
        if not looked_up:
            return f"is a {kind}, whose rows are looked up; say `embedding: true` to factorise it"
        reason = lookup_refusal(module)
        if reason is not None:
            return reason
    elif not is_linear(module):
        return f"is a {kind}, not an nn.Linear or Conv1D"
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is not a parameter (weight norm or pruning computes it); make it one"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "has forward hooks or a forward of its own, which rewriting would drop"
    weight = module.weight
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}: quantised weights cannot be factorised"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}; only plain tensors are rewritten"
    return None


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


def _tie_refusal(
    readers: list[str], modules: Mapping[str, nn.Module], *, looked_up: bool
) -> str | None:
    """Why the readers of one weight cannot be rewritten together; None where they can."""
    owners = {reader: modules.get(reader.rpartition(".")[0]) for reader in readers}
    linears = {r: m for r, m in owners.items() if m is not None and is_linear(m)}
    first = next(iter(linears.values()), None)
    for reader, other in owners.items():
        if not reader.endswith("weight") or other is None or not _holds_weight(other):
            return f"its weight is tied to {reader!r}: rewriting it would store the weight twice"
        if reader in linears:
            assert first is not None
            if type(other) is not type(first):
                return f"its weight is tied to {reader!r}, which reads it another way"
            if weight_and_bias(other)[1] is not first.bias:
                return f"its weight is tied to {reader!r}, which has another bias"
            continue
        why = lookup_refusal(other) if is_embedding(other) else f"is a {type(other).__name__}"
        if why is None and not looked_up:
            why = "looks its rows up; say `embedding: true` to rewrite both"
        if why is not None:
            return f"its weight is tied to {reader!r}, which {why}"
    embedding = next((r for r in owners if r not in linears), None)
    if embedding is not None and first is not None and is_conv1d(first):
        return f"its weight is tied to {embedding!r}, which reads it transposed"
    return None


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
    slices = _slices(names[0], out_features, spec, type_name, model)
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
    name: str,
    type_name: str,
    owners: Mapping[int, list[str]],
) -> list[Site] | Skipped:
    """The sites of a parameter that a model multiplies by itself: one for a matrix, one for each
    matrix of a stack ``(experts, out, in)``. That it is used as a linear, the graph has to show."""
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
    layer = _layer(cfg, name, type_name)
    spec = cfg.weight_types[type_name]
    transposed = parameter.ndim == 3 and getattr(module, "is_transposed", False) is True
    bias = stored_bias(module, field) is not None
    rows, columns = parameter.shape[-2:]
    if transposed:
        rows, columns = columns, rows
    linear = owner if field == "weight" and owner else name
    names = [linear] if parameter.ndim == 2 else [f"{name}.{e}" for e in range(len(parameter))]
    found = []
    for number, one in enumerate(names):
        slices = _slices(one, rows, spec, type_name, model)
        if parameter.ndim == 3:
            # an expert's number is what tells slices of one layer apart, as a head's is elsewhere
            slices = tuple(s.model_copy(update={"head": number}) for s in slices)
        found.append(
            Site(
                name=one,
                calls=(one,),
                type=type_name,
                layer=layer,
                in_features=columns,
                out_features=rows,
                bias=bias,
                slices=slices,
                transposed=transposed,
            )
        )
    return found


def _layer(cfg: ShareConfig, name: str, type_name: str, *, alone: bool = False) -> int | None:
    """The layer number in a name; None where there need not be one, as of a weight ``alone`` in its
    type, which has nothing to share with in any layer."""
    if cfg.block_pattern is None:
        if cfg.mode == "sharing" and not alone and cfg.group_size_of(type_name) > 1:
            raise MatchError(
                "sharing across layers needs block_pattern, a regular expression whose group 1 is "
                f"the layer number in names like {name!r}, for example 'h\\.(\\d+)'"
            )
        return None
    found = re.search(cfg.block_pattern, name)
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


def _from_config(model: nn.Module, names: tuple[str, ...]) -> int | None:
    config = getattr(model, "config", None)
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _slices(
    site: str, out_features: int, spec: WeightType, type_name: str, model: nn.Module
) -> tuple[SliceSpec, ...]:
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
    heads = spec.n_head or _from_config(model, _HEADS)
    kv_heads = spec.n_kv_head or (1 if _is_multi_query(model) else _from_config(model, _KV_HEADS))
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
    heads = _from_config(model, _HEADS)
    width = _from_config(model, ("head_dim",))
    hidden = _from_config(model, _WIDTHS)
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


def _every_type_has_sites(
    cfg: ShareConfig,
    sites: list[Site],
    skipped: list[Skipped],
    modules: Mapping[str, nn.Module],
) -> None:
    linears = [name for name, module in modules.items() if is_linear(module)]
    empty: dict[str, str] = {}
    for type_name, spec in cfg.weight_types.items():
        if any(site.type == type_name for site in sites):
            continue
        refused = [s for s in skipped if s.type == type_name]
        if refused:
            raise MatchError(
                f"weight type {type_name!r}: pattern {spec.pattern!r} matches {len(refused)} "
                f"modules and none can be rewritten; {refused[0].name!r} {refused[0].reason}"
            )
        empty[type_name] = spec.pattern
    if not empty:
        return
    listed = "; ".join(
        f"weight type {t!r}: pattern {p!r} matches no module" for t, p in empty.items()
    )
    family = ""
    if len(empty) == len(cfg.weight_types):
        family = "; the configuration seems to be for another family of models"
    raise MatchError(
        f"{listed} (re.match on the qualified name, from its start); "
        f"{_nearest(next(iter(empty.values())), linears)}{family}; 'fxshare init MODEL -o "
        "cfg.yaml' writes a configuration for a model"
    )


def _nearest(pattern: str, linears: list[str]) -> str:
    if not linears:
        return "the model has no linear modules"
    plain = re.sub(r"\\d\+?|[\\^$.*+?()\[\]{}|]", "", pattern)
    scored = difflib.get_close_matches(plain, linears, n=3, cutoff=0.0)
    return f"the nearest linear modules are {', '.join(map(repr, scored))}"


def dense_weights(model: nn.Module, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """The weight ``(out, in)`` of every site, as views of the model's own tensors."""
    found = {}
    for site in sites:
        weight_OI = site_tensors(model, site)[0].detach()
        if weight_OI.device.type != "meta" and not bool(torch.isfinite(weight_OI).all()):
            raise MatchError(f"the weight of {site.name!r} has values that are not finite")
        found[site.name] = weight_OI
    return found
