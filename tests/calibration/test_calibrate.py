"""The statistics that compiling rests on: one Gram per distinct input, padding left out.

Legend for shapes: I features, T tokens.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare import FxShareWarning
from fxshare.base import placement
from fxshare.base.numerics import worst
from fxshare.calibration.blocks import bytes_needed
from fxshare.calibration.calibrate import calibrate
from fxshare.calibration.statistics import Statistics
from fxshare.capture import Caller, Captured, capture
from fxshare.capture.widening import to_measure
from fxshare.config import load_config
from fxshare.errors import CalibrationError
from fxshare.sites.match import match
from passes.graph.graph import structure_copy
from tests.strategies import no_warnings_of_ours
from tests.toys import GPT2, LAYERS, LLAMA, LLAMA_LIKE, NANOGPT, TIED_MLP, VOCABULARY, WIDTH

EVERYTHING = {"weight_types": {"w": {"pattern": r".*(attn|proj|fc|twice|left|right|down|up)$"}}}


def batches(count: int = 3, rows: int = 4, length: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (rows, length), generator=generator) for _ in range(count)]


_CAPTURED: dict[nn.Module, dict[Any, Captured]] = {}


def statistics(
    model: nn.Module, data: Any, mode: Any = "fx", *, example: Any = None, **keys: Any
) -> Statistics:
    """Calibrate; a model is captured once, whatever is asked of it afterwards."""
    sites = match(model, load_config(EVERYTHING)).sites
    made = _CAPTURED.setdefault(model, {})
    if mode not in made:
        first = Caller(model)(data[0] if example is None else example)
        made[mode] = capture(model, first, mode=mode)
    with no_warnings_of_ours():
        return calibrate(made[mode], data, sites, **keys)


def assert_same(left: Statistics, right: Statistics, limit: float) -> None:
    assert left.inputs.keys() == right.inputs.keys()
    assert left.inputs
    for site in left.inputs:
        assert left.tokens_of(site) == right.tokens_of(site)
        distance = worst(left.gram(site), right.gram(site))
        assert distance.relative <= limit, f"{site}: {distance}"


# What is gathered


def test_gram_is_the_second_moment_of_what_the_module_was_given() -> None:
    model = NANOGPT.model(dtype=torch.float64)
    seen: list[Tensor] = []
    module = model.transformer.h[1].mlp.c_proj
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches():
            model(batch)
    handle.remove()
    x_TI = torch.cat(seen).reshape(-1, 4 * WIDTH)
    found = statistics(model, batches()).gram("transformer.h.1.mlp.c_proj")
    assert worst(x_TI.T @ x_TI / len(x_TI), found).relative <= 1e-14


@pytest.mark.parametrize("mode", ["fx", "modules"])
def test_readers_of_one_activation_share_one_gram(mode: Any) -> None:
    found = statistics(LLAMA_LIKE.model(), batches(), mode)
    for layer in range(LAYERS):
        q, k, v, o, gate, up, down = (
            found.inputs[f"layers.{layer}.{name}_proj"][0]
            for name in ("q", "k", "v", "o", "gate", "up", "down")
        )
        assert q is k is v
        assert gate is up
        assert len({id(q), id(o), id(gate), id(down)}) == 4
    assert found.key(["layers.0.q_proj"]) == found.key(["layers.0.v_proj"])
    assert found.key(["layers.0.q_proj"]) != found.key(["layers.1.q_proj"])
    distinct = {id(g): g for parts in found.inputs.values() for g in parts}
    assert len(distinct) == 4 * LAYERS
    assert found.bytes == sum(g.nbytes for g in distinct.values())


def test_bytes_are_known_beforehand() -> None:
    model = LLAMA_LIKE.model()
    captured = capture(model, batches()[0])
    sites = match(model, load_config(EVERYTHING)).sites
    assert bytes_needed(captured, sites) == statistics(model, batches()).bytes


@pytest.mark.parametrize("mode", ["fx", "modules"])
def test_a_module_called_twice_pools_both_inputs(mode: Any) -> None:
    model = TIED_MLP.model(dtype=torch.float64)
    data = [torch.randn(3, 5, WIDTH, dtype=torch.float64) for _ in range(2)]
    found = statistics(model, data, mode)
    x_TI = torch.cat(data).reshape(-1, WIDTH)
    both_TI = torch.cat([x_TI, model.twice(x_TI)]).detach()
    assert found.tokens_of("twice") == len(both_TI) == 60
    assert worst(both_TI.T @ both_TI / 60, found.gram("twice")).relative <= 1e-13
    # left and right are one site, reading one input: counted once
    assert found.tokens_of("left") == 30


@pytest.mark.parametrize("toy", [NANOGPT, GPT2, LLAMA, LLAMA_LIKE], ids=lambda t: t.name)
def test_front_ends_agree(toy: Any) -> None:
    model = toy.model(dtype=torch.float64)
    assert_same(statistics(model, batches()), statistics(model, batches(), "modules"), 1e-13)


def test_export_agrees() -> None:
    model = NANOGPT.model(dtype=torch.float64)
    assert_same(statistics(model, batches()), statistics(model, batches(), "export"), 1e-13)


# Padding


@pytest.mark.parametrize("toy", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("mode", ["fx", "modules"])
def test_padded_data_equals_the_same_data_unpadded(toy: Any, mode: Any) -> None:
    model = toy.model(dtype=torch.float64)
    ids, lengths = batches(1, 3, 8)[0], [8, 5, 3]
    mask = torch.tensor([[1] * n + [0] * (8 - n) for n in lengths])
    padded = [{"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}]
    alone = [ids[i : i + 1, :n] for i, n in enumerate(lengths)]
    found = statistics(model, padded, mode)
    assert found.tokens == 16
    assert_same(found, statistics(model, alone, mode, example=ids), 1e-12)
    wrong = statistics(model, [padded[0]["input_ids"]], mode)
    site = "transformer.h.0.attn.c_attn" if toy is GPT2 else "model.layers.0.self_attn.q_proj"
    assert worst(found.gram(site), wrong.gram(site)).relative > 1e-3


def test_boolean_masks_count_like_numbers() -> None:
    model = LLAMA.model(dtype=torch.float64)
    ids = batches(1)[0]
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    as_number = statistics(model, [{"input_ids": ids, "attention_mask": mask}])
    as_bool = statistics(model, [{"input_ids": ids, "attention_mask": mask.bool()}])
    assert_same(as_number, as_bool, 1e-12)


def test_a_site_that_only_saw_padding_is_named() -> None:
    model = LLAMA.model()
    ids = batches(1)[0]
    found = statistics(
        model, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}], example=ids
    )
    with pytest.raises(CalibrationError, match=r"'model\.layers\.0\..*' saw no tokens"):
        found.gram("model.layers.0.self_attn.q_proj")
    with pytest.raises(CalibrationError, match=r"'model\.layers\.0\..*' saw no tokens"):
        found.mean("model.layers.0.self_attn.q_proj")  # which a budget asks for first


# How it is given


def test_order_and_size_of_batches_do_not_matter() -> None:
    model = NANOGPT.model(dtype=torch.float64)
    whole = torch.cat(batches())
    reference = statistics(model, [whole])
    for data in (batches(), batches()[::-1], list(whole.split(1)), list(whole.split(5))):
        assert_same(reference, statistics(model, data), 1e-13)


def test_tensors_tuples_and_mappings_are_the_same_data() -> None:
    model = NANOGPT.model(dtype=torch.float64)
    reference = statistics(model, batches())
    as_tuples = [(b, b) for b in batches()]  # (inputs, targets), as a data loader gives them
    as_lists = [[b] for b in batches()]
    as_mappings = [{"idx": b, "targets": b} for b in batches()]
    for data in (as_tuples, as_lists, as_mappings):
        assert_same(reference, statistics(model, data, example=batches()[0]), 0.0)


def test_a_generator_is_read_once_and_nothing_of_it_kept() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def stream() -> Iterator[Tensor]:
        nonlocal most
        for batch in batches(6):
            fresh = batch.clone()
            alive.append(weakref.ref(fresh))
            yield fresh
            del fresh
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))

    model, data = NANOGPT.model(), stream()
    cfg = {**EVERYTHING, "group_size": 1, "compression_rate": 0.5}
    with no_warnings_of_ours():
        gm = fxshare.compile(model, cfg, calibration=data)
        listed = fxshare.compile(model, cfg, calibration=batches(6))
    assert len(alive) == 6
    assert next(data, None) is None
    # the example, which is the first batch, and the one at hand
    assert most <= 2
    assert gm.fxshare.report.calibration["batches"] == 6
    assert gm.fxshare.report.calibration["tokens"] == 6 * 28
    for name, tensor in gm.state_dict().items():
        assert torch.equal(tensor, listed.state_dict()[name])


def test_a_data_loader_is_taken() -> None:
    data = torch.utils.data.TensorDataset(torch.cat(batches()))
    loader = torch.utils.data.DataLoader(data, batch_size=5)
    model = NANOGPT.model()
    cfg = {**EVERYTHING, "group_size": 1, "compression_rate": 0.5}
    with no_warnings_of_ours():
        gm = fxshare.compile(model, cfg, calibration=loader)
    assert gm.fxshare.report.calibration["batches"] == 3
    assert gm.fxshare.report.calibration["tokens"] == 84


def test_max_tokens_stops_after_the_batch_that_reaches_it() -> None:
    model = NANOGPT.model()
    assert statistics(model, batches(5), max_tokens=28).batches == 1
    assert statistics(model, batches(5), max_tokens=29).batches == 2
    found = statistics(model, batches(5), max_tokens=10**6)
    assert (found.batches, found.tokens) == (5, 140)


def test_a_used_up_iterator_is_told_apart() -> None:
    used = iter(batches())
    list(used)
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        fxshare.compile(NANOGPT.model(), EVERYTHING, calibration=used)


# Too little, and singular


def test_fewer_tokens_than_features_warns_with_the_numbers() -> None:
    cfg = {**EVERYTHING, "group_size": 1, "compression_rate": 0.5}
    with pytest.warns(FxShareWarning) as caught:
        gm = fxshare.compile(NANOGPT.model(), cfg, calibration=batches(1, 4, 5))
    (text,) = [str(w.message) for w in caught if "fewer tokens" in str(w.message)]
    assert "3 of 12 sites saw fewer tokens than they have features" in text
    assert "transformer.h.0.mlp.c_proj has 64 features and saw 20 tokens" in text
    assert text in gm.fxshare.report.notes


class Units(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def dead_units() -> tuple[nn.Module, Tensor]:
    model = Units()
    with torch.no_grad():
        model.a.bias[:5] = -1e3
    return model, torch.randn(64, WIDTH)


def constant_inputs() -> tuple[nn.Module, Tensor]:
    return Units(), torch.ones(64, WIDTH)


def zero_inputs() -> tuple[nn.Module, Tensor]:
    return Units(), torch.zeros(64, WIDTH)


def few_tokens() -> tuple[nn.Module, Tensor]:
    return Units(), torch.randn(3, WIDTH)


@pytest.mark.parametrize("case", [dead_units, constant_inputs, zero_inputs, few_tokens])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_statistics_work_and_are_reported(case: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = case()
    model, x = model.to(dtype), x.to(dtype)
    cfg = {"weight_types": {"w": {"pattern": "[ab]"}}, "group_size": 1, "compression_rate": 0.9}
    with no_warnings_of_ours():
        gm = fxshare.compile(model, cfg, calibration=[x])
    rows = {g.name: g for g in gm.fxshare.report.groups}
    assert max(row.floored for row in rows.values()) >= 5
    assert "singular statistics in" in str(gm.fxshare.report)
    assert all(bool(p.isfinite().all()) for p in gm.parameters())
    # what the data did show is kept; the rank, 7, is above that of constant or few inputs
    if case is not dead_units:
        with torch.no_grad():
            assert worst(model(x), gm(x)).relative <= 1e-3


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["fx", "modules"])
def test_half_precision_models_give_nearly_the_grams_of_float32(dtype: Any, mode: Any) -> None:
    half = LLAMA.model(dtype=dtype)
    found = statistics(half, batches(), mode)
    reference = statistics(LLAMA.model(dtype=dtype).float(), batches(), mode)
    assert_same(reference, found, 8 * torch.finfo(dtype).eps)
    assert found.gram("model.layers.0.mlp.down_proj").dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_as_its_float32_copy_is(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    half = LLAMA.model(dtype=dtype)
    sites = match(half, load_config(EVERYTHING)).sites
    captured = capture(half, Caller(half)(batches()[0]), mode="fx")
    monkeypatch.setattr(placement, "multiplies_bfloat16", lambda device: False)
    with no_warnings_of_ours():
        found, own = (
            calibrate(one, batches(), sites, gradients=True)
            for one in (to_measure(captured), captured)
        )
    wide = structure_copy(half, clone_parameters=True).float()
    expected = statistics(wide, batches(), gradients=True)
    assert_same(found, expected, 1e-6)
    assert found.mean_loss == pytest.approx(expected.mean_loss, rel=1e-6)
    last = f"model.layers.{LAYERS - 1}.mlp.down_proj"  # what computing in half loses
    assert worst(own.gram(last), expected.gram(last)).relative > 1e-4
    monkeypatch.setattr(placement, "multiplies_bfloat16", lambda device: True)
    assert (to_measure(captured) is captured) == (dtype == torch.bfloat16)


def test_inputs_in_half_precision_are_measured_in_float32_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pixels, say: numbers that meet weights in the first step."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).bfloat16()
    data = [torch.randn(5, 6).bfloat16() for _ in range(3)]
    sites = match(model, load_config({"weight_types": {"w": {"pattern": "[02]"}}})).sites
    captured = capture(model, Caller(model)(data[0]), mode="fx")
    monkeypatch.setattr(placement, "multiplies_bfloat16", lambda device: False)
    found = calibrate(to_measure(captured), data, sites)
    rows = torch.cat(data).double()
    assert worst(found.gram("0"), rows.T @ rows / len(rows)).relative < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_compiled_in_their_dtype(dtype: torch.dtype) -> None:
    cfg = {**EVERYTHING, "group_size": 1, "compression_rate": 0.5}
    with no_warnings_of_ours():
        gm = fxshare.compile(LLAMA.model(dtype=dtype), cfg, calibration=batches())
    assert {p.dtype for p in gm.parameters()} == {dtype}
    assert bool(gm(batches()[0]).logits.isfinite().all())


# What the model does meanwhile


def test_dropout_is_off_and_flags_stay() -> None:
    model = NANOGPT.model(dtype=torch.float64)
    reference = statistics(model, batches())
    for mode in ("fx", "modules"):
        assert_same(reference, statistics(model.train(), batches(), mode), 1e-13)
        assert all(m.training for m in model.modules())
