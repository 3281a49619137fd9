"""Rounding to few bits: the price of it, error feedback, and the factors of groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxshare.base.quantised import BITS
from fxshare.errors import FactoriseError
from fxshare.factors.group import factorise_group
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.rounding import lost_by, nearest, rounded, rounded_group, with_feedback
from fxshare.factors.spectra import Spectra
from tests.factors.test_spectra import group
from tests.planning.build import gram, quadratic, slice_of

seeds = st.integers(0, 1000)
bits = st.sampled_from(BITS)
storages = st.sampled_from(["plain", "pivoted"])


def a_slice(seed: int, out: int = 9, width: int = 40, tokens: int = 200) -> SliceStatistics:
    return slice_of(out, width, seed, gram_II=gram(width, seed + 7, tokens=tokens))


def correlated(seed: int, out: int = 12, width: int = 48) -> SliceStatistics:
    """Inputs that tell one another, as those of models do."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    mixed = few @ torch.randn(6, width, generator=generator, dtype=torch.float64)
    rows = mixed + 0.1 * torch.randn(300, width, generator=generator, dtype=torch.float64)
    return slice_of(out, width, seed, gram_II=rows.T @ rows / 300)


@given(seeds, bits, st.integers(1, 70))
@settings(deadline=None, max_examples=30)
def test_integers_times_a_scale_of_full_range_come_back(seed: int, of: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    most = 127 if of == 8 else 7
    codes = torch.randint(-most, most + 1, (5, width), generator=generator)
    step = width if of == 8 else 32
    codes[:, ::step] = most  # every group has an entry at the end of its range
    scale = torch.rand(5, 1, generator=generator, dtype=torch.float64) + 0.5
    weight = codes * scale
    for found in (
        nearest(weight, of, torch.float64),
        with_feedback(weight, gram(width, seed, tokens=3 * width), of, torch.float64),
    ):
        assert torch.allclose(found.values(), weight, rtol=1e-14, atol=0)


@given(seeds, bits)
@settings(deadline=None, max_examples=20)
def test_the_loss_is_the_quadratic_one_of_the_codes(seed: int, of: int) -> None:
    one = a_slice(seed)
    codes = rounded(one, of)
    expected = quadratic(one, codes.values(torch.float64))
    assert expected > 0
    assert lost_by(one, codes.values(torch.float64)) == pytest.approx(expected, rel=1e-8)


@given(seeds, bits, st.booleans())
@settings(deadline=None, max_examples=30)
def test_feedback_is_never_worse_than_the_nearest_codes(seed: int, of: int, few: bool) -> None:
    one = a_slice(seed, tokens=5) if few else correlated(seed)
    plain = rounded(one, of, feedback=False)
    fed = rounded(one, of)
    assert lost_by(one, fed.values()) <= lost_by(one, plain.values())


def test_feedback_is_far_better_where_inputs_tell_one_another() -> None:
    one = replace(correlated(3), moment_OO=None)
    plain, fed = (rounded(one, 4, feedback=feedback) for feedback in (False, True))
    assert lost_by(one, fed.values()) < 0.5 * lost_by(one, plain.values())


@pytest.mark.parametrize("width", [20, 75])
def test_feedback_is_that_of_the_definition(width: int) -> None:
    """Column by column, with the inverse of what is left each time."""
    one = correlated(5, width=width)
    weight, moment = one.weight_OI, one.gram_II
    found = with_feedback(weight, moment, 8, torch.float64)
    order = moment.diagonal().argsort(descending=True, stable=True).tolist()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    left, done = weight.clone(), torch.zeros_like(weight)
    for at, column in enumerate(order):
        scale = found.scale[:, 0]
        done[:, column] = (left[:, column] / scale).round().clamp(-127, 127)
        gap = left[:, column] - done[:, column] * scale
        rest = order[at:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        for place, other in enumerate(rest):
            left[:, other] -= gap * inverse[0, place] / inverse[0, 0]
    assert torch.equal(found.codes, done.to(torch.int8))


def test_what_is_wide_is_priced_by_the_trace_of_its_output_moment() -> None:
    one = a_slice(2, out=60, width=20)
    moment = one.moment_OO
    assert isinstance(moment, Tensor)
    trace = float(moment.diagonal().sum())
    product = one.weight_OI.T @ moment @ one.weight_OI
    wide = replace(one, moment_OO=None, product_II=product, trace=trace)
    codes = rounded(wide, 8).values()
    gap = one.weight_OI - codes
    expected = 0.5 * trace / 60 * float((gap @ one.gram_II * gap).sum())
    assert lost_by(wide, codes) == pytest.approx(expected, rel=1e-10)


@given(seeds, bits, storages, st.integers(1, 18), st.booleans())
@settings(deadline=None, max_examples=25)
def test_what_a_group_loses_in_few_bits_is_what_its_weights_lose(
    seed: int, of: int, storage: str, rank: int, several: bool
) -> None:
    inputs = (0, 1) if several else (0, 0)
    slices = {
        str(i): slice_of(9, 40, seed + i, input=which, gram_II=gram(40, seed + which, tokens=90))
        for i, which in enumerate(inputs)
    }
    plain = factorise_group(group(slices, rank, storage), Spectra(slices))
    found = rounded_group(plain, of)
    expected = sum(quadratic(one, found.product(name)) for name, one in slices.items())
    assert found.lost == pytest.approx(expected, rel=1e-8)
    codes = found.quantised
    assert set(codes) == {"", *slices}
    held = found.group.stored_as.whole_basis(
        codes[""].values(), None if found.kept_form is None else found.kept_form.kept_J
    )
    for name in slices:
        assert torch.allclose(codes[name].values() @ held, found.product(name), atol=1e-12)


def test_eight_bits_lose_little_beside_truncation_and_four_lose_more() -> None:
    slices = {"a": correlated(1, out=40)}
    plain = factorise_group(group(slices, 10), Spectra(slices))
    eight, four = (rounded_group(plain, of) for of in BITS)
    # steps are 18 times as wide, but 32 columns have their own
    assert 0 < eight.lost - plain.lost < 0.05 * (four.lost - plain.lost)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(value: float) -> None:
    gram = torch.eye(4, dtype=torch.float64)
    gram[1, 1] = value
    with pytest.raises(FactoriseError, match="expected finite moments of the inputs"):
        with_feedback(torch.randn(3, 4, dtype=torch.float64), gram, 8, torch.float32)
