"""The packaged files agree with the code. Skipped only in a checkout without the weights."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from fxshare.embedded import load_embedded, load_tokenizer
from fxshare.embedded.corpus import Document, held_out, load_documents, pack, role_of, token_stream
from fxshare.embedded.evaluate import bits_per_byte, predicted_bytes

PACKAGE = files("fxshare.embedded")

pytestmark = pytest.mark.skipif(
    not PACKAGE.joinpath("model.safetensors").is_file(), reason="no packaged weights"
)


def test_size() -> None:
    names = ["model.safetensors", "bpe.json", "training.json"]
    assert sum(len(PACKAGE.joinpath(name).read_bytes()) for name in names) <= 12_000_000


def test_the_tokenizer_fits_the_model() -> None:
    assert load_tokenizer().vocab_size == load_embedded().config.vocab_size


def test_the_split_is_the_one_of_the_training() -> None:
    report = json.loads(PACKAGE.joinpath("training.json").read_text(encoding="utf-8"))
    assert report["held_out_modules"]
    assert all(role_of(name) == "held_out" for name in report["held_out_modules"])


def test_the_model_has_learnt() -> None:
    """Well below 8 bits on held-out text, and far above that on its letters in reverse."""
    model, tokenizer = load_embedded(), load_tokenizer()
    documents = held_out(load_documents())
    reverse = [Document(document.name, document.text[::-1]) for document in documents]

    def bits(texts: list[Document]) -> float:
        windows = pack(token_stream(texts, tokenizer))
        windows = windows[:: max(1, len(windows) // 16)]
        return bits_per_byte(model, windows, predicted_bytes(windows, tokenizer.token_bytes))

    found = bits(documents)
    assert found < 2.2
    assert bits(reverse) > found + 1
