"""Models by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fxshare.errors import DataError, FxShareWarning
from fxshare.loading.names import load_model
from fxshare.models.traits import context_of, example_ids, vocabulary_of
from passes.errors import FxShareError


def test_a_transformers_folder(gpt2: Path) -> None:
    loaded = load_model(str(gpt2))
    assert loaded.kind == "transformers"
    assert type(loaded.model).__name__ == "GPT2LMHeadModel"
    assert loaded.tokenizer is None
    assert (vocabulary_of(loaded.model), context_of(loaded.model)) == (48, 32)
    example = example_ids(loaded.model)
    assert example is not None
    assert example.shape == (2, 16)


def test_a_transformers_folder_with_a_tokenizer(gpt2: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for file in gpt2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?").save_pretrained(
        tmp_path
    )
    tokenizer = load_model(str(tmp_path)).tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("a b a x") == [0, 1, 0, 2]


def test_weights_that_are_missing_are_named(gpt2: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    weights = load_file(gpt2 / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = (
        r"no weights for 1 parameters of GPT2LMHeadModel \(transformer\.h\.1\.mlp\.c_fc\.weight\)"
    )
    with pytest.raises(DataError, match=said):
        load_model(str(tmp_path))
    with pytest.warns(FxShareWarning, match=said):
        load_model(str(tmp_path), allow_missing=True)


def test_a_folder_that_transformers_cannot_read(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    (tmp_path / "model.safetensors").write_bytes((gpt2 / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match="transformers cannot load this folder"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DataError, match="expected a JSON object"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="expected JSON"):
        load_model(str(tmp_path))


def test_transformers_is_not_installed(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match=r"pip install 'fxshare\[hf\]'"):
        load_model(str(gpt2))


def test_the_path_is_as_before_after_an_import(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = list(sys.path)
    assert load_model("cli_toy:make").kind == "factory"
    with pytest.raises(FxShareError):
        load_model("cli_toy:broken")
    assert sys.path == before


def test_sizes_without_a_configuration() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Embedding(20, 4))
    assert vocabulary_of(model) == 20
    assert context_of(model) is None
    assert vocabulary_of(nn.Linear(2, 2)) is None
    assert example_ids(nn.Linear(2, 2)) is None


def test_made_up_ids_are_seeded() -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.embed(input_ids)
            return out

    first, again, other = (example_ids(Ids(), seed=s) for s in (0, 0, 1))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
