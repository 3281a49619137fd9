"""Weights as codes and scales: what they stand for, and what moves their rows."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxshare.base.quantised import BITS, Quantised, matrix_bytes, scale_count, scale_dtype

widths = st.sampled_from([1, 2, 31, 32, 33, 48, 70])
bits = st.sampled_from(BITS)


def parts(of: int, width: int, seed: int = 0, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-127, 128) if of == 8 else (-8, 8)
    codes = torch.randint(low, high, (rows, width), generator=generator)
    count = scale_count(of, 1, width)
    scale = torch.rand(rows, count, generator=generator) + 0.1
    return codes, scale.to(scale_dtype(torch.float32, of))


def made(of: int, width: int, seed: int = 0, rows: int = 6) -> Quantised:
    return Quantised.of(*parts(of, width, seed, rows), of, torch.float32)


@given(bits, widths, st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_codes_come_back_and_stand_for_codes_times_the_scale_of_their_columns(
    of: int, width: int, seed: int
) -> None:
    codes, scale = parts(of, width, seed)
    weight = made(of, width, seed)
    assert torch.equal(weight.codes, codes.to(torch.int8))
    group = width if of == 8 else 32
    expected = torch.stack(
        [codes[:, i] * scale[:, i // group].double() for i in range(width)], dim=1
    )
    assert torch.equal(weight.values(torch.float64), expected)
    assert weight.stored_bytes == matrix_bytes(of, len(codes), width, 4)


@given(bits, widths, st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_a_linear_with_codes_computes_what_one_with_their_values_does(
    of: int, width: int, rows: int
) -> None:
    weight = made(of, width)
    linear, plain = nn.Linear(width, 6), nn.Linear(width, 6)
    plain.bias = linear.bias
    linear.weight = nn.Parameter(weight, requires_grad=False)
    plain.weight = nn.Parameter(weight.values())
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    found, expected = linear(x).detach(), plain(x).detach()
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()) + 1e-6)
    wrong = linear.weight.with_rows(lambda t: t.flip(0))
    assert not torch.allclose(nn.functional.linear(x, wrong, linear.bias), expected)


@pytest.mark.parametrize("of", BITS)
def test_rows_move_as_codes_and_other_things_see_values(of: int) -> None:
    weight = made(of, 40)
    values = weight.values()
    order = torch.tensor([4, 0, 2])
    for found, expected in (
        (weight[1:4], values[1:4]),
        (weight.index_select(0, order), values.index_select(0, order)),
        (torch.cat([weight[3:], weight[:2]]), torch.cat([values[3:], values[:2]])),
        (weight.split([2, 4])[1], values.split([2, 4])[1]),
        (weight.clone(), values),
        (weight.detach().contiguous(), values),
    ):
        assert isinstance(found, Quantised)
        assert torch.equal(found.values(), expected)
    for found, expected in (
        (weight.t(), values.t()),
        (weight[:, 3:9], values[:, 3:9]),
        (torch.cat([weight, values]), torch.cat([values, values])),
        (weight @ values.t(), values @ values.t()),
    ):
        assert not isinstance(found, Quantised)
        assert torch.equal(found, expected)
    assert torch.equal(weight.double().values(), weight.values(torch.float64))


@pytest.mark.parametrize("of", BITS)
def test_copies_casts_and_state_dicts_keep_the_codes(of: int) -> None:
    linear = nn.Linear(40, 6)
    linear.weight = nn.Parameter(made(of, 40), requires_grad=False)
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert isinstance(twin.weight, Quantised)
        assert isinstance(twin.weight, nn.Parameter)
        assert twin.weight.stored is not linear.weight.stored
        assert torch.equal(twin.weight.codes, linear.weight.codes)
        assert torch.equal(twin.weight.scale, linear.weight.scale)
    other = copy.deepcopy(linear)
    other.weight.stored.zero_()
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.weight.values(), linear.weight.values())
    half = copy.deepcopy(linear).to(torch.bfloat16)
    assert isinstance(half.weight, Quantised)
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.weight.codes, linear.weight.codes)
    meta = copy.deepcopy(linear).to("meta")
    assert isinstance(meta.weight, Quantised)
    assert meta.weight.stored.device.type == "meta"


def test_writing_values_into_codes_is_refused() -> None:
    weight = made(8, 8)
    with pytest.raises(TypeError, match="train before the weights are quantised"):
        weight.mul_(2.0)
    with pytest.raises(TypeError, match=r"expected the codes and scales of Quantised\(8 bits"):
        weight.copy_(torch.zeros(6, 8))
