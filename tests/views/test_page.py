"""The page of a compilation: what is in it, that it is escaped, and what a browser makes of it."""

from __future__ import annotations

import copy
import html
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import fxshare
from fxshare.cli import main
from fxshare.cli.why import explain
from fxshare.views.page import page_of
from fxshare.views.page_curves import frontier_curves
from tests.refining.build import refined, subject

_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(_BROWSER is None, reason="needs chromium: apt install chromium")


@pytest.fixture(scope="module")
def compiled() -> Any:
    model, gm = subject("llama", "planned")
    return refined(gm, model, steps=8)


@pytest.fixture(scope="module")
def page(compiled: Any) -> str:
    return shown(compiled, compiled.fxshare)


def shown(gm: Any, record: Any) -> str:
    return page_of(record, "out", lambda name: explain(gm, name, record.config, record))


class Tags(HTMLParser):
    """Counts tags and notes attributes; every tag that is opened is closed."""

    VOID = frozenset({"meta", "rect", "line", "circle", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def cells(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.found if tag == "g" and "data-name" in attrs]


def test_every_slice_has_a_cell_with_a_name_that_says_what_became_of_it(
    compiled: Any, page: str
) -> None:
    plan = compiled.fxshare.plan
    by_name = {cell["data-name"]: cell for cell in Tags(page).cells()}
    assert set(by_name) == {s.name for site in plan.sites for s in site.slices}
    for group in plan.groups:
        for name in group.slices:
            label = by_name[name]["aria-label"]
            assert label is not None
            assert group.name in label
            assert f"rank {group.rank}" in label
            assert "moved by" in label
    assert all(cell["tabindex"] == "0" and cell["role"] == "img" for cell in by_name.values())


def test_it_needs_nothing_beside_itself(page: str) -> None:
    tags = Tags(page).found
    assert not any({"src", "href", "srcset"} & attrs.keys() for _, attrs in tags)
    assert {tag for tag, _ in tags}.isdisjoint({"link", "img", "iframe", "object", "base"})
    assert "url(" not in page
    assert "@import" not in page
    policy = next(a["content"] for t, a in tags if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_figures_tables_and_curves(compiled: Any, page: str) -> None:
    report = compiled.fxshare.report
    text = html.unescape(page)
    assert f"{report.parameters_before:,} → {report.parameters_after:,}" in text
    assert str(compiled.fxshare.refined[-1]) in text
    for group in report.groups:
        assert f'<th scope="row">{group.name}</th>' in page
    (curve,) = (a for t, a in Tags(page).found if t == "polyline")
    points = [tuple(map(float, p.split(","))) for p in str(curve["points"]).split()]
    assert len(points) == 1 + len(compiled.fxshare.refined[-1].curve)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    # the first loss is the highest here, and y runs downwards
    assert points[0][1] == min(y for _, y in points)
    steps = compiled.fxshare.refined[-1].steps
    assert f"fxshare refine again/ --teacher MODEL --data DATA --steps {steps}" in text


def test_the_commands_follow_from_one_another(compiled: Any) -> None:
    """No command writes where one before it wrote, and names are one word of a shell each."""
    record = compiled.fxshare
    (done,) = record.refined
    record = replace(record, refined=(done, replace(done, trained=("factors", "norms"))))
    page = page_of(record, "my out", lambda name: [name])
    lines = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)[0].splitlines()
    commands = [shlex.split(html.unescape(line)) for line in lines]
    assert commands[0][4:7] == ["my out/config.yaml", "--plan", "my out/plan.json"]
    assert commands[-1] == ["fxshare", "report", "my out", "--html", "report.html"]
    made = commands[0][-1]
    for command in commands[1:3]:
        assert command[:3] == ["fxshare", "refine", made]
        assert command[-2] == "-o"
        assert command[-1] != made
        made = command[-1]
        assert float(command[command.index("--learning-rate") + 1]) == pytest.approx(
            done.learning_rate, rel=1e-4
        )
    assert "--also" not in commands[1]
    assert commands[2][commands[2].index("--also") + 1] == "norms"


def test_what_is_written_in_names_and_reasons_stays_text(compiled: Any) -> None:
    bad = "<script>alert(1)</script>\"' onload='x"
    record = compiled.fxshare
    report = replace(record.report, model=bad, notes=(bad,), warnings=(bad,))
    page = page_of(replace(record, report=report), bad, lambda name: [bad])
    assert "<script>alert" not in page
    tags = Tags(page).found
    assert sum(tag == "script" for tag, _ in tags) == 1
    assert not any("onload" in attrs for _, attrs in tags)
    assert bad in html.unescape(page)


def test_other_modes_and_what_was_not_refined() -> None:
    for how in ("shared", "exact"):
        _, gm = subject("llama", how)
        page = shown(gm, gm.fxshare)
        assert Tags(page).cells()
        assert "polyline" not in page.split("</style>")[1]


def test_a_curve_of_losses_that_are_not_finite_is_left_out(compiled: Any) -> None:
    record = compiled.fxshare
    (done,) = record.refined
    points = tuple(replace(point, loss=float("nan")) for point in done.curve)
    page = shown(compiled, replace(record, refined=(replace(done, curve=points),)))
    assert not [t for t, _ in Tags(page).found if t == "polyline"]


SWEEP = {
    "sweep": {
        "unit": "numbers",
        "loss_name": "next-token",
        "planned": [
            {"kept": 0.4, "loss": 0.9, "measured": None},
            {"kept": 0.8, "loss": 0.1, "measured": 0.2},
            {"kept": 1.0, "loss": 0.0, "measured": None},
        ],
        "uniform": [{"kept": 0.4, "loss": 1.5, "measured": None}],
    }
}
ROWS = {
    "rows": [
        {"case": case, "method": method, "kept": kept, "increase": increase}
        for case in ("one", "<b>two</b>")
        for method, kept, increase in (
            ("everything", 0.25, 0.1),
            ("everything", 0.5, 0.01),
            ("bases", 0.5, None),
            ("bases", 0.25, 0.4),
        )
    ]
}


def test_frontiers_are_curves_of_their_own(compiled: Any) -> None:
    record = compiled.fxshare
    page = page_of(record, "out", lambda name: [name], frontier_curves(SWEEP))
    found = Tags(page).found
    own, *others = (a for t, a in found if t == "polyline")
    assert "style" not in own
    first, second, third = (len(str(line["points"]).split()) for line in others)
    # what loses nothing has no place on a logarithmic axis
    assert (first, second, third) == (2, 1, 1)
    titles = re.findall(r"<title>(.*?)</title>", page)
    assert "planned, measured: 0.800 kept, 0.2" in titles
    (label,) = (a["aria-label"] for t, a in found if "the share of the" in str(a.get("aria-label")))
    assert "planned, predicted 0.9 at 0.40, 0.1 at 0.80; every slice alone" in str(label)
    heights = [float(str(a["cy"])) for t, a in found if t == "circle" and a.get("r") == "3"]
    top, least = heights[-3], heights[-2]
    assert top > min(heights)
    assert least == min(heights)  # of the uniform one, which loses most

    page = page_of(record, "out", lambda name: [name], frontier_curves(ROWS))
    assert "Frontier: &lt;b&gt;two&lt;/b&gt;" in page
    assert sum(t == "polyline" for t, _ in Tags(page).found) == 1 + 2 * 2


@pytest.mark.parametrize(
    "found", [None, [], {}, {"rows": [3]}, {"rows": [{"case": "a"}]}, {"sweep": {}}, {"sweep": 3}]
)
def test_what_is_no_frontier(found: object) -> None:
    with pytest.raises(ValueError, match="no frontier"):
        frontier_curves(found)


# The command ------------------------------------------------------------------------------------


def test_the_command(compiled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    fxshare.save(compiled, out)
    assert main(["report", str(out)]) == 0
    assert str(compiled.fxshare.report) in capsys.readouterr().out
    assert main(["report", str(out), "--html", str(tmp_path / "r.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["html"] == str(tmp_path / "r.html")
    assert Tags((tmp_path / "r.html").read_text("utf-8")).cells()
    sweep = tmp_path / "sweep.json"
    sweep.write_text(json.dumps(SWEEP))
    given = ["--frontier", str(sweep)]
    assert main(["report", str(out), "--html", str(tmp_path / "r.html"), *given]) == 0
    assert "Frontier: loss by next-token" in (tmp_path / "r.html").read_text("utf-8")
    page = ["--html", str(tmp_path / "r.html")]
    sweep.write_text("{")
    capsys.readouterr()
    for arguments, code, reason in (
        ([str(out), *given], 2, "is shown on a page; give --html"),
        ([str(out), *page, *given], 2, "expected what 'fxshare bench frontier --json' or"),
        ([str(out), *page, "--frontier", str(tmp_path / "no.json")], 2, "No such file"),
        ([str(out), "--html", str(tmp_path / "r.txt")], 2, "ending in .html; found .txt"),
        ([str(out), "--html", str(tmp_path)], 2, "no ending"),
        (["embedded"], 2, "expected a folder that fxshare saved"),
        ([str(tmp_path / "none")], 2, "none"),
    ):
        assert main(["report", *arguments]) == code, arguments
        assert reason in capsys.readouterr().err
    sweep.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "r.html"]


# In a browser -----------------------------------------------------------------------------------

_PROBE = """
<script nonce="plan">
(function () {
  var style = getComputedStyle(document.body), note = document.body.dataset;
  note.paper = style.backgroundColor;
  note.ink = style.color;
  note.width = document.documentElement.scrollWidth;
  note.room = document.documentElement.clientWidth;
})();
</script>
"""


def rendered(page: str, tmp_path: Path, *options: str, at: str = "") -> str:
    """What the document has become."""
    assert _BROWSER is not None
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
    command = [_BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    folder = f"--user-data-dir={tmp_path / 'profile'}"
    ran = subprocess.run(
        [*command, folder, *options, f"{file.as_uri()}#{at}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return ran.stdout


def noted(dom: str, name: str) -> str:
    found = re.search(rf'data-{name}="([^"]*)"', dom)
    assert found is not None, dom[:500]
    return found[1]


def lightness(colour: str) -> float:
    parts = re.findall(r"\d+", colour)[:3]
    return sum(map(int, parts)) / 3


@browser
def test_on_a_phone_nothing_reaches_over_the_edge_and_a_link_opens_a_cell(
    compiled: Any, page: str, tmp_path: Path
) -> None:
    name = compiled.fxshare.plan.groups[-1].slices[0]
    dom = rendered(page, tmp_path, "--window-size=360,800", at=name)
    assert int(noted(dom, "width")) <= int(noted(dom, "room"))
    (detail,) = re.findall(r'<div id="detail"[^>]*>(.*?)</div>', dom, re.DOTALL)
    lines = re.findall(r"<p>(.*?)</p>", detail, re.DOTALL)
    assert lines[0].strip() == name
    assert any(compiled.fxshare.plan.groups[-1].name in line for line in lines)
    assert lightness(noted(dom, "paper")) > lightness(noted(dom, "ink"))


@browser
def test_dark_where_the_reader_wants_it(page: str, tmp_path: Path) -> None:
    dom = rendered(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert lightness(noted(dom, "paper")) + 100 < lightness(noted(dom, "ink"))


@browser
def test_a_page_that_is_too_wide_would_be_seen(page: str, tmp_path: Path) -> None:
    broken = copy.copy(page).replace(".wide { overflow-x: auto; }", "")
    dom = rendered(broken, tmp_path, "--window-size=360,800")
    assert int(noted(dom, "width")) > int(noted(dom, "room"))
