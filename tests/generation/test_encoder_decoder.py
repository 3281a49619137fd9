"""``gm.generate()`` of models with an encoder and a decoder: the same tokens, on graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fxshare
import fxshare.generation.shell as shell_module
from fxshare.base.numerics import tolerance, worst
from fxshare.errors import CaptureError, FxShareWarning, StoreError
from fxshare.generation.check_encoder_decoder import check_decoder, check_encoder
from fxshare.generation.module_form import module_form
from fxshare.generation.program import Program, capture_program
from fxshare.generation.shell import shell_of
from fxshare.generation.step import Kind
from fxshare.result.module import record_of
from tests.generation.models import (
    NEW,
    compiled_seq2seq,
    example_of,
    notes,
    seq2seq,
    seq2seq_pair,
    sources,
)

SHARING = {"group_size": 2, "compression_rate": 0.6}
# one basis for weights of the encoder and of the decoder
JOINT = {
    "weight_types": {
        "attn": {"pattern": r".*(SelfAttention|EncDecAttention)\.[qkv]$"},
        "o": {"pattern": r".*Attention\.o$"},
        "wi": {"pattern": r".*DenseReluDense\.wi$"},
    },
    "block_pattern": r"block\.(\d+)",
    **SHARING,
}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}
NAMES = ("t5", "whisper", "bart")


def limit(gm: Any) -> float:
    return tolerance(torch.float32, 2 * len(record_of(gm).plan.sites) + 1)


def generated(name: str, model: Any, new: int = NEW, **options: Any) -> Any:
    given = {**sources(name), "max_new_tokens": new, "do_sample": False, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model.generate(**given)


def programs(gm: Any) -> list[Program]:
    return list(gm.meta["structure"].made["steps"].programs.values())


@pytest.mark.parametrize("name", NAMES)
def test_same_tokens_as_the_original(name: str) -> None:
    model, gm = seq2seq_pair(name)
    assert gm.can_generate()
    sampling = {"do_sample": True, "temperature": 1.5, **LOGITS}
    expected, found = (generated(name, m, **sampling) for m in (model, gm))
    assert min(len(row.unique()) for row in expected.sequences) >= 6
    assert torch.equal(expected.sequences, found.sequences)
    assert len(found.logits) == len(expected.logits) >= NEW - 2
    for a, b in zip(expected.logits, found.logits, strict=True):
        assert worst(a, b).relative <= limit(gm)
    assert torch.equal(generated(name, model), generated(name, gm))
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generated(name, model, **beams), generated(name, gm, **beams))
    # the encoder, the first step and those after it ran on graphs
    assert len(programs(gm)) == 3
    assert None not in programs(gm)
    assert notes(gm) == []


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_what_the_encoder_gives_is_computed_once(name: str) -> None:
    _, gm = seq2seq_pair(name)
    (cross,) = [
        m for n, m in gm.named_modules() if n.endswith(("0.layer.1.EncDecAttention.k",))
    ] or [m for n, m in gm.named_modules() if n.endswith("decoder.layers.0.encoder_attn.k_proj")]
    calls: list[int] = []
    handle = cross.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[1]))
    generated(name, gm, 2)  # whatever is checked at the first call is done
    calls.clear()
    generated(name, gm, 12)
    handle.remove()
    assert len(calls) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"decoder_input_ids": torch.tensor([[0, 5, 6], [0, 9, 4], [0, 3, 3]])},
        {"output_scores": True, "return_dict_in_generate": True, "num_beams": 2},
        {"use_cache": False},
        {"output_attentions": True, "return_dict_in_generate": True},
    ],
    ids=["a prompt", "scores", "no cache", "attentions"],
)
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_options(name: str, options: dict[str, Any]) -> None:
    model, gm = seq2seq_pair(name)
    expected, found = (generated(name, m, 12, **options) for m in (model, gm))
    if isinstance(expected, Tensor):
        assert torch.equal(expected, found)
        return
    assert set(expected) == set(found)
    for key in set(expected) - {"past_key_values"}:
        assert worst(expected[key], found[key]).relative <= limit(gm), key
    assert torch.equal(expected.sequences, found.sequences)


def test_ways_to_give_the_input() -> None:
    model, gm = seq2seq_pair("t5")
    ids, mask = sources("t5")["input_ids"], sources("t5")["attention_mask"]
    ways: list[dict[str, Any]] = [
        {"input_ids": ids, "attention_mask": None},
        {"input_ids": ids[2:, :5], "attention_mask": None},
        {"input_ids": None, "encoder_outputs": model.get_encoder()(ids, attention_mask=mask)},
        {"input_ids": ids[:1], "attention_mask": mask[:1], "prompt_lookup_num_tokens": 3},
    ]
    for way in ways:
        expected, found = (generated("t5", m, 12, **way) for m in (model, gm))
        assert torch.equal(expected, found)
    assert notes(gm) == []


def test_embeddings_run_the_models_own_code_and_the_record_says_so() -> None:
    model = seq2seq("t5")
    gm = compiled_seq2seq("t5", model)
    given = {"input_ids": None, "inputs_embeds": model.shared(sources("t5")["input_ids"]).detach()}
    with pytest.warns(FxShareWarning, match="it begins with embeddings"):
        found = generated("t5", gm, 8, **given)
    assert torch.equal(generated("t5", model, 8, **given), found)
    assert len(notes(gm)) == 1  # the encoder's alone: the steps have a graph


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_static_cache(name: str) -> None:
    model, gm = seq2seq_pair(name)
    options = {"cache_implementation": "static"}
    expected, found = (generated(name, m, 12, **options) for m in (model, gm))
    assert torch.equal(expected, found)
    assert notes(gm) == []


def test_static_cache_compiled_without_breaks() -> None:
    from transformers import CompileConfig

    model, gm = seq2seq_pair("t5")
    how = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    torch.compiler.reset()
    found = generated("t5", gm, 8, cache_implementation="static", compile_config=how)
    torch.compiler.reset()
    assert torch.equal(generated("t5", model, 8), found)
    assert notes(gm) == []


# what fxshare does to a model


def test_compressed_graphs_and_lowered_ones() -> None:
    gm = fxshare.compile(seq2seq("t5"), JOINT, example=example_of("t5"))
    halves = [{name.partition(".")[0] for name in g.slices} for g in gm.fxshare.plan.groups]
    assert {"encoder", "decoder"} in halves
    expected = generated("t5", module_form(gm), 12, **LOGITS)
    for form in (gm, fxshare.lower(gm), fxshare.lower(gm, prefer="speed")):
        found = generated("t5", form, 12, **LOGITS)
        assert torch.equal(expected.sequences, found.sequences)
        assert worst(expected.logits, found.logits).relative <= limit(gm)
        assert notes(form) == []


def test_no_parameter_is_stored_twice_and_training_reaches_generation() -> None:
    gm = compiled_seq2seq("t5", seq2seq("t5"), mode=SHARING, copy=True)
    names = set(dict(gm.named_modules())), set(gm.state_dict())
    before = generated("t5", gm, 8)
    assert (set(dict(gm.named_modules())), set(gm.state_dict())) == names
    ours = {p.data_ptr() for p in gm.parameters()}
    for program in programs(gm):
        assert {p.data_ptr() for p in program.bound(gm).parameters()} <= ours
    with torch.no_grad():
        for name in ("encoder.final_layer_norm", "decoder.final_layer_norm"):
            gm.get_submodule(name).weight.mul_(-0.5)
    assert not torch.equal(before, generated("t5", gm, 8))
    assert torch.equal(generated("t5", module_form(gm), 8), generated("t5", gm, 8))
    assert torch.equal(
        before, generated("t5", compiled_seq2seq("t5", seq2seq("t5"), mode=SHARING), 8)
    )


@pytest.mark.parametrize(
    ("name", "auto"),
    [("t5", "Seq2SeqLM"), pytest.param("whisper", "SpeechSeq2Seq", marks=pytest.mark.slow)],
)
def test_a_loaded_folder_generates(name: str, auto: str, tmp_path: Path) -> None:
    import transformers

    import fxshare.hf

    gm = compiled_seq2seq(name, seq2seq(name), mode=SHARING)
    fxshare.save(gm, tmp_path / "out")
    expected = generated(name, gm, 16)
    again = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(tmp_path / "out")
    assert torch.equal(expected, generated(name, again, 16))
    assert notes(again) == []
    with pytest.raises(StoreError, match=f"AutoModelFor{auto}"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_captured_with_labels() -> None:
    example = example_of("t5")
    example["labels"] = example.pop("decoder_input_ids")
    model = seq2seq("t5")
    gm = compiled_seq2seq("t5", model, example=example)
    assert torch.equal(generated("t5", model, 12), generated("t5", gm, 12))
    assert notes(gm) == []


def test_a_cast_that_the_plain_graph_does_not_follow() -> None:
    _, gm = seq2seq_pair("t5")
    half = copy.deepcopy(gm).to(torch.bfloat16)
    with pytest.warns(FxShareWarning, match="cast to torch.bfloat16"):
        found = generated("t5", half, 6)
    assert torch.equal(generated("t5", module_form(half), 6), found)


def test_what_no_graph_runs_runs_the_models_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(gm: Any, shell: Any, kind: Any) -> Program:
        if kind.cache is None or not kind.cache.filled:
            return capture_program(gm, shell, kind)
        raise CaptureError("it is Tuesday")

    monkeypatch.setattr(shell_module, "capture_program", refuse)
    model = seq2seq("whisper")
    gm = compiled_seq2seq("whisper", model)
    with pytest.warns(FxShareWarning, match="a later step .* it is Tuesday"):
        found = generated("whisper", gm, 12)
    assert torch.equal(generated("whisper", model, 12), found)
    assert len(notes(gm)) == 1


# graphs that are wrong


@cache
def called_once(name: str) -> tuple[Any, tuple[Kind, ...]]:
    """A compiled model of these tests alone, which no other has called in another way, and the
    kinds of its graphs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gm = compiled_seq2seq(name, seq2seq(name))
    generated(name, gm, 3)
    return gm, tuple(program.kind for program in programs(gm))


def fresh(name: str, which: int) -> tuple[Program, Any, Any]:
    """The encoder's graph (0), that of the first step (1) or of later ones (2), unchecked."""
    gm, kinds = called_once(name)
    shell = shell_of(gm)
    return capture_program(gm, shell, kinds[which]), gm, shell


def _replace(program: Program, node: fx.Node, by: Callable[[Any], Any]) -> None:
    with program.graph.graph.inserting_after(node):
        new = program.graph.graph.call_function(by, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    program.graph.recompile()
    program.forget()


def _input(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.graph.nodes if n.target == name)


def test_sound_programs_pass() -> None:
    encoder, gm, _ = fresh("t5", 0)
    assert check_encoder(encoder, gm) <= limit(gm)
    first, gm, shell = fresh("t5", 1)
    assert check_decoder(first, first, gm, shell) <= limit(gm)
    later, gm, shell = fresh("t5", 2)
    assert check_decoder(later, first, gm, shell) <= limit(gm)


def test_an_encoder_that_reads_padding_is_caught() -> None:
    program, gm, _ = fresh("t5", 0)
    _replace(program, _input(program, "attention_mask"), torch.ones_like)
    with pytest.raises(CaptureError, match="differs from the plain graph"):
        check_encoder(program, gm)


@pytest.mark.parametrize("which", [1, 2])
def test_a_step_that_reads_padding_of_the_source_is_caught(which: int) -> None:
    program, gm, shell = fresh("t5", which)
    first, _, _ = fresh("t5", 1)
    _replace(program, _input(program, "attention_mask"), torch.ones_like)
    with pytest.raises(CaptureError, match="differs from the plain graph"):
        check_decoder(program, first if which == 2 else program, gm, shell)


def test_keys_of_the_encoder_from_another_layer_are_caught() -> None:
    first, gm, shell = fresh("t5", 1)
    later, _, _ = fresh("t5", 2)
    read = [n for n in later.graph.graph.nodes if n.target is getattr and n.args[1:] == ("keys",)]
    assert len(read) == 2
    _replace(later, read[0], lambda keys: keys.roll(1, 2))
    with pytest.raises(CaptureError, match="differs from the plain graph"):
        check_decoder(later, first, gm, shell)


def test_a_past_that_is_not_read_is_caught() -> None:
    first, gm, shell = fresh("whisper", 1)
    later, _, _ = fresh("whisper", 2)
    updates = [n for n in later.graph.graph.nodes if n.target == "update"]
    assert len(updates) == 2  # of self attention; cross attention has its keys
    _replace(later, updates[0], lambda kv: (kv[0] * 0, kv[1]))
    with pytest.raises(CaptureError, match="differs from the plain graph"):
        check_decoder(later, first, gm, shell)
