"""The metric of a slice, from what was measured of its site."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxshare.factors.metric import slice_statistics
from fxshare.sites.site import Site
from tests.planning.build import gram


def made(*, tokens: int = 8, seen: int = 8, bias: bool = True, **given: Any) -> Any:
    """The statistics of a slice of two rows."""
    moments = {"gradients": {"s": ()}, "moment": lambda name, site: gram(2, 3)}
    statistics = SimpleNamespace(
        **{**moments, **given},
        tokens=tokens,
        tokens_of=lambda site: seen,
        key=lambda names: tuple(names),
        mean=lambda site: torch.ones(4, dtype=torch.float64),
        gram=lambda site: gram(4, 1),
        check=lambda site, names: None,
        is_projected=lambda name: False,
    )
    one = SimpleNamespace(name="s", start=1, stop=3)
    site: Site = SimpleNamespace(name="w", bias=bias, lookups=(), slices=[one])  # type: ignore[assignment]
    weights = {"w": torch.arange(12.0).reshape(3, 4)}
    return slice_statistics([site], weights, statistics)["s"]  # type: ignore[arg-type]


def test_rows_mean_and_moment() -> None:
    one = made()
    assert one.weight_OI.tolist() == [[4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]]
    assert torch.equal(one.gram_II, gram(4, 1) - 1.0)
    assert torch.equal(one.moment_OO, gram(2, 3))
    assert torch.equal(made(bias=False).gram_II, gram(4, 1))


def test_without_gradients_the_error_of_the_activation_counts_alone() -> None:
    def moment(name: str, site: str) -> None:
        raise KeyError(name)

    assert made(gradients={}, moment=moment).moment_OO is None


@pytest.mark.parametrize(("tokens", "seen", "share"), [(8, 2, 0.25), (8, 16, 2.0), (1, 1, 1.0)])
def test_losses_are_per_token(tokens: int, seen: int, share: float) -> None:
    assert torch.equal(made(tokens=tokens, seen=seen).moment_OO, gram(2, 3) * share)
