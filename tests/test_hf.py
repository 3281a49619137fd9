"""Saved folders through transformers' Auto classes, and ``save_pretrained``."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxshare
from fxshare.errors import StoreError

transformers = pytest.importorskip("transformers")
import fxshare.hf  # noqa: E402

IDS = torch.randint(64, (2, 10), generator=torch.Generator().manual_seed(0))
SHARING = {"group_size": 2, "compression_rate": 0.7}


def small(name: str) -> Any:
    """A random small model and the configuration that fits it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "gpt2":
            config = transformers.GPT2Config(
                n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=64, bos_token_id=0
            )
            pattern = {"fc": {"pattern": r".*\.mlp\.c_fc$"}}
            model, layers = transformers.GPT2LMHeadModel(config), r"h\.(\d+)"
        else:
            config = transformers.LlamaConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=64,
                max_position_embeddings=64,
                initializer_range=0.3,
            )
            pattern = {"up": {"pattern": r".*\.up_proj$"}}
            model, layers = transformers.LlamaForCausalLM(config), r"layers\.(\d+)"
    model.generation_config.pad_token_id = 1
    model.generation_config.eos_token_id = None
    return model.eval(), {"weight_types": pattern, "block_pattern": layers}


def continued(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """The model, its exact graph, and the folder of that."""
    model, config = small("llama")
    gm = fxshare.compile(model, config, example=IDS)
    path = tmp_path_factory.mktemp("hf") / "out"
    gm.save_pretrained(path)
    return model, gm, path


@pytest.mark.parametrize("front_end", ["fx", "modules"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generates_like_the_original(name: str, front_end: Any, tmp_path: Path) -> None:
    model, config = small(name)
    example = IDS if front_end == "fx" else None
    for mode in ({}, SHARING) if name == "llama" else ({},):
        gm = fxshare.compile(model, {**config, **mode}, example=example, capture=front_end)
        gm.save_pretrained(tmp_path / "out")  # in place of the first
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert not loaded.training
        assert torch.equal(loaded(IDS).logits, gm(IDS).logits)
        assert torch.equal(continued(loaded), continued(gm))
        assert torch.equal(continued(loaded), continued(model)) or mode
        assert type(loaded.config) is type(model.config)
        assert loaded.fxshare.report.front_end == front_end


def test_the_folder_is_that_of_save(llama: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, gm, path = llama
    fxshare.save(gm, tmp_path / "saved")
    first, second = (
        {p.name: p.read_bytes() for p in f.iterdir()} for f in (path, tmp_path / "saved")
    )
    assert first == second
    assert torch.equal(fxshare.load(path)(IDS).logits, gm(IDS).logits)


def test_the_configuration_carries_the_original(llama: tuple[Any, Any, Path]) -> None:
    model, _, path = llama
    config = transformers.AutoConfig.from_pretrained(path)
    assert type(config) is fxshare.hf.FxShareConfig
    assert config.original["model_type"] == "llama"
    assert (config.vocab_size, config.hidden_size) == (64, 16)
    assert not hasattr(config, "n_embd")
    assert not config.is_encoder_decoder
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    written = json.loads((path / "config.json").read_text())
    # a tool that reads architectures must not make the original's class from our weights
    assert not any(hasattr(transformers, name) for name in written["architectures"])
    original = transformers.LlamaConfig.from_dict(written["original"])
    assert original.to_dict() == {**model.config.to_dict(), "dtype": original.to_dict()["dtype"]}


def test_defaults_of_generation_are_kept(llama: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, gm, _ = llama
    gm = copy.deepcopy(gm)
    gm.generation_config.max_new_tokens = 3
    gm.save_pretrained(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for one in (loaded, fxshare.load(tmp_path / "out")):
        assert one.generation_config.max_new_tokens == 3
        assert one.generate(IDS).shape == (2, 13)
    # the file is the user's to edit
    path = tmp_path / "out" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 5}))
    edited = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert edited.generate(IDS).shape == (2, 15)


def test_options_of_from_pretrained(llama: tuple[Any, Any, Path]) -> None:
    _, gm, path = llama
    load = transformers.AutoModelForCausalLM.from_pretrained
    half, info = load(path, dtype="bfloat16", device_map="cpu", output_loading_info=True)
    assert half.dtype == torch.bfloat16
    assert info["missing_keys"] == set()
    assert load(str(path), dtype=torch.float64, low_cpu_mem_usage=True).dtype == torch.float64
    assert load(path, dtype="auto", trust_remote_code=False).dtype == gm.dtype
    for options, message in [
        ({"device_map": {"a": 0, "b": 1}}, "one device"),
        ({"quantization_config": {"load_in_4bit": True}}, "does not take quantization_config"),
        ({"max_memory": {0: 1}}, "does not take max_memory"),
    ]:
        with pytest.raises(StoreError, match=message):
            load(path, **options)


def test_another_auto_class_is_refused(llama: tuple[Any, Any, Path]) -> None:
    _, _, path = llama
    for auto in (transformers.AutoModel, transformers.AutoModelForMaskedLM):
        with pytest.raises(StoreError, match=r"LlamaForCausalLM, which Auto\w+ does not make; use"):
            auto.from_pretrained(path)
    config = transformers.AutoConfig.from_pretrained(path)
    with pytest.raises(StoreError, match=r"config\.json alone"):
        transformers.AutoModelForCausalLM.from_config(config)


def test_an_encoder_through_its_auto_class(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
    )
    model = transformers.BertModel(config).eval()
    gm = fxshare.compile(model, {"weight_types": {"q": {"pattern": r".*\.query$"}}}, example=IDS)
    gm.save_pretrained(tmp_path / "out")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(IDS).last_hidden_state, gm(IDS).last_hidden_state)


def test_what_save_pretrained_refuses(llama: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, gm, _ = llama
    for options, message in [
        ({"safe_serialization": False}, "would pickle"),
        ({"push_to_hub": True}, "push_to_hub is not supported"),
        ({"state_dict": {}}, "state_dict is not supported"),
        ({"max_shard_size": "many"}, "expected a number of bytes or a size"),
    ]:
        with pytest.raises(StoreError, match=message):
            gm.save_pretrained(tmp_path / "out", **options)
    gm.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.txt").write_text("a")
    with pytest.raises(StoreError, match="fxshare did not make it"):
        gm.save_pretrained(tmp_path / "theirs")
    gm.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(loaded(IDS).logits, gm(IDS).logits)


def test_a_copy_at_module_granularity_saves_itself(tmp_path: Path) -> None:
    model, config = small("gpt2")
    gm = fxshare.compile(model, config, capture="modules")
    again = copy.deepcopy(gm)
    with torch.no_grad():
        again.transformer.wte.weight.mul_(2)
    again.save_pretrained(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.transformer.wte.weight, again.transformer.wte.weight)
    assert not torch.equal(loaded.transformer.wte.weight, gm.transformer.wte.weight)


def test_without_the_import_nothing_is_loaded_as_something_else(
    llama: tuple[Any, Any, Path],
) -> None:
    _, _, path = llama
    code = (
        "import sys, transformers\n"
        "try: transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except ValueError as e: print('refused', 'fxshare' in str(e))\n"
        "import fxshare.hf\n"
        "print(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).can_generate())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert ran.stdout.split() == ["refused", "True", "True"], ran.stderr
