"""Windows start with what the tokenizer puts before a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from fxshare.bench.perplexity import evaluate
from fxshare.cli import main
from fxshare.data.batches import Sampling, sample_batches
from fxshare.data.starts import before_text
from fxshare.data.stream import load_tokens, read_stream
from fxshare.errors import DataError, FxShareWarning
from tests.bench.test_perplexity import Table
from tests.loading.test_in_and_out import byte_tokenizer, llama

BOS, EOS = 257, 258
TEXT = "abcdefghijklm\n\nnopqrstuvwxyz"


def tokenizer(single: str) -> Any:
    """Bytes, in a template such as ``<s> $A </s>``."""
    found = byte_tokenizer()
    found.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    found.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return found


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text(TEXT)
    return str(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("single", "before"),
    [("$A", ()), ("<s> $A", (BOS,)), ("<s> </s> $A", (BOS, EOS)), ("<s> $A </s>", (BOS,))],
)
def test_every_window_starts_so_and_has_the_text_once(
    text: str, single: str, before: tuple[int, ...]
) -> None:
    made = tokenizer(single)
    assert before_text(made) == before
    plain = read_stream(text, tokenizer=made).ids
    assert plain.tolist() == made.encode(TEXT, add_special_tokens=False)
    windows = load_tokens(text, tokenizer=made, length=6)
    assert windows.shape == (len(plain) // (6 - len(before)), 6)
    assert {tuple(row[: len(before)]) for row in windows.tolist()} == {before}
    own = windows[:, len(before) :].flatten()
    assert torch.equal(own, plain[: len(own)])
    (batch,) = sample_batches(text, Sampling(length=6, batch_size=99), tokenizer=made)
    assert torch.equal(batch, windows)
    without = load_tokens(text, tokenizer=made, length=6, bos=False)
    assert torch.equal(without.flatten(), plain[: without.numel()])


def test_places_of_a_large_file_and_documents(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokenizer("<s> $A </s>")
    monkeypatch.setattr("fxshare.data.batches.LARGE", 4)
    sampling = {"length": 5, "count": 2, "batch_size": 9}
    with pytest.warns(FxShareWarning, match="2 samples were asked for"):
        (places,) = sample_batches(text, Sampling(**sampling), tokenizer=made)
    assert places[:, 0].tolist() == [BOS] * len(places)
    for bos, first in ((True, BOS), (False, ord("a") - 33)):
        sampled = Sampling(length=99, padded=True, count=2, bos=bos)
        (documents,) = sample_batches(text, sampled, tokenizer=made)
        assert documents["input_ids"][0, 0] == first  # type: ignore[index]


def test_token_files_are_taken_as_they_are_with_a_warning(tmp_path: Path) -> None:
    made = tokenizer("<s> $A")
    rows = np.array([[BOS, 1, 2, 3], [BOS, 4, 5, 6]])
    np.save(tmp_path / "with.npy", rows)
    np.save(tmp_path / "without.npy", rows[:, 1:])
    assert load_tokens(f"{tmp_path}/with.npy", tokenizer=made, length=4).tolist() == rows.tolist()
    options: dict[str, Any] = {"tokenizer": made}
    said = "2 of 2 windows do not start with 257, the token that the tokenizer puts before"
    for padded in (False, True):
        sampling = Sampling(length=3, padded=padded)
        with pytest.warns(FxShareWarning, match=said):
            (batch,) = sample_batches(f"{tmp_path}/without.npy", sampling, **options)
        ids = batch["input_ids"] if padded else batch  # type: ignore[index]
        assert ids.tolist() == rows[:, 1:].tolist()
    with pytest.warns(FxShareWarning, match="2 of 4 windows do not start"):
        load_tokens(f"{tmp_path}/with.npy", length=2, **options)
    load_tokens(f"{tmp_path}/without.npy", length=3, bos=False, **options)


@pytest.mark.parametrize("before", [(), (5,), (5, 6)])
@pytest.mark.parametrize("protocol", ["A", "B"])
def test_what_comes_before_is_read_and_not_predicted(before: Any, protocol: Any) -> None:
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    own = 4 - len(before)
    rows = [ids[at : at + own].tolist() for at in range(0, len(ids), own)]
    if protocol == "A":
        rows = [row for row in rows if len(row) == own]
    log = torch.log_softmax(table.double(), -1)
    losses = [
        [-float(log[a, b]) for a, b in zip([*before[-1:], *row], row[not before :], strict=False)]
        for row in rows
    ]
    found = evaluate(Table(table), ids, protocol=protocol, length=4, before=before)
    flat = [x for row in losses for x in row]
    means = [sum(row) / len(row) for row in losses if row]
    assert found.tokens == len(flat)
    expected = sum(flat) / len(flat) if protocol == "A" else sum(means) / len(means)
    assert found.nll == pytest.approx(expected, abs=1e-6)
    assert ("every window starts with 5" in found.description) == bool(before)


def test_windows_too_short_for_it(text: str) -> None:
    with pytest.raises(DataError, match="windows of at least 2 tokens, found 1"):
        load_tokens(text, tokenizer=tokenizer("<s> $A"), length=1)
    with pytest.raises(DataError, match="window length of at least 3, found 2"):
        evaluate(Table(torch.zeros(7, 7)), torch.arange(7), length=2, before=(1, 2))


def test_the_command_line_says_it(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "model")
    transformers.LlamaForCausalLM(llama()).save_pretrained(folder)
    tokenizer("<s> $A").save_pretrained(folder)
    command = ["eval", folder, "--data", text, "--length", "8", "--quiet"]
    said = []
    for options in ([], ["--no-bos"]):
        assert main([*command, *options]) == 0
        said.append(capsys.readouterr().out)
        assert main([*command, *options, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["starts_with"] == ([] if options else [BOS])
    sentence = "every window starts with 257, which the tokenizer puts before a text"
    assert [sentence in one for one in said] == [True, False]
    cfg = tmp_path / "cfg.yaml"
    assert main(["init", folder, "-o", str(cfg), "--quiet"]) == 0
    share = ["--set", "compression_rate=0.5", "--set", "group_size=2"]
    compile_ = ["compile", folder, "-c", str(cfg), *share, "--calibration", text, "--length", "8"]
    capsys.readouterr()
    for options in ([], ["--no-bos"]):
        assert main([*compile_, *options, "--quiet"]) == 0
        found = capsys.readouterr().out
        assert ("every sample starts with token 257" in found) == (not options)
