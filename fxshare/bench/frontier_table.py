"""The rows of ``fxshare bench frontier`` and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fxshare.bench.refined import Refined

EVERYTHING = "everything"
HUNDREDTH = 5e-3
"""What rounds to a size counts as that size."""


@dataclass(frozen=True)
class Row:
    """One method. ``size`` is the share that was allowed (None where the method has one size),
    ``kept`` what the file takes; losses are increases in nats per token."""

    case: str
    method: str
    size: float | None
    kept: float
    increase: float
    second: float | None
    predicted: float | None
    seconds: float
    prompt: float | None = None
    one: float | None = None
    """Tokens a second of a prompt and of one token alone, where they were measured, over those of
    the dense model in turn with it."""
    refined: Refined | None = None


@dataclass(frozen=True)
class Frontier:
    """All rows, and what they were measured on."""

    environment: dict[str, object]
    seed: int
    search: str
    dense_loss: dict[str, float]
    rows: tuple[Row, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)

    def best(self, case: str, size: float, *, alone: bool = False) -> Row | None:
        """What loses least at no more than a share of the bytes; with ``alone`` of single
        methods."""
        fits = [
            row
            for row in self.rows
            if row.case == case and (row.kept if row.size is None else row.size) <= size + HUNDREDTH
        ]
        fits = [row for row in fits if not (alone and row.method == EVERYTHING)]
        return min(fits, key=lambda row: row.increase, default=None)

    def contenders(self, case: str, size: float) -> tuple[Row | None, Row | None]:
        """The best single method that is a plan, and everything, at a size."""
        plans = [row for row in self.rows if not row.method.endswith("nearest")]
        alone = replace(self, rows=tuple(plans)).best(case, size, alone=True)
        every = [r for r in plans if (r.case, r.size, r.method) == (case, size, EVERYTHING)]
        return alone, next(iter(every), None)


def table_of(
    result: Frontier, sizes: Sequence[float], *, second: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per case and size, with what loses least named, and what everything
    loses over the best single method. ``second`` tells of the second corpus, where the winners are
    those of the first."""
    methods = list(dict.fromkeys(row.method for row in result.rows if row.size is not None))
    methods.sort(key=lambda method: method == EVERYTHING)
    header = ["model", "bytes kept", *methods, "dense in bits", "least", "everything / best single"]

    def increase(row: Row | None) -> float | None:
        return None if row is None else row.second if second else row.increase

    def told(row: Row | None) -> str:
        found = increase(row)
        return "–" if found is None else f"{found:.4f}"

    rows = []
    for case in result.dense_loss:
        if second and not any(row.case == case and row.second is not None for row in result.rows):
            continue
        for size in sizes:
            by = {r.method: r for r in result.rows if (r.case, r.size) == (case, size)}
            fixed = [
                r
                for r in result.rows
                if r.case == case and r.size is None and r.kept <= size + HUNDREDTH
            ]
            rounded = min(fixed, key=lambda r: r.increase, default=None)
            best, alone = result.best(case, size), result.best(case, size, alone=True)
            cells = [told(by.get(m)) for m in methods] + [told(rounded)]
            ratio, least = "–", increase(alone)
            every = increase(by.get(EVERYTHING))
            if every is not None and least is not None and least > 0:
                ratio = f"{every / least:.2f}"
            named = "–" if best is None else best.method
            rows.append([case, f"{size:.2f}", *cells, named, ratio])
    return header, rows


def dense_table(result: Frontier) -> tuple[list[str], list[list[str]]]:
    """Header and rows: dense weights in few bits, which have one size each, with error feedback and
    as the nearest codes."""
    several = any(row.second is not None for row in result.rows)
    header = ["model", "dense", "bytes kept", "loss", *(["second corpus"] if several else [])]
    rows = []
    for row in result.rows:
        if row.size is None:
            cells = [row.case, row.method.removeprefix("dense, "), f"{row.kept:.3f}"]
            cells.append(f"{row.increase:.5f}")
            if several:
                cells.append("–" if row.second is None else f"{row.second:.5f}")
            rows.append(cells)
    return header, rows


def speed_table(result: Frontier) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what was timed, over dense."""
    header = ["model", "bytes kept", "method", "prompt", "one token"]
    return header, [
        [r.case, f"{r.kept:.3f}", r.method, f"{r.prompt:.2f}", f"{r.one:.2f}"]
        for r in result.rows
        if r.prompt is not None and r.one is not None
    ]


def refined_table(result: Frontier, sizes: Sequence[float]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the best single method and everything at each size, before and after."""
    header = ["model", "bytes kept", "best single", "before", "refined", "everything", "refined"]
    header += ["everything / best single, refined", "steps"]
    rows = []
    for case in result.dense_loss:
        for size in sizes:
            alone, every = result.contenders(case, size)
            if alone is None or every is None or alone.refined is None or every.refined is None:
                continue
            ratio = "–"
            if alone.refined.increase > 0:
                ratio = f"{every.refined.increase / alone.refined.increase:.2f}"
            cells = [alone.method]
            for one in (alone, every):
                assert one.refined is not None
                cells += [f"{one.increase:.4f}", f"{one.refined.increase:.4f}"]
            steps = f"{alone.refined.steps} / {every.refined.steps}"
            rows.append([case, f"{size:.2f}", *cells, ratio, steps])
    return header, rows


__all__ = [
    "EVERYTHING",
    "HUNDREDTH",
    "Frontier",
    "Row",
    "dense_table",
    "refined_table",
    "speed_table",
    "table_of",
]
