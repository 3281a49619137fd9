"""Token data from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fxshare.data.stream import load_tokens, read_stream
from fxshare.embedded import corpus
from fxshare.embedded.bpe import SEPARATOR, Tokenizer
from fxshare.errors import DataError, FxShareWarning

BYTES = Tokenizer([])  # one id per byte


def test_text_in_windows_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("déjà vu".encode())
    found = load_tokens(str(path), tokenizer=BYTES, length=4)
    assert found.dtype == torch.int64
    assert found.tolist() == [list("déjà vu".encode())[:4], list("déjà vu".encode())[4:8]]
    stream = read_stream(str(path), tokenizer=BYTES)
    assert stream.bytes_per_token == 1.0


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab")
    assert read_stream(str(tmp_path / "a.txt"), tokenizer=BYTES).ids.tolist() == [97, 98]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"abc\xffdef", r"byte 3 \(0xff\)"),
        (b"", "found nothing"),
        (b" \n", "found only white space"),
    ],
)
def test_text_that_does_not_do(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_stream(str(tmp_path / "a.txt"), tokenizer=BYTES)


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "body": "xy"}\n\n{"text": "b", "body": "z"}\n')
    assert BYTES.decode(read_stream(str(path), tokenizer=BYTES).ids.tolist()) == "a\n\nb"
    stream = read_stream(f"{path}:body", tokenizer=BYTES)
    assert BYTES.decode(stream.ids.tolist()) == "xy\n\nz"
    with pytest.raises(
        DataError, match=r"line 1: expected an object with text under 'title'.*body"
    ):
        read_stream(f"{path}:title", tokenizer=BYTES)
    path.write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(DataError, match="line 2: expected JSON"):
        read_stream(str(path), tokenizer=BYTES)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_token_files(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(12, dtype=dtype).reshape(3, 4))
    found = load_tokens(str(path), tokenizer=None, length=6)
    assert found.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_a_named_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"train": torch.arange(6), "test": torch.arange(4), "x": torch.ones(3)}, path)
    assert read_stream(f"{path}:test", tokenizer=None).ids.tolist() == [0, 1, 2, 3]
    for spec, message in [
        (f"{path}", "3 tensors; choose one"),
        (f"{path}:tset", "no tensor 'tset'"),
        (f"{path}:x", "expected whole numbers"),
    ]:
        with pytest.raises(DataError, match=message):
            read_stream(spec, tokenizer=None)
    save_file({"only": torch.arange(6, dtype=torch.int32)}, path)
    assert read_stream(str(path), tokenizer=None).ids.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4), "expected whole numbers"),
        (np.zeros((2, 2, 2), dtype=int), "expected shape"),
        (np.zeros(0, dtype=int), "found none"),
        (np.array([1, -2]), "found -2 at position 1"),
    ],
)
def test_arrays_that_are_no_tokens(tmp_path: Path, array: Any, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=message):
        read_stream(str(tmp_path / "a.npy"), tokenizer=None)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_damaged_token_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"not a token file")
    with pytest.raises(DataError, match="cannot be read"):
        read_stream(str(path), tokenizer=None)


def test_pickled_arrays_are_not_run(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        read_stream(str(tmp_path / "a.npy"), tokenizer=None)


def test_a_seeded_choice_of_windows(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(103))
    options: dict[str, Any] = {"tokenizer": None, "length": 10}
    every = load_tokens(f"{tmp_path}/a.npy", **options)
    assert every.shape == (10, 10)
    first, again, other = (
        load_tokens(f"{tmp_path}/a.npy", count=4, seed=seed, **options) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rows = first[:, 0].tolist()
    assert rows == sorted(set(rows))
    assert all(row % 10 == 0 for row in rows)
    with pytest.warns(FxShareWarning, match="11 windows of 10 tokens were asked for"):
        assert torch.equal(load_tokens(f"{tmp_path}/a.npy", count=11, **options), every)


def test_ids_that_the_model_does_not_know(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 7, 9]))
    read_stream(f"{tmp_path}/a.npy", tokenizer=None, vocabulary=10)
    with pytest.raises(DataError, match="0 to 8, found 9 at position 2"):
        read_stream(f"{tmp_path}/a.npy", tokenizer=None, vocabulary=9)


def test_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [corpus.Document(f"m{i}.py", f"x = {i}\n") for i in range(200)]
    monkeypatch.setattr(corpus, "load_documents", lambda: documents)
    test = read_stream("stdlib:held-out", tokenizer=BYTES)
    held_out = corpus.held_out(documents)
    assert test.ids.tolist() == corpus.token_stream(held_out, BYTES)
    assert isinstance(test.bytes_per_token, torch.Tensor)
    assert test.bytes_per_token[SEPARATOR] == 0
    train = read_stream("stdlib", tokenizer=BYTES)
    assert int((train.ids == SEPARATOR).sum()) == 200 - len(held_out)
    with pytest.raises(DataError, match="or 'stdlib:held-out', found 'test'"):
        read_stream("stdlib:test", tokenizer=BYTES)


def test_a_tokenizer_of_another_model_reads_the_standard_library_as_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Words:
        def encode(self, text: str) -> list[int]:
            return [len(word) for word in text.split()]

    monkeypatch.setattr(corpus, "load_documents", lambda: [corpus.Document("a.py", "a bcd\n")])
    monkeypatch.setattr(corpus, "calibration", list)
    stream = read_stream("stdlib", tokenizer=Words())
    assert stream.ids.tolist() == [1, 3]
    assert stream.bytes_per_token == 3.0


def test_a_path_with_a_colon_is_taken_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl:b.txt"
    path.write_text("ab")
    assert read_stream(str(path), tokenizer=BYTES).ids.tolist() == [97, 98]


@pytest.mark.parametrize("name", ["a.bin", "a"])
def test_other_kinds_of_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps([1]))
    with pytest.raises(DataError, match=r"expected a \.txt"):
        read_stream(str(tmp_path / name), tokenizer=BYTES)
