"""Why a module or a parameter cannot be a site, and what was meant instead."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxshare.config import ShareConfig
from fxshare.errors import MatchError
from fxshare.models.computed import computed, placed_by_accelerate
from fxshare.models.quantised import quantisation_of, refusal_of_quantised
from fxshare.sites.site import Site, Skipped
from passes import is_embedding, is_linear, lookup_refusal, weight_and_bias
from passes.graph.graph import is_conv1d


def refuse_quantised(model: nn.Module) -> None:
    """Raise :class:`MatchError` where the weights of ``model`` are quantised."""
    method = quantisation_of(getattr(model, "config", None))
    if method is not None:
        raise MatchError(refusal_of_quantised(type(model).__name__, method))


def holds_weight(module: nn.Module) -> bool:
    """Whether a module has a tensor called ``weight``."""
    return isinstance(getattr(module, "weight", None), Tensor)


def not_rewritable(module: nn.Module, *, looked_up: bool) -> str | None:
    """Why a module that a pattern matches cannot be rewritten; None where it can."""
    kind = type(module).__name__
    reason = computed(module) or placed_by_accelerate(module)
    if reason is not None:
        return reason
    if is_embedding(module):
        if not looked_up:
            return f"is a {kind}, whose rows are looked up; say `embedding: true` to factorise it"
        reason = lookup_refusal(module)
        if reason is not None:
            return reason
    elif not is_linear(module):
        return f"is a {kind}, not an nn.Linear or Conv1D"
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is not a parameter (something computes it); make it one"
    if module._forward_hooks or module._forward_pre_hooks or _own_forward(module):
        return "has forward hooks or a forward of its own, which rewriting would drop"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks, which rewriting would drop"
    if any(has_hooks(p) for p in module.parameters()):
        return "has hooks on its weight or bias, which rewriting would drop"
    weight = module.weight
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}: quantised weights cannot be factorised"
    if isinstance(weight.data, FakeTensor):
        return (
            "its weight is a FakeTensor, which has no values; make the model outside of "
            "FakeTensorMode, or under torch.device('meta') for what needs none"
        )
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}; only plain tensors are rewritten"
    return None


def _own_forward(module: nn.Module) -> bool:
    """Whether a function was put in place of ``forward``; accelerate puts the class's own back."""
    own = vars(module).get("forward")
    if inspect.ismethod(own) and own.__self__ is module:
        return own.__func__ is not type(module).forward
    return own is not None


def has_hooks(parameter: Tensor) -> bool:
    """Whether something hangs on the gradient of a parameter."""
    after = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return bool(parameter._backward_hooks) or bool(after)


def tie_refusal(
    readers: list[str], modules: Mapping[str, nn.Module], *, looked_up: bool
) -> str | None:
    """Why the readers of one weight cannot be rewritten together; None where they can."""
    owners = {reader: modules.get(reader.rpartition(".")[0]) for reader in readers}
    linears = {r: m for r, m in owners.items() if m is not None and is_linear(m)}
    first = next(iter(linears.values()), None)
    for reader, other in owners.items():
        if not reader.endswith("weight") or other is None or not holds_weight(other):
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


def every_type_has_sites(
    cfg: ShareConfig,
    sites: list[Site],
    skipped: list[Skipped],
    modules: Mapping[str, nn.Module],
) -> None:
    """Raise :class:`MatchError` for weight types without a site, saying why they have none."""
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
    scored = difflib.get_close_matches(plain[:200], linears, n=3, cutoff=0.0)
    return f"the nearest linear modules are {', '.join(map(repr, scored))}"
