"""Every family of the zoo: exact mode is exact, both other modes run and plan as they claim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxshare
from fxshare.result.products import slice_product
from tests.toys import same_tensors, tensors_of
from tests.zoo.families import FAMILIES, Family, family
from tests.zoo.measure import (
    KEPT,
    SHARING,
    both,
    compiled,
    gathered,
    generates,
    inputs_of,
    loss,
    missed,
    reason,
    ulps,
)

# one of each kind of layout; the others repeat what these show and are run with -m slow
_KINDS = ("phi3", "mixtral")


def _modes() -> list[Any]:
    return [
        pytest.param(f, id=f.name, marks=() if f.name in _KINDS else pytest.mark.slow)
        for f in FAMILIES
    ]


@pytest.mark.parametrize("one", FAMILIES, ids=lambda f: f.name)
def test_exact_mode_equals_the_original(one: Family) -> None:
    subject = one.subject()
    before = tensors_of(subject.model)
    gm = compiled(subject)
    limit = fxshare.base.numerics.tolerance(torch.float32, 2 * len(gm.fxshare.plan.sites) + 1)
    assert ulps(subject, gm) <= limit / torch.finfo(torch.float32).eps
    assert same_tensors(before, tensors_of(subject.model))
    assert gm.fxshare.report.front_end == "fx"
    left = {name.rpartition(".")[2] for name in missed(subject.model, gm.fxshare.plan, gm)}
    left -= {place.module.rpartition(".")[2] for place in gm.meta["slices"].values()}
    # heads and poolers, routers, and the gate that decides how much of the shared expert counts
    heads = {"lm_head", "decoder", "dense", "proj_out", "head"}
    assert left <= heads | {"gate", "router", "shared_expert_gate"}
    # it can fail: one slice whose rows are off by one shows
    places = gm.meta["slices"]
    linear = gm.get_submodule(places[gm.fxshare.plan.sites[-1].slices[0].name].module)
    with torch.no_grad():
        linear.weight = nn.Parameter(linear.weight.roll(1, 0))
    assert ulps(subject, gm) > limit / torch.finfo(torch.float32).eps


@pytest.mark.parametrize("one", _modes())
def test_sharing_and_planned_modes(one: Family) -> None:
    subject = one.subject()
    shared, planned = both(subject)
    plan = shared.fxshare.plan
    assert plan.groups
    assert plan.stored_numbers <= KEPT * plan.dense_numbers
    for gm in (shared, planned):
        result = fxshare.verify(subject.model, gm, [subject.other])
        assert result.ok, result
    statistics = gathered(subject)
    losses = [loss(subject.model, gm, statistics) for gm in (shared, planned)]
    assert losses[1] <= losses[0]


# Which rows belong to which head: what a change of one slice does to the model's own attention


_FUSED = [
    ("gpt2", "transformer.h.0.attn.c_attn", 4),
    ("phi3", "model.layers.0.self_attn.qkv_proj", 2),
    ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value", 4),
    ("falcon", "transformer.h.0.self_attention.query_key_value", 1),
    ("falcon_grouped", "transformer.h.0.self_attention.query_key_value", 2),
    ("bloom", "transformer.h.0.self_attention.query_key_value", 4),
]


def _attention_of_first_layer(model: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**call, output_attentions=True).attentions[0]
    return found


@pytest.mark.parametrize(("name", "site", "kv"), _FUSED, ids=[f[0] for f in _FUSED])
def test_slices_are_the_rows_of_their_heads(name: str, site: str, kv: int) -> None:
    one = family(name)
    model = one.model()
    model.set_attn_implementation("eager")
    call = one.call()
    call.pop("attention_mask")
    whole = _attention_of_first_layer(model, call)
    heads = whole.shape[1]
    matching = fxshare.sites.match.match(model, fxshare.config.load_config(one.config))
    (found,) = (s for s in matching.sites if s.name == site)
    labels = [f"q.{h}" for h in range(heads)] + [f"{p}.{h}" for p in "kv" for h in range(kv)]
    assert sorted(s.label for s in found.slices) == sorted(labels)
    for part in found.slices:
        weight = model.get_submodule(site).weight
        rows = weight.T if type(model.get_submodule(site)).__name__ == "Conv1D" else weight
        kept = rows[part.start : part.stop].detach().clone()
        with torch.no_grad():
            rows[part.start : part.stop] *= 2
        changed = _attention_of_first_layer(model, call)
        with torch.no_grad():
            rows[part.start : part.stop] = kept
        differ = {h for h in range(heads) if not torch.equal(changed[:, h], whole[:, h])}
        group = range(part.head * heads // kv, (part.head + 1) * heads // kv)
        expected = {"q": {part.head}, "k": set(group), "v": set()}[part.part]
        assert differ == expected, part.name


def test_gate_and_up_are_told_apart() -> None:
    model = family("phi3").model()
    mlp = model.model.layers[0].mlp
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    matching = fxshare.sites.match.match(model, fxshare.config.load_config(family("phi3").config))
    (site,) = (s for s in matching.sites if s.name == "model.layers.0.mlp.gate_up_proj")
    gate, up = (mlp.gate_up_proj.weight[s.start : s.stop] for s in site.slices)
    assert [s.part for s in site.slices] == ["gate", "up"]
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


# Experts


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_equal_every_implementation(implementation: str) -> None:
    subject = family("mixtral").subject()
    subject.model.set_experts_implementation(implementation)
    gm = compiled(subject)
    assert subject.model.config._experts_implementation == implementation
    assert ulps(subject, gm) <= 64
    assert len([s for s in gm.fxshare.plan.sites if ".experts." in s.name]) == 2 * 2 * 4
    notes = " ".join(gm.fxshare.report.notes)
    assert ("cannot be traced" in notes) == (implementation != "batched_mm")


def test_experts_of_neighbouring_layers_share_one_basis() -> None:
    subject = family("mixtral").subject()
    types = {
        name: spec | {"split": False, "basis": "site"} if name.startswith("experts") else spec
        for name, spec in subject.config["weight_types"].items()
    }
    gm = compiled(subject, weight_types=types, **SHARING)
    pooled = [g for g in gm.fxshare.plan.groups if g.type == "experts_gate_up"]
    assert [len(g.slices) for g in pooled] == [8]
    assert fxshare.verify(subject.model, gm, [subject.other]).ok
    stored = {id(p): p.numel() for p in gm.parameters()}
    assert sum(stored.values()) < sum(p.numel() for p in subject.model.parameters())


def test_an_expert_that_no_token_chose() -> None:
    subject = family("mixtral").subject()
    gm = compiled(subject)
    call = inputs_of(subject.example)
    call = {name: value[:1, :1] for name, value in call.items()}
    call["attention_mask"] = torch.ones_like(call["input_ids"])
    with torch.no_grad():  # one token goes to two of four experts
        expected, found = subject.model(**call, use_cache=False).logits, gm(**call).logits
    torch.testing.assert_close(found, expected)


def test_experts_with_biases_stored_transposed() -> None:
    one = family("gpt_oss")
    subject = one.subject()
    gm = compiled(subject)
    site = next(s for s in gm.fxshare.plan.sites if s.name.endswith("experts.down_proj.1"))
    assert site.transposed
    assert site.bias
    original = subject.model.model.layers[0].mlp.experts.down_proj[1].T
    assert torch.equal(slice_product(gm, site.slices[0].name).float(), original)


@pytest.mark.slow  # test_stored does it for the same families, without sharing
def test_saving_and_loading_experts_and_in_proj(tmp_path: Any) -> None:
    for name in ("mixtral", "nn_transformer"):
        subject = family(name).subject()
        gm = compiled(subject, **SHARING)
        fxshare.save(gm, tmp_path / name)
        again = fxshare.load(tmp_path / name, model=family(name).model(seed=1))
        call = inputs_of(subject.other)
        with torch.no_grad():
            for left, right in zip(
                fxshare.base.numerics.float_leaves(gm(**call)),
                fxshare.base.numerics.float_leaves(again(**call)),
                strict=True,
            ):
                assert torch.equal(left[1], right[1])


# Parameters and output heads


class _Columns(nn.Module):
    """Multiplies by parameters ``(in, out)``, which only the graph tells from ``(out, in)``."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ParameterList(torch.randn(16, 24) / 4 for _ in range(4))
            self.square = nn.Parameter(torch.randn(24, 24) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.tanh(x @ w) for w in self.layers]
        return torch.einsum("...i,io->...o", torch.stack(parts).sum(0), self.square)


@pytest.mark.parametrize("mode", [{}, SHARING, {"budget": {"params_kept": 0.6}}])
def test_parameters_of_either_orientation_in_every_mode(mode: dict[str, Any]) -> None:
    model = _Columns()
    types = {"w": {"pattern": r"layers\.\d+$"}}
    config = {"weight_types": types, "block_pattern": r"layers\.(\d+)"}
    x = torch.randn(8, 12, 16, generator=torch.Generator().manual_seed(1))
    gm = fxshare.compile(model, [config, mode], calibration=[x, x * 0.5])
    assert {(s.in_features, s.out_features) for s in gm.fxshare.plan.sites} == {(16, 24)}
    assert all(site.transposed for site in gm.fxshare.plan.sites)
    assert fxshare.verify(model, gm, [x]).ok
    if mode:
        stored = sum(p.numel() for p in gm.parameters())
        assert stored < sum(p.numel() for p in model.parameters())


def test_an_untied_head_is_rewritten_and_a_tied_one_is_not() -> None:
    head = {"weight_types": {"head": {"pattern": "lm_head$"}}, "group_size": 1}
    subject = family("llama").subject()
    assert not subject.model.config.tie_word_embeddings
    gm = compiled(subject, **head, compression_rate=0.5)
    assert "lm_head" in [site.name for site in gm.fxshare.plan.sites]
    assert fxshare.verify(subject.model, gm, [subject.other]).ok
    with pytest.raises(fxshare.FxShareError, match=r"tied to 'transformer\.wte\.weight'"):
        compiled(family("gpt2").subject(), **head, compression_rate=0.5)


# Implementations that cannot be traced, and models that cannot be rewritten


def test_flash_attention_becomes_sdpa_in_the_copy() -> None:
    subject = family("llama").subject()
    subject.model.config._attn_implementation_internal = "flash_attention_2"
    gm = compiled(subject)
    assert subject.model.config._attn_implementation == "flash_attention_2"
    assert any("'flash_attention_2' cannot be traced" in n for n in gm.fxshare.report.notes)
    subject.model.config._attn_implementation_internal = "sdpa"
    assert ulps(subject, gm) <= 64


def test_gradient_checkpointing_is_left_out_and_said() -> None:
    subject = family("gpt2").subject()
    subject.model.gradient_checkpointing_enable()
    gm = compiled(subject)
    assert subject.model.is_gradient_checkpointing
    assert any("gradient checkpointing" in note for note in gm.fxshare.report.notes)
    assert ulps(subject, gm) <= 64


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_quantised_model_is_refused(method: str) -> None:
    subject = family("llama").subject()
    subject.model.config.quantization_config = {"quant_method": method}
    text = ""
    try:
        compiled(subject)
    except fxshare.FxShareError as error:
        text = str(error)
    assert method in text
    assert "quantise the result" in text


def test_a_linear_subclass_that_does_more_is_none() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.01

    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.extra = nn.Parameter(torch.zeros(4, 4))  # as LoRA begins

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x @ self.extra

    class Written(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T + self.bias

    found = [fxshare.sites.match.is_linear(m) for m in (Scaled(4, 4), Adapted(), Written(4, 4))]
    assert found == [False, False, True]


def test_reason_is_the_first_line() -> None:
    def fail() -> None:
        raise ValueError("first\nsecond")

    assert reason(fail) == "ValueError: first"


@pytest.mark.slow  # tests/generation/test_bench.py measures one of each kind
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_generation_of_an_encoder_and_a_decoder_is_measured(name: str) -> None:
    subject = family(name).subject()
    gm = compiled(subject)
    assert generates(subject, gm) == ""
    places = gm.meta["slices"]
    linear = gm.get_submodule(places[gm.fxshare.plan.sites[-1].slices[0].name].module)
    linear.weight = nn.Parameter(linear.weight.detach().roll(1, 0))
    assert "other tokens" in generates(subject, gm, 8)
