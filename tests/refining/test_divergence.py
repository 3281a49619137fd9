"""The divergence a few rows at a time is what torch computes on all of them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxshare.refining import divergence
from fxshare.refining.divergence import distribution, divergence_of


def made(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    own, wanted = 3 * torch.randn(2, 7, 11, generator=generator, dtype=torch.float64).to(dtype)
    return own.requires_grad_(), wanted


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("numbers", [1, 30, 1 << 22])
def test_value_and_gradient_are_those_of_torch(temperature: float, numbers: int) -> None:
    own, wanted = made()
    log_p = distribution(wanted, temperature)
    log_q = distribution(own, temperature)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    (slope,) = torch.autograd.grad(3 * expected, own)
    with mock.patch.object(divergence, "_NUMBERS", numbers):
        found = divergence_of(own, log_p, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(3 * found, own)[0], slope, rtol=0, atol=1e-12)


def test_what_is_impossible_for_the_teacher_costs_nothing_of_its_own() -> None:
    own, wanted = made()
    wanted[:, 0] = -torch.inf
    found = divergence_of(own, distribution(wanted, 1.0), 1.0)
    assert bool(found.isfinite())
    (slope,) = torch.autograd.grad(found, own)
    torch.testing.assert_close(slope[:, 0], own.softmax(-1)[:, 0].detach())


def test_half_precision_is_summed_in_float32_and_its_gradient_is_in_its_own() -> None:
    own, wanted = made(torch.bfloat16)
    found = divergence_of(own, distribution(wanted, 1.0), 1.0)
    assert found.dtype == torch.float32
    (slope,) = torch.autograd.grad(found, own)
    assert slope.dtype == torch.bfloat16
    exact = own.detach().double().softmax(-1) - wanted.double().softmax(-1)
    torch.testing.assert_close(slope.double(), exact, rtol=2**-8, atol=2**-8)


def test_nothing_is_kept_where_there_is_no_gradient() -> None:
    own, wanted = made()
    with torch.no_grad():
        found = divergence_of(own, distribution(wanted, 1.0), 1.0)
    assert not found.requires_grad
