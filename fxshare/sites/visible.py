"""The sites as a captured graph shows them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from torch import fx, nn

from fxshare.capture import Captured
from fxshare.sites.match import Matching
from fxshare.sites.reached import Reached, reached
from fxshare.sites.site import Site, Skipped
from passes import (
    LinearCall,
    LookedUp,
    UnstackExperts,
    linear_calls,
    lookups,
    other_reader,
    other_readers,
    run,
    stacks,
    unstacked_as,
    used_nodes,
    weight_and_bias,
)

_UNSEEN = "is not called by this graph"
_UNUSED = "is called, and nothing depends on its result"
_NO_MODULE = (
    "is a parameter that the code of its module reads, which capture: modules keeps as it is: it "
    "stays dense. A graph shows its calls: give an example of the inputs (calibration data, or "
    "example=...) and capture: auto or fx"
)


def unstacked(captured: Captured, sites: Sequence[Site]) -> Captured:
    """The capture with a linear for each expert that is a site (:class:`passes.UnstackExperts`)."""
    wanted = {call.rpartition(".")[0] for site in sites for call in site.calls}
    parameters = tuple(name for name in stacks(captured.graph) if name in wanted)
    if not parameters:
        return captured
    graph, _ = run(captured.graph, [UnstackExperts(parameters=parameters)])
    return replace(captured, graph=graph)


@dataclass(frozen=True)
class Seen:
    """A capture with its experts apart (:func:`unstacked`), the sites that it shows, and what was
    matched and is none, with the reason."""

    captured: Captured
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]


def seen(captured: Captured, matching: Matching, batches: Iterable[object] = ()) -> Seen:
    """What of a matching can be rewritten: the one rule for everyone who asks, before anything is
    calibrated. A few ``batches`` are run where there is no graph that shows it."""
    captured = unstacked(captured, matching.sites)
    watched = None
    if captured.side_by_side:
        names = {name for site in matching.sites for name in site.calls}
        shown = tuple(call.name for call in linear_calls(captured.graph) if call.name in names)
        watched = reached(captured, batches, shown)
    return Seen(captured, *visible_sites(captured, matching, watched))


def visible_sites(
    captured: Captured, matching: Matching, watched: Reached | None = None
) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """The sites that the captured graph calls for their results, and that nothing reads otherwise;
    any other linear stays as it is. ``watched`` tells it of the modules of a graph that only shows
    them side by side."""
    gm = captured.graph
    called: dict[str, list[LinearCall]] = {}
    parts: dict[str, list[str]] = {}
    used = used_nodes(gm.graph)
    looked_up = {lookup.name for lookup in lookups(gm) if lookup.node in used}
    calls = linear_calls(gm)
    unused = {call.name for call in calls} - {call.name for call in calls if call.node in used}
    readers = other_readers(gm)
    for call in calls:
        if call.node not in used:
            continue
        called.setdefault(call.name, []).append(call)
        whole, cut, _ = call.name.partition(".rows_")
        if cut and call.name not in parts.setdefault(whole, []):
            parts[whole].append(call.name)
    sites, skipped = [], list(matching.skipped)
    for site in matching.sites:
        refusal = None if site.lookups else _refusal(site, called, unused, readers, watched)
        if refusal is not None:
            found: list[Site] | str = refusal
        elif site.lookups:
            found = _as_looked_up(gm, site, set(called), looked_up)
        else:
            other = matching.turned.get(site.name)
            found = _as_called(captured.model, site, called, parts, other, unstacked_as(gm))
        if found == _UNSEEN and captured.side_by_side and site.name in matching.parameters:
            found = _NO_MODULE
        if isinstance(found, str):
            skipped.append(Skipped(name=site.name, type=site.type, reason=found))
        else:
            sites.extend(found)
    return tuple(sites), tuple(skipped)


def _refusal(
    site: Site,
    called: Container[str],
    unused: Container[str],
    readers: Mapping[str, fx.Node],
    watched: Reached | None,
) -> str | None:
    """Why a site cannot be rewritten although something calls it, or why nothing does."""
    is_called = any(name in called for name in site.calls)
    tensors = [f"{name}{end}" for name in site.calls for end in ("", ".weight", ".bias")]
    stack = site.name.rpartition(".")[0]
    if not is_called and stack in readers and isinstance(site.slices[0].head, int):
        return f"its stack is not read as one linear for each matrix (node {readers[stack].name!r})"
    reader = next((readers[name] for name in tensors if name in readers), None)
    if reader is not None:
        beside = "beside its calls" if is_called else "and no node calls it"
        return f"node {reader.name!r} of this graph reads its weight itself, {beside}"
    if not is_called and any(name in unused for name in site.calls):
        return _UNUSED
    if watched is None or not is_called:
        return None
    refusals = [watched.refusal(name) for name in site.calls if name in called]
    return None if None in refusals else refusals[0]


def _as_called(
    model: nn.Module,
    site: Site,
    called: Mapping[str, Sequence[LinearCall]],
    parts: Mapping[str, Sequence[str]],
    other: Site | str | None,
    stored: Mapping[str, bool],
) -> list[Site] | str:
    """The site as the graph reads it: under other names, transposed, or in parts, each of which is
    a site of its own (cross attention reads q from one input, k and v from another). ``other`` is
    a parameter's site turned, ``stored`` says which stacks are."""
    if site.name in parts:
        if site.name in called:
            return "is read as a whole and in parts"
        found = [_part_of(site, name, called[name][0]) for name in parts[site.name]]
        missing = next((one for one in found if isinstance(one, str)), None)
        return missing or [one for one in found if isinstance(one, Site)]
    calls = tuple(name for name in site.calls if name in called)
    if not calls:
        return _UNSEEN
    if other is not None:
        call = called[calls[0]][0]
        transposed = stored.get(site.name.rpartition(".")[0], call.transposed)
        usual = site if transposed is site.transposed else other
        return usual if isinstance(usual, str) else _fitting(usual, call)
    refusal = _unlike(model, site, [call for name in calls for call in called[name]])
    if refusal is not None:
        return refusal
    if site.bias and all(call.bias_O is None for call in called[calls[0]]):
        site = site.model_copy(update={"bias": False})  # `x @ linear.weight.T` leaves it out
    return [site if calls == site.calls else _called_as(site, calls, calls)]


def _unlike(model: nn.Module, site: Site, calls: Sequence[LinearCall]) -> str | None:
    """Why the calls of a module's weight are not what the module does, or not one thing."""
    weight_OI, _ = weight_and_bias(model.get_submodule(site.name))
    for call in calls:
        found = call.weight_OI
        turned = found.stride() != weight_OI.stride() and found.t().stride() == weight_OI.stride()
        if found.shape != weight_OI.shape or turned:
            return f"node {call.node.name!r} multiplies by its weight the other way round"
    if len({call.bias_O is None for call in calls}) > 1:
        return "is multiplied by with its bias in one place and without in another"
    return None


def _as_looked_up(
    gm: fx.GraphModule, site: Site, called: AbstractSet[str], looked_up: AbstractSet[str]
) -> list[Site] | str:
    """The site with the readers that the graph has: torch.export has one name for all of them."""
    calls = tuple(name for name in site.readers if name in called)
    lookups = tuple(name for name in site.readers if name in looked_up)
    if not lookups:
        return (
            "no node of this graph looks its rows up (a model may read them another way; "
            "capture: modules leaves embeddings as they are)"
        )
    if not calls and site.calls:
        return f"is tied to {site.calls[0]!r}, which this graph does not call"
    odd = other_reader(gm, LookedUp(site.name, lookups, calls))
    if odd is not None:
        return f"is also read by node {odd.name!r}, which neither looks rows up nor multiplies"
    found = site.model_copy(update={"calls": calls, "lookups": lookups})
    if found.name not in found.readers:
        found = _called_as(found, found.readers, calls)
    return [found if calls else found.model_copy(update={"bias": False})]


def _part_of(site: Site, name: str, call: LinearCall) -> Site | str:
    start, stop = map(int, name.rpartition(".rows_")[2].split("_"))
    inside = [s for s in site.slices if start <= s.start and s.stop <= stop]
    if not inside or (inside[0].start, inside[-1].stop) != (start, stop):
        return f"is read in parts that its slices do not follow (rows {start}:{stop}); split it"
    update = {
        "name": name,
        "calls": (name,),
        "out_features": stop - start,
        "slices": tuple(
            s.model_copy(update={"start": s.start - start, "stop": s.stop - start}) for s in inside
        ),
    }
    part = site.model_copy(update=update)
    if call.transposed and len(inside) == 1:
        whole = part.slices[0].model_copy(update={"stop": site.in_features})
        update = {
            "in_features": part.out_features,
            "out_features": site.in_features,
            "slices": (whole,),
            "transposed": True,
        }
        part = part.model_copy(update=update)
    found = _fitting(part, call)
    return found if isinstance(found, str) else found[0]


def _fitting(site: Site, call: LinearCall) -> list[Site] | str:
    """A parameter's site with the bias that its call shows."""
    if tuple(call.weight_OI.shape) != (site.out_features, site.in_features):
        return f"is read as {tuple(call.weight_OI.shape)}, which its slices do not fit"
    if call.bias_O is not None and not site.bias:
        return "is called with a bias that does not go with it by its name"
    # another `bias` of the module may go with something else
    return [site.model_copy(update={"bias": call.bias_O is not None})]


def _called_as(site: Site, readers: tuple[str, ...], calls: tuple[str, ...]) -> Site:
    """The site under the names that the graph knows: torch.export keeps one of several for a tied
    weight."""
    name = site.name if site.name in readers else readers[0]
    slices = tuple(
        s.model_copy(update={"name": name + s.name.removeprefix(site.name)}) for s in site.slices
    )
    return site.model_copy(update={"name": name, "calls": calls, "slices": slices})
