"""FoldGathers: the gather moves into the rows of the linears before an elementwise function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxshare.factors.pivots import pivot
from passes import (
    FoldGathers,
    PivotBasis,
    PivotedGroup,
    Rows,
    ShareBasis,
    SharedGroup,
    SplitLinear,
    SplitSite,
    equal_outputs,
    run,
    slice_weight,
)


class Gated(nn.Module):
    """``down(silu(gate x) ⊙ up x)``; with ``peek`` the hidden units are read once more."""

    def __init__(self, *, peek: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 10), nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.act, self.peek = nn.SiLU(), peek
        self.norm = nn.LayerNorm(10) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.act(self.gate(x)) * self.up(x))
        y = self.down(hidden)
        return y + hidden.sum(-1, keepdim=True) if self.peek else y


def pivoted(model: nn.Module, rank: int = 4) -> fx.GraphModule:
    """The model with every linear a slice and ``down`` stored pivoted at ``rank``."""
    gm = fx.symbolic_trace(model.double())
    names = ("gate", "up", "down")
    sites = tuple(SplitSite((n,), (Rows(n, 0, gm.get_submodule(n).out_features),)) for n in names)
    weight = gm.get_submodule("down").weight.detach()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    basis, coefficient = vh[:rank], u[:, :rank] * s[:rank]
    made = pivot(basis)
    result, _ = run(
        gm,
        [
            SplitLinear(sites=sites),
            ShareBasis(groups=(SharedGroup("basis_down", basis, {"down": coefficient}),)),
            PivotBasis(
                groups=(
                    PivotedGroup(
                        "basis_down",
                        made.kept_J,
                        made.table_RT,
                        {"down": coefficient @ made.block_RR},
                    ),
                )
            ),
        ],
    )
    return result


def test_the_gather_is_gone_and_the_function_stays() -> None:
    before = pivoted(Gated())
    after, (applied,) = run(before, [FoldGathers()])
    assert applied.rewrites == 1
    assert "index_select" in before.code
    assert "index_select" not in after.code
    x = torch.randn(3, 6, dtype=torch.float64)
    assert equal_outputs(before, after, [x], tolerance=1e-14)


def test_weights_are_told_in_their_original_order() -> None:
    model = Gated().double()
    after, _ = run(pivoted(model), [FoldGathers()])
    assert torch.equal(slice_weight(after, "gate"), model.gate.weight)
    assert torch.equal(slice_weight(after, "up"), model.up.weight)
    assert not torch.equal(after.get_submodule("up").weight, model.up.weight)
    before = pivoted(model)
    assert torch.allclose(slice_weight(after, "down"), slice_weight(before, "down"), atol=1e-14)


def test_a_second_run_finds_nothing() -> None:
    once, _ = run(pivoted(Gated()), [FoldGathers()])
    _, (applied,) = run(once, [FoldGathers()])
    assert applied.rewrites == 0


@pytest.mark.parametrize("options", [{"peek": True}, {"norm": True}])
def test_activations_with_other_readers_or_mixing_between_are_left_alone(
    options: dict[str, bool],
) -> None:
    gm = pivoted(Gated(**options))
    after, (applied,) = run(gm, [FoldGathers()])
    assert applied.rewrites == 0
    assert after.code == gm.code


def test_a_producer_called_twice_is_left_alone() -> None:
    class Twice(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.gate(x).sum(-1, keepdim=True)

    _, (applied,) = run(pivoted(Twice()), [FoldGathers()])
    assert applied.rewrites == 0


def test_reordering_only_one_of_two_producers_is_caught() -> None:
    """The check that would miss a wrong fold proves nothing: here it is done wrong on purpose."""
    before = pivoted(Gated())
    after, _ = run(before, [FoldGathers()])
    up = after.get_submodule("up")
    up.weight = nn.Parameter(slice_weight(after, "up").detach().clone())
    x = torch.randn(3, 6, dtype=torch.float64)
    assert not equal_outputs(before, after, [x], tolerance=1e-3)
