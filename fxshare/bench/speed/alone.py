"""The linears of one weight type by themselves: what of a model's time is theirs, and how much of a
layout's gain the rest of the model hides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.bench.speed.codes import rounded_as
from fxshare.bench.speed.steps import StepCall, nothing
from fxshare.bench.speed.subject import Subject
from fxshare.bench.speed.units import carried_out
from fxshare.capture import device_of, dtype_of
from fxshare.compiling.compile import compile as compile_model
from fxshare.errors import ConfigError
from fxshare.plans.plan import Plan
from fxshare.result.module import record_of
from passes.graph.graph import common_parent, put_module


class Alone(nn.Module):
    """Linears under the names that they have in a model, each with an input of its own."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = tuple(linears)
        for name, linear in linears.items():
            put_module(self, name, linear)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Map (1, T, I) to (1, T, O), each linear an input of its own: of one that all read, their
        products would be reused and put together."""
        each = zip(self.names, inputs, strict=True)
        return tuple(self.get_submodule(name)(x) for name, x in each)


def alone(subject: Subject) -> Iterator[Subject]:
    """A subject for each weight type of the plan: all its linears, with the factors' sizes. Of
    hidden units that went the MLPs are measured, activation included.

    Linears that are called more than once, or stored as a parameter of another kind of module, are
    left out with their type. Raises :class:`ConfigError` where no type is left.
    """
    made = 0
    modules = dict(subject.dense.named_modules())
    for kind in dict.fromkeys(one.type for one in subject.plan.units):
        made += 1
        yield _of_mlps(subject, kind, modules)
    torn = {name for one in subject.plan.units for name in one.sites}
    others = [site for site in subject.plan.sites if site.name not in torn]
    for kind in dict.fromkeys(site.type for site in others):
        sites = [site for site in others if site.type == kind]
        if any(len(s.calls) != 1 or s.transposed or s.calls[0] not in modules for s in sites):
            continue
        made += 1
        yield _of(subject, kind, {s.calls[0]: modules[s.calls[0]] for s in sites})
    if not made:
        raise ConfigError(f"--by-type: {subject.name} has no weight type whose linears stand alone")


def _of(subject: Subject, kind: str, linears: Mapping[str, nn.Module]) -> Subject:
    record = record_of(subject.compiled)
    types = record.config.model_dump(include={"weight_types", "block_pattern"})
    types["weight_types"] = {kind: types["weight_types"][kind]}
    dense = Alone(linears).eval()
    plan = _part(subject.plan, kind)
    example = {"inputs": _inputs(plan, 4, dense, seed=0)}
    if plan.mode == "planned":  # which is carried out on statistics
        compiled = rounded_as(dense, types, plan, example)
    else:
        compiled = compile_model(dense, types, plan=plan, example=example)
    return Subject(
        name=kind,
        dense=dense,
        compiled=compiled,
        make_exact=partial(compile_model, dense, types, example=example),
        plan=plan,
        vocabulary=0,
        context=None,
        kv_cache=False,
    )


def _of_mlps(subject: Subject, kind: str, modules: Mapping[str, nn.Module]) -> Subject:
    """The MLPs of all entries of a type, each the module that its linears are in."""
    entries = tuple(one for one in subject.plan.units if one.type == kind)
    sites = {site.name: site for site in subject.plan.sites}
    owners = {common_parent(one.sites): sites[one.producers[0]].in_features for one in entries}
    if not owners.keys() <= modules.keys() - {""}:
        raise ConfigError(
            f"--by-type: the MLPs of {subject.name} are in no modules of their own, found "
            f"{list(owners)[:3]}; leave it out"
        )
    record = record_of(subject.compiled)
    types = record.config.model_dump(include={"weight_types", "block_pattern"})
    own = {name for one in entries for name in one.sites}
    kinds = {sites[name].type for name in own}
    types["weight_types"] = {n: x for n, x in types["weight_types"].items() if n in kinds}
    dense = Alone({name: modules[name] for name in owners}).eval()
    found = tuple(site for site in subject.plan.sites if site.name in own)
    update = {"sites": found, "groups": (), "rounded": (), "units": entries, "skipped": ()}
    plan = subject.plan.model_copy(update={**update, "outlook": None})
    example = {"inputs": _inputs(plan, 4, dense, seed=0)}
    return Subject(
        name=kind,
        dense=dense,
        compiled=carried_out(dense, types, plan, example),
        make_exact=partial(compile_model, dense, types, example=example),
        plan=plan,
        vocabulary=0,
        context=None,
        kv_cache=False,
    )


def _part(plan: Plan, kind: str) -> Plan:
    sites = tuple(site for site in plan.sites if site.type == kind)
    groups = tuple(group for group in plan.groups if group.type == kind)
    own = {s.name for site in sites for s in site.slices}
    found = [(one, tuple(name for name in one.slices if name in own)) for one in plan.rounded]
    rounded = tuple(one.model_copy(update={"slices": names}) for one, names in found if names)
    update = {"sites": sites, "groups": groups, "rounded": rounded, "units": (), "skipped": ()}
    return plan.model_copy(update={**update, "outlook": None})


def alone_steps(
    subject: Subject, models: Mapping[str, nn.Module], *, prefill: int, seed: int
) -> list[StepCall]:
    """A prompt and one token, as activations of these linears: standard normal."""
    device = device_of(subject.dense)
    found = []
    for name, tokens in (("prefill", prefill), ("decode", 1)):
        call: Mapping[str, Any] = {
            "inputs": _inputs(subject.plan, tokens, subject.dense, seed=seed)
        }
        calls = dict.fromkeys(models, call)
        after = dict.fromkeys(models, nothing)
        found.append(StepCall(name, tokens, device, calls, after, call))
    return found


def _inputs(plan: Plan, tokens: int, like: nn.Module, *, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    device, dtype = device_of(like), dtype_of(like)
    sites = {site.name: site for site in plan.sites}
    read = [one.producers[0] for one in plan.units] or list(sites)
    return tuple(
        torch.randn((1, tokens, sites[name].in_features), generator=generator).to(device, dtype)
        for name in read
    )
