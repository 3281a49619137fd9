"""``fxshare.compile`` as a whole, over generated models and configurations."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.errors import CalibrationError, GuardError
from fxshare.result.products import slice_product, slices_of
from passes.errors import FxShareError
from tests.strategies import (
    LONGEST,
    SHARING,
    VOCAB,
    Sizes,
    configurations,
    gpt,
    gpt_config,
    model_sizes,
    no_warnings_of_ours,
    sharing,
    token_batches,
)
from tests.toys import same_tensors, tensors_of

BATCHES = token_batches()
IDS = token_batches(1, rows=2, length=7, seed=5)[0]


def compiled(model: nn.Module, cfg: Any, **keys: Any) -> Any:
    with no_warnings_of_ours():
        return fxshare.compile(model, cfg, **{"calibration": BATCHES, **keys})


@torch.no_grad()
def distance(model: nn.Module, gm: nn.Module, *args: Any, **keys: Any) -> float:
    return worst(model(*args, **keys), gm(*args, **keys)).relative


def depth_of(gm: Any) -> int:
    return 2 * len(gm.fxshare.plan.sites) + 1


@st.composite
def exact_cases(draw: st.DrawFn) -> tuple[Sizes, dict[str, Any]]:
    sizes = draw(model_sizes())
    return sizes, draw(configurations(sizes))


@st.composite
def sharing_cases(draw: st.DrawFn) -> tuple[Sizes, dict[str, Any]]:
    sizes, cfg = draw(exact_cases())
    return sizes, draw(sharing(cfg))


# The same function


@given(exact_cases(), st.sampled_from([torch.float64, torch.float32]))
@settings(deadline=None, max_examples=3)
def test_exact_mode_equals_the_original(case: Any, dtype: torch.dtype) -> None:
    sizes, cfg = case
    model = gpt(dtype, **vars(sizes))
    gm = compiled(model, cfg)
    limit = 1e-10 if dtype == torch.float64 else tolerance(dtype, depth_of(gm))
    assert distance(model, gm, IDS) <= limit


@given(exact_cases(), st.integers(1, 4))
@settings(deadline=None, max_examples=3)
def test_sharing_at_full_rank_equals_the_original(case: Any, group_size: int) -> None:
    sizes, cfg = case
    model = gpt(torch.float64, **vars(sizes))
    gm = compiled(model, {**cfg, "group_size": group_size, "compression_rate": 1e6})
    assert all(g.rank == min(g.in_features, g.out_features) for g in gm.fxshare.plan.groups)
    assert distance(model, gm, IDS) <= 1e-11


@pytest.mark.parametrize("front_end", ["export", "modules"])
@pytest.mark.parametrize("shared", [False, True])
def test_other_front_ends_give_the_same_function(front_end: Any, shared: bool) -> None:
    sizes = Sizes(n_head=2, conv1d=True)
    model = gpt(torch.float64, **vars(sizes))
    cfg = gpt_config(sizes, **SHARING if shared else {})
    cfg["weight_types"]["attn"] |= {"split": "heads", "qkv_order": "qkv", "n_head": 2}
    gm = compiled(model, cfg, capture=front_end)
    assert gm.fxshare.report.front_end == front_end
    reference = compiled(model, cfg, capture="fx") if shared else model
    assert distance(reference, gm, IDS) <= 1e-12


def test_batch_of_one_and_a_single_token_are_taken() -> None:
    model = gpt(torch.float64)
    gm = compiled(model, gpt_config())
    for ids in (IDS[:1], IDS[:, :1], IDS[:1, :1]):
        assert distance(model, gm, ids) <= 1e-10


# Honest numbers


@given(sharing_cases())
@settings(deadline=None, max_examples=3)
def test_report_and_module_hold_what_the_plan_says(case: Any) -> None:
    sizes, cfg = case
    model = gpt(**vars(sizes))
    gm = compiled(model, cfg)
    plan, report = gm.fxshare.plan, gm.fxshare.report
    assert len(report.groups) == len(plan.groups)
    assert report.numbers_after == plan.stored_numbers
    assert report.numbers_before == plan.dense_numbers
    places = slices_of(gm).values()
    names = {p.module for p in places} | {p.basis for p in places if p.basis}
    stored = {id(w): w for name in names for w in [gm.get_submodule(name).weight]}
    assert sum(w.numel() for w in stored.values()) == plan.stored_numbers
    assert report.parameters_before == sum(p.numel() for p in model.parameters())
    assert report.parameters_after == sum(p.numel() for p in gm.parameters())
    saved = plan.dense_numbers - plan.stored_numbers
    assert report.parameters_before - report.parameters_after == saved


@given(exact_cases(), st.integers(1, 4))
@settings(deadline=None, max_examples=3)
def test_weighted_error_never_grows_with_the_rate(case: Any, group_size: int) -> None:
    sizes, cfg = case
    model = gpt(**vars(sizes))
    previous: dict[str, float] = {}
    for rate in (0.05, 0.3, 0.6, 0.9, 1e6):
        # the error is of the factorisation, so one capture-free front end is enough
        gm = compiled(
            model, {**cfg, "group_size": group_size, "compression_rate": rate}, capture="modules"
        )
        errors = {g.name: g.weighted_error for g in gm.fxshare.report.groups}
        for name, error in errors.items():
            assert error <= previous.get(name, 1.0) + 1e-12
        previous = errors
    assert all(error <= 1e-12 for error in previous.values())


def test_one_owner_for_each_basis() -> None:
    for front_end in ("fx", "modules"):
        gm = compiled(gpt(n_layer=4), gpt_config(**SHARING), capture=front_end)
        keys = [k for k in gm.state_dict() if "basis_" in k]
        assert sorted(keys) == sorted(f"{g.name}.weight" for g in gm.fxshare.plan.groups)


# The source stays as it is


class Untouched:
    """Everything about a model, and about the process, that compiling must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self.look()

    def look(self) -> dict[str, Any]:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        return {
            "training": {n: m.training for n, m in modules.items()},
            "identity": {n: id(m) for n, m in modules.items()},
            "class": {n: type(m) for n, m in modules.items()},
            "keys": {n: sorted(vars(m)) for n, m in modules.items()},
            "hooks": {
                n: [list(v) for k, v in vars(m).items() if k.endswith("_hooks")]
                for n, m in modules.items()
            },
            "requires_grad": {n: p.requires_grad for n, p in self.model.named_parameters()},
            "grad": {
                n: None if p.grad is None else (id(p.grad), p.grad._version, p.grad.clone())
                for n, p in self.model.named_parameters()
            },
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "dtype": torch.get_default_dtype(),
            "fast path": torch.backends.mha.get_fastpath_enabled(),
            "factories": (torch.arange, torch.ones, torch.zeros, torch.full, torch.tensor),
            "call": (nn.Module.__call__, nn.Module.__getattr__),
            "tensors": tensors_of(self.model),
        }

    def check(self) -> None:
        now = self.look()
        assert same_tensors(self.before.pop("tensors"), now.pop("tensors"))
        for what, value in self.before.items():
            assert _equal(value, now[what]), what


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, (Tensor, np.ndarray)):
        return bool((left == right).all())
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(v, right[k]) for k, v in left.items())
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right)


def trained_a_little(**sizes: Any) -> nn.Module:
    """A model in the middle of its life: training mode, gradients, a hook, a frozen parameter."""
    model = gpt(**sizes, dropout=0.1).train()
    model.transformer["h"][0].ln_1.eval()
    F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
    model.transformer["ln_f"].weight.requires_grad_(False)
    model.transformer["ln_f"].register_forward_hook(lambda module, args, output: None)
    model.register_buffer("steps", torch.ones(3))
    return model


@pytest.mark.parametrize("front_end", ["fx", "export", "modules"])
@pytest.mark.parametrize("shared", [False, True])
def test_source_is_untouched(front_end: Any, shared: bool) -> None:
    model = trained_a_little()
    untouched = Untouched(model)
    cfg = gpt_config(**SHARING if shared else {})
    gm = compiled(model, cfg, capture=front_end)
    fxshare.verify(model, gm, BATCHES[0])
    untouched.check()


class Fails(nn.Module):
    """A model that raises the third time that it is run on other data."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.inner, self.error = gpt(n_layer=1), error

    def forward(self, idx: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and idx.shape[1] == LONGEST - 1:
            raise self.error
        return self.inner(idx)


@pytest.mark.parametrize("front_end", ["auto", "fx", "modules"])
def test_source_is_untouched_after_a_model_raised_during_calibration(front_end: Any) -> None:
    model = Fails(ValueError("no more")).train()
    untouched = Untouched(model)
    batches = [*BATCHES, token_batches(1, length=LONGEST - 1)[0]]
    with pytest.raises(FxShareError):
        compiled(model, gpt_config(**SHARING), calibration=batches, capture=front_end)
    untouched.check()


def test_source_is_untouched_after_a_nan_batch() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    untouched = Untouched(model)
    good = torch.ones(8, 6)
    cfg = {"weight_types": {"w": {"pattern": r"\d"}}, "group_size": 1, "compression_rate": 0.5}
    bad = good.clone()
    bad[3, 3] = torch.nan
    with pytest.raises(CalibrationError, match="batch 1: input 'input' has 1 values"):
        compiled(model, cfg, calibration=[good, bad])
    untouched.check()


@pytest.mark.parametrize("front_end", ["fx", "modules"])
def test_unmatched_parameters_are_shared(front_end: Any) -> None:
    model = gpt()
    gm = compiled(model, gpt_config(**SHARING), capture=front_end)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in ("transformer.wte.weight", "lm_head.weight", "transformer.h.1.ln_2.bias"):
        assert gm.get_parameter(name) is parameters[name]
    assert gm.lm_head.weight is gm.transformer.wte.weight


@pytest.mark.parametrize("front_end", ["fx", "modules"])
@pytest.mark.parametrize("shared", [False, True])
def test_copy_shares_no_memory(front_end: Any, shared: bool) -> None:
    model = gpt()
    cfg = gpt_config(**SHARING if shared else {})
    gm = compiled(model, cfg, capture=front_end, copy=True)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not mine & {p.untyped_storage().data_ptr() for p in gm.parameters()}
    assert gm.lm_head.weight is gm.transformer.wte.weight
    before = tensors_of(model)
    gm(IDS).square().mean().backward()
    torch.optim.SGD(gm.parameters(), lr=0.1).step()
    assert same_tensors(before, tensors_of(model))


def test_exact_mode_holds_views_of_the_matched_weights() -> None:
    model = gpt()
    gm = compiled(model, gpt_config())
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {p.untyped_storage().data_ptr() for p in gm.parameters()} == mine


# A module like any other


@pytest.mark.parametrize("front_end", ["fx", "modules"])
def test_deepcopy_is_independent_and_keeps_the_record(front_end: Any) -> None:
    gm = compiled(gpt(), gpt_config(**SHARING), capture=front_end)
    twin = copy.deepcopy(gm)
    assert twin.fxshare.plan == gm.fxshare.plan
    assert distance(gm, twin, IDS) == 0
    assert sorted(twin.state_dict()) == sorted(gm.state_dict())
    expected = gm(IDS)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(gm(IDS), expected)
    assert not twin(IDS).any()


def test_same_seed_same_result() -> None:
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)  # the global one must not matter
        states.append(compiled(gpt(), gpt_config(**SHARING)).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_dropout_follows_train_and_eval() -> None:
    model = gpt(dropout=0.5, n_layer=1)
    gm = compiled(model, gpt_config())
    for module in (model, gm):
        module.train()
    outputs = []
    for module in (model, gm):
        torch.manual_seed(3)
        outputs.append(module(IDS))
    # the same generator in the same order: attention's own dropout, too, is drawn alike
    assert worst(*outputs).relative <= tolerance(torch.float32, depth_of(gm))
    assert worst(outputs[0], model.eval()(IDS)).relative > 0.01
    assert distance(model, gm.eval(), IDS) <= tolerance(torch.float32, depth_of(gm))


def test_dropout_of_attention_alone_follows_train_and_eval() -> None:
    model = gpt(n_layer=1)
    model.transformer["h"][0].attn.dropout = 0.5  # read by scaled_dot_product_attention only
    gm = compiled(model, gpt_config()).train()
    assert distance(gm, gm, IDS) > 0.01
    gm.eval()
    assert distance(gm, gm, IDS) == 0


@pytest.mark.parametrize("front_end", ["fx", "modules"])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_basis_gets_the_sum_of_its_readers_gradients(front_end: Any, fuse: bool) -> None:
    model = gpt(torch.float64)
    gm = compiled(model, gpt_config(**SHARING, fuse=fuse), capture=front_end)
    loss_of(gm).backward()
    # the same function with the products in place of the factors: dW_i is known for each slice
    dense = copy.deepcopy(model)
    for site in gm.fxshare.plan.sites:
        with torch.no_grad():
            product = torch.cat([slice_product(gm, s.name) for s in site.slices])
            dense.get_submodule(site.name).weight.copy_(product)
    loss_of(dense).backward()
    places, sites = (
        slices_of(gm),
        {s.name: site for site in gm.fxshare.plan.sites for s in site.slices},
    )
    for group in gm.fxshare.plan.groups:
        expected = torch.zeros(group.rank, group.in_features, dtype=torch.float64)
        for name in group.slices:
            place, site = places[name], sites[name]
            spec = next(s for s in site.slices if s.name == name)
            d_weight_OI = dense.get_submodule(site.name).weight.grad[spec.start : spec.stop]
            coefficient_OR = gm.get_submodule(place.module).weight[place.start : place.stop]
            expected += coefficient_OR.detach().T @ d_weight_OI
        found = gm.get_submodule(group.name).weight.grad
        assert worst(expected, found).relative <= 1e-10


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(IDS).flatten(0, 1), IDS.roll(1, 1).flatten())


@pytest.mark.parametrize("front_end", ["fx", "modules"])
def test_training_reduces_the_loss_and_reaches_every_factor(front_end: Any) -> None:
    gm = compiled(gpt(), gpt_config(**SHARING), capture=front_end, copy=True).train()
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
    before = {n: p.detach().clone() for n, p in gm.named_parameters()}
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(gm)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert not [n for n, p in gm.named_parameters() if torch.equal(p, before[n])]


def test_frozen_weights_give_frozen_factors() -> None:
    model = gpt()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    gm = compiled(model, gpt_config(**SHARING))
    trainable = {n for n, p in gm.named_parameters() if p.requires_grad}
    assert any(n.startswith("basis_fc") for n in trainable)
    assert not any(n.startswith(("basis_attn", "basis_proj")) for n in trainable)


def test_compiling_under_inference_mode_gives_a_trainable_model() -> None:
    model = gpt()
    with torch.inference_mode():
        gm = compiled(model, gpt_config(**SHARING))
    loss_of(gm).backward()
    assert all(p.grad is not None for p in gm.parameters())


def test_torch_compile_finds_no_graph_break() -> None:
    gm = compiled(gpt(), gpt_config(**SHARING))
    with torch.no_grad():
        fast = torch.compile(gm, fullgraph=True, backend="aot_eager")(IDS)
    assert worst(gm(IDS), fast).relative <= tolerance(torch.float32, depth_of(gm))


# Calls that it was and was not captured for


def test_example_with_targets_gives_logits_and_loss() -> None:
    model = gpt(torch.float64)
    targets = IDS.roll(-1, 1)
    for example in ({"idx": IDS, "targets": targets}, (IDS, targets)):
        gm = compiled(model, gpt_config(), example=example, calibration=None)
        expected, found = model(IDS, targets), gm(IDS, targets)
        assert isinstance(found, tuple)
        assert len(found) == 2
        assert worst(expected, found).relative <= 1e-10
        with pytest.raises((GuardError, TypeError), match="'targets'"):
            gm(IDS)


def test_calibration_with_targets_goes_with_an_example_that_has_them() -> None:
    model = gpt()
    batches = [(b, b.roll(-1, 1)) for b in BATCHES]
    gm = compiled(model, gpt_config(**SHARING), example=batches[0], calibration=batches)
    logits, loss = gm(*batches[0])
    assert logits.shape == (*BATCHES[0].shape, VOCAB)
    assert loss.ndim == 0
    assert fxshare.verify(model, gm, [batches[1]]).ok


def test_targets_among_the_data_alone_are_left_out() -> None:
    gm = compiled(gpt(), gpt_config(), calibration=[(b, b.roll(-1, 1)) for b in BATCHES])
    assert isinstance(gm(IDS), Tensor)


def test_an_argument_that_was_not_captured_is_refused() -> None:
    gm = compiled(gpt(), gpt_config())
    with pytest.raises(GuardError, match=r"argument 'targets': .* targets=None") as caught:
        gm(IDS, targets=IDS)
    assert "an example call like this one (example=...)" in str(caught.value)


@pytest.mark.parametrize("front_end", ["fx", "modules"])
def test_too_long_a_sequence_is_refused(front_end: Any) -> None:
    model = gpt()
    gm = compiled(model, gpt_config(), capture=front_end)
    longest = token_batches(1, length=LONGEST)[0]
    assert distance(model, gm, longest) <= tolerance(torch.float32, depth_of(gm))
    with pytest.raises((GuardError, AssertionError)):
        gm(token_batches(1, length=LONGEST + 1)[0])


def hf_gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=24, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).double().eval()


def hf_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).double().eval()


HF_CONFIG = {
    "weight_types": {
        "attn": {"pattern": r".*\.(c_attn|q_proj|k_proj|v_proj)$", "basis": "site"},
        "mlp": {"pattern": r".*\.(c_fc|gate_proj|up_proj)$"},
    },
    "block_pattern": r"(?:h|layers)\.(\d+)",
}


@pytest.mark.parametrize("make", [hf_gpt2, hf_llama])
def test_hf_attention_mask_given_or_omitted(make: Callable[[], nn.Module]) -> None:
    model = make()
    gm = compiled(model, HF_CONFIG)
    ones = torch.ones_like(IDS)
    left, right = ones.clone(), ones.clone()
    left[0, :3] = 0
    right[1, -3:] = 0
    for mask in (None, ones, left, right):
        given = {} if mask is None else {"attention_mask": mask}
        with torch.no_grad():
            expected, found = model(IDS, **given).logits, gm(IDS, **given).logits
        rows = (ones if mask is None else mask).bool()
        assert worst(expected[rows], found[rows]).relative <= 1e-10
    for ids in (IDS[:1], IDS[:, :1], IDS[:1, :1]):
        with torch.no_grad():
            assert worst(model(ids).logits, gm(ids).logits).relative <= 1e-10
    assert type(gm(IDS)) is type(model(IDS))


def test_hf_example_with_labels_gives_the_loss() -> None:
    model = hf_gpt2()
    labels = IDS.clone()
    labels[0, :2] = -100
    gm = compiled(model, HF_CONFIG, example={"input_ids": IDS, "labels": labels})
    found = gm(input_ids=IDS, labels=labels)
    assert worst(model(input_ids=IDS, labels=labels).loss, found.loss).relative <= 1e-10


# Plans


def test_a_plan_made_before_is_carried_out() -> None:
    model, cfg = gpt(n_layer=4), gpt_config(**SHARING)
    plan = fxshare.plan(model, cfg)
    gm = compiled(model, cfg, plan=fxshare.Plan.from_json(plan.to_json()))
    assert gm.fxshare.plan == plan
    reference = compiled(model, cfg)
    assert distance(reference, gm, IDS) == 0


def test_a_model_on_the_meta_device_is_planned_and_compiled() -> None:
    model = gpt().to("meta")
    plan = fxshare.plan(model, gpt_config(**SHARING))
    assert 0 < plan.params_kept < 1
    gm = compiled(model, gpt_config(), calibration=None, example=IDS)
    assert gm(IDS.to("meta")).shape == (*IDS.shape, VOCAB)


def test_sites_of_two_widths_in_one_type_get_groups_of_their_own() -> None:
    cfg = gpt_config(**SHARING)
    cfg["weight_types"] = {
        "m-lp": {"pattern": r".*\.mlp\.c_"},
        "m_lp": {"pattern": r".*\.attn\.c_"},
    }
    model = gpt()
    gm = compiled(model, cfg)
    groups = gm.fxshare.plan.groups
    assert len({g.name for g in groups}) == len(groups) == 3
    assert fxshare.verify(model, gm, IDS).ok


def test_sharing_without_data_says_so() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fxshare.compile(gpt(), gpt_config(**SHARING), example=IDS)
    assert "no calibration data: plain SVD" in str(gm.fxshare.report)
    assert gm.fxshare.report.calibration is None
