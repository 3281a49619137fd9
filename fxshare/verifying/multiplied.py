"""The original with every matched weight as the factors multiply out to, for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.base.filed import Filed
from fxshare.plans.plan import Plan
from fxshare.result.module import record_of
from fxshare.result.products import site_bias, slice_product
from fxshare.sites.site import Site
from fxshare.sites.tensors import substitute
from passes.graph.graph import is_conv1d, is_linear, structure_copy

LARGE = 1 << 26
"""Bytes of matched weights up to which all products are held at once."""
_MOST = 1 << 32
"""Bytes of a temporary file; products beyond are made anew for every call."""


class Products(Mapping[str, Tensor]):
    """The weight ``(out, in)`` of every site multiplied out, in float64, made when asked for.

    Where they are asked for ``again``, on a CPU, up to :data:`_MOST` bytes are made once and read
    from a temporary file, in float32 where the model is no finer: every call that is compared needs
    all of them, and making them is most of comparing.
    """

    def __init__(self, gm: nn.Module, plan: Plan, *, again: bool = False) -> None:
        self._gm = gm
        self._sites = {site.name: site for site in plan.sites}
        self._room = _MOST if again else 0
        self._file = Filed()
        self._made: dict[str, Callable[[], Tensor]] = {}
        self._is_double = any(p.dtype == torch.float64 for p in gm.parameters())

    def __getitem__(self, name: str) -> Tensor:
        if name in self._made:
            return self._made[name]()
        site = self._sites[name]
        made = torch.cat([slice_product(self._gm, s.name) for s in site.slices])
        size = made.numel() * (8 if self._is_double else 4)
        if made.device.type == "cpu" and size <= self._room:
            kept = made if self._is_double else made.float()
            read = self._file.keep(kept)
            if read is not None:
                self._room -= size
                self._made[name] = partial(read, len(kept))
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def is_large(model: nn.Module, plan: Plan) -> bool:
    """Whether the products of all sites together would be a burden on memory."""
    # half precision is compared in float32
    size = max(4, next((p.itemsize for p in model.parameters()), 4))
    return sum(site.out_features * site.in_features for site in plan.sites) * size > LARGE


def multiplied_out(
    model: nn.Module,
    gm: nn.Module,
    products: Mapping[str, Tensor] | None = None,
    *,
    by_call: bool = False,
) -> nn.Module:
    """A copy of ``model`` with the weights, and in planned mode the biases, that ``gm`` stands for;
    ``products`` where they are at hand.

    ``by_call`` makes each weight when its module is called and drops it after: memory of one
    weight, and time for every call. A weight that is read without a call stays the original's then.
    """
    record = record_of(gm)
    plan = record.plan
    copy = structure_copy(model)
    _put_others(copy, gm, record.other_shifts)
    biases: dict[str, Tensor] = {}
    if plan.mode == "planned" or record.bias_shifts:
        moved = ((site.name, site_bias(gm, site)) for site in plan.sites)
        biases = {name: bias for name, bias in moved if bias is not None}
    products = Products(gm, plan) if products is None else products
    if not by_call:
        substitute(copy, plan.sites, products, biases)
        return copy
    called = [site for site in plan.sites if _is_called(copy, site)]
    others = [site for site in plan.sites if site not in called]
    substitute(copy, others, products, biases)
    substitute(copy, called, {}, biases)
    for site in called:
        for name in site.calls:
            _make_when_called(copy.get_submodule(name), products, site)
    return copy


def _put_others(copy: nn.Module, gm: nn.Module, names: Iterable[str]) -> None:
    """Let the copy have the parameters of ``gm`` of these names, which refining has moved."""
    now = dict(gm.named_parameters(remove_duplicate=False))
    then = dict(copy.named_parameters(remove_duplicate=False))
    instead: dict[int, nn.Parameter] = {}
    for name in names:
        if name in now and name in then:  # where it is not, its shift is what differs
            new = now[name].detach().to(then[name].device, then[name].dtype)
            instead[id(then[name])] = nn.Parameter(new, requires_grad=False)
    for module in copy.modules() if instead else ():  # ties stay ties
        for leaf, old in module._parameters.items():
            module._parameters[leaf] = instead.get(id(old), old)


def _is_called(model: nn.Module, site: Site) -> bool:
    try:
        names = site.readers  # an embedding is not called with a weight to make first
        return all(is_linear(model.get_submodule(name)) for name in names)
    except AttributeError:
        return False


def _make_when_called(module: nn.Module, products: Mapping[str, Tensor], site: Site) -> None:
    original = module._parameters["weight"]
    assert original is not None

    def put(module: nn.Module, _: Sequence[Any]) -> None:
        new = products[site.name]
        stored = (new.t() if is_conv1d(module) else new).to(original).contiguous()
        module._parameters["weight"] = nn.Parameter(stored, requires_grad=False)

    def drop(module: nn.Module, *_: Any) -> None:
        module._parameters["weight"] = original

    module.register_forward_pre_hook(put)
    module.register_forward_hook(drop, always_call=True)


__all__ = ["Products", "is_large", "multiplied_out"]
