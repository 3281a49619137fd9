"""``fxshare bench generate``, small."""

from __future__ import annotations

import json

import pytest

from fxshare.bench.generate import VARIANTS, bench_generate, llama, t5, table
from fxshare.cli import main


def test_measures_all_forms() -> None:
    result = bench_generate(llama(32, 1, 2, 48), shape="32,1,2,48", new=6, prompt=6, repeats=1)
    assert result.same_tokens
    assert result.notes == ()
    assert set(result.tokens_per_second) == set(VARIANTS)
    header, rows = table(result)
    assert all(len(row) == len(header) for row in rows)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--shape", "32,1,2,48", "--new", "9", "--prompt", "4", "--repeats", "1"]
    code = main(["bench", "generate", *sizes, "--json", "--threads", "1"])
    assert code == 0
    assert json.loads(capsys.readouterr().out)["to_modules"]["modules"] == 1.0


def test_measures_an_encoder_and_a_decoder() -> None:
    result = bench_generate(t5(32, 1, 2, 48), shape="32,1,2,48", new=6, prompt=6, repeats=1)
    assert result.same_tokens
    assert result.notes == ()
