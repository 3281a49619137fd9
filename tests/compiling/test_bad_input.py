"""Bad input gives an error of ours that names what is wrong, and leaves nothing behind."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxshare
from fxshare import FxShareError, FxShareWarning
from fxshare.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    GuardError,
    MatchError,
    PlanError,
)
from tests.strategies import (
    SHARING,
    VOCAB,
    Sizes,
    gpt,
    gpt_config,
    no_warnings_of_ours,
    token_batches,
)
from tests.toys import same_tensors, tensors_of

BATCHES = token_batches()


def refusal(kind: type[FxShareError], cfg: Any, model: Any = None, **keys: Any) -> str:
    """The message of the error; the model must be as it was, and the next compilation work."""
    model = gpt() if model is None else model
    before = tensors_of(model)
    flags = [m.training for m in model.modules()]
    factories = (torch.arange, torch.ones, torch.tensor, nn.Module.__call__)
    rng = torch.get_rng_state()
    with pytest.raises(FxShareError) as caught, no_warnings_of_ours():
        fxshare.compile(model, cfg, **{"calibration": BATCHES, **keys})
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {caught.value}"
    assert same_tensors(before, tensors_of(model))
    assert [m.training for m in model.modules()] == flags
    assert (torch.arange, torch.ones, torch.tensor, nn.Module.__call__) == factories
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()
    return str(caught.value)


def with_attn(**keys: Any) -> dict[str, Any]:
    return {
        "weight_types": {"attn": {"pattern": r".*\.attn\.c_attn$", **keys}},
        "block_pattern": r"h\.(\d+)",
    }


# Configurations


def test_a_pattern_that_matches_nothing() -> None:
    text = refusal(MatchError, {"weight_types": {"attn": {"pattern": r".*\.c_atn$"}}})
    assert "weight type 'attn': pattern" in text
    assert "matches no module" in text
    assert "nearest linear modules are" in text


def test_two_types_on_one_module() -> None:
    cfg = gpt_config()
    cfg["weight_types"]["all"] = {"pattern": r".*\.c_proj$"}
    text = refusal(MatchError, cfg)
    assert "module 'transformer.h.0.attn.c_proj' is matched by two weight types" in text


def test_no_layer_number() -> None:
    text = refusal(MatchError, gpt_config(block_pattern=r"layers\.(\d+)", **SHARING))
    assert r"block_pattern 'layers\\.(\\d+)' finds no layer number" in text
    assert r"try 'h\.(\d+)'" in text


def test_heads_that_do_not_divide() -> None:
    text = refusal(MatchError, with_attn(split="heads", qkv_order="qkv", n_head=3))
    assert "the 24 rows of 'transformer.h.0.attn.c_attn' do not divide by 9" in text
    assert "the nearest number that does is 8" in text


def test_qkv_order_with_a_part_twice() -> None:
    text = refusal(ConfigError, with_attn(split="qkv", qkv_order="qkq"))
    assert "weight_types.attn.qkv_order: expected a permutation of 'qkv'" in text
    assert "q twice, v missing" in text


def test_an_unknown_key_suggests_the_nearest() -> None:
    text = refusal(ConfigError, gpt_config(group_sise=2))
    assert "group_sise: unknown key. Did you mean 'group_size'?" in text


@pytest.mark.parametrize("rate", [-0.5, 0, 0.0, float("nan"), float("inf"), "0.5", True])
def test_rates_that_are_no_positive_number(rate: object) -> None:
    text = refusal(ConfigError, gpt_config(group_size=2, compression_rate=rate))
    assert "compression_rate: expected the fraction of parameters kept" in text


@pytest.mark.parametrize("rate", [1.05, 2, 1e308])
def test_a_rate_that_costs_more_than_dense_warns_and_works(rate: float) -> None:
    model = gpt(torch.float64)
    cfg = gpt_config(group_size=2, compression_rate=rate)
    with pytest.warns(FxShareWarning, match="groups store more than their dense"):
        gm = fxshare.compile(model, cfg, calibration=BATCHES)
    assert gm.fxshare.report.params_kept > 1
    assert fxshare.verify(model, gm, BATCHES[0]).ok


def test_the_smallest_rate_keeps_rank_one() -> None:
    with no_warnings_of_ours():
        gm = fxshare.compile(gpt(), gpt_config(group_size=2, compression_rate=1e-300))
    assert {g.rank for g in gm.fxshare.plan.groups} == {1}


# Models


@pytest.mark.parametrize("model", [None, "gpt2", nn.Linear, 5])
def test_something_that_is_no_module(model: Any) -> None:
    name = type(model).__name__
    for work in (fxshare.compile, fxshare.plan):
        with pytest.raises(ConfigError, match=f"expected an nn.Module to compile, found {name}"):
            work(model, gpt_config())


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt(n_layer=1)

    def forward(self, idx: Tensor) -> Tensor:
        if idx.float().mean() > 5:
            return self.inner(idx)
        return -self.inner(idx)


def test_a_model_that_cannot_be_traced() -> None:
    cfg = {"weight_types": {"fc": {"pattern": r".*c_fc$"}}}
    text = refusal(CaptureError, cfg, Untraceable(), capture="fx")
    line = Untraceable.forward.__code__.co_firstlineno + 1
    assert f"tests.compiling.test_bad_input:{line}" in text
    assert "(gt)" in text
    assert fxshare.compile(Untraceable(), cfg, calibration=BATCHES).fxshare.front_end == "modules"


def test_weights_that_are_nan() -> None:
    model = gpt()
    with torch.no_grad():
        model.transformer["h"][0].mlp.c_fc.weight[0, 0] = torch.nan
    model_state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        MatchError, match=r"the weight of 'transformer\.h\.0\.mlp\.c_fc' has values"
    ):
        fxshare.compile(model, gpt_config(**SHARING), calibration=BATCHES)
    torch.testing.assert_close(model.state_dict(), model_state, equal_nan=True, rtol=0, atol=0)


def test_a_model_whose_matched_modules_are_never_called() -> None:
    model = gpt()
    model.unused = nn.Linear(3, 3)
    text = refusal(MatchError, {"weight_types": {"w": {"pattern": "unused"}}}, model)
    assert "none of the matched modules is called, 'unused' for one" in text


def test_a_plan_of_another_model() -> None:
    plan = fxshare.plan(gpt(n_layer=3), gpt_config(**SHARING))
    text = refusal(PlanError, gpt_config(**SHARING), gpt(n_layer=2), plan=plan)
    assert "the plan's site 'transformer.h.2." in text


# Calibration data


def test_no_batches() -> None:
    assert "calibration data is empty" in refusal(CalibrationError, gpt_config(), calibration=[])


@pytest.mark.parametrize("data", [5, 0.5, object()])
def test_data_that_is_no_iterable(data: Any) -> None:
    text = refusal(CalibrationError, gpt_config(), calibration=data)
    assert f"expected an iterable of batches, found {type(data).__name__}" in text


@pytest.mark.parametrize("data", [BATCHES[0], {"idx": BATCHES[0]}])
def test_one_batch_that_is_not_in_a_list(data: Any) -> None:
    text = refusal(CalibrationError, gpt_config(), calibration=data)
    assert f"found one {type(data).__name__}; wrap it in a list" in text


@pytest.mark.parametrize("batch", ["text", 3, None, [1, 2]])
def test_batches_that_hold_no_tensor(batch: Any) -> None:
    text = refusal(CalibrationError, gpt_config(**SHARING), calibration=[batch, batch])
    assert "expected a batch as a tensor, a tuple of tensors or a mapping" in text


def test_batches_with_nan() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    good, bad = torch.ones(8, 6), torch.full((8, 6), torch.nan)
    cfg = {"weight_types": {"w": {"pattern": r"\d"}}, "group_size": 1, "compression_rate": 0.5}
    for number, data in enumerate(([bad, good], [good, bad])):
        text = refusal(CalibrationError, cfg, model, calibration=data)
        assert f"calibration batch {number}: input 'input' has 48 values that are NaN" in text


def test_wrong_argument_names() -> None:
    text = refusal(CalibrationError, gpt_config(), calibration=[{"input_ids": BATCHES[0]}])
    assert "a batch has the entry 'input_ids', but GPT.forward takes ['idx', 'targets']" in text


def test_too_many_arguments() -> None:
    text = refusal(CalibrationError, gpt_config(), calibration=[(BATCHES[0],) * 3])
    assert "a batch has 3 entries, but GPT.forward takes ['idx', 'targets']" in text


def test_wrong_dtype() -> None:
    text = refusal(CaptureError, gpt_config(), calibration=[BATCHES[0].float()])
    assert "GPT does not accept the example call {'idx': 'float32 (3, 12)'}" in text
    later = refusal(
        CalibrationError, gpt_config(**SHARING), calibration=[BATCHES[0], BATCHES[1].float()]
    )
    assert "calibration batch 1 failed in the model" in later


def test_token_ids_out_of_range() -> None:
    text = refusal(CaptureError, gpt_config(), calibration=[BATCHES[0] + VOCAB])
    assert "does not accept the example call" in text
    assert "index out of range" in text
    later = refusal(
        CalibrationError, gpt_config(**SHARING), calibration=[BATCHES[0], BATCHES[1] + VOCAB]
    )
    assert "calibration batch 1 failed in the model: IndexError" in later
    assert "check its shapes and token ids" in later


def test_sequences_too_long_for_the_model() -> None:
    long = torch.cat(BATCHES, 1)
    with pytest.raises(GuardError, match=r"the condition at tests\.strategies:\d+ gave True"):
        fxshare.compile(gpt(), gpt_config(**SHARING), calibration=[BATCHES[0], long])
    text = refusal(CaptureError, gpt_config(), calibration=[long])
    assert "cannot forward 48 tokens, block size is only 16" in text


# Anything


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.floats(-1, 3),
    st.sampled_from(
        [float("nan"), float("inf"), 1e308, 1e-308, "qkv", "heads", "vqk", "site", "part"]
    ),
    st.text(max_size=3),
)
patterns = st.sampled_from(
    [
        r".*\.c_attn$", r".*c_proj$", r".*\.mlp\.c_fc$", r".*", r"lm_head", r"transformer\.h\.1.*",
        r".*\.attn$", r"(", r"", r".*ln_1$", r".*\.mlp\.c_.*", r".*\.attn\..*",
    ]
)  # fmt: skip
types = st.fixed_dictionaries(
    {"pattern": patterns},
    optional={
        "split": st.sampled_from([False, True, "qkv", "heads", None]),
        "qkv_order": st.sampled_from(["qkv", "vqk", None]),
        "n_head": st.integers(1, 5),
        "n_kv_head": st.integers(1, 4),
        "interleaved": st.booleans(),
        "basis": st.sampled_from(["slice", "part", "site"]),
    },
)
plausible = st.fixed_dictionaries(
    {
        "weight_types": st.dictionaries(
            st.sampled_from(["a", "b-c", "b_c"]), types, min_size=1, max_size=2
        )
    },
    optional={
        "block_pattern": st.sampled_from([r"h\.(\d+)", r"h\.(\d)?", r"(\d+)", r"(x)", r"\.(\w)"]),
        "group_size": st.integers(1, 4),
        "compression_rate": st.sampled_from([0.01, 0.4, 0.9, 1.0, 3.0, 1e308, 1e-308]),
        "private": st.lists(st.sampled_from(["a", "b-c"]), max_size=2),
        "fuse": st.booleans(),
        "capture": st.sampled_from(["modules", "modules", "fx"]),
        "calibration": st.fixed_dictionaries(
            {}, optional={"max_tokens": st.integers(1, 50), "relative_floor": st.floats(1e-9, 0.5)}
        ),
    },
)


@st.composite
def anything(draw: st.DrawFn) -> dict[str, Any]:
    """A plausible configuration, in which one value or key may be junk."""
    cfg = draw(plausible)
    if draw(st.integers(0, 3)) == 0:
        target = draw(st.sampled_from([cfg, *cfg["weight_types"].values()]))
        target[draw(st.sampled_from([*target, "layer_pattern", "rank"]))] = draw(values)
    return cfg


@given(anything(), st.booleans())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_any_configuration_gives_a_model_or_an_error_of_ours(cfg: Any, calibrated: bool) -> None:
    model = gpt(**vars(Sizes(n_layer=2, n_head=2, head_dim=4, hidden=6)))
    data = BATCHES[:2] if calibrated else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        try:
            gm = fxshare.compile(model, cfg, calibration=data, example=BATCHES[0])
        except FxShareError:
            return
    with torch.no_grad():
        assert gm(BATCHES[0]).shape == (*BATCHES[0].shape, VOCAB)
    assert gm.fxshare.report.sites == len(gm.fxshare.plan.sites) > 0
