"""A planning problem in a work folder: planned again without the model, its data or its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from torch import nn

from fxshare.base.files import write_text
from fxshare.base.fingerprints import of_json
from fxshare.base.processes import here
from fxshare.calibration.statistics import Statistics
from fxshare.capture import dtype_of
from fxshare.config import ShareConfig
from fxshare.errors import ConfigError, PlanError, StoreError
from fxshare.factors.entries import (
    entry_of,
    options_key,
    priced_exactly,
    read_tails,
    spectra_name,
)
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.units import Order, stored_order
from fxshare.planning.options import bytes_of
from fxshare.planning.work import Work
from fxshare.sites.attention import Attention
from fxshare.sites.head_groups import HeadGroups
from fxshare.sites.mlps import Mlp
from fxshare.sites.scores import Scores
from fxshare.sites.site import Frozen, Site, Skipped
from passes.graph.scores import Rotary

_FILE = "problem.json"


class Stored(Frozen):
    """What a plan is made from beside the spectra."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    inputs: dict[str, str]
    """What each slice reads; equal for those that read one activation."""
    config: ShareConfig
    """Of the run that wrote it."""
    mlps: tuple[tuple[tuple[str, ...], str], ...] = ()
    """Producers and consumer of every MLP, by the names of their sites."""
    alternating: tuple[str, ...] = ()
    """The producers whose rows of one unit are neighbours."""
    attentions: tuple[tuple[tuple[str, ...], str, int], ...] = ()
    """Slices of the values, consumer and width of the heads of every attention."""
    head_groups: tuple[
        tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], str, int, int], ...
    ] = ()
    """Slices of queries, keys and values, consumer, and how many heads queries, and keys, have."""
    scores: tuple[tuple[tuple[str, ...], tuple[str, ...], int, Rotary, int], ...] = ()
    """Slices of the queries and of the keys of every attention, the width of its heads, and what of
    it is turned."""
    element_size: int
    """Bytes of a number."""
    whole_bytes: int
    """Of every parameter and buffer of the model."""
    loss_name: str
    tokens: int

    @staticmethod
    def of(
        model: nn.Module,
        sites: Sequence[Site],
        skipped: Sequence[Skipped],
        slices: Mapping[str, SliceStatistics],
        statistics: Statistics,
        cfg: ShareConfig,
        parts: Sequence[Mlp | Attention | HeadGroups | Scores] = (),
    ) -> Stored:
        """The problem of a model and its statistics."""
        return Stored(
            sites=tuple(sites),
            skipped=tuple(skipped),
            inputs={name: repr(one.input) for name, one in slices.items()},
            config=cfg,
            mlps=tuple(
                (tuple(x.name for x in one.producers), one.consumer.name)
                for one in parts
                if isinstance(one, Mlp)
            ),
            alternating=tuple(
                name for one in parts if isinstance(one, Mlp) for name in one.alternating
            ),
            attentions=tuple(
                (tuple(s.name for _, s in one.values), one.consumer.name, one.width)
                for one in parts
                if isinstance(one, Attention)
            ),
            head_groups=tuple(
                (one.slices, one.consumer.name, one.heads, one.kv_heads)
                for one in parts
                if isinstance(one, HeadGroups)
            ),
            scores=tuple(
                (
                    tuple(s.name for _, s in one.queries),
                    tuple(s.name for _, s in one.keys),
                    one.width,
                    one.rotary,
                    one.rotated,
                )
                for one in parts
                if isinstance(one, Scores)
            ),
            element_size=dtype_of(model).itemsize,
            whole_bytes=bytes_of(model),
            loss_name=statistics.loss,
            tokens=statistics.tokens,
        )


def parts_in(stored: Stored) -> tuple[Mlp | Attention | HeadGroups | Scores, ...]:
    """The MLPs, attention calls, their heads, queries and keys of a stored problem."""
    known = {site.name: site for site in stored.sites}
    slices = {s.name: (site, s) for site in stored.sites for s in site.slices}
    found: list[Mlp | Attention | HeadGroups | Scores] = []
    for some, last in stored.mlps:
        if all(name in known for name in (*some, last)):
            turns = tuple(n for n in some if n in stored.alternating)
            found.append(Mlp(tuple(known[n] for n in some), known[last], turns))
    for values, last, width in stored.attentions:
        if last in known and all(name in slices for name in values) and width > 0:
            found.append(Attention(tuple(slices[n] for n in values), known[last], width))
    for names, last, heads, kv_heads in stored.head_groups:
        if last in known and all(n in slices for own in names for n in own) and kv_heads > 0:
            q, k, v = (tuple(slices[name] for name in own) for own in names)
            found.append(HeadGroups(q, k, v, known[last], heads, kv_heads))
    for queries, keys, width, rotary, rotated in stored.scores:
        if queries and keys and all(n in slices for n in (*queries, *keys)) and width > 0:
            own = tuple(slices[n] for n in queries), tuple(slices[n] for n in keys)
            found.append(Scores(*own, width, rotary, rotated))
    return tuple(found)


def write_problem(work: Work | None, make: Callable[[], Stored]) -> None:
    """Write the problem into a work folder that has none that is sound; of several processes the
    first."""
    if work is None or not here().is_first:
        return
    try:
        read_problem(work.path)
    except StoreError:
        problem = json.loads(make().model_dump_json())
        content = {"sha256": of_json(problem), "problem": problem}
        write_text(work.path / _FILE, json.dumps(content, indent=1) + "\n")


def read_problem(folder: Path) -> Stored:
    """The problem of a work folder. Raises :class:`StoreError` where it has none that is sound."""
    file = folder / _FILE
    if not file.exists():
        raise StoreError(
            f"{folder} has no {_FILE}: it is no work folder, or its first calibration did not end; "
            "plan once with MODEL and --calibration"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        problem, told = content["problem"], content["sha256"]
        if of_json(problem) != told:
            raise ValueError("it is not what was written (its hash differs)")
        return Stored.model_validate(problem)
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise StoreError(
            f"{file} cannot be read: {first}; plan once with MODEL and --calibration, which writes "
            "it again"
        ) from error


@dataclass(frozen=True)
class StoredSpectra:
    """The losses of groups that an earlier run has priced, on the statistics of the dense model.

    Raises :class:`PlanError` for a group that it has not.
    """

    folder: Path
    options: str

    @staticmethod
    def of(folder: Path, cfg: ShareConfig) -> StoredSpectra:
        """Those that a search under this configuration asks for."""
        planner = cfg.planner
        floor = cfg.calibration.relative_floor
        spectra = folder / "spectra"
        name = spectra_name(0, True, planner.bias, priced_exactly(spectra))
        return StoredSpectra(spectra, options_key(name, floor, planner.sketch))

    def tails(self, part: frozenset[str]) -> NDArray[np.float64]:
        """The loss of a group at every rank from 0."""
        names = tuple(sorted(part))
        found = read_tails(self.folder, entry_of(self.options, names))
        if found is None:
            raise PlanError(
                f"the group of {names[0]!r}{f' and {len(names) - 1} others' if names[1:] else ''} "
                f"was not priced in {self.folder.parent}: give MODEL and --calibration as well, so "
                "that it can be (the same as then)"
            )
        return found

    def order(self, kind: str, names: tuple[str, ...]) -> Order:
        """The hidden units that these slices read, by what they are worth to a kind."""
        found = stored_order(self.folder, self.options, kind, names)
        if found is None:
            raise PlanError(
                f"the hidden units that {names[0]!r} reads were not priced in "
                f"{self.folder.parent}: give MODEL and --calibration as well, so that they can be "
                "(the same as then)"
            )
        return found


__all__ = ["Stored", "StoredSpectra", "read_problem", "write_problem"]
