"""Where fxshare is installed a served folder is read without its own code."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fxshare
from fxshare.exporting.served import classes, plugin
from tests.exporting import build

transformers = pytest.importorskip("transformers")


@pytest.fixture
def auto() -> Iterator[Any]:
    """What is registered with the auto classes is forgotten afterwards."""
    known = [
        transformers.CONFIG_MAPPING._extra_content,
        transformers.AutoModel._model_mapping._extra_content,
        transformers.AutoModelForCausalLM._model_mapping._extra_content,
    ]
    before = [dict(each) for each in known]
    yield transformers
    for each, was in zip(known, before, strict=True):
        each.clear()
        each.update(was)
    classes.classes_of.cache_clear()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A compiled model and its folder, in which the code raises."""
    path = tmp_path_factory.mktemp("served") / "m"
    gm = build.compiled_transformers("llama", build.transformers_model("llama", use_cache=True))
    fxshare.export(gm, path, to="vllm")
    (path / "modeling_fxshare.py").write_text("raise SystemExit('code of the folder ran')")
    return gm, path


def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the plugin tells a vLLM that has Llama by itself of architectures."""
    found = {"LlamaForCausalLM": "its own"}
    registry: Any = ModuleType("vllm.model_executor.models.registry")

    class ModelRegistry:
        get_supported_archs = staticmethod(found.keys)
        register_model = staticmethod(found.__setitem__)

    registry.ModelRegistry = ModelRegistry
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    plugin.register()
    plugin.register()  # in each process, and in some twice
    return found


def test_it_is_the_compiled_model(
    served: tuple[Any, Path], auto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, path = served
    with pytest.raises(ValueError, match="trust_remote_code"):
        auto.AutoConfig.from_pretrained(path, trust_remote_code=False)
    registered(monkeypatch)
    config = auto.AutoConfig.from_pretrained(path, trust_remote_code=False)
    assert type(config) is classes.classes_of("llama").config
    # as an engine hands it to its other processes
    again = pickle.loads(pickle.dumps(config))
    assert again.shared_linears == config.shared_linears
    for made in (auto.AutoModelForCausalLM, auto.AutoModel):
        model = made.from_pretrained(path, trust_remote_code=False, local_files_only=True).eval()
        assert type(model).__name__ in ("SharedLlamaForCausalLM", "SharedLlamaModel")
        # vLLM takes what is annotated for what has to be given
        assert not type(model).__init__.__annotations__
        if made is auto.AutoModelForCausalLM:
            ids = build.ids()
            torch.testing.assert_close(
                model(ids).logits, gm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            )


def test_every_architecture_is_told_once_and_nothing_is_imported_for_it(
    auto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = {name for name in sys.modules if name.startswith("transformers.models.")}
    found = registered(monkeypatch)
    assert found.pop("LlamaForCausalLM") == "its own"
    assert {"SharedLlamaForCausalLM", "SharedGPT2LMHeadModel"} <= found.keys()
    place = "fxshare.exporting.served.classes:SharedForCausalLM"
    assert set(found.values()) == {place}
    now = {name for name in sys.modules if name.startswith("transformers.models.")}
    assert not [name for name in now - loaded if "modeling_" in name and "auto" not in name]


def test_the_entry_point_is_the_plugin() -> None:
    from importlib.metadata import entry_points

    (one,) = entry_points(group="vllm.general_plugins", name="fxshare")
    assert one.load() is plugin.register


def test_a_mixture_of_experts_is_run_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            self.given = vllm_config

    class Mixture(Plain):
        pass

    backend: Any = ModuleType("vllm.model_executor.models.transformers")
    backend.TransformersForCausalLM, backend.TransformersMoEForCausalLM = Plain, Mixture
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    classes._engine.cache_clear()
    try:
        engine: Any = getattr(classes, classes.ENGINE)
        for is_moe in (False, True):
            config = type("C", (), {"model_config": type("M", (), {"is_moe": is_moe})})
            made = engine(vllm_config=config)
            assert isinstance(made, Mixture) is is_moe
            assert isinstance(made, Plain)
            assert made.given is config
    finally:
        classes._engine.cache_clear()


@pytest.mark.parametrize("name", ["gpt2", "gpt-sw3", "llama", "qwen2"])
def test_another_process_finds_the_classes(name: str, auto: Any) -> None:
    # of GPT-2 and GPT-SW3, of Llama and others, the classes have one name
    made = classes.classes_of(name)
    for one in (made.config, made.base, made.head):
        assert pickle.loads(pickle.dumps(one)) is one
        assert one.__name__.startswith(classes.SHARED)


@pytest.mark.parametrize("name", ["SharedLlamaConfig", "llama:tail", "nosuch:config", ":config"])
def test_other_names_are_none(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(classes, name)


def test_the_folder_names_what_the_classes_are_called(served: tuple[Any, Path]) -> None:
    config = json.loads((served[1] / "config.json").read_text())
    made = classes.causal_types()["llama"]
    assert config["architectures"] == [f"{classes.SHARED}{made}"]
    assert config["model_type"] == "fxshare_llama"
