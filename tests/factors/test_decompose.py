"""Both forms of a group's decomposition against a plain SVD of the whole weighted stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxshare.errors import FactoriseError
from fxshare.factors.damping import Damping
from fxshare.factors.decompose import InputSide, OutputSide, Side, decompose, weighted_product
from fxshare.factors.factorise import Factors
from fxshare.factors.metric import SliceStatistics, output_root
from fxshare.factors.spectra import Spectra
from tests.planning.build import gram, quadratic, slice_of

FLOOR = 1e-8
# outs of the members, features: wide, tall, square; several members; one output, one input
SHAPES = [((9,), 20), ((30,), 12), ((12,), 12), ((4, 7, 3), 25), ((20, 9), 12), ((1,), 6)]
SHAPES += [((5,), 1)]
MOMENTS = ["whole", "diagonal", "none", "mixed"]


def moment_of(kind: str, out: int, number: int) -> Tensor | None:
    """Of another scale from member to member, as gradients of layers are."""
    kind = ["whole", "diagonal", "none"][number % 3] if kind == "mixed" else kind
    if kind == "none":
        return None
    whole = gram(out, 100 + number) * 10.0**-number
    return whole if kind == "whole" else whole.diagonal().clone()


def members_of(
    outs: Sequence[int], features: int, kind: str = "whole", *, inputs: int = 1
) -> dict[str, SliceStatistics]:
    return {
        f"s{at}": slice_of(
            out,
            features,
            at,
            moment_OO=moment_of(kind, out, at),
            input=at % inputs,
            gram_II=gram(features, 50 + at % inputs),
        )
        for at, out in enumerate(outs)
    }


def pooled_of(slices: dict[str, SliceStatistics]) -> Tensor:
    return torch.stack(list({one.input: one.gram_II for one in slices.values()}.values())).mean(0)


def both_sides(slices: dict[str, SliceStatistics]) -> list[Side]:
    """Whichever is the smaller one: both are right."""
    members = list(slices.values())
    pooled = Damping(pooled_of(slices), FLOOR)
    roots = [None if one.moment_OO is None else output_root(one.moment_OO) for one in members]
    product = sum((weighted_product(one) for one in members[1:]), weighted_product(members[0]))
    return [InputSide(members, pooled, product), OutputSide(members, roots, pooled.moment)]


def symmetric_root(moment: Tensor | None, out: int) -> tuple[Tensor, Tensor]:
    """``A^½`` and its inverse, as published."""
    if moment is None:
        return torch.eye(out).double(), torch.eye(out).double()
    values, vectors = torch.linalg.eigh(moment.diag() if moment.ndim == 1 else moment)
    scale = values.clamp(min=FLOOR * float(values[-1])).sqrt()
    return (vectors * scale) @ vectors.T, (vectors / scale) @ vectors.T


def published(slices: dict[str, SliceStatistics]) -> tuple[Tensor, Any]:
    """The squared singular values of the stacked ``A_i^½ W_i S``, and the products at a rank."""
    outs = [len(one.weight_OI) for one in slices.values()]
    members = list(slices.values())
    roots = [symmetric_root(one.moment_OO, len(one.weight_OI)) for one in members]
    root_II = symmetric_root(pooled_of(slices), next(iter(slices.values())).gram_II.shape[0])
    stack = torch.cat([a @ one.weight_OI for (a, _), one in zip(roots, members, strict=True)])
    left, values, right = torch.linalg.svd(stack @ root_II[0], full_matrices=False)

    def products(rank: int) -> list[Tensor]:
        best = (left[:, :rank] * values[:rank]) @ right[:rank] @ root_II[1]
        parts = best.split(outs)
        return [inverse @ part for (_, inverse), part in zip(roots, parts, strict=True)]

    return values.square(), products


def assert_same(found: Factors, expected: Sequence[Tensor], slices: Any, limit: float) -> None:
    for one, coefficient, product in zip(
        slices.values(), found.coefficients, expected, strict=True
    ):
        gap = coefficient @ found.basis_RI - product
        assert float(gap.norm()) <= limit * float(one.weight_OI.norm()), "the products differ"


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize(("outs", "features"), SHAPES)
def test_both_forms_are_the_svd(outs: Any, features: int, inputs: int, kind: str) -> None:
    slices = members_of(outs, features, kind, inputs=inputs)
    spectrum, products = published(slices)
    limit = min(features, sum(outs))
    total = float(spectrum.sum())
    for side in both_sides(slices):
        whole = decompose(side)
        torch.testing.assert_close(whole.spectrum[:limit], spectrum, rtol=0, atol=1e-12 * total)
        for rank in {1, (limit + 1) // 2, limit}:
            made = whole.factors(side, rank)
            assert made.basis_RI.shape == (rank, features)
            assert_same(made, products(rank), slices, 1e-9)
            assert made.lost == pytest.approx(float(spectrum[rank:].sum()), abs=1e-11 * total)
            assert made.total == pytest.approx(total, rel=1e-11)
            stacked = torch.cat(made.coefficients).norm(dim=0)
            torch.testing.assert_close(made.basis_RI.norm(dim=1), stacked, rtol=1e-9, atol=0)


def test_factors_in_float32_are_those_of_float64_to_its_rounding() -> None:
    slices = members_of((9, 5), 10)
    for side in both_sides(slices):
        whole = decompose(side)
        for rank in (1, 4, 10):
            fine, coarse = (whole.factors(side, rank, t) for t in (torch.float64, torch.float32))
            assert coarse.basis_RI.dtype == coarse.coefficients[0].dtype == torch.float32
            assert coarse.lost == fine.lost
            for a, b in zip(fine.coefficients, coarse.coefficients, strict=True):
                expected, found = a @ fine.basis_RI, (b @ coarse.basis_RI).double()
                size = a.norm() * fine.basis_RI.norm()
                assert (found - expected).norm() <= 10 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("wrong", ["side", "root", "gram"])
def test_the_comparison_can_fail(wrong: str) -> None:
    slices = members_of((9, 5), 10)
    _, products = published(slices)
    other = {n: replace(one, gram_II=gram(10, 9)) for n, one in slices.items()}
    inputs, outputs = both_sides(other if wrong == "gram" else slices)
    assert isinstance(outputs, OutputSide)
    if wrong == "root":
        outputs = replace(outputs, roots=[None, None])
    made = decompose(inputs).factors(inputs, 4) if wrong == "side" else None
    if made is None:
        made = decompose(outputs).factors(outputs, 4)
    expected = products(5 if wrong == "side" else 4)
    with pytest.raises(AssertionError, match="the products differ"):
        assert_same(made, expected, slices, 1e-4)


SINGULAR = {
    "few tokens": lambda n: gram(n, 3, tokens=max(n // 3, 1)),
    "dead units": lambda n: gram(n, 3) * torch.outer(*(2 * [(torch.arange(n) % 3 > 0).double()])),
    "one direction": lambda n: torch.ones(n, n).double(),
}


@pytest.mark.parametrize("moment", ["regular", "diagonal", *SINGULAR])
@pytest.mark.parametrize("input_moment", ["regular", *SINGULAR])
@pytest.mark.parametrize(("outs", "features"), [((6, 5), 24), ((16, 9), 12), ((12,), 12)])
def test_singular_moments(outs: Any, features: int, moment: str, input_moment: str) -> None:
    """The loss at every rank is the least there is, and at full rank the weights come back."""
    slices = members_of(outs, features, "diagonal" if moment == "diagonal" else "whole")
    for number, (name, one) in enumerate(slices.items()):
        out = len(one.weight_OI)
        if moment == "diagonal":
            slices[name] = replace(one, moment_OO=(torch.arange(out) % 3 == number).double())
        elif moment != "regular":
            slices[name] = replace(one, moment_OO=SINGULAR[moment](out))
        if input_moment != "regular":
            slices[name] = replace(slices[name], gram_II=SINGULAR[input_moment](features))
    spectrum, _ = published(slices)
    spectra, names = Spectra(slices), tuple(slices)
    tails = spectra.tails(frozenset(slices))
    total = float(tails[0])
    limit = min(features, sum(outs))
    for rank in range(1, limit + 1):
        made = spectra.factors(names, rank)
        lost = sum(
            quadratic(replace(one, moment_OO=diagonal(one)), coefficient @ made.basis_RI)
            for one, coefficient in zip(slices.values(), made.coefficients, strict=True)
        )
        assert lost == pytest.approx(float(spectrum[rank:].sum()) / 2, abs=1e-6 * total)
        assert lost == pytest.approx(tails[rank], abs=1e-6 * total)
        assert bool(made.basis_RI.isfinite().all())
    made = spectra.factors(names, limit)
    assert_same(made, [one.weight_OI for one in slices.values()], slices, 1e-9)


def diagonal(one: SliceStatistics) -> Tensor | None:
    moment = one.moment_OO
    return moment.diag() if moment is not None and moment.ndim == 1 else moment


@pytest.mark.parametrize(("out", "features"), [(20, 30), (30, 20)])
def test_beyond_what_the_moments_tell_the_weights_decide(out: int, features: int) -> None:
    """Six directions have a moment; the rest of the rank goes to what is large in the weight."""
    few = gram(min(out, features), 3, tokens=6)
    moment = few if out < features else gram(out, 3, tokens=6)
    one = slice_of(out, features, 0, moment_OO=moment)
    large = torch.zeros(out, features).double()
    large[-1, -1] = 1e4
    one = replace(one, weight_OI=one.weight_OI + large)
    made = Spectra({"a": one}).factors(("a",), 12)
    gap = one.weight_OI - made.coefficients[0] @ made.basis_RI
    assert float(gap.norm()) < 0.01 * float(one.weight_OI.norm())


def test_a_rank_that_is_none_is_refused() -> None:
    spectra = Spectra(members_of((4, 3), 6))
    for rank in (0, 7):
        with pytest.raises(FactoriseError, match=f"2 weights: expected from 1 to 6, found {rank}"):
            spectra.factors(("s0", "s1"), rank)


def sizes_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """The sizes that a function of torch.linalg is called with from now on."""
    sizes: list[int] = []
    real = getattr(torch.linalg, name)

    def counted(matrix: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(matrix.shape[-1])
        return real(matrix, *args, **options)

    monkeypatch.setattr(torch.linalg, name, counted)
    return sizes


@pytest.mark.parametrize(("outs", "features"), [((9,), 30), ((30,), 12), ((5, 8), 30), ((9, 8), 9)])
def test_one_decomposition_of_the_smaller_side_serves_every_rank(
    outs: Any, features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = members_of(outs, features, inputs=len(outs))
    spectra, names = Spectra(slices), tuple(slices)
    vectors, values = sizes_of(monkeypatch, "eigh"), sizes_of(monkeypatch, "eigvalsh")
    roots = sizes_of(monkeypatch, "cholesky_ex")
    spectra.tails(frozenset(names))
    for rank in (1, 4, 7, 4):
        spectra.factors(names, rank)
    side = min(features, sum(outs))
    assert vectors == [side]
    # the largest eigenvalue of a small moment is computed with the others
    assert values.count(side) <= 2
    # no root of the larger side
    assert roots
    assert set(roots) <= ({features} if features <= sum(outs) else set(outs))


@pytest.mark.parametrize("names", [("s1", "s3"), ("s3", "s0", "s1"), ("s0", "s4")])
def test_slices_of_one_input_are_priced_as_if_there_were_no_others(names: Any) -> None:
    """Their matrices are blocks of one; ``s4`` reads another input, ``s2`` is not wide."""
    slices = members_of((3, 5, 40, 4), 20)
    slices["s4"] = slice_of(6, 20, 4, input="other", gram_II=gram(20, 60))
    alone = {name: slices[name] for name in names}
    spectra, expected = Spectra(slices), Spectra(alone)
    tails = spectra.tails(frozenset(names))
    total = float(tails[0])
    assert tails == pytest.approx(expected.tails(frozenset(names)), abs=1e-12 * total)
    for rank in (1, 5):
        made, other = spectra.factors(names, rank), expected.factors(names, rank)
        products = [c @ other.basis_RI for c in other.coefficients]
        assert_same(made, products, alone, 1e-9)
