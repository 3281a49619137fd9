"""What error feedback asks of a moment, and how often it is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxshare.factors import rounding
from fxshare.factors.codes import CodedSlices
from fxshare.factors.elimination import Elimination
from fxshare.factors.group import factorise_group
from fxshare.factors.rounding import rounded_group, with_feedback
from fxshare.factors.spectra import Spectra
from fxshare.factors.triangles import inverse_of_lower
from tests.factors.test_rounding import correlated
from tests.factors.test_spectra import group
from tests.planning.build import gram, slice_of


@pytest.mark.parametrize("size", [1, 5, 192, 193, 500])
def test_the_inverse_of_a_lower_root(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64).tril() / size**0.5
    root.diagonal().copy_(1 + torch.rand(size, generator=generator, dtype=torch.float64))
    found = inverse_of_lower(root)
    assert torch.equal(found, found.tril())
    assert torch.allclose(found @ root, torch.eye(size, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(found, torch.linalg.inv(root), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [900, 20, 0])
def test_the_factor_is_that_of_the_damped_inverse(tokens: int) -> None:
    width = 220
    moment = gram(width, 3, tokens=tokens) if tokens else torch.zeros(width, width).double()
    found = Elimination.of(moment)
    diagonal = moment.diagonal()[found.order]
    assert bool((diagonal.diff() <= 0).all())
    by = 0.01 * float(moment.diagonal().mean()) if tokens else 1.0
    damped = moment[found.order][:, found.order] + by * torch.eye(width, dtype=torch.float64)
    factor = found.factor_II
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(width).double(), atol=1e-9)
    if tokens:  # else it is the identity
        turned = factor @ factor.T @ damped
        assert not torch.allclose(turned, torch.eye(width).double(), atol=1e-2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("name", "number"), [("_AT_ONCE", 1), ("_AT_ONCE", 300), ("_ROWS", 5)])
def test_batches_of_updates_change_nothing(
    bits: int, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = correlated(2, out=12, width=150)
    found = with_feedback(one.weight_OI, one.gram_II, bits, torch.float64)
    monkeypatch.setattr(rounding, name, number)
    again = with_feedback(one.weight_OI, one.gram_II, bits, torch.float64)
    assert torch.equal(again.codes, found.codes)
    wrong = Elimination(Elimination.of(one.gram_II).factor_II, torch.arange(150))
    other = with_feedback(one.weight_OI, one.gram_II, bits, torch.float64, wrong)
    assert not torch.equal(other.codes, found.codes)


@pytest.fixture
def eliminated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the moments that were eliminated."""
    seen: list[int] = []
    own = Elimination.of

    def of(gram_II: Any) -> Elimination:
        seen.append(len(gram_II))
        return own(gram_II)

    monkeypatch.setattr(Elimination, "of", staticmethod(of))
    return seen


def slices(inputs: tuple[int, ...]) -> dict[str, Any]:
    return {
        str(at): slice_of(9, 40, at, input=which, gram_II=gram(40, which, tokens=90))
        for at, which in enumerate(inputs)
    }


@pytest.mark.parametrize(("inputs", "times"), [((0, 0, 0), 1), ((0, 1, 1), 2)])
def test_slices_of_one_input_have_one_elimination(
    inputs: tuple[int, ...], times: int, eliminated: list[int]
) -> None:
    several = slices(inputs)
    coded = CodedSlices(dict.fromkeys(several, 8), Spectra(several), bias=False)
    assert len([coded[name] for name in coded]) == len(inputs)
    assert eliminated == [40] * times
    eliminated.clear()
    # of a group the basis has one, and its coefficients one for each input
    rounded_group(factorise_group(group(several, 7), Spectra(several)), 4)
    assert eliminated == [40] + [7] * times
