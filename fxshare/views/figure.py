"""Figures by matplotlib: formats, colours, writing, with settings of our own."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxshare.base.files import check_writable, write_bytes
from fxshare.errors import ConfigError
from fxshare.views.grid import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")
# Tol's light scheme: distinct to colour-blind eyes, and dark text is readable on all of them
PALETTE = ("#77AADD", "#EE8866", "#44BB99", "#FFAABB", "#BBCC33", "#99DDFF", "#EEDD88", "#C6A5D8")
ALONE = "#B4BECC"
AVERAGE = "#D8CDB8"
DENSE, HATCH = "#EFEFEF", "#A6A6A6"
INK = "#1A1A1A"


def colours(grid: Grid) -> dict[str, int]:
    """A number of the palette for every group of several slices, unlike its neighbours' where the
    palette allows; groups of one slice have none."""
    places: dict[str, list[tuple[int, int, int]]] = {}
    group_at: dict[tuple[int, int, int], str] = {}
    for (row, column), bars in grid.cells.items():
        for number, bar in enumerate(bars):
            if bar.group is not None:
                places.setdefault(bar.group, []).append((row, column, number))
                group_at[row, column, number] = bar.group
    shared = {group for group, at in places.items() if len(at) > 1}
    chosen: dict[str, int] = {}
    used: Counter[int] = Counter()
    for group in (group for group in places if group in shared):
        near: Counter[int] = Counter()
        for place in places[group]:
            for step in ((0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0), (0, 0, 1), (0, 0, -1)):
                row, column, number = (a + b for a, b in zip(place, step, strict=True))
                other = chosen.get(group_at.get((row, column, number), ""))
                near[-1 if other is None else other] += 1
        number = min(range(len(PALETTE)), key=lambda c: (near[c], used[c], c))
        chosen[group] = number
        used[number] += 1
    return chosen


# Files -----------------------------------------------------------------------------------------


def check_drawable(path: Path) -> None:
    """:class:`ConfigError` where a picture could not be written for want of matplotlib or because
    of its ending, :class:`StoreError` where no file could be; to be asked before hours of
    planning."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"{path}: expected a picture ending in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; "
            f"found {path.suffix or 'no ending'}"
        )
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{path}: pictures need matplotlib, which is not installed: pip install 'fxshare[viz]'"
        ) from error
    check_writable(path)


def write_figure(make: Callable[[], Figure], path: Path) -> None:
    """Make a figure under matplotlib's own settings and write it, whole or not at all."""
    check_drawable(path)
    with own_settings():
        write_drawing(make(), path)


@contextmanager
def own_settings() -> Iterator[None]:
    """Matplotlib's defaults whatever the user's style is, which is as it was afterwards."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.hashsalt": "fxshare", "hatch.linewidth": 0.6})
        yield


def write_drawing(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all, in the format that the name of ``path`` ends with."""
    kind = path.suffix.lower().removeprefix(".")
    # no dates and no version of the library: equal pictures are equal files
    undated: dict[str, dict[str, Any]] = {
        "svg": {"Date": None, "Creator": "fxshare"},
        "pdf": {"CreationDate": None, "Creator": "fxshare", "Producer": "fxshare"},
        "png": {"Software": "fxshare"},
    }
    content = io.BytesIO()
    figure.savefig(
        content, format=kind, metadata=undated[kind], dpi=144, bbox_inches="tight", pad_inches=0.12
    )
    write_bytes(path, content.getvalue())


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """How wide a text is when drawn, in inches; ``size`` in points."""
    if not text:
        return 0.0
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(weight="bold" if bold else "normal")
    # an x at the end, because spaces there have no extent
    extent = TextPath((0, 0), text, size=size, prop=font).get_extents()
    return float(extent.width) / 72


def mixed(colour: str, other: str, share: float) -> str:
    """``colour`` with this share of ``other`` in it; each is ``#rrggbb``."""
    parts = [
        round(int(colour[at : at + 2], 16) * (1 - share) + int(other[at : at + 2], 16) * share)
        for at in (1, 3, 5)
    ]
    return "#" + "".join(f"{part:02X}" for part in parts)


__all__ = [
    "ALONE",
    "AVERAGE",
    "DENSE",
    "FORMATS",
    "HATCH",
    "INK",
    "PALETTE",
    "check_drawable",
    "colours",
    "mixed",
    "own_settings",
    "text_width",
    "write_drawing",
]
