"""``gm.generate()`` makes the tokens that the original makes, on the rewritten graph."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.generation.module_form import module_form
from fxshare.result.module import record_of
from passes.errors import FxShareError
from tests.generation.models import (
    NAMES,
    NEW,
    batches,
    causal,
    compiled,
    notes,
    pair,
    prompts,
    sampled,
)
from tests.toys import NANOGPT
from tests.zoo.families import family

SHARING = {"group_size": 2, "compression_rate": 0.6}
PIVOTED = {"budget": {"params_kept": 0.7}, "planner": {"storage": "pivoted", "search": "off"}}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


def greedy(model: Any, new: int = NEW, **options: Any) -> Any:
    given = {**prompts(), "max_new_tokens": new, "do_sample": False, **options}
    return model.generate(**given)


def limit(gm: Any) -> float:
    return tolerance(torch.float32, 2 * len(record_of(gm).plan.sites) + 1)


# one of each way to know positions, to look back and to choose a linear; the others repeat these
_EACH = {"gpt2", "opt", "bloom", "mistral", "gemma3", "gpt_neox", "falcon", "mixtral", "gpt_oss"}


@pytest.mark.parametrize(
    "name", [n if n in _EACH else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_same_tokens_as_the_original(name: str) -> None:
    model, gm = pair(name)
    # the tokens of a sample differ from row to row and step to step, so a step that looks at the
    # wrong position cannot make the same ones
    expected, found = sampled(model, **LOGITS), sampled(gm, **LOGITS)
    new = expected.sequences[:, -NEW:]
    assert min(len(row.unique()) for row in new) >= 6
    assert torch.equal(expected.sequences, found.sequences)
    assert len(found.logits) == NEW
    for a, b in zip(expected.logits, found.logits, strict=True):
        assert worst(a, b).relative <= limit(gm)
    assert torch.equal(greedy(model), greedy(gm))
    assert notes(gm) == []  # the graph did it


@pytest.mark.parametrize("name", ["gpt2", "mistral", "bloom", "gemma3"])
def test_beam_search(name: str) -> None:
    model, gm = pair(name)
    assert torch.equal(greedy(model, num_beams=3), greedy(gm, num_beams=3))
    assert notes(gm) == []


def test_a_prompt_without_a_mask_and_one_that_goes_on() -> None:
    model, gm = pair("llama")
    ids = prompts()["input_ids"][:1]
    first = [
        m.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        for m in (model, gm)
    ]
    assert torch.equal(first[0].sequences, first[1].sequences)
    again = [
        m.generate(
            torch.cat([f.sequences, ids[:, :3]], 1),
            past_key_values=f.past_key_values,
            max_new_tokens=8,
            do_sample=False,
        )
        for m, f in zip((model, gm), first, strict=True)
    ]
    assert torch.equal(*again)


def test_assisted_decoding_makes_one_more_graph() -> None:
    model = causal("llama")
    gm = compiled("llama", model)
    ids = prompts()["input_ids"][:1].repeat(1, 3)
    options = {"max_new_tokens": 24, "do_sample": False, "prompt_lookup_num_tokens": 3}
    assert torch.equal(model.generate(ids, **options), gm.generate(ids, **options))
    assert len(gm.meta["structure"].made["steps"].programs) <= 2
    assert notes(gm) == []


# static cache


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma3", "mixtral"])
def test_static_cache(name: str) -> None:
    model, gm = pair(name)
    options = {"cache_implementation": "static"}
    assert torch.equal(greedy(model, 24, **options), greedy(gm, 24, **options))
    assert notes(gm) == []


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_static_cache_compiled_without_breaks(name: str) -> None:
    from transformers import CompileConfig

    model, gm = pair(name)
    before = notes(gm)  # the pair is every test's, and some call it without a cache
    how = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    torch.compiler.reset()
    found = greedy(gm, 12, cache_implementation="static", compile_config=how)
    torch.compiler.reset()
    assert torch.equal(greedy(model, 12), found)
    assert notes(gm) == before


# what fxshare does to a model


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param("gpt2", SHARING, id="sharing", marks=pytest.mark.slow),
        pytest.param("gemma3", PIVOTED, id="pivoted"),
    ],
)
def test_compressed_graphs_and_lowered_ones(name: str, mode: dict[str, Any]) -> None:
    gm = compiled(name, causal(name), mode=mode)
    expected = sampled(module_form(gm), **LOGITS, max_new_tokens=16)
    for form in (gm, fxshare.lower(gm), fxshare.lower(gm, prefer="speed")):
        found = sampled(form, **LOGITS, max_new_tokens=16)
        assert torch.equal(expected.sequences, found.sequences)
        assert worst(expected.logits, found.logits).relative <= limit(gm)
        assert notes(form) == []


def test_no_parameter_is_stored_twice_and_training_reaches_generation() -> None:
    model = causal("llama")
    gm = compiled("llama", model, mode=SHARING, copy=True)
    before = greedy(gm, 8)
    names = set(dict(gm.named_modules())), set(gm.state_dict())
    assert (set(dict(gm.named_modules())), set(gm.state_dict())) == names
    (program,) = gm.meta["structure"].made["steps"].programs.values()
    ours = {p.data_ptr() for p in gm.parameters()}
    assert {p.data_ptr() for p in program.bound(gm).parameters()} <= ours
    with torch.no_grad():
        gm.lm_head.weight.neg_()
    assert not torch.equal(before, greedy(gm, 8))
    assert torch.equal(greedy(module_form(gm), 8), greedy(gm, 8))


@pytest.mark.parametrize("lowered", [False, True])
def test_a_loaded_folder_generates(lowered: bool, tmp_path: Path) -> None:
    gm = compiled("mistral", causal("mistral"), mode=SHARING)
    gm.generation_config.temperature = 0.7
    if lowered:
        gm = fxshare.lower(gm)
    fxshare.save(gm, tmp_path / "out")
    again = fxshare.load(tmp_path / "out")
    assert torch.equal(greedy(gm, 24), greedy(again, 24))
    assert notes(again) == []
    assert again.config.to_dict()["hidden_size"] == gm.config.hidden_size


def test_a_copy_and_a_cast() -> None:
    _, gm = pair("qwen2")
    half = copy.deepcopy(gm).to(torch.bfloat16)
    half.generation_config.max_new_tokens = 3
    assert gm.generation_config.max_new_tokens != 3
    expected = greedy(module_form(half), 6, **LOGITS)
    found = greedy(half, 6, **LOGITS)
    assert half.dtype == found.logits[0].dtype or found.logits[0].dtype == torch.float32
    bound = tolerance(torch.bfloat16, 2 * len(record_of(gm).plan.sites) + 1)
    assert worst(expected.logits[0], found.logits[0]).relative <= bound
    assert torch.equal(greedy(pair("qwen2")[0], 8), greedy(gm, 8))


def test_captured_by_torch_export() -> None:
    model = causal("llama")
    gm = compiled("llama", model, capture="export")
    assert gm.fxshare.front_end == "export"
    assert torch.equal(greedy(model, 16), greedy(gm, 16))
    assert notes(gm) == []


# the face


def test_the_face() -> None:
    model, gm = pair("llama")
    assert gm.can_generate()
    assert gm.config.to_dict() == model.config.to_dict()
    assert gm.generation_config.to_dict() == model.generation_config.to_dict()
    assert (gm.device, gm.dtype) == (model.device, model.dtype)
    assert isinstance(gm, fx.GraphModule)


def test_generation_defaults_are_the_users() -> None:
    model = causal("llama")
    gm = compiled("llama", model)
    gm.generation_config.max_new_tokens = 5
    assert gm.generate(**prompts(), do_sample=False).shape == (3, 9 + 5)
    assert model.generation_config.max_new_tokens != 5


def test_module_granularity_generates_by_itself() -> None:
    model = causal("llama")
    gm = compiled("llama", model, capture="modules", calibration=None)
    assert torch.equal(greedy(model, 16), greedy(gm, 16))


def test_other_models_say_why_not() -> None:
    gm = fxshare.compile(
        NANOGPT.model(),
        {"weight_types": {"a": {"pattern": r".*c_fc$"}}},
        example=NANOGPT.inputs(),
    )
    assert not gm.can_generate()
    assert not hasattr(gm, "config")
    with pytest.raises(FxShareError, match="causal language model of transformers"):
        gm.generate(NANOGPT.inputs()[0])


def test_a_model_without_a_head_says_so() -> None:
    bert = family("bert")
    gm = fxshare.compile(bert.model(), bert.config, example=batches()[0])
    assert gm.config.model_type == "bert"
    with pytest.raises(FxShareError, match="ForCausalLM"):
        gm.generate(**prompts())


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    _, gm = pair("llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FxShareError, match=r"fxshare\[hf\]"):
        gm.generate(**prompts())
