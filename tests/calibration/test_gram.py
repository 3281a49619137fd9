"""Gram matrices against a plain float64 computation over the same rows."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxshare.calibration.gram import GramAccumulator, pooled_gram, sums_dtype
from fxshare.errors import CalibrationError


def _random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype)


def _direct(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    return rows.T @ rows / len(rows)


def _bound(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Worst case of a sum of products of that dtype, entry by entry: ``rows · eps · E|x||x|ᵀ``."""
    rows = x.reshape(-1, x.shape[-1]).double().abs()
    return rows.T @ rows * torch.finfo(dtype).eps


def _check_gram(found: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    excess = (found - _direct(x)).abs() - _bound(x, dtype)
    assert excess.max() <= 0, f"off by {(found - _direct(x)).abs().max()}"


@pytest.mark.parametrize("features", [1, 2, 127, 128, 129, 300, 1024, 1100])
@pytest.mark.parametrize(
    ("dtype", "product"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=["float64", "float32", "float16", "bfloat16"],
)
def test_equals_the_direct_computation(
    features: int, dtype: torch.dtype, product: torch.dtype
) -> None:
    x = _random(features, 2, 7, features, dtype=dtype)
    accumulator = GramAccumulator(features)
    accumulator.add(x)
    gram = accumulator.gram()
    assert accumulator.tokens == 14
    assert gram.dtype == torch.float64
    assert gram.shape == (features, features)
    assert torch.equal(gram, gram.T)
    _check_gram(gram, x, product)
    mean_error = (accumulator.mean() - x.double().mean((0, 1))).abs()
    assert (mean_error <= torch.finfo(product).eps * x.double().abs().sum((0, 1))).all()


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda x: (x.T @ x).double() / len(x), id="bfloat16 product"),
        pytest.param(lambda x: x.double().T @ x.double(), id="not normalised"),
        pytest.param(lambda x: torch.cov(x.double().T, correction=0), id="centred"),
    ],
)
def test_the_comparison_can_fail(wrong: Callable[[Tensor], Tensor]) -> None:
    x = _random(0, 14, 40, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="off by"):
        _check_gram(wrong(x), x, torch.float32)


@settings(deadline=None, max_examples=25)
@given(
    features=st.integers(1, 150),
    rows=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    seed=st.integers(0, 10**6),
)
def test_order_and_batching_change_rounding_only(
    features: int, rows: int, cuts: list[int], seed: int
) -> None:
    x = _random(seed, rows, features)
    whole, parts = GramAccumulator(features), GramAccumulator(features)
    whole.add(x)
    for part in reversed(torch.tensor_split(x, sorted(cuts))):
        parts.add(part)  # empty parts included
    assert parts.tokens == whole.tokens == rows
    assert ((parts.gram() - whole.gram()).abs() <= 2 * _bound(x, torch.float32)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_float32_and_no_coarser(dtype: torch.dtype) -> None:
    assert sums_dtype(dtype) == torch.float32
    assert sums_dtype(torch.float32) == sums_dtype(torch.float64) == torch.float64
    x = _random(4, 40, 6, 130, dtype=dtype)
    accumulator = GramAccumulator(130, dtype=sums_dtype(dtype))
    for part in x:
        accumulator.add(part)
    gram = accumulator.gram()
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    _check_gram(gram, x, torch.float32)
    assert accumulator.trace() == pytest.approx(float(gram.trace()), rel=1e-12)
    left = _random(5, 3, 130, dtype=torch.float64)
    mean = accumulator.mean()
    torch.testing.assert_close(
        accumulator.times(left, mean), left @ (gram - torch.outer(mean, mean)), rtol=0, atol=1e-12
    )
    again = GramAccumulator.restored(130, accumulator.tokens, accumulator.state())
    assert torch.equal(again.gram(), gram)
    assert again.nbytes == accumulator.nbytes == GramAccumulator.bytes_needed(130, torch.float32)
    assert 0.5 < accumulator.nbytes / GramAccumulator.bytes_needed(130) < 0.51
    again.add(x[0])
    assert again.tokens == accumulator.tokens + 6


def test_many_rows_are_added_in_bounded_products() -> None:
    x, keep = _random(1, 20_000, 5), torch.arange(20_000) % 3 != 0
    plain, masked = GramAccumulator(5), GramAccumulator(5)
    plain.add(x)
    masked.add(x, keep)
    assert (plain.tokens, masked.tokens) == (20_000, int(keep.sum()))
    # At most 8192 rows per float32 sum; the bound of one such sum holds for their mean.
    torch.testing.assert_close(plain.gram(), _direct(x), rtol=1e-5, atol=0)
    torch.testing.assert_close(masked.gram(), _direct(x[keep]), rtol=1e-5, atol=0)


def test_masked_rows_are_left_out_whatever_they_contain() -> None:
    x = _random(2, 3, 4, 10)
    keep = torch.rand(3, 4, generator=torch.Generator().manual_seed(2)) > 0.4
    poisoned = x.clone()
    poisoned[~keep] = torch.nan
    accumulator = GramAccumulator(10)
    accumulator.add(poisoned, keep)
    assert accumulator.tokens == int(keep.sum()) < 12
    _check_gram(accumulator.gram(), x[keep], torch.float32)
    assert torch.equal(poisoned.isnan().any(-1), ~keep)  # the caller's rows are untouched

    zeroed = GramAccumulator(10)  # zeroing padding is not leaving it out
    zeroed.add(x * keep[..., None])
    with pytest.raises(AssertionError, match="off by"):
        _check_gram(zeroed.gram(), x[keep], torch.float32)


def test_an_all_true_mask_is_the_same_as_none() -> None:
    x = _random(3, 6, 10)
    plain, masked = GramAccumulator(10), GramAccumulator(10)
    plain.add(x)
    masked.add(x, torch.ones(6, dtype=torch.bool))
    assert torch.equal(plain.gram(), masked.gram())


def test_keeps_no_rows_and_no_autograd_graph() -> None:
    accumulator = GramAccumulator(4)
    x = _random(4, 5, 4).requires_grad_()
    y = x * 2
    reference = weakref.ref(y)
    accumulator.add(y)
    del y
    gc.collect()
    assert reference() is None
    assert not accumulator.gram().requires_grad
    assert not accumulator.mean().requires_grad


def test_inference_mode_and_autocast_make_no_difference() -> None:
    x = _random(5, 40, 20)
    plain, mixed = GramAccumulator(20), GramAccumulator(20)
    plain.add(x)
    plain.add(x)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed.add(x.clone())
    mixed.add(x)
    assert torch.equal(plain.gram(), mixed.gram())
    assert torch.equal(plain.mean(), mixed.mean())


def test_memory_is_stated_beforehand() -> None:
    accumulator = GramAccumulator(300)
    accumulator.add(_random(6, 2, 300))
    held = [tensor for tensor in (accumulator._sum, *accumulator._products) if tensor is not None]
    assert sum(tensor.nbytes for tensor in held) == accumulator.nbytes
    assert accumulator.nbytes == GramAccumulator.bytes_needed(300)
    # The upper half and the strips' excess below the diagonal.
    assert 4 * 3072**2 < GramAccumulator.bytes_needed(3072) < 1.1 * 4 * 3072**2


def test_the_pool_is_the_mean_and_leaves_its_inputs_alone() -> None:
    few, many = _random(7, 5, 6), 3 * _random(8, 500, 6)
    grams = [_direct(few), _direct(many)]
    before = [gram.clone() for gram in grams]
    torch.testing.assert_close(pooled_gram(grams), (before[0] + before[1]) / 2, rtol=1e-15, atol=0)
    assert torch.equal(pooled_gram(grams[:1]), before[0])
    assert all(torch.equal(gram, old) for gram, old in zip(grams, before, strict=True))
    with pytest.raises(CalibrationError, match="to pool, found none"):
        pooled_gram([])
    with pytest.raises(CalibrationError, match=r"Gram matrix 1 of the pool: expected \(6, 6\)"):
        pooled_gram([grams[0], torch.eye(4)])


@pytest.mark.parametrize(
    ("x", "keep", "message"),
    [
        (torch.ones(2, 5), None, r"expected floating rows \(\.\.\., 4\), found \(2, 5\)"),
        (torch.ones(2, 4, dtype=torch.int64), None, r"found \(2, 4\) of torch.int64"),
        (torch.tensor(1.0), None, r"found \(\)"),
        (torch.ones(2, 4), torch.ones(3, dtype=torch.bool), r"each of the 2 rows, found \(3,\)"),
        (torch.ones(2, 4), torch.ones(2, dtype=torch.int64), r"pass .* as `mask.bool\(\)`"),
    ],
)
def test_unusable_rows_are_refused(x: Tensor, keep: Tensor | None, message: str) -> None:
    accumulator = GramAccumulator(4)
    with pytest.raises(CalibrationError, match=message):
        accumulator.add(x, keep)
    assert accumulator.tokens == 0


def test_no_tokens_and_no_features_are_refused() -> None:
    accumulator = GramAccumulator(4)
    accumulator.add(torch.ones(0, 4))
    accumulator.add(torch.full((2, 4), torch.nan), torch.zeros(2, dtype=torch.bool))
    for ask in (accumulator.gram, accumulator.mean, accumulator.check_finite):
        with pytest.raises(CalibrationError, match="at least 1 token, found 0"):
            ask()
    with pytest.raises(CalibrationError, match="at least 1 feature, found 0"):
        GramAccumulator(0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])  # the last one's square overflows
def test_sums_that_are_not_finite_are_refused(value: float) -> None:
    accumulator = GramAccumulator(4)
    accumulator.add(torch.ones(2, 4))
    accumulator.check_finite()
    accumulator.add(torch.tensor([1.0, 1.0, value, 1.0]))
    for ask in (accumulator.gram, accumulator.mean, accumulator.check_finite):
        with pytest.raises(CalibrationError, match="sums over 3 tokens are not finite"):
            ask()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_cuda_rows(device: str | None) -> None:
    x = _random(9, 64, 300)
    accumulator = GramAccumulator(300, device=device)
    accumulator.add(x.cuda(), torch.ones(64, dtype=torch.bool))
    assert accumulator.gram().device.type == (device or "cuda")
    _check_gram(accumulator.gram().cpu(), x, torch.float32)
