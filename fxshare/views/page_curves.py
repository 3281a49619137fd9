"""Curves of a page: the loss while refining, and what losing fewer or more bytes costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxshare.result.refinement import Refinement
from fxshare.views.figure import PALETTE

_SIZE = (560, 260)
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 20, 40
_ROW = 18
"""Of the names of several curves."""
_SWEPT = (
    ("planned", "loss", "planned, predicted"),
    ("uniform", "loss", "every slice alone, the same share"),
    ("planned", "measured", "planned, measured"),
)

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Text:
    """Words at a place of a picture."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    bold: bool = False


@dataclass(frozen=True)
class Axis:
    """From one point to another."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Dot:
    """A point of a curve; ``label`` says its numbers."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Line:
    """One curve; ``colour`` is None where it is the only one, ``key`` where its colour is shown
    beside its name."""

    dots: Sequence[Dot]
    colour: str | None = None
    key: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """A picture of curves, with what stands above it and what it is called."""

    id: str
    title: str
    text: str
    label: str
    width: int
    height: int
    axes: Sequence[Axis]
    texts: Sequence[Text]
    lines: Sequence[Line]


def refined_curve(number: int, done: Refinement) -> Curve:
    """The held-out loss against seconds of one run of refining."""
    points = [(0.0, done.before.objective), *((p.seconds, p.loss) for p in done.curve)]
    points = [(s, loss) for s, loss in points if math.isfinite(loss)]
    title = "Refined" if number == 1 else f"Refined again, {number}"
    label = (
        f"held-out loss by {done.objective} against seconds, from {done.before.objective:.4g} to "
        f"{done.after.objective:.4g}"
    )
    if len(points) < 2:
        return Curve(f"refined-{number}", title, f"{done}.", label, *_SIZE, (), (), ())
    most = max(s for s, _ in points) or 1.0
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    spread = (high - low) or abs(high) or 1.0
    place = _placed(lambda s: s / most, lambda loss: (loss - low) / spread)
    texts = tuple(_ends(("0 s", f"{most:.0f} s"), (f"{low:.4g}", f"{high:.4g}")))
    dots = [Dot(*place(s, loss), f"{loss:.4g} after {s:.0f} s") for s, loss in points]
    return Curve(
        f"refined-{number}", title, f"{done}.", label, *_SIZE, _axes(), texts, (Line(dots),)
    )


def frontier_curves(found: Any) -> list[Curve]:
    """Loss against what is kept, of what ``fxshare bench frontier --json`` prints (a curve a
    method, a picture a model) or ``fxshare plan --sweep - --json``.

    Raises ``ValueError`` where it is neither.
    """
    try:
        if "sweep" in found:
            return [_swept(found["sweep"])]
        cases: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for row in found["rows"]:
            by_method = cases.setdefault(str(row["case"]), {})
            by_method.setdefault(str(row["method"]), []).append(_point(row, "increase"))
        pictures = enumerate(cases.items(), 1)
        return [_frontier(n, case, "of the bytes", methods) for n, (case, methods) in pictures]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"no frontier: {type(error).__name__}: {error}") from error


def _swept(sweep: Mapping[str, Any]) -> Curve:
    curves = {
        name: [_point(point, loss) for point in sweep[kind] if point[loss] is not None]
        for kind, loss, name in _SWEPT
    }
    unit = {"flops": "FLOPs"}.get(str(sweep["unit"]), str(sweep["unit"]))
    return _frontier(1, f"loss by {sweep['loss_name']}", f"of the {unit}", curves)


def _point(row: Mapping[str, Any], loss: str) -> tuple[float, float]:
    return float(row["kept"]), math.nan if row[loss] is None else float(row[loss])


def _frontier(number: int, case: str, what: str, curves: Mapping[str, Points]) -> Curve:
    """Several curves, the loss on a logarithmic axis; what loses nothing has no place on it."""
    shown = {
        name: sorted((k, loss) for k, loss in points if 0 < loss < math.inf)
        for name, points in curves.items()
    }
    shown = {name: points for name, points in shown.items() if points}
    title = f"Frontier: {case}"
    text = f"What is lost above dense against the share {what} that is kept, by each way to choose."
    everything = [point for points in shown.values() for point in points]
    if len(everything) < 2:
        text += " Too little was measured for a picture."
        return Curve(f"frontier-{number}", title, text, title, *_SIZE, (), (), ())
    kept = [k for k, _ in everything]
    losses = [math.log(loss) for _, loss in everything]
    place = _placed(_between(kept), lambda loss: _between(losses)(math.log(loss)))
    ends = (f"{min(kept):.2f} kept", f"{max(kept):.2f} kept")
    texts = list(_ends(ends, (f"{math.exp(min(losses)):.2g}", f"{math.exp(max(losses)):.2g}")))
    width, height = _SIZE
    lines = []
    for at, (name, points) in enumerate(shown.items()):
        y = height + _ROW * at
        texts.append(Text(_LEFT + 18, y + 4, name))
        dots = [Dot(*place(k, loss), f"{name}: {k:.3f} kept, {loss:.4g}") for k, loss in points]
        lines.append(Line(dots, PALETTE[at % len(PALETTE)], (_LEFT, y)))
    told = "; ".join(f"{name} {_listed(points)}" for name, points in shown.items())
    label = f"loss above dense against the share {what}: {told}"
    height += _ROW * len(shown)
    return Curve(f"frontier-{number}", title, text, label, width, height, _axes(), texts, lines)


def _listed(points: Points) -> str:
    return ", ".join(f"{loss:.3g} at {kept:.2f}" for kept, loss in points)


def _between(values: Sequence[float]) -> Callable[[float], float]:
    low, high = min(values), max(values)
    return lambda value: (value - low) / ((high - low) or 1.0)


def _placed(
    across: Callable[[float], float], up: Callable[[float], float]
) -> Callable[[float, float], tuple[float, float]]:
    """Where a point is, from its share of either axis."""
    width, height = _SIZE

    def place(x: float, y: float) -> tuple[float, float]:
        left = _LEFT + (width - _LEFT - _RIGHT) * across(x)
        top = _TOP + (height - _TOP - _BOTTOM) * (1 - up(y))
        return round(left, 2), round(top, 2)

    return place


def _axes() -> tuple[Axis, Axis]:
    width, height = _SIZE
    base = height - _BOTTOM
    return Axis(_LEFT, _TOP, _LEFT, base), Axis(_LEFT, base, width - _RIGHT, base)


def _ends(across: tuple[str, str], up: tuple[str, str]) -> Iterator[Text]:
    """The least and the most of both axes."""
    width, height = _SIZE
    base = height - _BOTTOM
    yield Text(_LEFT - 6, _TOP + 4, up[1], "end")
    yield Text(_LEFT - 6, base, up[0], "end")
    yield Text(_LEFT, base + 16, across[0], "middle")
    yield Text(width - _RIGHT, base + 16, across[1], "end")


__all__ = ["Axis", "Curve", "Dot", "Line", "Text", "frontier_curves", "refined_curve"]
