"""Muon: the direction of its steps, their size, and what it leaves to AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxshare.errors import ConfigError
from fxshare.refining.optimiser import Optimiser, orthogonalised
from fxshare.refining.options import RefineOptions
from fxshare.refining.parameters import trainable_of
from fxshare.refining.student import Student
from tests.refining.build import refined, subject, usual
from tests.refining.test_resumed import EndedError, ended_at, same


def as_published(matrix_AB: Tensor) -> Tensor:
    """The iteration of Jordan et al. 2024 on the matrix itself."""
    x = matrix_AB / matrix_AB.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(5, 17), (17, 5), (8, 8), (1, 6)])
def test_orthogonalised_is_the_published_iteration(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonalised(matrix)
    torch.testing.assert_close(found, as_published(matrix))
    sizes = torch.linalg.svdvals(found)
    assert float(sizes.min()) > 0.6
    assert float(sizes.max()) < 1.25
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ found @ right.T  # the directions are those of the matrix
    torch.testing.assert_close(inner, inner.diagonal().diag())
    torch.testing.assert_close(orthogonalised(matrix.float()).double(), found, rtol=0, atol=2e-5)


def test_a_matrix_of_zeros_stays_one() -> None:
    assert torch.equal(orthogonalised(torch.zeros(3, 4)), torch.zeros(3, 4))


def moved(kind: Any, gradients: Any) -> tuple[Student, dict[str, Tensor]]:
    """How far one step of rate 1e-3 goes, by the size of each tensor."""
    model, gm = usual()
    student = Student(gm, trainable_of(gm, model, ("norms",)))
    before, scales = student.state(), student.scales()
    assert Optimiser(student, scales, kind).step(gradients(before), 1e-3)
    after = student.state()
    return student, {n: (after[n] - before[n]) / (1e-3 * scales[n]) for n in before}


def test_steps_are_as_large_as_those_of_adamw_and_turned_for_matrices_alone() -> None:
    def gradients(state: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {n: torch.randn(t.shape, generator=generator) for n, t in state.items()}

    student, muon = moved("muon", gradients)
    _, adamw = moved("adamw", gradients)
    for name, step in muon.items():
        if step.ndim == 1:
            assert torch.equal(step, adamw[name])
            continue
        sizes = torch.linalg.svdvals(step) / (0.2 * max(step.shape) ** 0.5)
        assert float(sizes.min()) > 0.5, name
        assert float(sizes.max()) < 1.3, name
    assert {step.ndim for step in muon.values()} == {1, 2}
    assert student.trainable.others


def test_tables_are_left_to_adamw() -> None:
    model, gm = subject()
    student = Student(gm, trainable_of(gm, model, ()))
    table = student.trainable.groups[0].basis
    linear = gm.get_submodule(table.rpartition(".")[0])
    gm.table = torch.nn.Embedding(*linear.weight.shape)
    gm.table.weight = linear.weight
    optimiser = Optimiser(student, student.scales(), "muon")
    assert optimiser.step({n: torch.ones_like(t) for n, t in student.masters.items()}, 1e-3)
    tensors, numbers = optimiser.state()
    by_adamw = {name for name in tensors if not name.startswith("momentum.")}
    assert by_adamw == {f"exp_avg.{table}", f"exp_avg_sq.{table}"}
    assert (numbers["taken"], numbers["kind"]) == (1, "muon")


def test_muon_refines_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, gm = subject()
    options = {"steps": 8, "optimiser": "muon", "also": ("norms",), "learning_rate": 1e-2}
    whole = refined(gm, model, **options)
    done = whole.fxshare.refined[-1]
    assert done.after.objective < done.before.objective
    with ended_at(5), pytest.raises(EndedError):
        refined(gm, model, work=tmp_path / "w", **options)
    assert same(refined(gm, model, work=tmp_path / "w", **options), whole)


def test_what_muon_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="optimiser: expected one of adamw, muon, found 'sgd'"):
        RefineOptions(steps=1, optimiser="sgd")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="shard=True and optimiser='muon', which turns whole"):
        RefineOptions(steps=1, optimiser="muon", shard=True)
