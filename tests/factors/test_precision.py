"""Groups priced in float32 beside the same in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fxshare.base.filed import Filed
from fxshare.calibration.gram import GramAccumulator
from fxshare.factors import spectra as module
from fxshare.factors.decompose import rounding, weighted_products
from fxshare.factors.spectra import Spectra
from fxshare.factors.tails import tails_of
from tests.factors.test_decompose import members_of

EPS = torch.finfo(torch.float32).eps
# wide, several inputs, one input read by several, as many outputs, tall, tall over several inputs
GROUPS: dict[str, Any] = {
    "wide": {"outs": (40,), "features": 96},
    "wide, two inputs": {"outs": (20, 24), "features": 96, "inputs": 2},
    "wide, one input": {"outs": (20, 24), "features": 96},
    "square": {"outs": (30, 34), "features": 64, "inputs": 2},
    "tall": {"outs": (90,), "features": 64},
    "tall, three inputs": {"outs": (40, 30, 50), "features": 64, "inputs": 3},
    "diagonal": {"outs": (40, 60), "features": 64, "kind": "diagonal"},
    "activation error": {"outs": (40, 60), "features": 64, "kind": "none"},
}


def spectra_of(group: str, dtype: torch.dtype) -> tuple[Spectra, tuple[str, ...]]:
    slices = members_of(**GROUPS[group])
    return Spectra(slices, dtype=dtype, filed=Filed()), tuple(slices)


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_tails_are_those_of_float64_to_a_few_roundings_of_their_sum(
    group: str, images: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WIDE", 8 if images else 1 << 30)
    (single, names), (double, _) = (spectra_of(group, t) for t in (torch.float32, torch.float64))
    found, expected = single.tails(frozenset(names)), double.tails(frozenset(names))
    apart = np.abs(found - expected)
    assert apart[found > 0].max() <= 8 * EPS * expected[0]
    values = -2 * torch.from_numpy(np.diff(expected))
    assert apart.max() <= 8 * EPS * expected[0] + rounding(values, torch.float32)
    assert apart.max() > 0, "it was not computed in float32"
    assert (np.diff(found) <= 0).all()
    assert found[-1] == 0


@pytest.mark.parametrize("group", GROUPS)
def test_factors_lose_what_those_of_float64_do(group: str) -> None:
    (single, names), (double, _) = (spectra_of(group, t) for t in (torch.float32, torch.float64))
    slices = double.slices
    for rank in (1, 20, 35):
        lost = []
        for made in (single.factors(names, rank, torch.float32), double.factors(names, rank)):
            products = (c.double() @ made.basis_RI.double() for c in made.coefficients)
            both = zip(names, products, strict=True)
            lost.append(sum(slices[n].quadratic_loss(product) for n, product in both))
        assert lost[0] == pytest.approx(lost[1], abs=64 * EPS * double.tails(frozenset(names))[0])


def test_what_is_kept_in_the_end_is_float64() -> None:
    (single, names), (double, _) = (spectra_of("wide", t) for t in (torch.float32, torch.float64))
    single.factors(names, 7, torch.float32)
    assert torch.equal(single.factors(names, 7).basis_RI, double.factors(names, 7).basis_RI)


def test_rounding_is_no_loss() -> None:
    values = torch.tensor([1.0, 0.5, 1e-9, 1e-10])
    found = tails_of(values, 4, dtype=torch.float32)
    assert found == pytest.approx([0.75, 0.25, 0.0, 0.0, 0.0], abs=1e-8)
    assert (found[2:] == 0).all()
    assert tails_of(values.double(), 4)[2] > 0


def test_heads_are_multiplied_together_as_one_by_one() -> None:
    for kind in ("whole", "diagonal", "none", "mixed"):
        members = list(members_of((4, 7, 3), 25, kind).values())
        expected = weighted_products(members, torch.float64)
        found = weighted_products(members, torch.float32)
        assert found.dtype == torch.float32
        assert float((found - expected).norm()) <= 8 * EPS * float(expected.norm())
        again = weighted_products(members, torch.float64)
        assert torch.equal(again, expected), "a member's own product was changed"


@pytest.mark.parametrize("features", [5, 300])
@pytest.mark.parametrize("centred", [True, False])
def test_a_moment_multiplies_without_being_expanded(features: int, centred: bool) -> None:
    generator = torch.Generator().manual_seed(features)
    rows = 3 + torch.randn(70, features, generator=generator)
    sums = GramAccumulator(features)
    sums.add(rows)
    left = torch.randn(9, features, generator=generator).double()
    mean = sums.mean() if centred else None
    gram = sums.gram()
    if mean is not None:
        gram -= torch.outer(mean, mean)
    expected = left @ gram
    torch.testing.assert_close(sums.times(left, mean), expected, rtol=1e-12, atol=1e-12)
    single = sums.times(left.float(), mean)
    assert single.dtype == torch.float32
    bound = 8 * EPS * float(left.norm() * gram.norm())
    assert float((single - expected).norm()) <= bound
