"""Next-token losses a few rows at a time, beside ``F.cross_entropy`` of all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxshare.calibration import cross_entropy
from fxshare.calibration.cross_entropy import next_token_losses


def published(logits: Tensor, targets: Tensor) -> Tensor:
    predictions = logits[:, :-1].flatten(0, 1)
    predictions = predictions.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(predictions, targets.flatten(), reduction="none").view(targets.shape)


def both(
    dtype: torch.dtype, samples: int = 3, length: int = 7, vocabulary: int = 11
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    logits = 20 * torch.randn(samples, length, vocabulary, generator=generator).to(dtype)
    targets = torch.randint(0, vocabulary, (samples, length - 1), generator=generator)
    targets[0, 2] = -100
    weights = torch.randn(samples, length - 1, generator=generator).to(dtype)
    return logits, targets, weights


# rows at a time: all, a sample, three positions, one
@pytest.mark.parametrize("most", [1 << 20, 77, 33, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_all_at_once(
    dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_MOST", most)
    logits, targets, weights = both(dtype)
    found = []
    for of in (next_token_losses, published):
        leaf = logits.clone().requires_grad_()
        losses = of(leaf, targets)
        (gradient,) = torch.autograd.grad((losses * weights).sum(), leaf)
        found.append((losses.detach(), gradient))
    (losses, gradient), (expected, expected_gradient) = found
    wide = torch.promote_types(dtype, torch.float32)
    assert (losses.dtype, gradient.dtype) == (wide, dtype)
    eps = torch.finfo(wide).eps
    assert float((losses - expected).abs().max()) <= 8 * eps * float(logits.abs().max())
    gap = (gradient - expected_gradient).double().abs().max()
    assert float(gap) <= 16 * torch.finfo(dtype).eps * float(weights.abs().max())
    assert losses[0, 2] == 0
    assert bool((gradient[:, -1] == 0).all())
    # the comparison can fail
    shifted = next_token_losses(logits, (targets + 1).clamp(min=0) % 11)
    assert float((shifted - expected).abs().max()) > 1


@pytest.mark.parametrize("head", ["product", "biased", "tanh", "leaf"])
def test_the_last_reader_of_a_product_leaves_its_gradient_there(head: str) -> None:
    _, targets, weights = both(torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 7, 5, generator=generator).requires_grad_()
    w = torch.randn(11, 5, generator=generator)
    gradients, kept = [], []
    for last in (False, True):
        logits = F.linear(x, w, torch.ones(11) if head == "biased" else None)
        if head == "tanh":
            logits = logits.tanh()
        elif head == "leaf":
            logits = logits.detach().requires_grad_()
        before = logits.detach().clone()
        losses = next_token_losses(logits, targets, last_reader=last)
        read = logits if head == "leaf" else x
        gradients += torch.autograd.grad((losses * weights).sum(), read)
        kept.append(torch.equal(logits, before))
    assert torch.equal(*gradients)
    # tanh computes its gradient from its result, and a leaf is the caller's
    assert kept == [True, head in ("tanh", "leaf")]


def test_logits_that_are_a_view_are_read_as_one() -> None:
    logits, targets, _ = both(torch.float32)
    wide = torch.zeros(3, 7, 22)
    wide[..., ::2] = logits
    torch.testing.assert_close(
        next_token_losses(wide[..., ::2], targets), next_token_losses(logits, targets)
    )


def test_a_target_that_is_no_token_is_refused() -> None:
    logits, targets, _ = both(torch.float32)
    with pytest.raises(RuntimeError, match="out of bounds"):
        next_token_losses(logits, targets.clamp(min=11))
