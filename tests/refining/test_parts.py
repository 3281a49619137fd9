"""Gradients, balancing, losses that are not finite, interruptions, learning rates."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.errors import FxShareWarning, RefineError
from fxshare.refining.balance import balance, balanced
from fxshare.refining.batches import divided
from fxshare.refining.measure import Teacher
from fxshare.refining.objectives import ToLogits
from fxshare.refining.optimiser import Optimiser
from fxshare.refining.options import RefineOptions
from fxshare.refining.parameters import trainable_of
from fxshare.refining.rate import DEFAULT, RATES
from fxshare.refining.steps import Stepper
from fxshare.refining.student import Student
from fxshare.refining.train import rate_at
from fxshare.result.products import slices_of
from fxshare.sites.tensors import site_tensors
from fxshare.verifying.multiplied import multiplied_out
from passes.graph.slices import basis_of, rows_of
from tests.refining.build import equal, everything, features, ids, refined, subject, usual

EXACT = torch.float64


def student_of(how: Any, capture: str = "auto") -> tuple[Any, Any, Student]:
    model, gm = subject("llama-like", how, dtype=EXACT, capture=capture)
    return model, gm, Student(gm, trainable_of(gm, model, ()))


def loss_of(module: Any, teacher: Any, batch: Tensor) -> Tensor:
    objective = ToLogits()
    with torch.no_grad():
        targets = objective.targets(teacher(batch), {})
    return objective.loss(module(batch), targets, {}, batch).mean


@pytest.mark.parametrize("how", ["shared", "planned"])
@pytest.mark.parametrize("capture", ["auto", "modules"])
def test_gradients_are_finite_differences(how: Any, capture: str) -> None:
    model, _, student = student_of(how, capture)
    batch = ids(1)[0]
    student.backward(loss_of(student.module, model, batch))
    gradients = student.gradients()
    generator = torch.Generator().manual_seed(0)
    step = 1e-5
    for name, master in student.masters.items():
        direction = torch.randn(master.shape, generator=generator, dtype=EXACT)
        slope = float((gradients[name] * direction).sum())
        start = master.clone()
        found = []
        for sign in (1, -1):
            master.copy_(start + sign * step * direction)
            with torch.no_grad():
                found.append(float(loss_of(student.module, model, batch)))
        master.copy_(start)
        size = max(abs(slope), 1e-6)
        # the third derivative times the step squared, and what rounding leaves of the difference
        assert abs((found[0] - found[1]) / (2 * step) - slope) <= 1e-5 * size + 1e-10, name


def test_the_gradient_of_a_shared_basis_is_the_sum_over_its_readers() -> None:
    model, gm, student = student_of("shared")
    batch = ids(1)[0]
    student.backward(loss_of(student.module, model, batch))
    gradients = student.gradients()
    dense = multiplied_out(model, gm)
    for parameter in dense.parameters():
        parameter.requires_grad_(True)
    loss_of(dense, model, batch).backward()
    summed: dict[str, Tensor] = {}
    readers: dict[str, int] = {}
    for site in gm.fxshare.plan.sites:
        weight_OI, _ = site_tensors(dense, site)
        owner = dense.get_submodule(site.name).weight
        assert owner.grad is not None
        assert owner.shape == weight_OI.shape
        for s in site.slices:
            place = slices_of(gm)[s.name]
            if place.basis is None:
                continue
            coefficient = rows_of(gm, place, gm.get_submodule(place.module).weight.detach())
            own = coefficient.T @ owner.grad[s.start : s.stop]
            name = f"{place.basis}.weight"
            summed[name] = summed.get(name, torch.zeros_like(own)) + own
            readers[name] = readers.get(name, 0) + 1
            assert basis_of(gm, place).shape == own.shape
    assert max(readers.values()) > 1
    for name, expected in summed.items():
        assert worst(expected, gradients[name]).relative <= tolerance(EXACT, 200), name


@settings(max_examples=20, deadline=None)
@given(
    outputs=st.integers(1, 9), inputs=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0)
)
def test_balancing_changes_no_product(outputs: int, inputs: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    coefficient = 1e3 * torch.randn(outputs, rank, generator=generator)
    basis = 1e-3 * torch.randn(rank, inputs, generator=generator)
    left, right = balanced(coefficient, basis)
    product = coefficient.double() @ basis.double()
    assert worst(product, left @ right).relative <= tolerance(EXACT, rank + 4)
    if rank <= min(outputs, inputs):
        gap = (left.T @ left - right @ right.T).norm() / left.norm() ** 2
        assert float(gap) <= tolerance(EXACT, rank + 4)


def test_balancing_changes_no_output_and_leaves_pivots() -> None:
    for how in ("shared", "planned"):
        model, gm, student = student_of(how)
        batch = ids(1)[0]
        before = everything(student.module)
        with torch.no_grad():
            expected = student.module(batch)
            balance(student.trainable.groups, student.masters)
            found = student.module(batch)
        assert worst(expected, found).relative <= tolerance(EXACT, 2 * len(gm.fxshare.plan.sites))
        after = everything(student.module)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        plain = {g.basis for g in student.trainable.groups if not g.pivoted}
        pivoted = [g for g in student.trainable.groups if g.pivoted]
        assert plain <= moved
        assert not moved & {n for g in pivoted for n in (g.basis, *g.coefficients)}
        assert bool(plain) == (how == "shared")
        del model


def test_the_order_of_batches_is_by_epochs() -> None:
    data = divided(list(ids(20)), None, None, seed=3)
    assert (len(data.fit), len(data.held_out)) == (18, 2)
    assert not {id(b) for b in data.fit} & {id(b) for b in data.held_out}
    first, second = ([data.at(n) for n in range(e * 18, e * 18 + 18)] for e in range(2))
    assert sorted(first) == sorted(second) == list(range(18))
    assert first != second
    assert data.at(5) == first[5]  # whatever was asked for before
    other = divided(list(ids(20)), None, None, seed=4)
    assert [other.at(n) for n in range(18)] != first


def test_the_rate_warms_up_and_falls() -> None:
    options = RefineOptions(steps=100)
    rates = [rate_at(step, step / 100, 1.0, options) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert rates.index(max(rates)) == 9
    assert rates[99] < 1e-3


def test_rates_are_tried_from_one_start_and_the_state_is_back() -> None:
    model, gm = subject("branches", "shared")
    done = refined(gm, model, features(), steps=200, learning_rate=None).fxshare.refined[-1]
    assert done.learning_rate in RATES
    assert done.after.objective < done.before.objective
    few = refined(gm, model, features(), steps=8, learning_rate=None).fxshare.refined[-1]
    assert few.learning_rate == DEFAULT


def test_a_limit_of_time_is_kept() -> None:
    model, gm = usual()
    done = refined(gm, model, steps=None, minutes=0.02, learning_rate=None).fxshare.refined[-1]
    assert done.seconds < 3.0  # a step, a measurement and the record come on top
    assert done.stopped in ("done", "rising")
    assert done.steps > 0
    both = refined(gm, model, steps=3, minutes=10).fxshare.refined[-1]
    assert both.steps == 3


# not finite -----------------------------------------------------------------------------------


def floats(*bad: int, count: int = 6) -> list[Tensor]:
    made = features(count)
    for number in bad:
        made[number][0, 0, 0] = math.nan
    return made


def test_a_batch_that_is_not_finite_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    model, gm = subject("branches", "shared")
    with caplog.at_level(logging.INFO, "fxshare"):
        result = refined(gm, model, floats(2), heldout=features(2, seed=5))
    done = result.fxshare.refined[-1]
    assert (done.steps, done.dropped) == (12, 2)
    assert done.after.objective < done.before.objective
    assert "batch 2 is not finite" in caplog.text
    assert all(bool(t.isfinite().all()) for t in everything(result).values())


def test_data_that_is_not_finite_names_the_batch() -> None:
    model, gm = subject("branches", "shared")
    before = everything(gm)
    with pytest.raises(RefineError, match=r"loss on batch [0-5].*not finite, 3 steps in a row"):
        refined(gm, model, floats(*range(6)), heldout=features(2))
    with pytest.raises(RefineError, match="held-out batch 1, is not finite"):
        refined(gm, model, features(3), heldout=floats(1, count=2))
    assert equal(before, everything(gm))


def test_where_it_goes_on_the_best_state_is_returned() -> None:
    model, gm = usual()
    calls = []

    def loss(output: Any, batch: Tensor) -> Tensor:
        found = output.logits.pow(2).sum()
        if not torch.is_grad_enabled():
            return found
        calls.append(0)
        return found * (math.nan if len(calls) > 10 else 1.0)

    with pytest.warns(FxShareWarning, match=r"batch \d.*the best state, of step 12, is returned"):
        result = refined(gm, model, loss=loss, steps=20)
    done = result.fxshare.refined[-1]
    assert (done.stopped, done.kept, done.steps, done.dropped) == ("not finite", 12, 13, 3)
    assert done.after.objective < done.before.objective
    assert fxshare.verify(model, result).ok


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    model, gm, student = student_of("shared")
    batches = divided(ids(2), ids(1), None, seed=0)
    options = RefineOptions(steps=1)
    stepper = Stepper(student, Teacher(model, ToLogits()), batches, _caller(gm, model), options)
    optimiser = Optimiser(student, student.scales(), "adamw")
    before = student.state()
    name = next(iter(before))
    gradients = {n: torch.ones_like(t) for n, t in before.items()}
    gradients[name][0, 0] = math.inf
    assert not optimiser.step(gradients, 1.0)
    assert equal(before, student.state())
    assert stepper(optimiser, 0, 1e-3).bad is None
    assert not equal(before, student.state())


def _caller(gm: Any, model: Any) -> Any:
    return gm.fxshare.caller(model)


# interrupted ----------------------------------------------------------------------------------


def interrupting(at: int) -> Any:
    calls = []

    def loss(output: Any, batch: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == at:
            raise KeyboardInterrupt
        found: Tensor = output.logits.pow(2).sum()
        return found

    return loss


def test_an_interruption_returns_the_best_so_far() -> None:
    model, gm = usual()
    before = everything(gm)
    result = refined(gm, model, loss=interrupting(14), steps=40)
    done = result.fxshare.refined[-1]
    assert done.stopped == "interrupted"
    assert 0 < done.kept <= done.steps < 20
    assert done.after.objective < done.before.objective
    assert fxshare.verify(model, result).ok
    assert equal(before, everything(gm))
    early = refined(gm, model, loss=interrupting(3), steps=40)
    assert early.fxshare.refined[-1].kept == 0
    assert equal(before, everything(early))


def test_an_interruption_before_anything_was_measured_is_one() -> None:
    model, gm = usual()
    with pytest.raises(KeyboardInterrupt):
        refined(gm, model, loss=interrupting(1))
