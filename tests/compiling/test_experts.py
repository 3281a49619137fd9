"""Stacks of experts from matching to a saved folder, whichever way a model multiplies by them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshare
from fxshare import FxShareWarning, Plan
from fxshare.compiling.replan import replan
from fxshare.compiling.stages import prepare
from fxshare.config import load_config
from fxshare.errors import PlanError
from fxshare.plans.units import units_of
from fxshare.result.products import slices_of
from fxshare.sites.match import match
from fxshare.sites.mlps import mlps
from fxshare.sites.tensors import site_tensors
from fxshare.verifying.multiplied import multiplied_out
from tests.strategies import no_warnings_of_ours

E, WIDTH, INNER = 3, 8, 12
TYPES = {"up": {"pattern": r".*\.up$", "split": "gate_up"}, "down": {"pattern": r".*\.down$"}}
WHOLE = {"up": {"pattern": r".*\.up$"}, "down": TYPES["down"]}
CONFIG = {"weight_types": TYPES, "block_pattern": r"layers\.(\d+)"}
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "sharing": {"group_size": 2, "compression_rate": 0.5},
    "budget": {"budget": {"params_kept": 0.7}, "planner": {"search": "off"}},
}
Multiply = Callable[[Tensor, Tensor], Tensor]


def _one_by_one(x: Tensor, w: Tensor) -> Tensor:
    return torch.stack([F.linear(x[e], w[e]) for e in range(E)])


def _runs(x: Tensor, w: Tensor) -> Tensor:
    rows = x.shape[1]
    ends = torch.tensor([rows * (e + 1) for e in range(E)], dtype=torch.int32)
    y = F.grouped_mm(x.flatten(0, 1), w.transpose(1, 2), offs=ends)
    return y.unflatten(0, (E, -1))


# how, and whether a stack is (experts, in, out)
HOW: dict[str, tuple[Multiply, bool]] = {
    "all at once": (torch.bmm, True),
    "einsum": (lambda x, w: torch.einsum("eti,eoi->eto", x, w), False),
    "one by one": (_one_by_one, False),
    "runs": (_runs, False),
    "in halves": (lambda x, w: torch.cat([x @ part for part in w.chunk(2, -1)], -1), True),
}


class Layer(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.in_turn = how == "in turn"
        self.multiply, columns = HOW["all at once" if self.in_turn else how]
        shapes = ((E, 2 * INNER, WIDTH), (E, WIDTH, INNER))
        self.up, self.down = (
            nn.Parameter((torch.randn(s).mT if columns else torch.randn(s)).contiguous() / 3)
            for s in shapes
        )
        self.router = nn.Linear(WIDTH, E)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = self.router(rows).sigmoid().t().unsqueeze(-1)  # (E, rows, 1)
        y = self.multiply(rows * chosen, self.up)
        gate, up = (y[..., ::2], y[..., 1::2]) if self.in_turn else y.chunk(2, dim=-1)
        return x + self.multiply(F.silu(gate) * up, self.down).sum(0).view(x.shape)


class Mixture(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(how) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, WIDTH, generator=generator) for _ in range(4)]


def _compiled(model: nn.Module, mode: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        return fxshare.compile(model, [CONFIG, MODES[mode]], calibration=_data())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", HOW)
def test_experts_are_compressed_saved_and_lowered(how: str, mode: str, tmp_path: Path) -> None:
    model = Mixture(how).eval()
    gm = _compiled(model, mode)
    plan = gm.fxshare.plan
    assert (len(plan.sites), plan.skipped, gm.fxshare.report.warnings) == (2 * 2 * E, (), ())
    shapes = {(s.type, s.in_features, s.out_features, len(s.slices)) for s in plan.sites}
    assert shapes == {("up", WIDTH, 2 * INNER, 2), ("down", INNER, WIDTH, 1)}
    x = _data()[0]
    if mode == "exact":
        torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)
    else:
        assert gm.fxshare.report.params_kept <= 0.71
        assert all(s.out_features for g in plan.groups for s in plan.sites if s.name in g.slices)
    fxshare.save(gm, tmp_path / "saved")
    loaded = fxshare.load(tmp_path / "saved", model=Mixture(how).eval())
    torch.testing.assert_close(loaded(x), gm(x), rtol=0, atol=0)
    torch.testing.assert_close(fxshare.lower(gm)(x), gm(x), rtol=1e-5, atol=1e-5)


UNITS = {"budget": {"params_kept": 0.7}, "planner": {"search": "off", "kinds": ["units"]}}


@pytest.mark.parametrize("how", ["all at once", "einsum", "one by one"])
def test_every_expert_keeps_a_number_of_units_of_its_own(how: str, tmp_path: Path) -> None:
    model = Mixture(how).eval()
    with no_warnings_of_ours():
        gm = fxshare.compile(model, [CONFIG, UNITS], calibration=_data())
    entries = gm.fxshare.plan.units
    assert {one.consumer.rpartition(".")[0] for one in entries} <= {
        "layers.0.down",
        "layers.1.down",
    }
    assert len({one.kept for one in entries}) > 1
    assert gm.fxshare.report.params_kept <= 0.7
    x = _data()[0]
    expected = multiplied_out(model, gm)(x)
    torch.testing.assert_close(gm(x), expected, rtol=1e-5, atol=1e-5)
    assert (expected - model(x)).abs().max() > 1e-3
    assert fxshare.verify(model, gm, _data()[:1]).ok
    fxshare.save(gm, tmp_path / "saved")
    loaded = fxshare.load(tmp_path / "saved", model=Mixture(how).eval())
    torch.testing.assert_close(loaded(x), gm(x), rtol=0, atol=0)
    torch.testing.assert_close(fxshare.lower(gm)(x), gm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("front_end", "bits"), [("fx", 8), ("export", None)])
def test_gates_and_ups_in_turn_go_in_pairs(
    front_end: str, bits: int | None, tmp_path: Path
) -> None:
    """As GPT-OSS has them, row by row; saved, in few bits, and planned again from a work folder."""
    model, config = Mixture("in turn").eval(), {**CONFIG, "weight_types": WHOLE}
    own = {"capture": front_end, **({"planner": {"bits": [bits]}} if bits else {})}
    with no_warnings_of_ours():
        gm = fxshare.compile(
            model, [config, UNITS, own], calibration=_data(), work=tmp_path / "work"
        )
    plan = gm.fxshare.plan
    assert plan.units
    assert all(one.alternating == one.producers for one in plan.units)
    assert all(one.bits == bits for one in plan.units)
    assert Plan.from_json(plan.to_json()) == plan
    assert replan(tmp_path / "work").plan.units == plan.units
    pairs = [units for x in slices_of(gm).values() if (units := x.unit_rows) is not None]
    assert {(units.parts, units.each) for units in pairs} == {(1, 2)}
    x = _data()[0]
    whole = multiplied_out(model, gm)
    for ours, theirs in zip(whole.layers, model.layers, strict=True):
        there = ours.up.abs().sum(1, keepdim=True) > 0
        # rows that stay are what they were, up to the rounding of codes
        gap = (ours.up - theirs.up * there).norm() / theirs.up.norm()
        assert gap <= (0.02 if bits else 0.0)
        assert torch.equal(there[..., ::2], there[..., 1::2])
        assert not there.all()
    expected = whole(x)
    torch.testing.assert_close(gm(x), expected, rtol=1e-5, atol=1e-5)
    assert (expected - model(x)).abs().max() > 1e-3
    assert fxshare.verify(model, gm, _data()[:1]).ok
    fxshare.save(gm, tmp_path / "saved")
    loaded = fxshare.load(tmp_path / "saved", model=Mixture("in turn").eval())
    assert torch.equal(loaded(x), gm(x))
    torch.testing.assert_close(fxshare.lower(gm)(x), gm(x), rtol=1e-5, atol=1e-5)


def test_a_plan_that_says_otherwise_in_which_order_rows_are_is_refused() -> None:
    model, config = Mixture("in turn").eval(), {**CONFIG, "weight_types": WHOLE}
    stages = prepare(model, load_config(config), _data(), None, None)
    one = mlps(stages.captured.graph, stages.sites).found[0]
    (producer,) = one.producers
    entry = units_of(one.producers, one.consumer, kept=5)
    plan = Plan(mode="planned", sites=stages.sites, units=(entry,))
    assert "alternating" not in plan.to_json()
    with pytest.raises(PlanError, match=r"in turn, found the alternating \[\]"):
        fxshare.compile(model, config, calibration=_data(), plan=plan)
    elsewhere = entry.model_copy(update={"alternating": (one.consumer.name,)})
    known = {site.name: site for site in stages.sites}
    assert "is none of its producers" in str(elsewhere.fault(known))
    # in halves a slice would have some of the units of each expert
    stages = prepare(model, load_config(CONFIG), _data(), None, None)
    found = mlps(stages.captured.graph, stages.sites)
    assert not found.found
    assert "in turn, which is split into 2 slices" in found.reasons[one.consumer.name]
    known = {site.name: site for site in stages.sites}
    alternating = units_of([producer], one.consumer, kept=5, alternating=[producer.name])
    assert "alternate, and it is split" in str(alternating.fault(known))


def test_experts_that_are_put_together_otherwise_keep_their_units_and_it_says_why() -> None:
    model = Mixture("in halves").eval()
    stages = prepare(model, load_config(CONFIG), _data(), None, None)
    found = mlps(stages.captured.graph, stages.sites)
    assert not found.found
    assert "'cat_2' (call_function) comes before it" in found.reasons["layers.1.down.2"]


def test_a_square_stack_is_told_by_the_graph_alone() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(E, WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x[None].expand(E, -1, -1), self.up)

    model = Square().eval()
    config = {"weight_types": {"up": {"pattern": "up$"}}}
    gm = fxshare.compile(model, config, example=torch.randn(5, WIDTH))
    site = gm.fxshare.plan.sites[1]
    assert site.transposed
    weight_OI, _ = site_tensors(model, site)
    torch.testing.assert_close(weight_OI, model.up[1].t())
    assert not match(model, fxshare.config.load_config(config)).sites[1].transposed


def test_a_large_dense_share_is_said_first() -> None:
    class Scaled(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.down.sum()

    class Experts(Mixture):
        def __init__(self) -> None:
            super().__init__("all at once")
            self.layers = nn.ModuleList(Scaled("all at once") for _ in range(2))

    gm = _compiled(Experts().eval(), "exact")
    (said,) = gm.fxshare.report.warnings
    assert said.startswith("35% of the weights that could be rewritten stay dense: layers.0.down")
    assert " and 1 more (32%: its stack is not read as one linear for each matrix" in said
    assert "layers.0.router and 1 more (3%: no pattern matches it)" in said
    assert str(gm.fxshare.report).splitlines()[0] == f"warning: {said}"
    assert fxshare.result.report.Report.from_dict(gm.fxshare.report.to_dict()).warnings == (said,)
