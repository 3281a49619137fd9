"""The frontier of loss against bytes: every method at one size, counted in the saved file."""

from __future__ import annotations

import math

import torch

from fxshare.bench.demo import CONFIG
from fxshare.bench.frontier import EVERYTHING, Frontier, Row, bench_frontier, table
from fxshare.bench.quality import Case
from fxshare.embedded.model import GPT, GPTConfig


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
    found = bench_frontier([case], sizes=(0.6,), batch=8, second={"small": tokens[8:]})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    methods = [one.method for one in found.rows]
    assert methods == [
        *(f"dense, {bits} bits, {how}" for bits in (8, 4) for how in ("feedback", "nearest")),
        "bases",
        "bases, 8 bits",
        "units",
        EVERYTHING,
    ]
    for one in found.rows:
        assert math.isfinite(one.increase)
        assert one.second is not None
        assert 0 < one.kept <= (one.size or 0.6) + 5e-3
    (cells,) = table(found, (0.6,))[1]
    best = found.best("small", 0.6)
    assert best is not None
    assert cells[-1] == best.method
    assert found.to_dict()["rows"][0]["method"] == methods[0]


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
    header, cells = table(found, (0.5, 0.6))
    assert header == ["model", "bytes kept", "bases", EVERYTHING, "dense in bits", "least"]
    assert cells[0] == ["small", "0.50", "2.0000", "0.5000", "–", EVERYTHING]
    assert cells[1] == ["small", "0.60", "1.0000", "0.2000", "0.1000", "dense, 8 bits, nearest"]
