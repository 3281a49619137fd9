"""The ways in which people call ``generate()``: all give what the original gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxshare.errors import FxShareWarning
from tests.generation.models import causal, compiled, notes, pair, prompts, sampled
from tests.generation.test_lm_eval import tokenizer

FEW = {"max_new_tokens": 12, "do_sample": False}


class Listener:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


def test_in_a_pipeline() -> None:
    from transformers import pipeline

    model, gm = pair("llama")
    texts = ["w3 w4 w5", "w9"]
    made = []
    for one in (model, gm):
        run = pipeline("text-generation", model=one, tokenizer=tokenizer(), batch_size=2)
        made.append(run(texts, max_new_tokens=8, do_sample=False))
    assert made[0] == made[1]


def test_a_streamer_hears_the_same() -> None:
    model, gm = pair("llama")
    first = {name: value[:1] for name, value in prompts().items()}
    listeners = Listener(), Listener()
    for one, listener in zip((model, gm), listeners, strict=True):
        one.generate(**first, **FEW, streamer=listener)
    assert listeners[0].heard == listeners[1].heard
    assert listeners[1].heard[-1] == "end"


def test_scores_and_several_sequences() -> None:
    model, gm = pair("llama")
    options = {
        "num_return_sequences": 2,
        "output_scores": True,
        "output_hidden_states": True,
        "return_dict_in_generate": True,
        "max_new_tokens": 8,
    }
    expected, found = sampled(model, **options), sampled(gm, **options)
    assert set(expected) == set(found)
    assert torch.equal(expected.sequences, found.sequences)
    for a, b in zip(expected.scores, found.scores, strict=True):
        torch.testing.assert_close(a, b)
    for step, other in zip(expected.hidden_states, found.hidden_states, strict=True):
        torch.testing.assert_close(step, other)


def test_penalties_and_an_assistant() -> None:
    model, gm = pair("llama")
    ways: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prefill_chunk_size": 4},
        {"guidance_scale": 1.5},
    ]
    for way in ways:
        options = {**prompts(), **FEW, **way}
        assert torch.equal(model.generate(**options), gm.generate(**options))
    first = {name: value[:1] for name, value in prompts().items()}
    options = {**first, **FEW, "assistant_model": pair("mistral")[0]}
    assert torch.equal(model.generate(**options), gm.generate(**options))


def test_a_prompt_of_embeddings() -> None:
    model = causal("llama")
    gm = compiled("llama", model)
    embedded = model.get_input_embeddings()(prompts()["input_ids"]).detach()
    given = {"inputs_embeds": embedded, "attention_mask": prompts()["attention_mask"], **FEW}
    with pytest.warns(FxShareWarning, match="it begins with embeddings"):
        found = gm.generate(**given)
    assert torch.equal(model.generate(**given), found)
    assert len(notes(gm)) == 1  # the tokens after it have a graph


def test_dropout_is_off_in_a_graph_of_torch_export() -> None:
    model = causal("gpt2")
    assert model.config.resid_pdrop > 0
    gm = compiled("gpt2", model, capture="export")
    assert torch.equal(model.generate(**prompts(), **FEW), gm.generate(**prompts(), **FEW))
    assert len(gm.meta["structure"].made["steps"].programs) == 1
    assert notes(gm) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_static_cache_under_inductor(name: str) -> None:
    from transformers import CompileConfig

    model, gm = pair(name)
    how = CompileConfig(fullgraph=True, backend="inductor", mode=None)
    how._compile_all_devices = True
    torch.compiler.reset()
    options = {**prompts(), **FEW}
    found = gm.generate(**options, cache_implementation="static", compile_config=how)
    torch.compiler.reset()
    assert torch.equal(model.generate(**options), found)
    assert notes(gm) == []
