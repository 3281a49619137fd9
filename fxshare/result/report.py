"""The report of a compilation: what was matched, shared, kept dense, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fxshare.base.names import as_label, as_module_path, as_type_names
from fxshare.plans.storage import PLAIN
from fxshare.result.group_report import GroupReport
from fxshare.sites.site import Skipped

_BYTES = ("bytes_before", "bytes_after")
_LISTED = 4
"""So many weights that were left alone for one reason have a line each; more are one line."""


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

    def _bytes(self) -> list[str]:
        """What there is to say of bytes: of few bits, and of a key-value cache."""
        lines = []
        if any(g.bits is not None for g in self.groups):
            before, after = (sum(getattr(g, f) for g in self.groups) for f in _BYTES)
            lines.append(
                f"bytes_kept {self.bytes_kept:.4f} ({before:,} bytes of these weights → {after:,}, "
                "scales counted)"
            )
        cached = [g for g in self.groups if g.cache_bytes_before]
        if cached:
            lines.append(
                f"key-value cache: {sum(g.cache_bytes_before for g in cached):,} → "
                f"{sum(g.cache_bytes_after for g in cached):,} bytes per token for fewer heads, "
                f"or narrower keys or values, of {len({g.layers for g in cached})} layers"
            )
        return lines

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
        lines += self._bytes()
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
