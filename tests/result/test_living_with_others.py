"""Compiled models in the hands of other packages: torchao, PEFT, accelerate, safetensors, torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.result.products import slices_of
from tests.strategies import SHARING, gpt, gpt_config, no_warnings_of_ours, token_batches
from tests.toys import NANOGPT, VOCABULARY

IDS = token_batches(1, rows=2, length=7, seed=5)[0]
FRONT_ENDS = ["fx", "modules"]


def untied() -> nn.Module:
    """Both packages leave ties to the code that loads, of which a plain module has none."""
    model = gpt()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@functools.cache
def _shared(front_end: Any, make: Callable[[], nn.Module]) -> Any:
    cfg, data = gpt_config(**SHARING), token_batches()
    with no_warnings_of_ours():
        return fxshare.compile(make(), cfg, calibration=data, capture=front_end, copy=True)


def shared(front_end: str = "fx", make: Callable[[], nn.Module] = gpt) -> Any:
    return copy.deepcopy(_shared(front_end, make))


def factor_names(gm: Any) -> tuple[set[str], set[str]]:
    """The modules that hold bases, and those that hold coefficients."""
    bases = {group.name for group in gm.fxshare.plan.groups}
    return bases, {place.module for place in slices_of(gm).values() if place.basis}


def loss_of(module: Any, ids: Tensor = IDS) -> Tensor:
    return nn.functional.cross_entropy(module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def limit(gm: Any) -> float:
    return tolerance(torch.float32, 2 * len(gm.fxshare.plan.sites) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_torchao_quantises_bases_and_coefficients(front_end: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    gm = shared(front_end)
    bases, coefficients = factor_names(gm)
    before = gm(IDS).detach()
    quantization.quantize_(gm, quantization.Int8WeightOnlyConfig())
    quantised = {
        name
        for name, module in gm.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight.data) is not Tensor
    }
    assert bases <= quantised
    assert coefficients <= quantised
    assert len(bases) >= 4
    assert len(coefficients) >= 8
    found = gm(IDS)
    # a weight is off by at most half a step of 1/127 of its row's largest, once per product
    close = 0.5 / 127 * (2 * len(gm.fxshare.plan.sites) + 1)
    assert 0 < worst(before, found).relative <= close


@pytest.mark.slow
def test_torchao_quantises_a_tied_embedding_but_for_its_basis() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    cfg = {
        "weight_types": {"wte": {"pattern": r"transformer\.wte$", "embedding": True}},
        "group_size": 1,
        "compression_rate": 0.5,
    }
    gm = fxshare.compile(NANOGPT.model(), cfg, calibration=[IDS % VOCABULARY] * 2)
    before = gm(IDS % VOCABULARY)[0].detach()
    (basis,) = (group.name for group in gm.fxshare.plan.groups)
    quantization.quantize_(
        gm,
        quantization.Int8WeightOnlyConfig(),
        lambda module, name: isinstance(module, nn.Linear) and name != basis,
    )
    assert type(gm.transformer.wte.weight.data) is not Tensor
    found = gm(IDS % VOCABULARY)[0]
    # once in the lookup, once in the head; the blocks between are not quantised but follow
    assert 0 < worst(before, found).relative <= 0.5 / 127 * 6


def test_peft_trains_adapters_on_coefficients_and_merges_them() -> None:
    peft = pytest.importorskip("peft")
    gm = shared()
    _, coefficients = factor_names(gm)
    before = gm(IDS).detach()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_fc", "c_attn"])
    tuned = peft.get_peft_model(copy.deepcopy(gm), config)
    layers = {n for n, m in tuned.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    expected = {n for n in coefficients if n.endswith(("c_fc", "c_attn"))}
    assert {n.removeprefix("base_model.model.") for n in layers} == expected
    assert len(expected) == 4
    assert torch.equal(tuned(IDS), before)

    trainable = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    frozen = {n: p.detach().clone() for n, p in tuned.named_parameters() if n not in trainable}
    optimizer = torch.optim.AdamW(trainable.values(), lr=2e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = loss_of(tuned)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in tuned.named_parameters() if n in frozen)

    tuned.eval()
    apart = tuned(IDS).detach()
    merged = tuned.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert worst(apart, merged(IDS)).relative <= limit(gm)
    assert worst(before, apart).relative > 100 * limit(gm)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in gm.named_parameters()}


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_parametrize_on_a_basis_reaches_every_reader(front_end: str) -> None:
    gm = shared(front_end)
    expected = copy.deepcopy(gm)
    group = gm.fxshare.plan.groups[0]
    with torch.no_grad():
        expected.get_submodule(group.name).weight.mul_(2)
    parametrize.register_parametrization(gm.get_submodule(group.name), "weight", Doubled())
    assert worst(expected(IDS), gm(IDS)).relative <= limit(gm)
    loss_of(gm).backward()
    original = gm.get_submodule(f"{group.name}.parametrizations.weight").original
    assert original.grad.abs().max() > 0
    parametrize.remove_parametrizations(gm.get_submodule(group.name), "weight")
    assert worst(expected(IDS), gm(IDS)).relative <= limit(gm)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_parameters_and_optimizer_groups_have_no_duplicates(front_end: str) -> None:
    gm = shared(front_end)
    bases, coefficients = factor_names(gm)
    named = dict(gm.named_parameters())
    assert len({id(p) for p in named.values()}) == len(named)
    assert {f"{name}.weight" for name in bases | coefficients} <= named.keys()
    decayed = [p for p in gm.parameters() if p.ndim > 1]
    plain = [p for p in gm.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(  # raises where two groups have one parameter
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2
    )
    first = loss_of(gm)
    first.backward()
    assert all(p.grad is not None for p in decayed)
    optimizer.step()
    assert loss_of(gm) < first


def test_accelerate_prepares_and_trains() -> None:
    accelerate = pytest.importorskip("accelerate")
    gm = shared()
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    accelerator = accelerate.Accelerator(cpu=True)
    model, prepared = accelerator.prepare(gm, optimizer)
    losses = []
    for _ in range(4):
        prepared.zero_grad()
        loss = loss_of(model)
        accelerator.backward(loss)
        prepared.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = accelerator.get_state_dict(model)
    assert state.keys() == gm.state_dict().keys()
    assert accelerator.unwrap_model(model) is gm


def test_accelerate_loads_a_checkpoint_and_dispatches(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    gm = shared(make=untied)
    accelerate.Accelerator(cpu=True).save_model(gm, tmp_path)
    empty = copy.deepcopy(gm)
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.zero_()
    accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"})
    assert torch.equal(empty(IDS), gm(IDS))


@pytest.mark.parametrize(
    ("front_end", "budget"), [("fx", True), ("modules", False), ("export", False)]
)
def test_safetensors_without_shared_tensors(front_end: str, budget: bool, tmp_path: Path) -> None:
    cfg = gpt_config(**({"budget": {"params_kept": 0.8}} if budget else SHARING))
    model = untied()
    with no_warnings_of_ours():
        gm = fxshare.compile(model, cfg, calibration=token_batches(), capture=front_end)
    save_file(gm.state_dict(), tmp_path / "gm.safetensors")
    state = load_file(tmp_path / "gm.safetensors")
    other = copy.deepcopy(gm)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    result = other.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other(IDS), gm(IDS))
    fxshare.save(gm, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for group in gm.fxshare.plan.groups:
        keys = [name for name in saved if name.startswith(f"{group.name}.weight")]
        assert keys == [f"{group.name}.weight"]
