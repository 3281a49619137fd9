"""Bits in the planner: widths compete under a budget in bytes, in factors and in dense weights."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fxshare
from fxshare.base.quantised import Quantised
from fxshare.compiling.replan import replan
from fxshare.errors import ConfigError, PlanError
from fxshare.factors.group import factorise_group
from fxshare.factors.rounding import lost_by, rounded, rounded_group
from fxshare.factors.spectra import Spectra
from fxshare.planning.kinds.basis import BasisOption, DenseOption, make_problem
from fxshare.planning.options import Options
from fxshare.planning.rounding_price import RoundingPrice
from fxshare.planning.solver.solve import solve
from fxshare.plans.storage import storage_named
from tests.compiling.test_bits import batches, model, outputs, stored_bytes
from tests.factors.test_rounding import correlated
from tests.factors.test_spectra import group
from tests.planning.build import node
from tests.strategies import no_warnings_of_ours


def slices_of_three() -> dict[str, Any]:
    return {f"h.{i}.w": correlated(i, out=20, width=24) for i in range(3)}


@functools.cache
def compiled(family: str, kept: float, bits: tuple[int, ...], kinds: str = "basis units") -> Any:
    original = model(family)
    config = {
        "budget": {"bytes_kept": kept},
        "planner": {"bits": list(bits), "kinds": kinds.split(), "remeasure": 0},
    }
    with no_warnings_of_ours():
        gm = fxshare.compile(
            original, [fxshare.init(original), config], calibration=batches(), seed=0
        )
    return original, gm


@pytest.mark.parametrize("kept", [0.5, 0.25])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plan_of_all_widths_and_kinds_keeps_its_budget_in_bytes(family: str, kept: float) -> None:
    original, gm = compiled(family, kept, (16, 8, 4))
    plan, report = gm.fxshare.plan, gm.fxshare.report
    assert plan.has_bits
    assert fxshare.verify(original, gm).ok
    assert report.bytes_kept <= kept
    assert plan.outlook.cost == sum(row.bytes_after for row in report.groups)
    assert plan.outlook.bound <= plan.outlook.predicted - plan.outlook.slope + 1e-12
    # counted from what is there: parameters of the matched linears and the kept inputs
    rest = sum(p.nbytes for n, p in original.named_parameters() if not _matched(plan, n))
    total = stored_bytes(gm) + sum(
        p.nbytes for p in gm.parameters() if not isinstance(p, Quantised)
    )
    assert total - rest <= kept * 4 * plan.dense_numbers


def _matched(plan: Any, name: str) -> bool:
    return any(name == f"{call}.weight" for site in plan.sites for call in site.calls)


def test_one_width_alone_goes_with_any_budget_and_rounds_everything() -> None:
    original = model("gpt2")
    config = {
        "budget": {"params_kept": 0.8},
        "planner": {"bits": [8], "search": "off", "kinds": ["basis", "units"]},
    }
    gm = fxshare.compile(original, [fxshare.init(original), config], calibration=batches())
    names = {f"{site.name}" for site in gm.fxshare.plan.sites}
    assert {row.bits for row in gm.fxshare.report.groups} == {8}
    assert gm.fxshare.report.params_kept <= 0.8
    assert names
    assert (outputs(gm) - outputs(original)).abs().max() > 0


def test_more_bytes_never_predict_a_larger_loss() -> None:
    slices = slices_of_three()
    problem, options = _problem(slices, (None, 8, 4))
    dense = sum(one.weight_OI.numel() for one in slices.values()) * options.element_size
    losses = [solve(problem, share * dense, strategy="auto").loss for share in (0.2, 0.3, 0.5, 0.8)]
    assert losses == sorted(losses, reverse=True)


def _nodes(slices: dict[str, Any]) -> dict[str, Any]:
    return {
        name: node(
            name,
            layer=at,
            in_features=one.weight_OI.shape[1],
            out_features=len(one.weight_OI),
            input=at,
        )
        for at, (name, one) in enumerate(slices.items())
    }


def _problem(slices: dict[str, Any], bits: tuple[Any, ...]) -> tuple[Any, Options]:
    options = Options(unit="bytes", element_size=2, bits=bits)
    spectra, nodes = Spectra(slices), _nodes(slices)
    rounding = RoundingPrice(spectra, nodes)
    return make_problem(nodes, spectra, options, rounding=rounding), options


@pytest.mark.parametrize("bits", [8, 4])
def test_slices_of_one_input_are_priced_together_as_each_by_itself(bits: int) -> None:
    whole = correlated(0, out=20, width=24)
    assert whole.moment_OO is not None
    parts = {"q": (0, 7), "k": (7, 8), "v": (8, 20)}
    slices = {
        name: replace(
            whole,
            weight_OI=whole.weight_OI[start:stop],
            moment_OO=whole.moment_OO[start:stop, start:stop],
        )
        for name, (start, stop) in parts.items()
    }
    slices["other"] = replace(correlated(5, out=6, width=24), input="y")
    price = RoundingPrice(Spectra(slices), _nodes(slices))
    for name, one in slices.items():
        alone = lost_by(one, rounded(one, bits).values())
        assert price.dense(frozenset({name}), bits) == pytest.approx(alone, rel=1e-9)


def test_the_choice_is_that_of_brute_force_over_ranks_storages_and_bits() -> None:
    slices = dict(list(slices_of_three().items())[:2])
    problem, _ = _problem(slices, (None, 8, 4))
    budget = 0.3 * sum(one.weight_OI.numel() for one in slices.values()) * 2
    found = solve(problem, budget, strategy="separate")
    curves = [problem.candidate(frozenset({name})).curve for name in slices]
    best = min(
        float(a.loss[i] + b.loss[j])
        for a, b in [curves]
        for i, j in itertools.product(range(len(a.cost)), range(len(b.cost)))
        if a.cost[i] + b.cost[j] <= budget
    )
    assert found.cost <= budget
    assert found.bound <= best + 1e-12
    assert best <= found.loss
    both = frozenset(slices)
    assert found.loss <= best + max(np.diff(np.sort(problem.candidate(both).curve.loss)).max(), 0)


def test_the_price_of_rounding_is_near_what_it_measures() -> None:
    slices = {"h.0.w": correlated(4, out=30, width=40)}
    spectra = Spectra(slices)
    price = RoundingPrice(spectra, _nodes(slices))
    one = slices["h.0.w"]
    part = frozenset(slices)
    for bits in (8, 4):
        dense = lost_by(one, rounded(one, bits).values())
        assert price.dense(part, bits) == pytest.approx(dense, rel=1e-9)
        for name in ("plain", "pivoted"):
            ranks = np.arange(1, 29)
            found = price.factors(part, storage_named(name), bits, ranks)
            assert (found >= 0).all()
            plain = factorise_group(group(slices, 12, name), spectra)
            added = rounded_group(plain, bits).lost - plain.lost
            assert added / 4 < found[11] < 4 * added


def test_what_every_option_stands_for() -> None:
    slices = {"h.0.w": correlated(4, out=30, width=40)}
    problem, _ = _problem(slices, (8, 4))
    curve = problem.candidate(frozenset(slices)).curve
    kinds = [type(curve.meaning(at)) for at in range(len(curve.label))]
    assert set(kinds) == {BasisOption, DenseOption}  # nothing is left as it is
    assert {curve.meaning(at).bits for at in range(len(curve.label))} == {8, 4}  # type: ignore[attr-defined]
    by_bits = {
        bits: [at for at in range(len(kinds)) if curve.meaning(at) == DenseOption(bits)]
        for bits in (8, 4)
    }
    assert [curve.cost[at[0]] for at in by_bits.values()] == [30 * 40 + 60, 30 * 20 + 30 * 2 * 2]
    again, _ = _problem(slices, (None,))
    assert again.candidate(frozenset(slices)).curve.meaning(-1) is None


@pytest.mark.parametrize(
    ("planner", "budget", "reason"),
    [
        ({"bits": [16, 3]}, {"bytes_kept": 0.5}, "expected a list of one or more of 16, 8 and 4"),
        ({"bits": []}, {"bytes_kept": 0.5}, "expected a list of one or more of 16, 8 and 4"),
        ({"bits": [8, 8]}, {"bytes_kept": 0.5}, "each once"),
        ({"bits": 8}, {"bytes_kept": 0.5}, "expected a list"),
        ({"bits": [16, 8]}, {"params_kept": 0.5}, "compete under a budget in bytes"),
        ({"bits": [8], "search": "refined"}, {"bytes_kept": 0.5}, "codes cannot be refined"),
        ({}, {"bytes_kept": 0.5, "params_kept": 0.5}, "expected one limit of params_kept"),
        ({}, {"bytes_kept": 50}, "above 0 and at most 1"),
        ({}, {"max_bytes": "many"}, "bytes, as a whole number above 0 or with a unit"),
    ],
)
def test_wrong_bits_and_budgets_are_refused(planner: Any, budget: Any, reason: str) -> None:
    original = model("gpt2")
    config = {"budget": budget, "planner": planner}
    with pytest.raises(ConfigError, match=reason):
        fxshare.compile(original, [fxshare.init(original), config], calibration=batches())


def test_a_budget_below_the_floor_names_the_least() -> None:
    original = model("gpt2")
    config = {
        "budget": {"bytes_kept": 0.01},
        "planner": {"bits": [16, 8, 4], "search": "off", "floor": 0.1},
    }
    least = r"below the cheapest plan, [\d,]+; .*\(budgets are in bytes\)$"
    with pytest.raises(PlanError, match=least):
        fxshare.compile(original, [fxshare.init(original), config], calibration=batches())


def test_another_budget_in_bytes_without_the_model(tmp_path: Path) -> None:
    original = model("gpt2")
    named = {"fc": {"pattern": r".*c_fc$"}, "out": {"pattern": r".*mlp\.c_proj$"}}
    types = {"weight_types": named, "block_pattern": r"h\.(\d+)"}

    def config(kept: float) -> list[Any]:
        planner = {"bits": [16, 8, 4], "kinds": ["basis", "units"], "search": "off"}
        return [types, {"budget": {"bytes_kept": kept}, "planner": planner}]

    def chosen(plan: Any) -> Any:
        return plan.groups, plan.units, plan.rounded

    made = fxshare.plan(original, config(0.25), calibration=batches(), work=tmp_path)
    assert chosen(replan(tmp_path).plan) == chosen(made)
    found = replan(tmp_path, overrides=["budget.bytes_kept=0.1"]).plan
    fresh = fxshare.plan(original, config(0.1), calibration=batches())
    assert found.has_bits
    assert chosen(found) == chosen(fresh) != chosen(made)
    assert found.outlook is not None
    assert found.outlook.cost <= found.outlook.budget
    # what was not measured then is not made up
    for one in (tmp_path / "spectra").glob("*.rounding"):
        one.unlink()
    with pytest.raises(PlanError, match="what rounding loses was not measured in"):
        replan(tmp_path)
    plain = replan(tmp_path, overrides=["planner.bits=[16]", "budget.bytes_kept=0.7"]).plan
    assert plain.units
    assert not plain.has_bits


def test_a_limit_of_bytes_has_units() -> None:
    config = fxshare.load_config([fxshare.init(model("gpt2")), {"budget": {"max_bytes": "350MB"}}])
    assert config.budget.max_bytes == 350_000_000
