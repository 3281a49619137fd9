"""Factorisations against the published algorithm: Cholesky whitening and a plain SVD."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxshare.calibration.gram import pooled_gram
from fxshare.errors import FactoriseError
from fxshare.factors.factorise import (
    Factors,
    Whitening,
    factorise,
    identity_whitening,
    spectrum,
    whiten,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """LAPACK's threads wait for each other: seconds instead of milliseconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _gram(seed: int, features: int, rows: int | None = None) -> Tensor:
    """Well conditioned with the default rows; its scale is far from 1 to catch lost factors."""
    x = _random(seed, rows or 4 * features, features) * torch.linspace(1, 5, features).double()
    return x.T @ x / len(x)


# in, outs, rank: either side smaller, square, one member, unequal members, rank 1, full rank
SHAPES = [
    (12, (5, 4), 3),
    (12, (12,), 7),
    (12, (10, 20), 6),
    (12, (16, 16, 16), 11),
    (12, (3, 30), 1),
    (40, (6,), 6),
    (5, (9, 9), 5),
    (200, (150, 150), 60),  # wider than one strip of the symmetric products
    (210, (100, 105), 60),
]


def _published(weights: list[Tensor], gram: Tensor, rank: int) -> tuple[list[Tensor], float]:
    """The reconstructed weights and the squared error, as Basis Sharing's paper computes them."""
    root = torch.linalg.cholesky(gram)
    left, values, right = torch.linalg.svd(torch.cat(weights) @ root, full_matrices=False)
    coefficients = left[:, :rank] * values[:rank]
    basis = right[:rank] @ torch.linalg.inv(root)
    products = (coefficients @ basis).split([len(weight) for weight in weights])
    return list(products), float(values[rank:].square().sum())


def _products(factors: Factors) -> list[Tensor]:
    return [part @ factors.basis_RI for part in factors.coefficients]


def _weighted(weights: list[Tensor], products: list[Tensor], gram: Tensor) -> float:
    """Σ tr((W − Ŵ) G (W − Ŵ)ᵀ), directly."""
    gaps = [weight - product for weight, product in zip(weights, products, strict=True)]
    return sum(float(torch.trace(gap @ gram @ gap.T)) for gap in gaps)


def _check_products(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        assert error <= tolerance, f"products differ by {error}"


@pytest.mark.parametrize(("features", "outs", "rank"), SHAPES)
def test_agrees_with_the_published_algorithm(
    features: int, outs: tuple[int, ...], rank: int
) -> None:
    weights = [_random(index, out, features) for index, out in enumerate(outs)]
    gram = pooled_gram([_gram(100 + index, features) for index in range(len(outs))])
    factors = factorise(weights, whiten(gram), rank)
    expected, lost = _published(weights, gram, rank)
    limit = min(features, sum(outs))

    assert factors.basis_RI.shape == (rank, features)
    assert [tuple(part.shape) for part in factors.coefficients] == [(out, rank) for out in outs]
    assert factors.spectrum.shape == (limit,)
    _check_products(_products(factors), expected, 1e-6)

    total = sum(float(torch.trace(weight @ gram @ weight.T)) for weight in weights)
    assert factors.total == pytest.approx(total, rel=1e-10)
    assert factors.lost == pytest.approx(lost, abs=1e-10 * total)
    measured = _weighted(weights, _products(factors), gram)
    assert measured == pytest.approx(float(factors.spectrum[rank:].sum()), abs=1e-8 * total)
    assert factors.weighted_error == factors.lost / factors.total
    assert rank < limit or factors.lost == 0.0


def _root(whitening: Whitening) -> Tensor:
    assert whitening.root_II is not None
    return whitening.root_II


@pytest.mark.parametrize("wrong", ["transposed root", "summed Grams", "Gram as its own root"])
def test_the_comparison_can_fail(wrong: str) -> None:
    features, outs, rank = 12, (10, 20), 6
    weights = [_random(index, out, features) for index, out in enumerate(outs)]
    # One layer saw many more tokens than the other, so a plain sum is dominated by it.
    sums = [_gram(100, features) * 10, _gram(101, features).flip(0, 1) * 1000]
    gram = pooled_gram([sums[0] / 10, sums[1] / 1000])
    expected, lost = _published(weights, gram, rank)
    right = whiten(gram)
    whitening = {
        "transposed root": dataclasses.replace(right, root_II=_root(right).T),
        "summed Grams": whiten(sums[0] + sums[1]),
        "Gram as its own root": dataclasses.replace(right, root_II=gram),
    }[wrong]
    products = _products(factorise(weights, whitening, rank))
    with pytest.raises(AssertionError, match="products differ"):
        _check_products(products, expected, 1e-6)
    assert _weighted(weights, products, gram) > 1.001 * lost


@settings(deadline=None, max_examples=25)
@given(
    features=st.integers(1, 14),
    outs=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    rows=st.integers(1, 30),
    seed=st.integers(0, 10**6),
)
def test_error_falls_with_rank_down_to_the_weights_themselves(
    features: int, outs: list[int], rows: int, seed: int
) -> None:
    weights = [_random(seed + index, out, features) for index, out in enumerate(outs)]
    gram = _gram(seed, features, rows)  # singular where there are fewer rows than features
    whitening = whiten(gram)
    damped = gram if whitening.root_II is None else whitening.root_II @ whitening.root_II.T
    every = [factorise(weights, whitening, rank) for rank in range(1, min(features, sum(outs)) + 1)]
    measured = [_weighted(weights, _products(factors), damped) for factors in every]
    slack = 1e-8 * every[0].total
    for factors, error in zip(every, measured, strict=True):
        assert error == pytest.approx(factors.lost, abs=slack)
    # Below the damping's rounding the order of two measured errors means nothing.
    noise = 1e-12 * every[0].total
    assert all(after <= before + noise for before, after in itertools.pairwise(measured))
    assert every[-1].weighted_error == 0.0
    _check_products(_products(every[-1]), weights, 1e-12)


def _few_tokens(features: int) -> Tensor:
    return _gram(0, features, rows=features // 3)


def _dead_units(features: int) -> Tensor:
    alive = (torch.arange(features) % 4 != 0).double()
    return _gram(0, features) * alive * alive[:, None]


def _constant_input(features: int) -> Tensor:
    return torch.ones(features, features, dtype=torch.float64)


def _massive_activation(features: int) -> Tensor:
    scale = torch.ones(features, dtype=torch.float64)
    scale[3] = 1e6
    return _gram(0, features) * scale * scale[:, None]


def _zero(features: int) -> Tensor:
    return torch.zeros(features, features, dtype=torch.float64)


@pytest.mark.parametrize(
    "gram_of", [_few_tokens, _dead_units, _constant_input, _massive_activation, _zero]
)
@pytest.mark.parametrize("outs", [(20, 30), (96,), (100, 150)])
def test_full_rank_is_the_identity_for_any_gram(
    gram_of: Callable[[int], Tensor], outs: tuple[int, ...]
) -> None:
    features = 96
    weights = [_random(index, out, features) for index, out in enumerate(outs)]
    factors = factorise(weights, whiten(gram_of(features)), min(features, sum(outs)))
    assert factors.weighted_error == 0.0
    _check_products(_products(factors), weights, 1e-12)
    assert all(bool(part.isfinite().all()) for part in (factors.basis_RI, *factors.coefficients))


def test_whitening_reports_the_floor() -> None:
    features = 30
    gram = _few_tokens(features)
    whitening = whiten(gram, relative_floor=1e-6)
    largest = float(torch.linalg.matrix_norm(gram, 2))
    assert whitening.features == features
    assert whitening.largest == pytest.approx(largest, rel=1e-12)
    assert whitening.floor == pytest.approx(1e-6 * largest, rel=1e-12)
    assert whitening.floored == features - features // 3
    root = _root(whitening)
    assert (root.triu(1) == 0).all()
    change = root @ root.T - gram
    # Only raised, and by no more than the floor.
    raised = torch.linalg.eigvalsh(change)
    assert -1e-12 * largest < raised[0]
    assert raised[-1] <= whitening.floor * (1 + 1e-6)

    # Nothing to raise: the root is the Gram's own.
    whole = whiten(_gram(0, features))
    assert whole.floored == 0
    product = _root(whole) @ _root(whole).T
    torch.testing.assert_close(product, _gram(0, features), rtol=1e-12, atol=1e-14)


def test_a_zero_gram_and_no_gram_give_a_plain_svd() -> None:
    weights = [_random(0, 9, 6), _random(1, 5, 6)]
    zero, none = whiten(_zero(6)), identity_whitening(6)
    assert (zero.zero_gram, zero.floored, zero.largest, zero.floor) == (True, 6, 0.0, 0.0)
    assert (none.zero_gram, none.floored, none.largest, none.floor) == (False, 0, 1.0, 0.0)
    assert zero.root_II is none.root_II is None
    explicit = whiten(torch.eye(6, dtype=torch.float64))
    expected, _ = _published(weights, torch.eye(6, dtype=torch.float64), 4)
    for whitening in (zero, none, explicit):
        factors = factorise(weights, whitening, 4)
        _check_products(_products(factors), expected, 1e-12)
        torch.testing.assert_close(
            factors.spectrum,
            torch.linalg.svdvals(torch.cat(weights)).square(),
            rtol=1e-12,
            atol=1e-12,
        )


@pytest.mark.parametrize(("features", "outs", "rank"), SHAPES)
def test_the_spectrum_alone_is_that_of_the_factorisation(
    features: int, outs: tuple[int, ...], rank: int
) -> None:
    weights = [_random(index, out, features) for index, out in enumerate(outs)]
    whitening = whiten(_gram(7, features))
    found = spectrum(weights, whitening)
    assert found.dtype == torch.float64
    assert (found[1:] <= found[:-1]).all()
    assert found[-1] >= 0
    slack = 1e-12 * float(found.sum())
    torch.testing.assert_close(
        found, factorise(weights, whitening, rank).spectrum, rtol=0, atol=slack
    )
    stacked = torch.cat(weights) @ _root(whitening)
    torch.testing.assert_close(
        found, torch.linalg.svdvals(stacked).square(), rtol=0, atol=10 * slack
    )
    # Members may come in any order, and their totals add up.
    torch.testing.assert_close(spectrum(weights[::-1], whitening), found, rtol=0, atol=slack)
    alone = sum(float(spectrum([weight], whitening).sum()) for weight in weights)
    assert alone == pytest.approx(float(found.sum()), rel=1e-12)


@pytest.mark.parametrize(("features", "outs", "rank"), SHAPES)
def test_scaling_the_weights_scales_the_error(
    features: int, outs: tuple[int, ...], rank: int
) -> None:
    weights = [_random(index, out, features) for index, out in enumerate(outs)]
    whitening = whiten(_gram(7, features))
    before = factorise(weights, whitening, rank)
    after = factorise([weight * 8 for weight in weights], whitening, rank)  # a power of 2: exact
    assert after.lost == pytest.approx(64 * before.lost, rel=1e-10)
    assert after.weighted_error == pytest.approx(before.weighted_error, rel=1e-10)
    _check_products(_products(after), [8 * product for product in _products(before)], 1e-12)


@pytest.mark.parametrize(("features", "outs", "rank"), SHAPES)
def test_scales_are_balanced_and_signs_are_fixed(
    features: int, outs: tuple[int, ...], rank: int
) -> None:
    weights = [1e-4 * _random(index, out, features) for index, out in enumerate(outs)]
    factors = factorise(weights, whiten(1e5 * _gram(7, features)), rank)
    torch.testing.assert_close(
        factors.basis_RI.norm(dim=1),
        torch.cat(factors.coefficients).norm(dim=0),
        rtol=1e-12,
        atol=0,
    )
    largest = factors.basis_RI.gather(1, factors.basis_RI.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_the_same_input_gives_the_same_result_and_stays_untouched() -> None:
    for outs in [(10, 12), (40, 30)]:
        weights = [_random(index, out, 30) for index, out in enumerate(outs)]
        gram = _gram(0, 30)
        before = [tensor.clone() for tensor in (gram, *weights)]
        first, second = (factorise(weights, whiten(gram), 9) for _ in range(2))
        assert torch.equal(first.basis_RI, second.basis_RI)
        full = factorise(weights, whiten(gram), min(30, sum(outs)))
        for ours, again, whole, weight in zip(
            first.coefficients, second.coefficients, full.coefficients, weights, strict=True
        ):
            assert torch.equal(ours, again)
            assert whole.data_ptr() != weight.data_ptr()
        assert all(
            torch.equal(tensor, old) for tensor, old in zip((gram, *weights), before, strict=True)
        )


def test_zero_weights_have_no_error_and_no_nan() -> None:
    for outs in [(3,), (9, 9)]:
        for rank in (1, 3):
            weights = [torch.zeros(out, 6) for out in outs]
            factors = factorise(weights, whiten(_gram(0, 6)), rank)
            assert (factors.weighted_error, factors.lost, factors.total) == (0.0, 0.0, 0.0)
            assert all(not bool(product.any()) for product in _products(factors))
            assert bool(factors.basis_RI.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_dtype_are_decided_in_float64(dtype: torch.dtype) -> None:
    weights = [_random(0, 9, 6).to(dtype).requires_grad_(), _random(1, 5, 6).to(dtype)]
    gram = _gram(0, 6)
    factors = factorise(weights, whiten(gram), 4)
    expected, _ = _published([weight.detach().double() for weight in weights], gram, 4)
    assert factors.basis_RI.dtype == factors.spectrum.dtype == torch.float64
    assert not factors.basis_RI.requires_grad
    _check_products(_products(factors), expected, 1e-12)


@pytest.mark.parametrize("rank", [0, -1, 7, 2.0, True, "3", None])
def test_unusable_ranks_are_refused(rank: object) -> None:
    weights = [_random(0, 4, 6), _random(1, 4, 6)]
    with pytest.raises(FactoriseError, match=f"in 6, out 8: .* from 1 to 6, found {rank!r}"):
        factorise(weights, identity_whitening(6), rank)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "at least 1 weight to factorise, found none"),
        ([torch.ones(2, 6), torch.ones(2, 5)], r"weight 1 of 2: expected \(out, 6\).*\(2, 5\)"),
        ([torch.ones(6)], r"weight 0 of 1: .* found \(6,\)"),
        ([torch.ones(0, 6)], r"weight 0 of 1: .* found \(0, 6\)"),
        ([torch.ones(2, 6), torch.full((2, 6), torch.nan)], "weight 1 of 2: expected finite"),
        ([torch.tensor([[torch.inf, -torch.inf, 1, 1, 1, 1]])], "weight 0 of 1: expected finite"),
    ],
)
def test_unusable_weights_are_refused(weights: list[Tensor], message: str) -> None:
    with pytest.raises(FactoriseError, match=message):
        spectrum(weights, identity_whitening(6))
    with pytest.raises(FactoriseError, match=message):
        factorise(weights, identity_whitening(6), 1)


@pytest.mark.parametrize(
    ("gram", "floor", "message"),
    [
        (torch.ones(2, 3), 1e-8, r"expected \(in, in\), found \(2, 3\)"),
        (torch.ones(4), 1e-8, r"found \(4,\)"),
        (torch.ones(0, 0), 1e-8, r"found \(0, 0\)"),
        (torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), 1e-8, "found NaN or infinity"),
        (torch.full((2, 2), torch.inf), 1e-8, "found NaN or infinity"),
        (torch.eye(2), 0.0, "relative_floor: expected more than 0, less than 1, found 0.0"),
        (torch.eye(2), torch.nan, "relative_floor"),
    ],
)
def test_unusable_grams_are_refused(gram: Tensor, floor: float, message: str) -> None:
    with pytest.raises(FactoriseError, match=message):
        whiten(gram, relative_floor=floor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("features", "outs", "rank"), SHAPES)
def test_cuda_weights(features: int, outs: tuple[int, ...], rank: int) -> None:
    weights = [_random(index, out, features) for index, out in enumerate(outs)]
    whitening = whiten(_gram(7, features))
    factors = factorise([weight.cuda() for weight in weights], whitening, rank)
    assert factors.basis_RI.is_cuda
    here = _products(factorise(weights, whitening, rank))
    _check_products([product.cpu() for product in _products(factors)], here, 1e-10)
