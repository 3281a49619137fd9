"""Half precision where the processor has no instructions for it: float32 on what is stored."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from fxshare.base import placement
from fxshare.refining.float32 import is_wide
from fxshare.refining.options import RefineOptions
from fxshare.refining.parameters import trainable_of
from fxshare.refining.student import Student
from fxshare.verifying.evaluated import evaluated
from tests.refining.build import ids, refined, subject

HALF = (torch.float16, torch.bfloat16)


def student_of(dtype: torch.dtype, *, wide: bool = True) -> tuple[Any, Student]:
    model, gm = subject("llama-like", "shared", dtype=dtype)
    return gm, Student(gm, trainable_of(gm, model, ()), wide=wide)


@pytest.mark.parametrize("dtype", HALF)
def test_it_computes_in_float32_on_the_rounded_values(dtype: torch.dtype) -> None:
    gm, student = student_of(dtype)
    call = {"ids": ids()[0]}
    with torch.no_grad():
        torch.testing.assert_close(student(call), evaluated(gm, True)(**call))
    assert {p.dtype for p in student.module.parameters()} == {torch.float32}
    assert student.dtypes == {dtype}
    for name, master in student.masters.items():
        master.mul_(1 + 1e-3)
        assert not torch.equal(master, master.to(dtype).float())
        student.round()
        own = dict(student.module.named_parameters())[name]
        assert torch.equal(own, master.to(dtype).float())


def test_where_it_is_faster() -> None:
    options = RefineOptions(steps=1)
    gms = {dtype: student_of(dtype)[0] for dtype in (*HALF, torch.float32)}
    for fast in (False, True):
        with mock.patch.object(placement, "multiplies_bfloat16", return_value=fast):
            found = {dtype: is_wide(gm, options) for dtype, gm in gms.items()}
        assert found == {torch.float16: True, torch.bfloat16: not fast, torch.float32: False}
    for others in ({"objective": "blocks"}, {"shard": True}):
        assert not is_wide(gms[torch.float16], RefineOptions(steps=1, **others))


def test_what_is_stored_stays_in_half_precision() -> None:
    model, gm = subject("llama-like", "shared", dtype=torch.bfloat16)
    found = {}
    for fast in (False, True):
        with mock.patch.object(placement, "multiplies_bfloat16", return_value=fast):
            result = refined(gm, model, steps=6)
        assert {p.dtype for p in result.parameters()} == {torch.bfloat16}
        found[fast] = result.fxshare.refined[-1].after.objective
    assert found[False] != found[True]
    assert found[False] == pytest.approx(found[True], rel=0.05)
