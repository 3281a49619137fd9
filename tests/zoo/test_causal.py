"""Every causal family of transformers: built small, measured, and in the support page.

The whole run is ``python -m tests.zoo.causal -o causal.jsonl --page``; here are two families of it,
and what writes the page.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zoo.causal import __main__ as command
from tests.zoo.causal.measure import Row, call_of, measure, share_in_sites
from tests.zoo.causal.models import build, families
from tests.zoo.causal.page import PAGE, put_into, section, section_of, shortened
from tests.zoo.causal.sizes import IMPOSSIBLE, OTHERS


@pytest.mark.parametrize("name", ["bart", "mixtral"])
def test_a_family_is_captured_exact_and_generates(name: str) -> None:
    row = measure(name)
    assert (row.front_end, row.generate, row.runs, row.not_built) == ("fx", "same", "graphs", "")
    assert row.is_exact
    # all but the router of a mixture
    assert 0.98 < row.in_sites <= 1.0


def test_what_is_wrong_is_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import fxshare

    compile_rightly = fxshare.compile

    def wrong(model: Any, cfg: Any, **options: Any) -> Any:
        gm: Any = compile_rightly(model, cfg, **options)
        linear = gm.get_submodule(next(iter(gm.meta["slices"].values())).module)
        linear.weight = torch.nn.Parameter(linear.weight.detach().roll(1, 0))
        return gm

    monkeypatch.setattr(fxshare, "compile", wrong)
    row = measure("bart")
    assert not row.is_exact
    assert row.generate != "same"


def test_why_there_is_no_model() -> None:
    row = measure("gemma4_assistant")
    assert row.not_built == IMPOSSIBLE["gemma4_assistant"]
    assert not row.front_end


def _needs_the_transformers_of_the_page() -> str:
    text = section_of(PAGE.read_text(encoding="utf-8"))
    assert text
    if f"families of transformers {version('transformers')}," not in text:
        pytest.skip("written with another transformers")
    return text


def test_exceptions_name_families() -> None:
    _needs_the_transformers_of_the_page()  # others lack families that it has
    assert set(OTHERS) <= set(families())
    assert set(IMPOSSIBLE) <= set(families())


def test_share_in_sites_counts_what_the_call_reads() -> None:
    import fxshare

    model = build("bart")  # the cross attention is read by nothing
    example = call_of(model, (6, 6), 0)
    config = {
        "weight_types": {"fc": {"pattern": r".*\.fc[12]$"}},
        "block_pattern": r"layers\.(\d+)",
    }
    gm = fxshare.compile(model, config, example=example)
    fc, attention = 2 * 2 * 32 * 48, 2 * 4 * 32 * 32
    assert share_in_sites(model, gm.fxshare.plan, example) == pytest.approx(fc / (fc + attention))


@pytest.mark.slow
def test_every_family_is_built_small() -> None:
    for name in families():
        if name in IMPOSSIBLE or name == "gemma3n":  # gemma3n asks for timm
            continue
        model = build(name)
        assert sum(p.numel() for p in model.parameters()) < 4_000_000, name
        call = call_of(model, (5, 3), 0)
        with torch.no_grad():
            assert model(**call).logits.isfinite().all(), name


# the command


def test_families_run_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def pretended(name: str) -> Row:
        if name == "ends":
            os._exit(3)
        if name == "hangs":
            time.sleep(60)
        return Row(name, front_end="fx")

    monkeypatch.setattr(command, "measure", pretended)
    monkeypatch.setattr(command, "_warm_up", lambda: None)
    threads = torch.get_num_threads()
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(asdict(Row("known"))) + "\n", encoding="utf-8")
    monkeypatch.setattr(
        command, "families", lambda: dict.fromkeys(("known", "ends", "hangs", "b"), "")
    )
    try:
        command.main(["-o", str(file), "--limit", "1"])
    finally:
        torch.set_num_threads(threads)
    rows = {row.name: row for row in command.read(file)}
    assert list(rows) == ["known", "ends", "hangs", "b"]
    assert rows["known"].front_end == ""
    assert rows["ends"].reason == "the process ended: 3"
    assert rows["hangs"].reason == "not done within 1 s"
    assert rows["b"].front_end == "fx"


# the page

_ROWS = (
    Row("b", front_end="fx", limit=80.0, generate="same", runs="graphs", in_sites=1.0),
    Row(
        "a",
        front_end="modules",
        reason="tried fx: tracing A failed at /x/site-packages/transformers/m.py:3, after %y : "
        "[num_users=0] = call_function[target=z](args = (), kwargs = {}): TypeError: no",
        ulps=90.0,
        limit=80.0,
        generate="other tokens",
        runs="generate: a step runs the model's own code, because no graph does: it is Tuesday",
        in_sites=0.25,
    ),
    Row("c", not_built="reads what a larger model made"),
    Row("d", front_end="fx", limit=80.0, generate="– TypeError: no", in_sites=1.0),
)


def test_the_section() -> None:
    text = section(_ROWS, "5.0")
    assert "* 4 families of transformers 5.0, 3 of them built small" in text
    assert "* captured by fx: 2, modules: 1" in text
    assert "* exact within what rounding explains: 2" in text
    assert "* the original's tokens: 1 of 2 that generate (graphs: 1)" in text
    assert "| a | modules | 90.0 **not equal** | no | own code | 25% |" in text
    assert "| d | fx | 0.0 | – | – | 100% |" in text
    assert "* **a**: tried fx: tracing A failed at transformers/m.py:3: TypeError: no" in text
    assert "* **a**: it is Tuesday" in text
    assert "* **c**: reads what a larger model made" in text


def test_the_section_takes_its_own_place() -> None:
    page = "# Title\n\ntable\n\nMeasured with torch.\n"
    once = put_into(page, section(_ROWS, "5.0"))
    assert once.startswith("# Title\n\ntable\n\n<!-- every causal family -->\n")
    assert once.endswith("Measured with torch.\n")
    assert section_of(once) == section(_ROWS, "5.0")
    assert put_into(once, section(_ROWS[:1], "5.1")).count("## Every causal family") == 1
    assert section_of(page) == ""


def test_reasons_are_short_and_of_no_machine() -> None:
    assert len(shortened("x" * 1000)) == 240
    assert "/home" not in shortened("at /home/me/lib/site-packages/torch/a.py:1")


def test_the_page_has_every_family_of_the_installed_transformers() -> None:
    text = _needs_the_transformers_of_the_page()
    assert all(f"| {name} |" in text or f"* **{name}**:" in text for name in families())
