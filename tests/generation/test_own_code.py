"""Wherever the original generates, the graph generates the same tokens: models whose steps no plain
graph predicts, and what runs where no graph can."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
import fxshare.generation.shell as shell_module
from fxshare import FxShareWarning
from fxshare.base.numerics import tolerance, worst
from fxshare.errors import CaptureError
from fxshare.generation.check_encoder_decoder import target_of
from fxshare.generation.module_form import module_form, unread_by
from fxshare.generation.rollback import Rollback
from fxshare.generation.unread import check_unread, is_never_read, never_read
from passes.errors import FxShareError
from tests.generation.models import causal, compiled
from tests.zoo.causal.models import build
from tests.zoo.causal.sizes import VOCABULARY
from tests.zoo.families import transformers_model

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SHARING = {"group_size": 2, "compression_rate": 0.6}


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 88, (batch, length), generator=generator)


def exact(model: nn.Module, **more: Tensor) -> Any:
    """The model in exact mode, captured with texts without padding."""
    ids = tokens(2, 12)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        return fxshare.compile(model, None, example=example)


def generated(model: Any, new: int = 8, **options: Any) -> Tensor:
    """Greedy tokens of two prompts of different length, padded on the left."""
    ids = tokens(2, 7, 5)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    given = {"input_ids": ids * mask, "attention_mask": mask, "pad_token_id": 0, "eos_token_id": 98}
    torch.manual_seed(0)
    found: Tensor = model.generate(
        **given, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options
    )
    return found


def steps_said(gm: Any) -> list[str]:
    return [note for note in gm.fxshare.report.notes if note.startswith("generate:")]


def unit_gain(model: Any) -> Any:
    """Weights of unit gain: with those of an untrained model all tokens are alike."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5)
    return model.eval()


def bert_to_both_sides() -> Any:
    """Attention looks to both sides without a cache, and cannot with one."""
    return unit_gain(transformers_model("BertConfig", "BertLMHeadModel", **_SMALL))


def long_rope() -> Any:
    """Its steps make the frequencies of a long context and leave them in the module."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 20,
    }
    sizes = {**_SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "rope_parameters": rope}
    sizes["original_max_position_embeddings"] = 20
    return unit_gain(transformers_model("Phi3Config", "Phi3ForCausalLM", **sizes))


def images_too() -> Any:
    """Its generation code keeps positions in a module below."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return unit_gain(
        transformers_model(
            "Qwen2VLConfig",
            "Qwen2VLForConditionalGeneration",
            text_config={**_SMALL, "num_key_value_heads": 2, "rope_parameters": rope},
            vision_config={"depth": 1, "embed_dim": 32, "num_heads": 4, "hidden_size": 32},
            image_token_id=90,
            video_token_id=91,
            vision_start_token_id=92,
            vision_end_token_id=93,
        )
    )


_MADE = {"bert": bert_to_both_sides, "longrope": long_rope, "qwen2_vl": images_too}


# positions that count padding and cross attention that nothing reads; numbers of numpy; and those
# above
@pytest.mark.parametrize("name", ["bart", "ctrl", *_MADE])
def test_graphs_make_the_tokens_of_the_original(name: str) -> None:
    model = _MADE[name]() if name in _MADE else build(name)
    expected = generated(model)
    assert len(expected[:, 7:].unique()) >= 3
    gm = exact(model)
    assert torch.equal(expected, generated(gm))
    assert not steps_said(gm)


def test_a_decoder_that_starts_with_padding() -> None:
    sizes = {"d_model": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
    model = unit_gain(
        transformers_model(
            "M2M100Config",
            "M2M100ForConditionalGeneration",
            **sizes,
            pad_token_id=1,
            decoder_start_token_id=1,
        )
    )
    gm = exact(model, decoder_input_ids=tokens(2, 7, 1))
    assert torch.equal(generated(model), generated(gm))
    assert not steps_said(gm)


def test_a_graph_that_differs_from_the_own_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(gm: Any, shell: Any, kind: Any) -> Any:
        program = shell_module.capture_program.__wrapped__(gm, shell, kind)  # type: ignore[attr-defined]
        scores = next(n for n in program.graph.graph.nodes if "scaled_dot_product" in str(n.target))
        scores.kwargs = {**scores.kwargs, "scale": 2.0}
        program.forget()
        return program

    wrong.__wrapped__ = shell_module.capture_program  # type: ignore[attr-defined]
    monkeypatch.setattr(shell_module, "capture_program", wrong)
    model = build("bart")
    gm = exact(model)
    with pytest.warns(FxShareWarning, match="differs from the model's own code by"):
        found = generated(gm)
    assert torch.equal(generated(model), found)


def _no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise CaptureError("it is Tuesday")

    monkeypatch.setattr(shell_module, "capture_program", refuse)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("mode", [{}, SHARING], ids=["exact", "sharing"])
def test_experts_are_multiplied_out_where_no_graph_can(
    name: str, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = causal(name)
    gm = compiled(name, model, mode=mode)
    own = module_form(gm)
    ids = tokens(2, 9)
    distance = worst(gm(input_ids=ids)["logits"], own(input_ids=ids).logits)
    assert distance.relative <= tolerance(torch.float32, 2 * len(gm.fxshare.plan.sites) + 1)
    _no_graph(monkeypatch)
    with pytest.warns(FxShareWarning, match="runs the model's own code.* it is Tuesday"):
        found = generated(gm)
    if not mode:
        assert torch.equal(generated(model), found)
        stacks = [n for n, _ in own.named_parameters() if ".experts." in n]
        assert stacks
        assert all(torch.equal(own.get_parameter(n), model.get_parameter(n)) for n in stacks)


def test_what_the_example_never_reads_does_not_forbid_the_own_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("bart")
    gm = exact(model)
    assert any("encoder_attn" in name for name in unread_by(module_form(gm)))
    _no_graph(monkeypatch)
    with pytest.warns(FxShareWarning, match="it is Tuesday"):
        found = generated(gm)
    assert torch.equal(generated(model), found)
    # and who reads it is told
    with (
        pytest.warns(FxShareWarning, match="encoder_hidden_states.* it is Tuesday"),
        pytest.raises(FxShareError, match=r"gives NaN: it reads 'model\.decoder.*encoder_attn"),
    ):
        generated(gm, encoder_hidden_states=torch.randn(2, 5, 32))


def test_checks_that_fail_in_another_way_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> float:
        raise AttributeError("no such thing")

    monkeypatch.setattr(shell_module, "check_program", fail)
    model = build("bart")
    gm = exact(model)
    assert torch.equal(generated(model), generated(gm))  # the own code says that the graph is right
    assert not steps_said(gm)
    gm = exact(model)
    monkeypatch.setattr(shell_module, "check_against_own_code", fail)
    with pytest.warns(FxShareWarning, match="because no graph does: AttributeError: no such thing"):
        assert torch.equal(generated(model), generated(gm))


def test_tokens_of_a_configuration_without_start_or_padding() -> None:
    text = SimpleNamespace(vocab_size=9)
    shell: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: text))
    found = target_of(nn.Linear(1, 1), shell, 2, 5, 0)
    assert found.shape == (2, 5)
    assert int(found.max()) < 9
    text_and_more = {"pad_token_id": 3, "decoder_start_token_id": 3, **vars(shell.config)}
    shell.config = SimpleNamespace(**text_and_more)
    found = target_of(nn.Linear(1, 1), shell, 2, 5, 0)
    assert (found[:, 0] == 3).all()
    assert (found[:, 1:] != 3).all()


def test_a_cache_that_no_graph_takes_is_noted(tmp_path: Path) -> None:
    model = build("minimax")  # with a buffer that only later steps read, and experts
    fxshare.save(exact(model), tmp_path / "out")
    gm = fxshare.load(tmp_path / "out")
    assert torch.equal(generated(model), generated(gm))
    # the first step makes the cache
    assert [note.partition(",")[0] for note in steps_said(gm)] == [
        "generate: a step without a cache",
        "generate: a step with a MiniMaxCache",
    ]


def test_never_read() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.long):
        like = torch.zeros(3, 4, dtype=dtype, device="meta")
        found = never_read(like, dtype, torch.device("cpu"))
        assert is_never_read(found)
        assert found.shape == (3, 4)
        assert found.untyped_storage().nbytes() == dtype.itemsize
    assert not is_never_read(torch.zeros(2))
    check_unread({"logits": torch.full((1,), torch.nan)}, (), "a step")
    check_unread({"logits": torch.zeros(1)}, ("a",), "a step")
    with pytest.raises(FxShareError, match=r"a step gives NaN: it reads 'a' and 1 more"):
        check_unread({"logits": torch.full((1,), torch.nan)}, ("a", "b"), "a step")


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_a_step_that_leaves_the_path_of_its_graph(options: dict[str, Any]) -> None:
    """A guard that holds at first: the cache is put back, and the own code goes on."""
    import transformers

    class Counting(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **given: Any) -> Any:
            output = super().forward(input_ids=input_ids, **given)
            # after the cache has got its keys, as with models that look at a few tokens of many
            longest = given["attention_mask"].shape[-1]
            output.logits = output.logits * (2 if longest > 11 else -1)
            return output

    config = transformers.LlamaConfig(**_SMALL, num_key_value_heads=2)
    model: Any = unit_gain(Counting(config))
    ids = tokens(2, 10)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    gm = fxshare.compile(model, None, example=example)
    expected = generated(model, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = generated(gm, **options)
    assert torch.equal(expected, found)
    if not options:
        assert any("the model was captured on the path" in str(w.message) for w in said)


def test_rollback() -> None:
    import transformers
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

    config = transformers.LlamaConfig(**_SMALL)
    keys = torch.randn(1, 4, 2, 8)
    static = StaticCache(config=config, max_cache_len=8)
    both = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    for whole, cache in (
        (alone := DynamicCache(config=config), alone),
        (static, static),
        (both, both.self_attention_cache),
    ):
        cache.update(keys, keys, 0)
        cache.update(keys, keys, 1)
        both.is_updated[0] = False
        before = Rollback(whole)
        length = int(cache.get_seq_length())
        cache.update(-keys, keys, 0)
        both.is_updated[0] = True
        before.undo()
        assert both.is_updated[0] is (whole is not both)
        assert int(cache.get_seq_length()) == length
        again, _ = cache.update(2 * keys, keys, 0)
        assert torch.equal(again[:, :, :4], torch.cat([keys, 2 * keys], 2))
