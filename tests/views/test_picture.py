"""Pictures of plans: what is drawn where, and the files."""

from __future__ import annotations

import builtins
import hashlib
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fxshare.errors import ConfigError, StoreError
from fxshare.planning.rules import exact_plan
from fxshare.planning.sweep import Sweep, SweepPoint
from fxshare.plans.outlook import Outlook
from fxshare.plans.plan import Group, Plan
from fxshare.sites.site import Site, Skipped, SliceSpec
from fxshare.views.figure import colours
from fxshare.views.grid import Grid, grid_of
from fxshare.views.picture import draw_plan
from fxshare.views.sweep import draw_sweep

Wanted = list[tuple[list[str], int]]


def site(
    layer: int | None, type_name: str, labels: tuple[str, ...] = ("",), name: str = ""
) -> Site:
    name = name or f"h.{layer}.{type_name}"
    slices = []
    for at, label in enumerate(labels):
        part, _, head = label.partition(".")
        slices.append(
            SliceSpec(
                name=f"{name}.{label}" if label else name,
                part=part,
                head=int(head) if head else None,
                start=8 * at,
                stop=8 * at + 8,
            )
        )
    return Site(
        name=name,
        calls=(name,),
        type=type_name,
        layer=layer,
        in_features=8,
        out_features=8 * len(labels),
        bias=False,
        slices=tuple(slices),
    )


def plan_of(sites: list[Site], groups: Wanted) -> Plan:
    known = {s.name: one for one in sites for s in one.slices}
    return Plan(
        mode="planned",
        sites=tuple(sites),
        groups=tuple(
            Group(
                name=f"basis_{number}",
                type=known[names[0]].type,
                label="",
                layers=tuple(sorted({known[n].layer or 0 for n in names})),
                slices=tuple(names),
                in_features=8,
                out_features=8 * len(names),
                rank=rank,
            )
            for number, (names, rank) in enumerate(groups)
        ),
    )


@pytest.fixture
def small() -> Plan:
    """Shared along layers and along rows, alone, apart, and dense."""
    sites = [site(layer, t) for layer in range(5) for t in ("q", "k", "o")]
    groups: Wanted = [
        (["h.0.q", "h.1.q"], 4),
        (["h.2.q", "h.3.q"], 3),
        (["h.0.k"], 2),
        (["h.1.o", "h.4.o"], 3),
        (["h.2.k", "h.3.o"], 2),
        (["h.4.q", "h.4.k"], 2),
    ]
    return plan_of(sites, groups)


# the grid -----------------------------------------------------------------------------------


def test_layers_are_columns_and_types_are_rows(small: Plan) -> None:
    grid = grid_of(small)
    assert grid.layers == (0, 1, 2, 3, 4)
    assert [row.type for row in grid.rows] == ["q", "k", "o"]
    (bar,) = grid.cells[0, 1]
    assert (bar.slice, bar.group) == ("h.1.q", "basis_0")
    assert bar.kept == small.groups[0].stored_numbers / small.groups[0].dense_numbers
    (dense,) = grid.cells[2, 0]
    assert (dense.group, dense.kept) == (None, 1.0)


def test_layers_are_in_order_and_those_without_number_last() -> None:
    grid = grid_of(exact_plan([site(None, "a", name="head"), site(10, "a"), site(2, "a")]))
    assert grid.layers == (2, 10, None)
    assert grid.cells[0, 2][0].slice == "head"


def test_sites_of_one_type_in_one_layer_have_rows_of_their_own() -> None:
    grid = grid_of(exact_plan([site(0, "up", name=f"h.0.experts.{n}.up") for n in range(3)]))
    assert [row.label for row in grid.rows] == ["", "#2", "#3"]
    assert grid.whole


@pytest.mark.parametrize(
    ("heads", "rows", "whole"), [(4, 12, True), (16, 48, True), (32, 3, False)]
)
def test_many_heads_become_bars(heads: int, rows: int, whole: bool) -> None:
    labels = tuple(f"{part}.{head}" for part in "qkv" for head in range(heads))
    grid = grid_of(exact_plan([site(layer, "qkv", labels) for layer in range(2)]))
    assert (len(grid.rows), grid.whole) == (rows, whole)
    assert sum(len(bars) for bars in grid.cells.values()) == 2 * 3 * heads


def test_too_many_experts_become_bars_too() -> None:
    sites = [site(0, "up", name=f"h.0.experts.{n}.up") for n in range(100)]
    grid = grid_of(exact_plan(sites))
    assert len(grid.rows) == 1
    assert len(grid.cells[0, 0]) == 100


def test_neighbouring_shared_groups_have_different_colours() -> None:
    sites = [site(layer, t) for layer in range(12) for t in "abc"]
    groups: Wanted = [
        ([f"h.{at}.{t}", f"h.{at + 1}.{t}"], 2) for t in "abc" for at in range(0, 12, 2)
    ]
    plan = plan_of(sites, groups)
    grid = grid_of(plan)
    chosen = colours(grid)
    assert set(chosen) == {group.name for group in plan.groups}
    for (row, column), (bar,) in grid.cells.items():
        for place in ((row + 1, column), (row, column + 1)):
            if place in grid.cells:
                (other,) = grid.cells[place]
                same = bar.group == other.group
                assert same == (chosen[str(bar.group)] == chosen[str(other.group)])


def test_groups_of_one_slice_need_no_colour(small: Plan) -> None:
    assert "basis_2" not in colours(grid_of(small))


# files --------------------------------------------------------------------------------------


def test_files_are_equal_byte_for_byte_and_carry_no_date(small: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for ending in ("svg", "png", "pdf"):
        paths = [tmp_path / f"{name}.{ending}" for name in "ab"]
        for path in paths:
            draw_plan(small, path, title="a plan")
        first, second = (hashlib.sha256(p.read_bytes()).hexdigest() for p in paths)
        assert first == second, ending
    assert {p.suffix for p in tmp_path.iterdir()} == {".svg", ".png", ".pdf"}
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert not re.search(r"20\d\d-\d\d-\d\d", text)


def test_the_users_matplotlib_is_left_alone(small: Plan, tmp_path: Path) -> None:
    mpl = pytest.importorskip("matplotlib")
    draw_plan(small, tmp_path / "plain.svg")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "none"}):
        before = dict(mpl.rcParams)
        draw_plan(small, tmp_path / "styled.svg")
        assert dict(mpl.rcParams) == before
    plain, styled = ((tmp_path / f"{n}.svg").read_bytes() for n in ("plain", "styled"))
    assert plain == styled


def test_every_part_of_the_legend_is_there_when_it_is_needed(small: Plan) -> None:
    pytest.importorskip("matplotlib")
    from fxshare.views.picture import plan_figure

    def words(plan: Plan) -> str:
        return " ".join(text.get_text() for text in plan_figure(plan).axes[0].texts)

    full = words(small)
    for part in ("filled height", "one shared basis", "a basis of its own", "dense: kept as it is"):
        assert part in full
    assert "one bar per slice" not in full
    assert "6 bases, 5 of them shared, 4 slices dense" in full
    exact = words(exact_plan(small.sites, [Skipped(name="x", type="q", reason="is an embedding")]))
    assert "one shared basis" not in exact
    assert "1 modules not rewritten" in exact
    labels = tuple(f"q.{head}" for head in range(70))
    assert "average of slices" in words(exact_plan([site(0, "q", labels)]))
    few = [
        site(layer, t, ("q.0", "q.1")) for layer in range(2) for t in map("t{}".format, range(40))
    ]
    assert "one bar per slice" in words(exact_plan(few))


def test_groups_apart_are_joined_by_lines(small: Plan) -> None:
    pytest.importorskip("matplotlib")
    from fxshare.views.picture import plan_figure

    joined = [line for line in plan_figure(small).axes[0].lines if line.get_marker() == "o"]
    # 1.o with 4.o, 2.k with 3.o, 4.q with 4.k
    assert len(joined) == 3


def test_a_picture_inside_the_figure(small: Plan) -> None:
    """Nothing is drawn outside of the paper: rows, legend and titles all have room."""
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from fxshare.views.picture import plan_figure

    figure = plan_figure(small, title="a rather long title " * 8)
    renderer: Any = FigureCanvasAgg(figure).get_renderer()
    paper = figure.bbox
    for text in figure.axes[0].texts:
        box = text.get_window_extent(renderer)
        assert paper.x0 - 1 <= box.x0
        assert box.x1 <= paper.x1 + 1, text.get_text()
        assert paper.y0 - 1 <= box.y0
        assert box.y1 <= paper.y1 + 1, text.get_text()


def test_no_labels_of_rows_overlap(small: Plan) -> None:
    labels = tuple(f"{part}.{head}" for part in "qkv" for head in range(20))
    grid: Grid = grid_of(exact_plan([site(layer, "qkv", labels) for layer in range(3)]))
    pytest.importorskip("matplotlib")
    from fxshare.views.picture import _layout

    place = _layout(grid, 2)
    assert all(b - a >= 0.15 for a, b in pairwise(place.y))
    assert small.sites


@pytest.mark.parametrize("name", ["plan.gif", "plan", "plan.jpeg"])
def test_other_endings_are_refused(small: Plan, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a picture ending in \.svg, \.png or \.pdf"):
        draw_plan(small, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_way_out_is_named(
    small: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install 'fxshare\[viz\]'"):
        draw_plan(small, tmp_path / "plan.svg")


def test_a_picture_that_cannot_be_written_leaves_nothing(small: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "plan.svg").mkdir()
    with pytest.raises(StoreError, match=r"plan\.svg"):
        draw_plan(small, tmp_path / "plan.svg")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.svg"]


# the sweep ----------------------------------------------------------------------------------


def test_the_sweep_has_a_log_axis_and_marks_the_plan(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fxshare.views.sweep import sweep_figure

    points = tuple(SweepPoint(b, b, loss, 0.0, 3) for b, loss in ((0.5, 0.1), (0.8, 0.01), (1, 0)))
    sweep = Sweep("numbers", 1000, "cross-entropy", points, points[1:])
    outlook = Outlook(
        loss_name="cross-entropy",
        unit="numbers",
        budget=800,
        cost=790,
        price=1e-5,
        predicted=0.012,
        bound=0.01,
        gap=0.002,
        measured=0.02,
        strategy="layers",
        trial="planned",
        refit=True,
    )
    axes = sweep_figure(sweep, outlook=outlook).axes[0]
    assert axes.get_yscale() == "log"
    labels = axes.get_legend_handles_labels()[1]
    assert labels[2:] == ["the plan, predicted", "the plan, measured on held-back data"]
    # what loses nothing has no place on a log axis
    assert [list(line.get_xdata()) for line in axes.lines[:2]] == [[0.5, 0.8], [0.8]]
    draw_sweep(sweep, tmp_path / "curve.svg", outlook=outlook)
    assert (tmp_path / "curve.svg").stat().st_size > 1000
