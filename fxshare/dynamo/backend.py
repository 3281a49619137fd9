"""``torch.compile(model, backend=fxshare.backend(gm))``: the model's object, gm's factors.

Dynamo hands over graphs whose parameters are inputs. Linears over weights of the compiled model's
sites become modules, and the same passes that made ``gm`` rewrite them; the rest of the graph, and
the signature, stay as dynamo made them for the inner backend.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshare.base.numerics import beyond_rounding, relative_error
from fxshare.dynamo.linears import DynamoLinear, keep_sources, linears_of, parameters_of
from fxshare.errors import GuardError, MatchError
from fxshare.factors.empty import selected
from fxshare.plans.heads import Heads
from fxshare.plans.keys import Keys
from fxshare.plans.plan import Group, Plan
from fxshare.plans.storage import PIVOTED
from fxshare.plans.units import Units
from fxshare.plans.whole_heads import WholeHeads
from fxshare.result.module import record_of
from fxshare.result.products import site_bias, slice_product, slices_of
from fxshare.sites.attention import attentions
from fxshare.sites.head_groups import head_groups
from fxshare.sites.mlps import mlps
from fxshare.sites.scores import all_scores
from fxshare.sites.site import Site
from passes import (
    DroppedHeads,
    NarrowedHeads,
    NarrowedKeys,
    PivotedGroup,
    Rows,
    SharedGroup,
    SplitSite,
    default_passes,
    new_linear,
    put_module,
    run,
    weight_and_bias,
)
from passes.errors import FxShareError
from passes.graph.slices import basis_matrix, rows_of
from passes.pipeline import Narrower

Inner = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def backend(compiled: nn.Module, *, inner: str | Inner = "inductor", check: bool = True) -> Backend:
    """A backend for :func:`torch.compile` that runs a model with the factors of ``compiled``.

    ::

        gm = fxshare.compile(model, cfg, calibration=batches)
        fast = torch.compile(model, backend=fxshare.backend(gm))

    For inference: the factors are those that ``compiled`` has when torch.compile calls the backend,
    and they get no gradients. Train ``compiled`` itself.

    Parameters
    ----------
    compiled
        What :func:`fxshare.compile` or :func:`fxshare.load` made from this model.
    inner
        What compiles the rewritten graph: the name of a backend, or a function of a graph module
        and its inputs.
    check
        Hold every weight of the model to the error that was recorded when it was factorised, so
        that another checkpoint is an error. Switch it off where ``compiled`` was trained since.

    Raises
    ------
    FxShareError
        ``compiled`` was not made by fxshare, or there is no such inner backend. While torch.compile
        runs, torch wraps errors in its ``BackendCompilerFailed``, with ours inside: a graph whose
        linears are none of ``compiled``'s sites, or that reads what is compressed as a bare
        parameter, such as a stack of experts (:class:`MatchError`), another dtype or device.
    """
    if isinstance(compiled, Plan):
        raise FxShareError(
            "a Plan has no factors to compute with: give fxshare.backend what "
            "fxshare.compile(model, cfg, plan=plan, calibration=...) returns"
        )
    if not isinstance(compiled, nn.Module):
        raise FxShareError(
            f"expected a compiled module, found {type(compiled).__name__}; compile the model with "
            "fxshare.compile, or load a folder with fxshare.load, first"
        )
    compiled = getattr(compiled, "_orig_mod", compiled)
    sites = record_of(compiled).plan.sites
    looked_up = next((site.lookups[0] for site in sites if site.lookups), None)
    if looked_up is not None:
        raise FxShareError(
            f"fxshare.backend rewrites linears, and this plan has the rows that {looked_up!r} "
            "looks up: run the compiled module itself, torch.compile(gm), or leave the embedding "
            "out"
        )
    return Backend(compiled, _inner(inner), check)


def _inner(inner: str | Inner) -> Inner:
    if not isinstance(inner, str):
        return inner
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        found: Inner = lookup_backend(inner)  # type: ignore[assignment]
    except InvalidBackend:
        known = ", ".join(torch.compiler.list_backends())
        raise FxShareError(
            f"inner: torch has no backend {inner!r}; it has {known}, and takes a function too"
        ) from None
    return found


class Backend:
    """What :func:`backend` returns. ``rewritten`` collects the names of the sites that were found
    in the graphs so far."""

    def __init__(self, compiled: nn.Module, inner: Inner, check: bool) -> None:
        self.compiled = compiled
        self.inner = inner
        self.check = check
        self.rewritten: set[str] = set()
        self.__name__ = "fxshare"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Rewrite one of dynamo's graphs and hand it on."""
        linears = linears_of(gm, example_inputs)
        sites = self._sites(linears)
        self._check_parameters(gm, example_inputs)
        if linears and not sites:
            seen = ", ".join(sorted({repr(one.name) for one in linears})[:4])
            names = ", ".join(repr(s.name) for s in record_of(self.compiled).plan.sites[:4])
            raise MatchError(
                f"no linear of the graph is a site of the compiled model: the graph reads the "
                f"weights of {seen}, the sites are {names}; compile this very model with "
                "fxshare.compile and give that to fxshare.backend"
            )
        if not sites:
            return self.inner(gm, example_inputs)
        return _held(self.inner(self._rewritten(gm, sites), example_inputs), sites, example_inputs)

    def _check_parameters(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        """Refuse a graph that reads what is compressed as a parameter that is no linear's weight:
        it would stay dense."""
        plan = record_of(self.compiled).plan
        inside = [x for x in plan.sites if any(s.name in plan.rewritten for s in x.slices)]
        for name, numbers in parameters_of(gm, example_inputs):
            if any(f".{name}." in f".{x.name}." and not numbers % x.weights for x in inside):
                raise MatchError(
                    f"fxshare.backend rewrites linears, and {name!r}, of which parts are "
                    "compressed, is a parameter that the model multiplies by itself: run the "
                    "compiled module, torch.compile(gm)"
                )

    def _sites(self, linears: Sequence[DynamoLinear]) -> dict[Site, list[DynamoLinear]]:
        found: dict[Site, list[DynamoLinear]] = {}
        for linear in linears:
            site = self._site(linear)
            if site is not None:
                found.setdefault(site, []).append(linear)
        return found

    def _site(self, linear: DynamoLinear) -> Site | None:
        """The site whose weight a linear reads. After a graph break names are relative to some
        inner module, and several sites may end alike: then the numbers decide."""
        shape = tuple(linear.weight_OI.shape)
        plan = record_of(self.compiled).plan
        alike = [
            site
            for site in plan.sites
            if shape == (site.out_features, site.in_features)
            and any(f".{name}".endswith(f".{linear.name}") for name in site.calls)
        ]
        if not alike:
            return None
        if len(alike) == 1 and not self.check:
            return alike[0]
        gaps = {site.name: self._gap(site, linear.weight_OI) for site in alike}
        site = min(alike, key=lambda one: gaps[one.name])
        dtype = linear.weight_OI.dtype
        # recorded in float64 over the numbers as they were stored; a later cast rounds once more
        limit = 64 * torch.finfo(dtype).eps
        if not gaps[site.name] <= limit:
            far = f"the relative error of a slice is off by {gaps[site.name]:.1e}"
            raise FxShareError(
                f"the weight of {linear.name!r} is not the one that {site.name!r} was made from: "
                f"{beyond_rounding(far, limit)}. Compile this model again, or give "
                "check=False if the compiled module was trained since"
            )
        return site

    def _gap(self, site: Site, weight_OI: Tensor) -> float:
        """The largest deviation of a slice's relative error from the recorded one."""
        recorded = record_of(self.compiled).slice_errors
        return max(
            abs(
                relative_error(weight_OI[s.start : s.stop], slice_product(self.compiled, s.name))
                - recorded.get(s.name, 0.0)
            )
            for s in site.slices
        )

    def _rewritten(
        self, gm: fx.GraphModule, sites: Mapping[Site, Sequence[DynamoLinear]]
    ) -> fx.GraphModule:
        record = record_of(self.compiled)
        for site, linears in sites.items():
            _same_kind(site, linears[0].weight_OI, self.compiled)
            put_module(gm, site.name, self._module(site, linears[0].weight_OI))
            for linear in linears:
                with gm.graph.inserting_before(linear.node):
                    call = gm.graph.call_module(site.name, (linear.input,))
                call.meta.update(linear.node.meta)
                linear.node.replace_all_uses_with(call)
                gm.graph.erase_node(linear.node)
        present = {s.name for site in sites for s in site.slices}
        groups, pivots = [], []
        for group in record.plan.groups:
            names = [name for name in group.slices if name in present]
            if names:
                shared, pivoted = self._factors(group, names)
                groups.append(shared)
                pivots += [pivoted] if pivoted is not None else []
        split = [
            SplitSite((site.name,), tuple(Rows(s.name, s.start, s.stop) for s in site.slices))
            for site in sites
        ]
        storing, fuse = PIVOTED.passes(pivots), record.config.fuse
        units = [one for one in record.plan.units if one.is_within(sites)]
        chosen = [self._units(one) for one in units if self._is_seen(gm, one, tuple(sites))]
        result, _ = run(gm, default_passes(split, groups, storing, fuse=fuse, units=chosen))
        keep_sources(gm, result)
        for parameter in result.parameters():
            parameter.requires_grad_(False)
        self.rewritten |= {site.name for site in sites}
        return result

    def _module(self, site: Site, weight_OI: Tensor) -> nn.Linear:
        """The site as one linear: the model's own memory, but for dense rows trained elsewhere."""
        places = slices_of(self.compiled)
        rows = []
        changed = False
        for s in site.slices:
            own = weight_OI[s.start : s.stop]
            place = places[s.name]
            if place.basis is None:
                stored, _ = weight_and_bias(self.compiled.get_submodule(place.module))
                kept = place.whole_weight(rows_of(self.compiled, place, stored.detach()))
                changed |= not torch.equal(kept, own)
                own = kept
            rows.append(own)
        weight = torch.cat(rows) if changed else weight_OI
        bias = site_bias(self.compiled, site)
        bias = None if bias is None else bias.detach()
        return new_linear(weight, bias, requires_grad=False, training=False)

    def _is_seen(self, gm: fx.GraphModule, one: Units, sites: Sequence[Site]) -> bool:
        """Whether the graph shows the MLP whose units go; else its weights have zeros instead."""
        called = [site.model_copy(update={"calls": (site.name,)}) for site in sites]
        if isinstance(one, Heads):
            heads = attentions(gm, called).of(one.consumer)
            return heads is not None and [s.name for _, s in heads.values] == list(one.values)
        if isinstance(one, Keys):
            found = all_scores(gm, called).of(one.queries)
            return found is not None and [s.name for _, s in found.keys] == list(one.keys)
        if isinstance(one, WholeHeads):
            groups = head_groups(gm, called).of(one.consumer)
            own = one.queries, one.keys, one.values
            return groups is not None and groups.slices == own
        mlp = mlps(gm, called).of(one.consumer)
        if mlp is None or set(mlp.alternating) != set(one.alternating):
            return False
        return {site.name for site in mlp.producers} == set(one.producers)

    def _units(self, one: Units) -> Narrower:
        """What stays, with the compiled module's weights."""
        if isinstance(one, Heads):
            return self._heads(one)
        if isinstance(one, Keys):
            return self._keys(one)
        if isinstance(one, WholeHeads):
            return self._whole_heads(one)
        places = slices_of(self.compiled)
        weights = {}
        kept = tuple(range(one.of))
        for name in (s.name for x in self._plan.sites if x.name == one.consumer for s in x.slices):
            place = places[name]
            weight, _ = weight_and_bias(self.compiled.get_submodule(place.module))
            weights[name] = rows_of(self.compiled, place, weight.detach())
            kept = kept if place.unit_columns is None else place.unit_columns.kept
        return selected(self._plan, one, kept, weights)

    def _whole_heads(self, one: WholeHeads) -> DroppedHeads:
        weights, biases = self._whole(one)
        units = slices_of(self.compiled)[one.queries[0]].unit_rows
        kept = tuple(range(one.of)) if units is None else units.kept
        queries, keys, values = (
            {name: weights.pop(name) for name in names}
            for names in (one.queries, one.keys, one.values)
        )
        return DroppedHeads(one.name, kept, one.of, queries, keys, values, weights, biases)

    def _whole(self, one: Heads | Keys | WholeHeads) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights and biases of the slices that an entry takes, as they are stored."""
        places = slices_of(self.compiled)
        weights, biases = {}, {}
        for name in one.slices_among(self._plan.sites):
            place = places[name]
            weight, bias = weight_and_bias(self.compiled.get_submodule(place.module))
            weights[name] = rows_of(self.compiled, place, weight.detach())
            if bias is not None:
                biases[name] = rows_of(self.compiled, place, bias.detach())
        return weights, biases

    def _heads(self, one: Heads) -> NarrowedHeads:
        weights, biases = self._whole(one)
        values = {name: weights.pop(name) for name in one.values}
        return NarrowedHeads(one.name, one.kept, one.of, values, weights, biases)

    def _keys(self, one: Keys) -> NarrowedKeys:
        weights, biases = self._whole(one)
        units = slices_of(self.compiled)[one.queries[0]].unit_rows
        kept = tuple(range(one.of)) if units is None else units.kept
        queries = {name: weights.pop(name) for name in one.queries}
        return NarrowedKeys(one.name, kept, one.of, queries, weights, biases)

    @property
    def _plan(self) -> Plan:
        return record_of(self.compiled).plan

    def _factors(
        self, group: Group, names: Sequence[str]
    ) -> tuple[SharedGroup, PivotedGroup | None]:
        places = slices_of(self.compiled)
        coefficients, biases = {}, {}
        for name in names:
            place = places[name]
            weight, bias = weight_and_bias(self.compiled.get_submodule(place.module))
            coefficients[name] = rows_of(self.compiled, place, weight.detach())
            if bias is not None:
                biases[name] = rows_of(self.compiled, place, bias.detach())
        pivoted = places[names[0]].pivoted
        basis_RI = basis_matrix(self.compiled, group.name, pivoted=pivoted).detach()
        shared = SharedGroup(group.name, basis_RI, coefficients, biases)
        if not pivoted:
            return shared, None
        owner = self.compiled.get_submodule(group.name)
        table_RT, _ = weight_and_bias(owner)
        assert isinstance(owner.kept, Tensor)
        return shared, PivotedGroup(group.name, owner.kept, table_RT.detach(), coefficients)


def _held(
    run: Callable[..., Any],
    sites: Mapping[Site, Sequence[DynamoLinear]],
    example_inputs: Sequence[Any],
) -> Callable[..., Any]:
    """``run``, refusing to run on other weights than those whose factors it has.

    To dynamo weights are inputs like any other: blocks of one class that it compiles apart (after a
    graph break), and models of one class, share a graph and call it with their own weights.
    """
    held = [
        (one.at, weakref.ref(example_inputs[one.at]), site.name)
        for site, linears in sites.items()
        for one in linears
    ]

    def call(*inputs: Any) -> Any:
        for at, weight, name in held:
            if inputs[at] is not weight():
                raise GuardError(
                    f"torch.compile runs the graph that has the factors of {name!r} on other "
                    "weights: it compiled the model in pieces, or several models with one backend. "
                    "Find the graph break with fullgraph=True, make a backend for each model and "
                    "call torch.compiler.reset() between them, or run the compiled module itself"
                )
        return run(*inputs)

    return call


def _same_kind(site: Site, weight_OI: Tensor, compiled: nn.Module) -> None:
    place = slices_of(compiled)[site.slices[0].name]
    own, _ = weight_and_bias(compiled.get_submodule(place.module))
    if (own.dtype, own.device) != (weight_OI.dtype, weight_OI.device):
        raise FxShareError(
            f"{site.name!r}: the model has {weight_OI.dtype} on {weight_OI.device}, the compiled "
            f"module {own.dtype} on {own.device}; move one of them with .to(...)"
        )
