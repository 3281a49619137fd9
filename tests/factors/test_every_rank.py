"""Factors of every rank from one file: those that each rank would have by itself."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxshare.base.filed import Filed
from fxshare.errors import StoreError
from fxshare.factors.spectra import Spectra
from tests.planning.build import slice_of

OUTS = {"wide": (9, 7), "narrow": (2, 3)}


def products(spectra: Spectra, names: tuple[str, ...], rank: int, dtype: torch.dtype) -> Tensor:
    made = spectra.factors(names, rank, dtype)
    return torch.cat([c @ made.basis_RI for c in made.coefficients])


@pytest.mark.parametrize("side", OUTS)
def test_every_rank_is_as_by_itself(side: str) -> None:
    slices = {str(n): slice_of(out, 8, n) for n, out in enumerate(OUTS[side])}
    names = tuple(slices)
    filed, alone = Spectra(slices, filed=Filed()), Spectra(slices)
    full = min(8, sum(OUTS[side]))
    for rank in (full, 1, 3, full - 1):  # in any order
        expected = products(alone, names, rank, torch.float64)
        # rounded to float32 in both factors
        bound = 8 * torch.finfo(torch.float32).eps * float(expected.norm()) * 8
        found = products(filed, names, rank, torch.float32)
        assert float((found.double() - expected).norm()) < bound
    lost = [float(filed.factors(names, r, torch.float32).lost) for r in range(1, full)]
    assert lost == pytest.approx([float(alone.factors(names, r).lost) for r in range(1, full)])
    assert filed.every_rank(names) is filed.every_rank(names)


@pytest.mark.parametrize("side", OUTS)
def test_of_half_precision_they_are_kept_as_they_are_stored(side: str) -> None:
    slices = {str(n): slice_of(out, 8, n) for n, out in enumerate(OUTS[side])}
    names = tuple(slices)
    half = Spectra(slices, filed=Filed(), dtype=torch.float32, stored=torch.bfloat16)
    fine = Spectra(slices, filed=Filed(), dtype=torch.float32)
    full = min(8, sum(OUTS[side]))
    for rank in (1, full - 1):
        expected = fine.factors(names, rank, torch.float32)
        found = half.factors(names, rank, torch.float32)
        assert found.basis_RI.dtype == torch.float32
        assert torch.equal(found.basis_RI, expected.basis_RI.bfloat16().float())
        for a, b in zip(found.coefficients, expected.coefficients, strict=True):
            assert torch.equal(a, b.bfloat16().float())
    # those that are kept in the end are not rounded, and come from what was priced
    kept = half.factors(names, full - 1)
    exact = Spectra(slices).factors(names, full - 1)
    assert kept.basis_RI.dtype == torch.float64
    assert not torch.equal(kept.basis_RI, kept.basis_RI.bfloat16().double())
    first, second = (
        torch.cat([c @ one.basis_RI for c in one.coefficients]) for one in (kept, exact)
    )
    assert 0 < float((first - second).norm() / second.norm()) < 1e-4


def test_what_is_kept_in_the_end_does_not_come_from_the_file() -> None:
    slices = {"a": slice_of(9, 8, 0)}
    one, other = Spectra(slices, filed=Filed()), Spectra(slices)
    one.factors(("a",), 3, torch.float32)
    for found, expected in zip(
        (one.factors(("a",), 3).basis_RI, *one.factors(("a",), 3).coefficients),
        (other.factors(("a",), 3).basis_RI, *other.factors(("a",), 3).coefficients),
        strict=True,
    ):
        assert found.dtype == torch.float64
        assert torch.equal(found, expected)


def test_without_a_disk_they_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    slices = {"a": slice_of(9, 8, 0)}
    expected = products(Spectra(slices, filed=Filed()), ("a",), 3, torch.float32)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    spectra = Spectra(slices, filed=Filed())
    assert torch.equal(products(spectra, ("a",), 3, torch.float32), expected)
    assert spectra.every_rank(("a",)) is not spectra.every_rank(("a",))


def test_the_file_goes_with_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    filed = Filed()
    rows = filed.keep(torch.arange(12.0).view(4, 3))
    other = filed.keep(torch.ones(2, 5))
    assert rows is not None
    assert other is not None
    assert torch.equal(rows(2), torch.arange(6.0).view(2, 3))
    assert torch.equal(other(2), torch.ones(2, 5))
    del filed, rows, other
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_what_is_there_readable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filed = Filed()
    first = filed.keep(torch.arange(6.0).view(2, 3))
    assert first is not None
    assert filed._file is not None

    class Full:
        """A file with room for four bytes more."""

        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 4

        def write(self, content: Any) -> int:
            if not self.left:
                raise OSError(28, "No space left on device")
            written: int = self.file.write(content[: self.left])
            self.left -= written
            return written

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    whole = filed._file
    monkeypatch.setattr(filed, "_file", Full(whole))
    assert filed.keep(torch.ones(5, 5)) is None
    assert torch.equal(first(2), torch.arange(6.0).view(2, 3))
    monkeypatch.setattr(filed, "_file", whole)
    again = filed.keep(torch.ones(2, 5))
    assert again is not None
    assert torch.equal(again(2), torch.ones(2, 5))


def test_a_file_that_lost_its_end_is_told() -> None:
    filed = Filed()
    rows = filed.keep(torch.ones(4, 3))
    assert rows is not None
    assert filed._file is not None
    filed._file.truncate(20)
    with pytest.raises(StoreError, match="shorter than what was written; set TMPDIR"):
        rows(4)
