"""The folder that the documents speak of: models, tokens, a corpus, our configurations."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CORPUS = "\n\n".join(
    f"The {n}th paragraph of this corpus says that {n} times {n} is {n * n}." for n in range(30)
)


def _tokenizer() -> Any:
    """One id for each byte, and 256 for padding."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)} | {"<pad>": 256}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        padding_side="left",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def _models() -> dict[str, Any]:
    """Random models by the folder that the documents call them."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 260, "pad_token_id": 256, "eos_token_id": 257, "bos_token_id": 257}
    gpt2 = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=64, **common)
    llama = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        **common,
    )
    t5 = transformers.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=256,
        dropout_rate=0.0,
        **{k: v for k, v in common.items() if k != "bos_token_id"},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "my-gpt2": transformers.GPT2LMHeadModel(gpt2),
            "my-llama": transformers.LlamaForCausalLM(llama),
            "my-t5": transformers.T5ForConditionalGeneration(t5),
        }


@pytest.fixture(scope="session")
def _furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("documents")
    tokenizer = _tokenizer()
    for name, model in _models().items():
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    shutil.copytree(path / "my-gpt2", path / "my-model")
    shutil.copytree(path / "my-llama", path / "model-folder")
    (path / "corpus.txt").write_text(CORPUS, encoding="utf-8")
    save_file({"tokens": torch.tensor(tokenizer.encode(CORPUS))}, path / "tokens.safetensors")
    shutil.copytree(ROOT / "configs", path / "configs")
    gpt2 = path / "configs" / "gpt2.yaml"  # for 12 heads as it stands
    gpt2.write_text(gpt2.read_text(encoding="utf-8").replace("n_head: 12", "n_head: 2"))
    return path


@pytest.fixture
def room(_furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own copy of the folder, current and on Python's path, with a cache of its own."""
    shutil.copytree(_furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path
