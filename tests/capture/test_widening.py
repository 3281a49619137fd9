"""A half-precision module that is widened computes what its float32 copy does, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxshare.base.numerics import float_leaves
from fxshare.capture.widening import Widened, free, stored_of, widen
from fxshare.proposing.propose import init
from fxshare.sites.match import match
from fxshare.sites.tensors import dense_weights, substitute
from passes.graph.graph import structure_copy
from tests.toys import TOYS, Toy
from tests.zoo.families import family

HALF = (torch.bfloat16, torch.float16)


def widened(model: nn.Module) -> nn.Module:
    copy = structure_copy(model)
    widen(copy)
    return copy


def values(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
    with torch.no_grad():
        return list(float_leaves(model(*inputs)))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_the_numbers_are_those_of_a_float32_copy(toy: Toy, dtype: torch.dtype) -> None:
    model = toy.model(dtype=dtype)
    inputs = toy.inputs()
    expected = values(structure_copy(model, clone_parameters=True).float(), inputs)
    found = values(widened(model), inputs)
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, left), (_, right) in zip(expected, found, strict=True):
        assert torch.equal(left, right)
        assert type(right) is Tensor
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_matrices_are_read_and_not_copied(toy: Toy) -> None:
    model = toy.model(dtype=torch.bfloat16)
    copy = widened(model)
    own = {p.data_ptr() for p in model.parameters()}
    for name, parameter in copy.named_parameters(remove_duplicate=False):
        assert isinstance(parameter, nn.Parameter)
        assert parameter.dtype == torch.float32
        assert isinstance(parameter, Widened) == (parameter.ndim > 1), name
        if isinstance(parameter, Widened):
            assert parameter._stored.data_ptr() in own
    ties = [
        len({id(p) for _, p in m.named_parameters(remove_duplicate=False)}) for m in (model, copy)
    ]
    assert ties[0] == ties[1]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_other_weights_take_what_the_models_own_do(name: str) -> None:
    """A candidate of a search is as large as the model, and no larger."""
    one = family(name)
    model = one.model().bfloat16()
    sites = match(model, init(model)).sites
    ids = (torch.arange(10).view(2, 5),)
    own = dense_weights(model, sites)
    new = {name: (2 * weight.float() + 1e-4).clone() for name, weight in own.items()}
    rounded = structure_copy(model, clone_parameters=True)
    wide = widened(model)
    before = {id(p) for p in wide.parameters()}
    for copy in (rounded, wide):
        substitute(copy, sites, new, {}, as_kept=True)
    made = [p for p in wide.parameters() if id(p) not in before]
    assert made
    assert all(isinstance(p, Widened) and p._stored.dtype == torch.bfloat16 for p in made)
    expected = values(rounded.float(), ids)
    for (_, left), (_, right) in zip(expected, values(wide, ids), strict=True):
        assert torch.equal(left, right)
    for parameter in made:
        free(parameter)
        assert not stored_of(parameter).numel()
    assert all(torch.equal(weight, own[n]) for n, weight in dense_weights(model, sites).items())


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: x @ w,
        lambda w, x: torch.addmm(x.new_zeros(6), x, w),
        lambda w, x: torch.einsum("bi,io->bo", x, w[:, 1:4]),
        lambda w, x: nn.functional.linear(x, w.t().contiguous()),
        lambda w, x: x.to(w.dtype) @ w.detach().clone(),
        lambda w, x: nn.functional.embedding(torch.tensor([[0, 3], [2, 2]]), w, padding_idx=2),
        lambda w, x: torch.stack([w, w]).sum(0) + w.new_ones(()),
        lambda w, x: w.to(x) * 2,
    ],
)
def test_every_way_to_read_a_weight(use: Any) -> None:
    stored = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    found = use(Widened(stored), x)
    assert type(found) is Tensor
    assert torch.equal(found, use(stored.float(), x))


@pytest.mark.parametrize("fused", [True, False])
def test_a_backward_pass_keeps_no_float32_copy_of_a_weight(fused: bool) -> None:
    """Half precision would take three times as much while statistics are gathered."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64, bias=fused), nn.GELU(), nn.Linear(64, 16)).bfloat16()
    wide = widened(model)
    kept: list[Tensor] = []

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    x = torch.randn(3, 5, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        wide(x).square().sum().backward()
    weights = [p for p in model.parameters() if p.ndim > 1]
    large = [t for t in kept if t.numel() in {w.numel() for w in weights}]
    assert len(large) == len(weights)
    own = {w.untyped_storage().data_ptr() for w in weights}
    assert {stored_of(t).untyped_storage().data_ptr() for t in large} == own
    # and the gradient is that of a float32 copy
    other = x.detach().requires_grad_()
    structure_copy(model, clone_parameters=True).float()(other).square().sum().backward()
    assert x.grad is not None
    assert other.grad is not None
    assert torch.equal(x.grad, other.grad)
