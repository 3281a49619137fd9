"""Weights that are not the model's: refused by name, with what they look like."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxshare
from fxshare.cli import main, make_app
from fxshare.errors import ConfigError, DataError, FxShareWarning, StoreError
from fxshare.loading.names import load_model
from fxshare.loading.state import load_weights

transformers = pytest.importorskip("transformers")
State = dict[str, Tensor]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
BERT = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models by name, saved."""
    tied = {**SIZES, "tie_word_embeddings": True}
    moe = {**SIZES, "num_local_experts": 2}
    made = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
        "tied": transformers.LlamaForCausalLM(transformers.LlamaConfig(**tied)),
        "body": transformers.LlamaModel(transformers.LlamaConfig(**SIZES)),
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        "classifier": transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)),
        "mixtral": transformers.MixtralForCausalLM(transformers.MixtralConfig(**moe)),
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        ),
    }
    root = tmp_path_factory.mktemp("keys")
    for name, model in made.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in made}


def changed(source: Path, target: Path, change: Callable[[State], State]) -> Path:
    """A copy of a folder with other weights."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    state = change(load_file(file))
    save_file({k: v.contiguous().clone() for k, v in state.items()}, file, {"format": "pt"})
    return target


def configured(folder: Path, **changes: Any) -> Path:
    """The same folder with its configuration changed; None removes a key."""
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: t for name, t in state.items() if name not in names}


def inside(state: State) -> State:
    """As saved from a model whose layers alone were compiled."""
    return {name.replace(".self_attn.", ".self_attn._orig_mod."): t for name, t in state.items()}


def half(state: State) -> State:
    """As of two state dicts put together."""
    names = sorted(state)[::2][:10]
    return {f"module.{n}" if n in names else n: tensor for n, tensor in state.items()}


def _more(state: State) -> State:
    return {**state, "model.layers.2.mlp.up_proj.weight": torch.ones(24, 16)}


def _turned(state: State) -> State:
    return {n: t.t() if n.endswith("up_proj.weight") else t for n, t in state.items()}


def _lora(state: State) -> State:
    name = "model.layers.0.self_attn.q_proj"
    found = {n: t for n, t in state.items() if n != f"{name}.weight"}
    return {
        **found,
        f"{name}.base_layer.weight": state[f"{name}.weight"],
        f"{name}.lora_A.default.weight": torch.ones(2, 16),
    }


WRONG: dict[str, tuple[Callable[[State], State], tuple[str, ...]]] = {
    "compiled": (
        prefixed("_orig_mod."),
        (
            "no weights for 21 parameters of LlamaForCausalLM",
            "21 weights that LlamaForCausalLM has no place for (_orig_mod.lm_head.weight",
            "All keys begin with _orig_mod.: saved from a model that torch.compile had wrapped",
            'k.replace("_orig_mod.", "")',
        ),
    ),
    "compiled inside": (
        inside,
        ("8 of 21 keys contain _orig_mod.: saved from a model that torch.compile had wrapped",),
    ),
    "half of them parallel": (half, ("10 of 21 keys begin with module.: saved from a model in",)),
    "parallel": (
        prefixed("module."),
        ("All keys begin with module.: saved from a model in DataParallel",),
    ),
    "parallel and compiled": (
        prefixed("_orig_mod.module."),
        ("All keys begin with _orig_mod.", 'k.replace("_orig_mod.", "")'),
    ),
    "sharded": (prefixed("_fsdp_wrapped_module."), ("saved from a model under FSDP",)),
    "adapter": (
        prefixed("base_model.model."),
        ("All keys begin with base_model.model.: saved from a model of PEFT; merge_and_unload",),
    ),
    "unmerged": (_lora, ("adapters of PEFT that are not merged",)),
    "a holder": (
        prefixed("net.inner."),
        ("All keys begin with net.inner.: saved from a module that holds the model",),
    ),
    "no head": (
        without("lm_head.weight"),
        (
            "no weights for 1 parameters of LlamaForCausalLM (lm_head.weight)",
            '"tie_word_embeddings": true',
        ),
    ),
    "one weight": (
        without("model.layers.1.mlp.up_proj.weight"),
        ("no weights for 1 parameters", "(model.layers.1.mlp.up_proj.weight)"),
    ),
    "a layer more": (
        _more,
        (
            "1 weights that LlamaForCausalLM has no place for (model.layers.2.mlp.up_proj.weight)",
            "belongs to a layer or part that the configuration does not make",
        ),
    ),
    "turned": (
        _turned,
        ("2 weights of another shape", "up_proj.weight: [16, 24] instead of [24, 16]"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_do_not_fit(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    change, said = WRONG[name]
    folder = changed(folders["llama"], tmp_path / "m", change)
    with pytest.raises(DataError) as raised:
        load_model(str(folder))
    for part in (*said, "--allow-missing"):
        assert part in str(raised.value)
    with pytest.warns(FxShareWarning, match=r"weights"):
        loaded = load_model(str(folder), allow_missing=True)
    assert type(loaded.model).__name__ == "LlamaForCausalLM"


def test_the_command_line_saves_nothing(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(folders["llama"], tmp_path / "m", prefixed("_orig_mod."))
    for command in ("compile", "plan", "init", "inspect"):
        more = ["-o", str(tmp_path / "out")] if command == "compile" else []
        assert main([command, str(folder), *more]) == 1
        assert "All keys begin with _orig_mod." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    folder = changed(folders["llama"], tmp_path / "n", without("lm_head.weight"))
    assert main(["compile", str(folder), "-o", str(tmp_path / "out"), "--allow-missing"]) == 0
    assert "warning: " in capsys.readouterr().err
    assert (tmp_path / "out" / "fxshare.json").is_file()


def test_every_command_with_a_model_has_the_option() -> None:
    def walk(command: Any, name: str = "") -> dict[str, set[str]]:
        found = {} if hasattr(command, "commands") else {name: {p.name for p in command.params}}
        for key, inner in getattr(command, "commands", {}).items():
            found |= walk(inner, f"{name} {key}")
        return found

    named = {"model", "original", "against"}
    commands = {n: p for n, p in walk(typer.main.get_command(make_app())).items() if p & named}
    assert len(commands) >= 10
    del commands[" estimate"]  # which reads no weights
    assert [n for n, parameters in commands.items() if "allow_missing" not in parameters] == []


def test_what_a_class_declares_is_not_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    assert "lm_head.weight" not in load_file(folders["tied"] / "model.safetensors")
    load_model(str(folders["tied"]))
    # constants that earlier versions of the classes stored
    old = {"bert.embeddings.position_ids": torch.arange(32)[None]}
    load_model(str(changed(folders["bert"], tmp_path / "bert", lambda s: {**s, **old})))
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    load_model(str(changed(folders["llama"], tmp_path / "llama", lambda s: {**s, **rotary})))
    load_model(str(folders["mixtral"]))  # whose names in files are other ones than in the class


def test_weights_that_cannot_be_put_together_are_named(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    name = "model.layers.1.block_sparse_moe.experts.1.w1.weight"
    assert name in load_file(folders["mixtral"] / "model.safetensors")
    folder = changed(folders["mixtral"], tmp_path / "m", without(name))
    with pytest.raises(DataError, match=r"model\.layers\.1\.\S*experts"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", "BertForMaskedLM"),
        ("classifier", "BertForSequenceClassification"),
        ("t5", "T5ForConditionalGeneration"),
        ("body", "LlamaModel"),
    ],
)
def test_the_head_that_was_saved_stays(name: str, expected: str, folders: dict[str, Path]) -> None:
    assert type(load_model(str(folders[name])).model).__name__ == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "LlamaForCausalLM"),
        ("tied", "LlamaForCausalLM"),
        ("body", "LlamaModel"),
    ],
)
@pytest.mark.parametrize("named", [None, [], ["MyOwnForCausalLM"], ["T5Model"]])
def test_without_architectures_the_only_class_that_fits(
    name: str, named: Any, expected: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = configured(changed(folders[name], tmp_path / "m", dict), architectures=named)
    with pytest.warns(FxShareWarning, match=rf"loaded as {expected}, the only class"):
        loaded = load_model(str(folder))
    assert type(loaded.model).__name__ == expected


def test_without_architectures_nothing_is_guessed(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, classes in (
        ("t5", "T5ForConditional.*T5Model|T5Model.*T5ForC"),
        ("bert", "BertForM"),
    ):
        two = configured(changed(folders[name], tmp_path / name, dict), architectures=None)
        with pytest.raises(DataError, match=rf"and the weights fit several classes: .*{classes}"):
            load_model(str(two))
    folder = changed(folders["llama"], tmp_path / "none", prefixed("_orig_mod."))
    with pytest.raises(DataError, match=r"none of its classes.* begin with _orig_mod\."):
        load_model(str(configured(folder, architectures=None)))


def test_a_folder_with_an_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    adapter = json.dumps({"base_model_name_or_path": "some/base", "peft_type": "LORA"})
    (alone / "adapter_config.json").write_text(adapter)
    beside = tmp_path / "beside"
    shutil.copytree(folders["llama"], beside)
    (beside / "adapter_config.json").write_text(adapter)
    for folder in (alone, beside):
        with pytest.raises(DataError, match=r"adapter of PEFT of some/base .*merge_and_unload\(\)"):
            load_model(str(folder))


def test_a_model_with_an_adapter_in_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    types = {"up": {"pattern": r"model\.layers\.\d+\.mlp\.up_proj"}}
    cfg = {"weight_types": types, "block_pattern": r"model\.layers\.(\d+)"}
    gm = fxshare.compile(model, cfg, example=torch.ones(2, 6).long())
    fxshare.save(gm, tmp_path / "out")
    with pytest.raises(StoreError, match=r"give it: load\(path, model=\.\.\.\)"):
        fxshare.load(tmp_path / "out")
    loaded = fxshare.load(tmp_path / "out", model)
    x = torch.ones(2, 6).long()
    assert torch.equal(loaded(x).logits, gm(x).logits)


def test_shards(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(str(folders["llama"])).model
    model.save_pretrained(tmp_path / "m", max_shard_size="4KB")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 2
    load_model(str(tmp_path / "m"))
    index = tmp_path / "m" / "model.safetensors.index.json"
    text = index.read_text()
    index.unlink()
    with pytest.raises(DataError, match=r"expected model\.safetensors\.index\.json beside"):
        load_model(str(tmp_path / "m"))
    index.write_text(text)
    # the file is there and has not what the index says
    name = next(iter(load_file(shards[1])))
    rest = {key: value for key, value in load_file(shards[1]).items() if key != name}
    save_file(rest or {"x": torch.ones(1)}, shards[1], {"format": "pt"})
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_model(str(tmp_path / "m"))
    shards[1].unlink()
    with pytest.raises(DataError, match=rf"the first is {shards[1].name}"):
        load_model(str(tmp_path / "m"))


def test_pickled_shards(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")
    weights = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(DataError, match=r"the first is pytorch_model-00002-of-00002\.bin"):
        load_model(str(tmp_path))


class Net(nn.Module):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.second.weight = self.first.weight


STATES: dict[str, tuple[Callable[[State], Any], str | None]] = {
    "itself": (lambda s: s, None),
    "a checkpoint": (lambda s: {"epoch": 3, "state_dict": s}, None),
    "one name of a tie": (without("second.weight"), None),
    "compiled": (prefixed("_orig_mod."), r"All keys begin with _orig_mod\."),
    "lightning": (lambda s: {"state_dict": prefixed("model.")(s)}, r"as Lightning's do"),
    "parallel": (prefixed("module."), r"DataParallel"),
    "a part": (without("last.bias"), r"no weights for 1 parameters of Net \(last\.bias\)"),
    "more": (lambda s: {**s, "x.weight": s["last.bias"]}, r"1 weights that Net has no place for"),
    "shapes": (lambda s: {**s, "last.bias": torch.ones(5)}, r"last\.bias: \[5\] instead of \[4\]"),
    "nothing": (lambda s: {"epoch": 3}, r"expected a state dict, tensors by name.*found epoch"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", STATES)
def test_a_state_dict(name: str, suffix: str, tmp_path: Path) -> None:
    change, reason = STATES[name]
    source, model = Net(), Net()
    state = change(source.state_dict())
    file = tmp_path / f"net{suffix}"
    if suffix == ".pt":
        torch.save(state, file)
    elif all(isinstance(value, Tensor) for value in state.values()):
        save_file({k: v.clone() for k, v in state.items()}, file)
    else:
        pytest.skip("safetensors holds tensors alone")
    if reason is not None:
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(DataError, match=reason):
            load_weights(model, file)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        return
    loaded = load_weights(model, file).state_dict()
    assert all(torch.equal(t, loaded[n]) for n, t in source.state_dict().items())


def test_a_state_dict_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    with pytest.raises(DataError, match="cannot be read"):
        load_weights(Net(), file)
    torch.save(Net(), file)
    with pytest.raises(DataError, match=r"holds more than tensors"):
        load_weights(Net(), file)
    with pytest.raises(ConfigError, match=r"weights without a model; write a function"):
        load_model(str(file))


@pytest.mark.parametrize("value", [3, True, "LlamaForCausalLM", {"a": 1}, [None], [["Llama"]]])
def test_architectures_of_another_type(
    value: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(folders["llama"], tmp_path / "m", lambda state: state)
    configured(folder, architectures=value)
    with pytest.raises(DataError, match=r'expected "architectures" to be a list of class names'):
        load_model(str(folder))


@pytest.mark.parametrize("value", [3, [], "awq"])
def test_a_quantisation_of_another_type(
    value: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(folders["llama"], tmp_path / "m", lambda state: state)
    configured(folder, quantization_config=value)
    with pytest.raises(DataError, match=r'expected "quantization_config" to be an object'):
        load_model(str(folder))


def test_half_of_the_keys_of_a_state_dict(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    state = {f"module.{n}" if n.startswith("0") else n: t for n, t in model.state_dict().items()}
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(DataError, match=r"2 of 4 keys begin with module\.: saved from a model"):
        load_weights(model, tmp_path / "net.pt")
