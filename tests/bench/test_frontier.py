"""The frontier of loss against bytes: every method at one size, counted in the saved file."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fxshare.bench.demo import CONFIG
from fxshare.bench.frontier import Texts, _bench_of, bench_frontier
from fxshare.bench.frontier_plot import curves
from fxshare.bench.frontier_table import (
    EVERYTHING,
    Frontier,
    Row,
    dense_table,
    refined_table,
    speed_table,
    table_of,
)
from fxshare.bench.quality import Case
from fxshare.bench.refined import Refined
from fxshare.cli import main
from fxshare.cli.bench.frontier import named
from fxshare.embedded.model import GPT, GPTConfig
from fxshare.errors import ConfigError
from fxshare.proposing.propose import init


def row(method: str, size: float | None, kept: float, increase: float) -> Row:
    """A row of a case of no importance."""
    return Row("small", method, size, kept, increase, None, None, 0.0)


def test_every_method_at_one_size_within_its_bytes() -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=32, n_layer=2, n_head=2, n_embd=32, block_size=16)
    model = GPT(config).eval()
    tokens = torch.randint(0, 32, (16, 16))
    case = Case("small", model, CONFIG, tokens, tokens[:8])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    more = {"second": {"small": tokens[8:]}, "refine": 0.005}
    found = bench_frontier([case], sizes=(0.6,), batch=8, **more)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    methods = [one.method for one in found.rows]
    assert methods == [
        *(f"dense, {bits} bits, {how}" for bits in (8, 4) for how in ("feedback", "nearest")),
        EVERYTHING,
        "bases",
        "bases, 8 bits",
        "units",
    ]
    for one in found.rows:
        assert math.isfinite(one.increase)
        assert one.second is not None
        assert 0 < one.kept <= (one.size or 0.6) + 5e-3
    (cells,) = table_of(found, (0.6,))[1]
    best = found.best("small", 0.6)
    assert best is not None
    assert cells[-2] == best.method
    assert found.to_dict()["rows"][0]["method"] == methods[0]
    assert {one.method for one in found.rows if one.refined} >= {EVERYTHING}


def test_one_model_is_refined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=32, n_layer=1, n_head=2, n_embd=32, block_size=16)).eval()
    tokens = torch.randint(0, 32, (16, 16))
    bench = _bench_of(Case("small", model, CONFIG, tokens, tokens), None, (8, "off", 0, False))
    eight, four = (bench.planned(1.0, {"kinds": ["units"], "bits": [n]}) for n in (8, 4))
    again = bench.planned(1.0, {"kinds": ["units"], "bits": [8]})
    seen: list[object] = []

    def refined_on(gm: object, *_: object, **__: object) -> None:
        seen.append(gm)

    monkeypatch.setattr("fxshare.bench.frontier.refined_on", refined_on)
    rows = [row("one", None, 0.5, loss) for loss in (0.1, 0.1, 0.1, 0.2)]
    found = bench.refined(list(zip(rows, (eight, again, four, eight), strict=True)), 1.0, 0)
    assert list(found) == [id(one) for one in rows]
    assert seen == [eight, four, eight]


def test_the_least_is_of_what_fits() -> None:
    rows = (
        row("dense, 8 bits, nearest", None, 0.51, 0.1),
        row("bases", 0.5, 0.499, 2.0),
        row(EVERYTHING, 0.5, 0.5, 0.5),
        row("bases", 0.6, 0.6, 1.0),
        row(EVERYTHING, 0.6, 0.6, 0.2),
    )
    found = Frontier({}, 0, "off", {"small": 1.0}, rows, 0.0)
    assert found.best("small", 0.5) == rows[2]
    assert found.best("small", 0.5, alone=True) == rows[1]
    assert found.best("small", 0.6) == rows[0]
    assert found.best("small", 0.1) is None
    header, cells = table_of(found, (0.5, 0.6))
    assert header == [
        "model",
        "bytes kept",
        "bases",
        EVERYTHING,
        "dense in bits",
        "least",
        "everything / best single",
    ]
    assert cells[0] == ["small", "0.50", "2.0000", "0.5000", "–", EVERYTHING, "0.25"]
    assert cells[1] == [
        "small",
        "0.60",
        "1.0000",
        "0.2000",
        "0.1000",
        "dense, 8 bits, nearest",
        "2.00",
    ]


def test_a_second_corpus_and_speeds_have_tables_of_their_own() -> None:
    alone = Row("small", "bases", 0.5, 0.5, 1.0, 3.0, None, 0.0, prompt=1.5, one=0.5)
    found = Frontier({}, 0, "off", {"small": 1.0, "other": 1.0}, (alone,), 0.0)
    assert table_of(found, (0.5,), second=True)[1] == [
        ["small", "0.50", "3.0000", "–", "bases", "–"]
    ]
    both = dataclasses.replace(
        found, rows=(alone, Row("small", EVERYTHING, 0.5, 0.5, 0.5, 0.75, None, 0.0))
    )
    ratios = [table_of(both, (0.5,), second=second)[1][0][-1] for second in (False, True)]
    assert ratios == ["0.50", "0.25"]  # each of its own corpus
    assert speed_table(found)[1] == [["small", "0.500", "bases", "1.50", "0.50"]]
    assert dense_table(found)[1] == []
    coded = Row("small", "dense, 4 bits, nearest", None, 0.2813, 0.25, 0.5, None, 0.0)
    few = dataclasses.replace(found, rows=(alone, coded))
    assert dense_table(few)[1] == [["small", "4 bits, nearest", "0.281", "0.25000", "0.50000"]]
    first = dataclasses.replace(few, rows=(dataclasses.replace(coded, second=None),))
    assert dense_table(first)[0][-1] == "loss"
    assert curves(found, "small") == {"bases": [(0.5, 1.0)]}


def test_what_is_refined_has_a_table_of_its_own() -> None:
    def after(increase: float) -> Refined:
        return Refined(increase, 7, 100, 1.0)

    rows = (
        dataclasses.replace(row("dense, 8 bits, nearest", None, 0.5, 0.1), refined=None),
        dataclasses.replace(row("bases", 0.5, 0.5, 0.8), refined=after(0.4)),
        dataclasses.replace(row(EVERYTHING, 0.5, 0.5, 0.5), refined=after(0.3)),
    )
    found = Frontier({}, 0, "off", {"small": 1.0}, rows, 0.0)
    assert found.contenders("small", 0.5) == rows[1:]
    cells = ["small", "0.50", "bases", "0.8000", "0.4000", "0.5000", "0.3000", "0.75", "7 / 7"]
    assert refined_table(found, (0.5, 0.4))[1] == [cells]
    assert table_of(found, (0.5,))[1][0][-1] == "5.00"  # codes that are nearest are no plan


def test_nothing_to_measure_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "frontier", "--no-embedded"]) == 2
    assert "leaves nothing to measure; give --model" in capsys.readouterr().err


def test_methods_are_named_as_the_table_names_them() -> None:
    assert named(None) is None
    assert named("everything,bases, 8 bits,bases") == [EVERYTHING, "bases, 8 bits", "bases"]
    with pytest.raises(ConfigError, match="'layers' is no method"):
        named("bases,layers")


def test_embeddings_of_an_encoder_turn_with_fewer_bytes() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32}
    sizes = transformers.BertConfig(vocab_size=32, intermediate_size=64, **small)
    bert = transformers.BertModel(sizes).eval()
    ids = torch.randint(1, 32, (4, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    types = init(bert).model_dump(include={"weight_types", "block_pattern"})
    case = Texts("bert", bert, types, [batch, batch], [batch])
    found = bench_frontier([case], sizes=(0.6,))
    assert found.dense_loss["bert"] == pytest.approx(0.0, abs=1e-6)
    lost = {one.method: one.increase for one in found.rows}
    assert -1e-6 < lost["dense, 8 bits, nearest"] < lost["dense, 4 bits, nearest"] < 1
