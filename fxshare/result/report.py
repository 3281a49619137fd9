"""The report of a compilation: what was matched, shared, kept dense, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fxshare.base.names import as_label, as_module_path, as_type_names
from fxshare.plans.bits import matrix_bytes
from fxshare.plans.cost import Shape, flops
from fxshare.plans.plan import Group, Plan
from fxshare.plans.storage import PLAIN
from fxshare.plans.units import Units
from fxshare.sites.site import Site, Skipped

_BYTES = ("bytes_before", "bytes_after")
_LISTED = 4
"""So many weights that were left alone for one reason have a line each; more are one line."""
_ENDS = ("before", "after")


@dataclass(frozen=True)
class GroupReport:
    """One group, or in exact mode one site.

    ``flops_*`` are floating-point operations per token (a multiply-add counts 2), the basis
    product counted once per distinct input. ``weighted_error`` is ``Σ‖(W − C B) S‖² / Σ‖W S‖²``;
    None where nothing was factorised. ``refined`` is how far refining moved the weights that the
    group stands for, ``‖C' B' − C B‖ / ‖C B‖``; None where it was not refined. ``cache_bytes_*``
    are those that a key-value cache has for one token of what the group computes, where that is
    another number after; 0 elsewhere.
    """

    name: str
    type: str
    label: str
    layers: tuple[int, ...]
    slices: int
    in_features: int
    out_features: int
    rank: int | None
    storage: str
    numbers_before: int
    numbers_after: int
    bytes_before: int
    bytes_after: int
    flops_before: int
    flops_after: int
    weighted_error: float | None
    floored: int
    seconds: float
    refined: float | None = None
    bits: int | None = None
    """Of each stored number, where it has fewer than the model's dtype."""
    cache_bytes_before: int = 0
    cache_bytes_after: int = 0


@dataclass(frozen=True)
class Report:
    """Everything a user may ask about a compilation. ``str(report)`` is a table."""

    model: str
    mode: str
    front_end: str
    dtype: str
    groups: tuple[GroupReport, ...]
    sites: int
    skipped: tuple[Skipped, ...] = ()
    parameters_before: int = 0
    parameters_after: int = 0
    calibration: dict[str, Any] | None = None
    passes: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """What comes first: a large share of the weights that stays dense."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def numbers_before(self) -> int:
        """Weights of the matched linears, biases apart."""
        return sum(g.numbers_before for g in self.groups)

    @property
    def numbers_after(self) -> int:
        """Stored numbers of their replacement, biases apart."""
        return sum(g.numbers_after for g in self.groups)

    @property
    def params_kept(self) -> float:
        """Stored numbers after over weights before."""
        return self.numbers_after / max(self.numbers_before, 1)

    @property
    def bytes_kept(self) -> float:
        """Stored bytes after over the weights' bytes before."""
        after = sum(g.bytes_after for g in self.groups)
        return after / max(sum(g.bytes_before for g in self.groups), 1)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, totals included."""
        plain = asdict(self)
        plain["skipped"] = [s.model_dump() for s in self.skipped]
        totals = {
            "numbers_before": self.numbers_before,
            "numbers_after": self.numbers_after,
            "params_kept": self.params_kept,
        }
        return {**plain, "totals": totals}

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`; ``KeyError``, ``TypeError`` or ``ValueError`` where it is
        no such data."""
        values = {key: value for key, value in plain.items() if key != "totals"}
        values["groups"] = tuple(
            GroupReport(**{**group, "layers": tuple(group["layers"])}) for group in plain["groups"]
        )
        for group in plain["groups"]:
            as_module_path(group["name"])
            as_type_names(group["type"])
            as_label(group["label"])
        values["skipped"] = tuple(Skipped(**skipped) for skipped in plain["skipped"])
        values["warnings"] = tuple(plain.get("warnings", ()))
        return Report(**values | {key: tuple(plain[key]) for key in ("passes", "notes")})

    def to_json(self) -> str:
        """The report as a JSON document."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table."""
        header = ["group", "layers", "slices", "in→out", "rank", "numbers before", "after", "kept"]
        header += ["bytes after", "FLOPs/token before", "after", "weighted error", "s"]
        refined = any(g.refined is not None for g in self.groups)
        header += ["moved by refining"] if refined else []
        rows = [
            [
                g.name,
                _layers(g.layers),
                str(g.slices),
                f"{g.in_features}→{g.out_features}",
                _rank(g),
                f"{g.numbers_before:,}",
                f"{g.numbers_after:,}",
                f"{g.numbers_after / g.numbers_before:.3f}",
                f"{g.bytes_after:,}",
                f"{g.flops_before:,}",
                f"{g.flops_after:,}",
                "–" if g.weighted_error is None else f"{g.weighted_error:.3e}",
                f"{g.seconds:.2f}",
                *([_moved(g.refined)] if refined else []),
            ]
            for g in self.groups
        ]
        return header, rows

    def summary(self) -> list[str]:
        """The lines above the table."""
        before, after = self.parameters_before, self.parameters_after
        flops = [sum(getattr(g, f) for g in self.groups) for f in ("flops_before", "flops_after")]
        lines = [f"warning: {warning}" for warning in self.warnings]
        lines += [
            f"{self.model}: {self.mode} mode, captured by {self.front_end}, {self.dtype}",
            f"{self.sites} sites in {len(self.groups)} groups; params_kept {self.params_kept:.4f} "
            f"({self.numbers_before:,} weights → {self.numbers_after:,} stored numbers)",
            f"whole model: {before:,} → {after:,} parameters; matched linears: {flops[0]:,} → "
            f"{flops[1]:,} FLOPs per token",
        ]
        if any(g.bits is not None for g in self.groups):
            sizes = [sum(getattr(g, f) for g in self.groups) for f in _BYTES]
            lines.append(
                f"bytes_kept {self.bytes_kept:.4f} ({sizes[0]:,} bytes of these weights → "
                f"{sizes[1]:,}, scales counted)"
            )
        cache = [sum(getattr(g, f"cache_bytes_{x}") for g in self.groups) for x in _ENDS]
        if cache[0]:
            lines.append(
                f"key-value cache: {cache[0]:,} → {cache[1]:,} bytes per token for the values of "
                f"{sum(g.cache_bytes_before > 0 for g in self.groups)} attentions"
            )
        if self.calibration is not None:
            c = self.calibration
            first = c.get("starts_with")
            starts = "" if first is None else f"; every sample starts with token {first}"
            lines.append(
                f"calibrated on {c['tokens']:,} tokens in {c['batches']} batches, "
                f"{c['seconds']:.1f} s, {c['bytes']:,} bytes of statistics{starts}"
            )
        elif self.mode == "sharing":
            lines.append("no calibration data: plain SVD of the weights, all inputs counted alike")
        floored = [g for g in self.groups if g.floored]
        if floored:
            most = max(floored, key=lambda g: g.floored)
            lines.append(
                f"singular statistics in {len(floored)} groups: up to {most.floored} of "
                f"{most.in_features} eigenvalues were raised to the floor ({most.name})"
            )
        lines += [f"note: {note}" for note in self.notes]
        alike: dict[tuple[str, str], list[str]] = {}
        for s in self.skipped:
            alike.setdefault((s.type, s.reason), []).append(s.name)
        for (type_name, reason), names in alike.items():
            if len(names) > _LISTED:  # the experts of a model are thousands
                names = [f"{names[0]}, ..., {names[-1]} ({len(names):,} in all)"]
            lines += [f"not rewritten: {name} ({type_name}): {reason}" for name in names]
        return lines

    def to_markdown(self) -> str:
        """The report as Markdown."""
        header, rows = self.rows()
        lines = [f"- {line}" for line in self.summary()] + [""]
        lines.append("| " + " | ".join(header) + " |")
        lines.append("|" + "---|" * len(header))
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        header, rows = self.rows()
        widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
        table = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [header, *rows]
        ]
        return "\n".join([*self.summary(), *table])


def _rank(row: GroupReport) -> str:
    """The rank, and the storage where it is not the plain one; of dense weights the storage; and
    few bits."""
    bits = "" if row.bits is None else f", {row.bits} bits"
    if row.rank is None:
        return f"{row.storage}{bits}"
    return f"{row.rank}{bits}" if row.storage == PLAIN.name else f"{row.rank} {row.storage}{bits}"


def _moved(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _layers(layers: tuple[int, ...]) -> str:
    if not layers:
        return "–"
    if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))


def group_reports(
    plan: Plan,
    element_size: int,
    *,
    errors: dict[str, float] | None = None,
    floored: dict[str, int] | None = None,
    seconds: dict[str, float] | None = None,
) -> tuple[GroupReport, ...]:
    """A row per group of the plan, and one per site outside every group."""
    site_of = {s.name: site for site in plan.sites for s in site.slices}
    grouped = plan.rewritten
    rows = [
        _group_row(
            group,
            shape=_shape(group, [site_of[name] for name in group.slices]),
            element_size=element_size,
            error=(errors or {}).get(group.name),
            floored=(floored or {}).get(group.name, 0),
            seconds=(seconds or {}).get(group.name, 0.0),
        )
        for group in plan.groups
    ]
    rows += [
        _units_row(one, plan, element_size, errors=errors or {}, seconds=seconds or {})
        for one in plan.units
    ]
    for site in plan.sites:
        by_bits: dict[int | None, int] = {}
        counts: dict[int | None, int] = {}
        for s in site.slices:
            if s.name not in grouped:
                bits = plan.dense_bits.get(s.name)
                by_bits[bits] = by_bits.get(bits, 0) + s.out_features
                counts[bits] = counts.get(bits, 0) + 1
        rows += [
            _dense_row(site, counts[bits], out, bits, element_size) for bits, out in by_bits.items()
        ]
    return tuple(rows)


def _dense_row(
    site: Site, slices: int, out_features: int, bits: int | None, element_size: int
) -> GroupReport:
    """The row of those slices of a site that stay dense in so many bits."""
    numbers = site.in_features * out_features
    return GroupReport(
        name=site.name,
        type=site.type,
        label="",
        layers=() if site.layer is None else (site.layer,),
        slices=slices,
        in_features=site.in_features,
        out_features=out_features,
        rank=None,
        storage="dense",
        numbers_before=numbers,
        numbers_after=numbers,
        bytes_before=numbers * element_size,
        bytes_after=matrix_bytes(bits, out_features, site.in_features, element_size),
        flops_before=2 * numbers if site.calls else 0,
        flops_after=2 * numbers if site.calls else 0,
        weighted_error=None,
        floored=0,
        seconds=0.0,
        bits=bits,
    )


def _shape(group: Group, sites: Sequence[Site]) -> Shape:
    """The shape of a group whose slices are in these sites; each site that multiplies reads the
    basis with an input of its own."""
    distinct = {site.name: site for site in sites}.values()
    return Shape(
        group.in_features,
        group.out_features,
        sum(bool(site.calls) for site in distinct),
        sum(len(site.lookups) for site in distinct),
        sum(site.out_features for site in distinct if not site.calls),
    )


def _units_row(
    one: Units,
    plan: Plan,
    element_size: int,
    *,
    errors: Mapping[str, float],
    seconds: Mapping[str, float],
) -> GroupReport:
    """A row of an entry of another kind: its rank is how much stays."""
    sites = {site.name: site for site in plan.sites}
    before, after = one.dense_numbers, one.stored_numbers
    return GroupReport(
        name=one.name,
        type=one.type,
        label="",
        layers=one.layers,
        slices=len(one.slices_among(plan.sites)),
        in_features=sites[one.producers[0]].in_features,
        out_features=sites[one.consumer].out_features,
        rank=one.kept,
        storage=one.words.storage,
        numbers_before=before,
        numbers_after=after,
        bytes_before=before * element_size,
        bytes_after=one.stored_bytes(plan.sites, element_size),
        flops_before=2 * before,
        flops_after=2 * after,
        weighted_error=errors.get(one.name),
        floored=0,
        seconds=seconds.get(one.name, 0.0),
        bits=one.bits,
        cache_bytes_before=one.cached[0] * element_size,
        cache_bytes_after=one.cached[1] * element_size,
    )


def _group_row(
    group: Group,
    *,
    shape: Shape,
    element_size: int,
    error: float | None,
    floored: int,
    seconds: float,
) -> GroupReport:
    rank = np.array([group.rank])
    return GroupReport(
        name=group.name,
        type=group.type,
        label=group.label,
        layers=group.layers,
        slices=len(group.slices),
        in_features=group.in_features,
        out_features=group.out_features,
        rank=group.rank,
        storage=group.storage,
        numbers_before=group.dense_numbers,
        numbers_after=group.stored_numbers,
        bytes_before=group.dense_numbers * element_size,
        bytes_after=group.stored_bytes(element_size),
        flops_before=shape.dense_flops,
        flops_after=int(flops(shape, rank, group.stored_as)[0]),
        weighted_error=error,
        floored=floored,
        seconds=seconds,
        bits=group.bits,
    )
