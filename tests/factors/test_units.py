"""Hidden units: their order, what is lost, and what makes up for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxshare.errors import FactoriseError
from fxshare.factors import units as module
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.units import Order, UnitFactors, metric_of, order_of, unit_factors
from fxshare.plans.units import Units
from passes import SelectedUnits, SelectUnits, run
from tests.passes.build import split, whole_sites

seeds = st.integers(0, 1000)
WIDE = 12


def moment(size: int, seed: int, tokens: int) -> Tensor:
    rows = torch.randn(
        tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return rows.T @ rows / tokens


def a_slice(seed: int, units: int = WIDE, out: int = 5, tokens: int = 40) -> SliceStatistics:
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(out, units, generator=generator, dtype=torch.float64)
    return SliceStatistics(weight, moment(units, seed, tokens), moment(out, seed + 2, 30), "x")


def entry(kept: int, units: int = WIDE) -> Units:
    sizes = {"kept": kept, "of": units, "numbers_per_unit": 9}
    return Units(name="units", type="up+down", layers=(0,), producers=("u",), consumer="d", **sizes)


def made(one: SliceStatistics, kept: int) -> UnitFactors:
    order = order_of(one.gram_II, metric_of([one]))
    return unit_factors(entry(kept, len(one.gram_II)), {"d": one}, order)


def greedy(gram: Tensor, metric: Tensor) -> tuple[list[int], list[float]]:
    """Straight from the definition: every unit is tried at every step, with a new residual."""
    units = len(gram)

    def lost(some: list[int]) -> float:
        if not some:
            return 0.5 * float((metric * gram).sum())
        at = torch.tensor(some)
        told = gram[:, at] @ torch.linalg.solve(gram[at][:, at], gram[at])
        return 0.5 * float((metric * (gram - told)).sum())

    taken: list[int] = []
    losses = [lost([])]
    while len(taken) < units:
        rest = [unit for unit in range(units) if unit not in taken]
        taken.append(min(rest, key=lambda unit: lost([*taken, unit])))
        losses.append(lost(taken))
    return taken, losses


@given(seeds)
@settings(deadline=None, max_examples=15)
def test_the_order_is_that_of_the_greatest_gain_at_every_step(seed: int) -> None:
    one = a_slice(seed)
    order = order_of(one.gram_II, metric_of([one]))
    taken, losses = greedy(one.gram_II, metric_of([one]))
    # the last units are all that is left, and lose what rounding does
    assert order.units[: WIDE - 2].tolist() == taken[: WIDE - 2]
    np.testing.assert_allclose(order.lost, losses, rtol=1e-9, atol=1e-9 * losses[0])


@pytest.mark.parametrize("block", [1, 3, 64])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = a_slice(3, units=40, out=9, tokens=200)
    usual = order_of(one.gram_II, metric_of([one]))
    monkeypatch.setattr(module, "_BLOCK", block)
    other = order_of(one.gram_II, metric_of([one]))
    assert torch.equal(usual.units, other.units)
    torch.testing.assert_close(usual.lost, other.lost, rtol=1e-10, atol=1e-12 * usual.lost[0])


@given(seeds, st.integers(1, WIDE))
@settings(deadline=None, max_examples=25)
def test_the_predicted_loss_is_the_measured_one(seed: int, kept: int) -> None:
    one = a_slice(seed)
    found = made(one, kept)
    measured = one.quadratic_loss(found.whole("d", torch.float64))
    assert measured == pytest.approx(found.lost, rel=1e-8, abs=1e-8 * found.total)
    # no other weights of these units lose less
    other = found.whole("d", torch.float64)
    other[:, list(found.kept)] *= 1 + 1e-3
    if kept < WIDE:
        assert one.quadratic_loss(other) > measured


def test_all_units_kept_are_the_identity() -> None:
    one = a_slice(0, tokens=3)  # a singular Gram
    found = made(one, WIDE)
    assert torch.equal(found.weights["d"], one.weight_OI)
    assert found.kept == tuple(range(WIDE))
    assert found.lost == 0.0
    assert not found.bias_shift


def test_a_mean_goes_into_the_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, WIDE, generator=generator, dtype=torch.float64) + 2.0
    weight = torch.randn(5, WIDE, generator=generator, dtype=torch.float64)
    mean = hidden.mean(0)
    covariance = (hidden - mean).T @ (hidden - mean) / len(hidden)
    one = SliceStatistics(weight, covariance, None, "x", mean_I=mean)
    found = made(one, 4)
    at = list(found.kept)
    gone = hidden @ weight.T - (hidden[:, at] @ found.weights["d"].T + found.bias_shift["d"])
    assert gone.mean(0).abs().max() < 1e-12
    assert 0.5 * float(gone.square().sum()) / len(hidden) == pytest.approx(found.lost, rel=1e-9)
    # without the shift the same weights lose more
    still = hidden @ weight.T - hidden[:, at] @ found.weights["d"].T
    assert still.square().sum() > 1.5 * gone.square().sum()


def test_units_that_others_tell_go_first_and_dead_ones_too() -> None:
    one = a_slice(1, units=6, tokens=50)
    gram = one.gram_II.clone()
    gram[5] = gram[4]  # a twin of unit 4
    gram[:, 5] = gram[:, 4]
    gram[0] = gram[:, 0] = 0.0  # never active
    order = order_of(gram, metric_of([one]))
    assert order.lost[4] == pytest.approx(0.0, abs=1e-10 * float(order.lost[0]))
    assert 0 in order.units[4:].tolist()
    assert len({4, 5} & set(order.units[:4].tolist())) == 1


def test_slices_of_a_consumer_count_together() -> None:
    one, other = a_slice(4), a_slice(4, out=7)
    both = metric_of([one, other])
    torch.testing.assert_close(both, metric_of([one]) + metric_of([other]))
    whole = one.weight_OI.T @ one.moment_OO @ one.weight_OI
    projected = SliceStatistics(one.weight_OI, one.gram_II, None, "x", product_II=whole)
    torch.testing.assert_close(metric_of([projected]), metric_of([one]))


def test_numbers_that_are_not_finite_are_refused() -> None:
    gram = torch.eye(3, dtype=torch.float64)
    gram[1, 1] = float("nan")
    with pytest.raises(FactoriseError, match="expected finite moments, found NaN"):
        order_of(gram, torch.eye(3, dtype=torch.float64))


@pytest.mark.gpu
def test_on_a_gpu_the_order_is_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    one = a_slice(3, units=200, out=30, tokens=500)
    here = order_of(one.gram_II, metric_of([one]))
    there = order_of(one.gram_II.cuda(), metric_of([one]).cuda())
    torch.testing.assert_close(here.lost, there.lost.cpu(), rtol=1e-8, atol=1e-9 * here.lost[0])


def test_a_moment_that_is_not_finite_ends_with_an_error() -> None:
    gram = torch.eye(4, dtype=torch.float64)
    gram[1, 1] = torch.nan
    with pytest.raises(FactoriseError, match="the moment of the 2 units"):
        module.mixing_of(gram, (0, 1), 1e-8)


def test_fewer_tokens_than_units_make_no_weights_that_cancel() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(9, 48, generator=generator, dtype=torch.float64)
    gram = rows.T @ rows / 9
    # what is left of a unit is rounding, of sums in float32, and not nothing
    rounding = 1e-7 * torch.randn(24, 24, generator=generator, dtype=torch.float64)
    gram[24:, :24] += rounding
    gram[:24, 24:] += rounding.T
    gram[:24, :24] += 1e-12 * torch.eye(24)
    kept = tuple(range(24))
    wild = module.mixing_of(gram, kept, 1e-8)
    calm = module.mixing_of(gram, kept, 1e-8, most=100.0)
    assert float(wild.abs().max()) > 1e4
    assert float(calm.abs().max()) <= 100
    gap = rows - rows[:, :24] @ calm.T
    assert float(gap.norm()) <= 1e-2 * float(rows.norm())
    one = SliceStatistics(torch.ones(2, 48), gram, None, "x")
    found = unit_factors(entry(24, 48), {"d": one}, Order(torch.arange(48), torch.zeros(49)))
    assert float(found.weights["d"].abs().max()) <= 48 * 100


class InTurn(nn.Module):
    """An MLP whose gate and up are one weight, row by row in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 2 * WIDE), nn.Linear(WIDE, 5)

    def units(self, x: Tensor) -> Tensor:
        y = self.up(x)
        gate, up = y[..., ::2].clamp(max=1), y[..., 1::2].clamp(-1, 1)
        return (up + 1) * gate.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.units(x))
        return found


@pytest.mark.parametrize("kept", [1, WIDE // 2, WIDE])
def test_what_is_predicted_is_what_a_graph_loses_whose_gates_and_ups_alternate(kept: int) -> None:
    """With the second moments of these rows, and a loss that is half the squared distance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = InTurn().double()
        x = torch.randn(50, 6, dtype=torch.float64)
    units = dense.units(x).detach()
    weight = dense.down.weight.detach()
    one = SliceStatistics(weight, units.T @ units / len(x), torch.eye(5).double(), "x")
    found = made(one, kept)
    gm = fx.symbolic_trace(dense)
    gm = split(gm, *whole_sites(gm))
    turns = frozenset({"up"})
    new = {"down": found.weights["d"]}
    chosen = SelectedUnits("units", found.kept, WIDE, {"up": 2}, new, alternating=turns)
    result, _ = run(gm, [SelectUnits(selections=(chosen,))])
    with torch.no_grad():
        lost = 0.5 * float((result(x) - dense(x)).square().sum(-1).mean())
    assert lost == pytest.approx(found.lost, rel=1e-8, abs=1e-14)
    assert (lost == 0.0) == (kept == WIDE)
