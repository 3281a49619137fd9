"""Which weights a configuration means, how they are named, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fxshare.config import load_config
from fxshare.errors import MatchError
from fxshare.sites.match import Matching, match
from fxshare.sites.site import Site
from fxshare.sites.tensors import dense_weights
from tests.toys import GPT2, HEADS, LAYERS, LLAMA, NANOGPT, TIED_MLP, WIDTH

BLOCKS = r"(?:h|layers)\.(\d+)"


def matched(model: nn.Module, block_pattern: str | None = BLOCKS, **types: Any) -> Matching:
    written = {t: {"pattern": s} if isinstance(s, str) else s for t, s in types.items()}
    return match(model, load_config({"weight_types": written, "block_pattern": block_pattern}))


def refusal(model: nn.Module, block_pattern: str | None = BLOCKS, **types: Any) -> str:
    with pytest.raises(MatchError) as caught:
        matched(model, block_pattern, **types)
    return str(caught.value)


class OneLinear(nn.Module):
    """A fused projection beside a config, as any library may call its fields."""

    def __init__(self, rows: int, **config: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, rows)
        self.config = SimpleNamespace(**config)


def one(rows: int, config: dict[str, Any] | None = None, **keys: Any) -> Site:
    model = OneLinear(rows, **(config or {}))
    (site,) = matched(model, None, w={"pattern": "qkv$", **keys}).sites
    assert [s.start for s in site.slices] == [0, *(s.stop for s in site.slices)][:-1]
    assert site.slices[-1].stop == rows
    return site


def rows_of(site: Site) -> dict[str, tuple[int, int]]:
    return {s.label: (s.start, s.stop) for s in site.slices}


# Names and rows


def test_a_site_knows_its_module_and_layer() -> None:
    sites = matched(NANOGPT.model(), fc=r".*\.mlp\.c_fc$").sites
    assert [site.name for site in sites] == [f"transformer.h.{i}.mlp.c_fc" for i in range(LAYERS)]
    assert [site.layer for site in sites] == list(range(LAYERS))
    assert {(s.in_features, s.out_features, s.bias) for s in sites} == {(WIDTH, 4 * WIDTH, True)}
    assert all(site.slices[0].name == site.name for site in sites)


def test_patterns_match_from_the_start_of_the_name() -> None:
    assert "matches no module" in refusal(NANOGPT.model(), fc=r"mlp\.c_fc$")


def test_conv1d_is_read_as_out_by_in() -> None:
    model = GPT2.model()
    matching = matched(model, attn=r".*\.attn\.c_attn$")
    site = matching.sites[0]
    assert (site.in_features, site.out_features) == (WIDTH, 3 * WIDTH)
    weight = model.get_submodule(site.name).weight
    assert torch.equal(dense_weights(model, matching.sites)[site.name], weight.T)


@pytest.mark.parametrize("order", ["qkv", "kqv", "vkq"])
def test_qkv_in_any_order(order: str) -> None:
    site = one(30, split="qkv", qkv_order=order)
    assert [s.name for s in site.slices] == [f"qkv.{p}" for p in order]
    assert rows_of(site) == {p: (10 * i, 10 * i + 10) for i, p in enumerate(order)}


def test_split_true_means_qkv() -> None:
    assert list(rows_of(one(30, split=True))) == ["q", "k", "v"]


def test_heads_of_a_fused_projection() -> None:
    site = one(24, split="heads", qkv_order="vqk", n_head=2)
    assert rows_of(site) == {
        "v.0": (0, 4), "v.1": (4, 8), "q.0": (8, 12), "q.1": (12, 16), "k.0": (16, 20),
        "k.1": (20, 24),
    }  # fmt: skip


def test_heads_of_an_unfused_projection() -> None:
    site = one(12, split="heads", n_head=3)
    assert rows_of(site) == {"0": (0, 4), "1": (4, 8), "2": (8, 12)}
    assert [s.name for s in site.slices] == ["qkv.0", "qkv.1", "qkv.2"]


def test_grouped_queries_give_unequal_blocks() -> None:
    keys = {"n_head": 4, "n_kv_head": 1}
    assert rows_of(one(12, split="qkv", **keys)) == {"q": (0, 8), "k": (8, 10), "v": (10, 12)}
    by_head = one(12, split="heads", qkv_order="kqv", **keys)
    assert list(rows_of(by_head)) == ["k.0", "q.0", "q.1", "q.2", "q.3", "v.0"]
    assert {s.out_features for s in by_head.slices} == {2}


def test_interleaved_rows_are_q_k_v_per_head() -> None:
    site = one(12, split="heads", qkv_order="qkv", interleaved=True, n_head=2)
    assert rows_of(site) == {
        "q.0": (0, 2), "k.0": (2, 4), "v.0": (4, 6), "q.1": (6, 8), "k.1": (8, 10), "v.1": (10, 12),
    }  # fmt: skip


def test_interleaved_groups_are_their_q_heads_k_and_v() -> None:
    keys = {"split": "heads", "qkv_order": "qkv", "interleaved": True}
    site = one(16, **keys, n_head=4, n_kv_head=2)
    assert rows_of(site) == {
        "q.0": (0, 2), "q.1": (2, 4), "k.0": (4, 6), "v.0": (6, 8),
        "q.2": (8, 10), "q.3": (10, 12), "k.1": (12, 14), "v.1": (14, 16),
    }  # fmt: skip
    text = refusal(OneLinear(18), None, w={"pattern": "qkv$", **keys, "n_head": 5, "n_kv_head": 2})
    assert "the 5 heads of 'qkv' do not divide by 2" in text


def test_gate_and_up_are_halves() -> None:
    assert rows_of(one(12, split="gate_up")) == {"gate": (0, 6), "up": (6, 12)}
    text = refusal(OneLinear(13), None, w={"pattern": "qkv$", "split": "gate_up"})
    assert "the 13 rows of 'qkv' do not divide by 2 (gate and up)" in text


def test_multi_query_has_one_key_head_whatever_the_config_counts() -> None:
    # Falcon's: num_kv_heads says 4 where all heads read one
    config = {"num_attention_heads": 4, "num_kv_heads": 4, "multi_query": True}
    site = one(12, config, split="heads", qkv_order="qkv")
    assert list(rows_of(site)) == ["q.0", "q.1", "q.2", "q.3", "k.0", "v.0"]


# Parameters that are not the weight of a linear module


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.layers:
            layer.in_proj_weight = nn.Parameter(torch.randn(12, 4))
            layer.in_proj_bias = nn.Parameter(torch.randn(12))
            layer.stack = nn.Parameter(torch.randn(3, 8, 4))
            layer.embed = nn.Embedding(5, 4)


def test_a_parameter_is_matched_by_its_own_name() -> None:
    found = matched(Bare(), w={"pattern": r".*in_proj_weight$", "split": "qkv"})
    assert [site.name for site in found.sites] == [f"layers.{i}.in_proj_weight" for i in range(2)]
    assert {site.bias for site in found.sites} == {True}
    assert found.parameters == {site.name for site in found.sites}


def test_each_matrix_of_a_stack_is_a_site() -> None:
    model = Bare()
    sites = matched(model, w={"pattern": r".*\.stack$", "split": "gate_up"}).sites
    assert [site.name for site in sites[:3]] == [f"layers.0.stack.{e}" for e in range(3)]
    assert [s.label for s in sites[1].slices] == ["gate.1", "up.1"]
    assert [s.name for s in sites[1].slices] == ["layers.0.stack.1.gate", "layers.0.stack.1.up"]
    weights = dense_weights(model, sites)
    assert torch.equal(weights["layers.1.stack.2"], model.layers[1].stack[2])


def test_an_embedding_is_refused_with_the_reason() -> None:
    text = refusal(Bare(), w=r".*\.embed\.weight$")
    assert "belongs to a Embedding, which looks up" in text


# Heads from the model's own config


@pytest.mark.parametrize("key", ["num_attention_heads", "n_head", "num_heads"])
def test_heads_are_read_from_the_models_config(key: str) -> None:
    site = one(24, {key: 2}, split="heads", qkv_order="qkv")
    assert list(rows_of(site)) == ["q.0", "q.1", "k.0", "k.1", "v.0", "v.1"]


def test_the_configuration_wins_over_the_models_config() -> None:
    site = one(24, {"n_head": 2}, split="heads", qkv_order="qkv", n_head=4)
    assert len(site.slices) == 12


def test_key_value_heads_are_read_from_the_models_config() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert rows_of(one(16, config, split="qkv")) == {"q": (0, 8), "k": (8, 12), "v": (12, 16)}


def test_heads_of_gpt2_and_llama_are_inferred() -> None:
    fused = matched(
        GPT2.model(), attn={"pattern": r".*c_attn$", "split": "heads", "qkv_order": "qkv"}
    )
    assert len(fused.sites[0].slices) == 3 * HEADS
    spec = {"pattern": r".*\.[qk]_proj$", "split": "heads"}
    sites = matched(LLAMA.model(), qk=spec).sites
    # the keys' projection is narrower by the ratio of the head counts: the head width is the same
    assert [len(site.slices) for site in sites[:2]] == [HEADS, HEADS // 2]


def test_unknown_head_count_says_what_to_add() -> None:
    text = refusal(OneLinear(24), None, w={"pattern": "qkv", "split": "heads", "qkv_order": "qkv"})
    assert "the number of heads of 'qkv' is not known" in text
    assert "add n_head" in text


# Ties


def test_modules_with_one_weight_are_one_site() -> None:
    (site,) = matched(TIED_MLP.model(), None, w=r"left|right").sites
    assert (site.name, site.calls) == ("left", ("left", "right"))


def test_a_pattern_for_the_second_name_takes_the_whole_tie() -> None:
    (site,) = matched(TIED_MLP.model(), None, w=r"right").sites
    assert site.calls == ("left", "right")


def test_a_module_under_two_names_is_one_site() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    (site,) = matched(model, None, w=r"[ab]").sites
    assert site.calls == ("a", "b")


def test_a_head_tied_to_the_embedding_is_left_alone() -> None:
    matching = matched(
        NANOGPT.model(), fc=r".*c_fc$", head={"pattern": r"lm_head|.*h\.0\.attn\.c_proj"}
    )
    (skipped,) = matching.skipped
    assert skipped.name == "lm_head"
    assert "tied to 'transformer.wte.weight'" in skipped.reason
    text = refusal(NANOGPT.model(), head="lm_head")
    assert "matches 1 modules and none can be rewritten" in text


def test_one_weight_with_two_biases_is_left_alone() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    matching = matched(model, None, w=r"[abc]")
    assert [site.name for site in matching.sites] == ["c"]
    assert all("has another bias" in s.reason for s in matching.skipped)


# What is refused, and why


def test_other_modules_are_not_linears() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "embed": nn.Embedding(4, 4)})
    assert "'norm' is a LayerNorm, not an nn.Linear or Conv1D" in refusal(model, None, w="norm")
    assert "is a Embedding" in refusal(model, None, w="embed")


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _with_hook(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, args, output: output * 2)
    return linear


def _with_own_forward(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x: x  # as accelerate does
    return linear


def _with_plain_weight(linear: nn.Linear) -> nn.Linear:
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight
    return linear


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Scaled(4, 4), "is a Scaled"),
        (parametrizations.weight_norm(nn.Linear(4, 4)), "parametrize"),
        (prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), "not a parameter"),
        (_with_plain_weight(nn.Linear(4, 4)), "not a parameter"),
        (_with_hook(nn.Linear(4, 4)), "has forward hooks"),
        (_with_own_forward(nn.Linear(4, 4)), "a forward of its own"),
    ],
    ids=["subclass", "weight-norm", "pruned", "plain", "hooked", "own-forward"],
)
def test_linears_that_compute_something_else_are_left_alone(module: nn.Module, reason: str) -> None:
    model = nn.ModuleDict({"a": module, "b": nn.Linear(4, 4)})
    matching = matched(model, None, w=r"[ab]$")
    assert [site.name for site in matching.sites] == ["b"]
    (skipped,) = matching.skipped
    assert skipped.name == "a"
    assert reason in skipped.reason


def test_nothing_matched_names_the_nearest_linears() -> None:
    text = refusal(NANOGPT.model(), fc=r".*\.mlp\.c_fcc$")
    assert "weight type 'fc': pattern '.*\\\\.mlp\\\\.c_fcc$' matches no module" in text
    assert "the nearest linear modules are 'transformer.h." in text
    assert ".mlp.c_fc'" in text


def test_nothing_matched_in_a_model_without_linears() -> None:
    assert "the model has no linear modules" in refusal(nn.LayerNorm(3), None, w="x")


def test_two_types_on_one_module() -> None:
    text = refusal(NANOGPT.model(), a=r".*\.c_proj$", b=r".*\.mlp\.c_proj$")
    assert "module 'transformer.h.0.mlp.c_proj' is matched by two weight types, 'a' (" in text
    assert "and 'b' (" in text
    assert "make the patterns disjoint" in text


@pytest.mark.parametrize("pattern", [r"blocks\.(\d+)", r"h\.(x)?"])
def test_no_layer_number_suggests_a_pattern(pattern: str) -> None:
    text = refusal(NANOGPT.model(), pattern, fc=r".*c_fc$")
    assert "finds no layer number in module 'transformer.h.0.mlp.c_fc' of weight type 'fc'" in text
    assert r"try 'h\.(\d+)'" in text


def test_sharing_across_layers_needs_a_block_pattern() -> None:
    cfg = {
        "weight_types": {"fc": {"pattern": r".*c_fc$"}},
        "group_size": 2,
        "compression_rate": 0.5,
    }
    with pytest.raises(MatchError, match="needs block_pattern, a regular expression whose group 1"):
        match(NANOGPT.model(), load_config(cfg))


def test_groups_of_one_need_no_layer_number() -> None:
    cfg = {
        "weight_types": {"fc": {"pattern": r".*c_fc$"}},
        "group_size": 1,
        "compression_rate": 0.5,
    }
    assert {site.layer for site in match(NANOGPT.model(), load_config(cfg)).sites} == {None}


def test_heads_that_do_not_divide_name_the_nearest_number() -> None:
    spec = {"pattern": r".*c_attn$", "split": "heads", "qkv_order": "qkv", "n_head": 5}
    text = refusal(NANOGPT.model(), attn=spec)
    assert "the 48 rows of 'transformer.h.0.attn.c_attn' do not divide by 15" in text
    assert "the nearest number that does is 16" in text


def test_rows_that_are_no_three_blocks() -> None:
    text = refusal(OneLinear(16), None, w={"pattern": "qkv", "split": "qkv"})
    assert "the 16 rows of 'qkv' do not divide by 3" in text


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = NANOGPT.model()
    sites = matched(model, fc=r".*c_fc$").sites
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = value
    with pytest.raises(MatchError, match=r"weight of 'transformer\.h\.1\.mlp\.c_fc' has values"):
        dense_weights(model, sites)
