"""Uniform Basis Sharing plans: ranks and costs."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fxshare.planning.rules import sharing_rank
from fxshare.plans.storage import PLAIN


def test_sharing_rank_is_the_published_formula_clamped() -> None:
    assert sharing_rank(0.8, 768, 1536) == int(0.8 * 768 * 1536 / (768 + 1536)) == 409
    assert sharing_rank(0.5, 768, 768) == 192
    assert sharing_rank(1.0, 3072, 1536) == 1024
    assert sharing_rank(0.01, 10, 10) == 1
    assert sharing_rank(5.0, 10, 30) == 10
    assert sharing_rank(1e308, 10, 30) == 10


@settings(deadline=None)
@given(
    rate=st.floats(0, 1, exclude_min=True),
    features=st.integers(1, 10_000),
    out=st.integers(1, 100_000),
)
def test_break_even_is_the_last_rank_that_saves(rate: float, features: int, out: int) -> None:
    dense, per_rank = features * out, features + out
    rank = PLAIN.break_even_rank(features, out)
    assert rank * per_rank <= dense < (rank + 1) * per_rank
    shared = sharing_rank(rate, features, out)
    assert 1 <= shared <= min(features, out)
    # the division may round up by an ulp, never by a whole rank
    assert shared == 1 or shared * per_rank <= rate * dense * (1 + 1e-15)
