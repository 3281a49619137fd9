"""ShareBasis: one module and one key per basis, and its reasons for refusing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from passes import (
    CleanUp,
    RequiresError,
    ShapeError,
    ShareBasis,
    SharedGroup,
    SplitLinear,
    equal_outputs,
    run,
    slice_weight,
    slices,
)
from tests.passes.build import (
    Three,
    captured,
    exact_factors,
    groups,
    inputs,
    shared_on_one_basis,
    sites,
    split,
    whole_sites,
    x_of,
)
from tests.toys import GPT2, LLAMA_LIKE, NANOGPT, TIED_MLP, Toy


@pytest.mark.parametrize("toy", [NANOGPT, LLAMA_LIKE, GPT2, TIED_MLP], ids=lambda t: t.name)
def test_a_basis_is_one_module_with_one_key(toy: Toy) -> None:
    first = split(captured(toy), *sites(toy, captured(toy)))
    factors = groups(first)
    result, _ = run(first, [ShareBasis(groups=factors)])
    names = [name for name, _ in result.named_modules(remove_duplicate=False)]
    keys = list(result.state_dict())
    for group in factors:
        assert names.count(group.name) == 1
        assert [key for key in keys if group.name in key] == [f"{group.name}.weight"]
        linear = result.get_submodule(group.name)
        assert isinstance(linear, nn.Linear)
        assert torch.equal(linear.weight, group.basis_RI)
        calls = [n for n in result.graph.nodes if n.target == group.name]
        readers = [n for n in result.graph.nodes if n.target in group.coefficients]
        assert len(calls) == len(readers)
    assert all(place.basis is not None for place in slices(result).values())


def test_the_graph_computes_coefficient_times_basis() -> None:
    gm = fx.symbolic_trace(Three())
    first = split(gm, *whole_sites(gm))
    exact = shared_on_one_basis(first)[0]
    cut = SharedGroup("b", exact.basis_RI[:3], {n: c[:, :3] for n, c in exact.coefficients.items()})
    result, (applied,) = run(first, [ShareBasis(groups=(cut,))])
    assert applied.rewrites == 3
    x = x_of(6)
    for name, found in zip("qkv", result(x), strict=True):
        weight = slice_weight(result, f"attn.{name}")
        torch.testing.assert_close(weight, cut.coefficients[f"attn.{name}"] @ cut.basis_RI)
        bias = getattr(gm.attn, name).bias
        torch.testing.assert_close(found, x @ weight.t() + bias, rtol=1e-12, atol=1e-12)
    # and the comparison is one that tells: at rank 3 the function is another
    assert not equal_outputs(gm, result, [x], tolerance=1e-3)


def test_gradients_reach_the_basis_from_every_reader() -> None:
    gm = fx.symbolic_trace(Three())
    first = split(gm, *whole_sites(gm))
    result, _ = run(first, [ShareBasis(groups=shared_on_one_basis(first))])

    def basis_gradient(*readers: int) -> Tensor:
        result.zero_grad()
        out = result(x_of(6))
        sum(out[i].square().sum() for i in readers).backward()
        return result.basis.weight.grad.clone()

    parts = [basis_gradient(i) for i in range(3)]
    torch.testing.assert_close(basis_gradient(0, 1, 2), sum(parts))
    assert all(part.norm() > 0 for part in parts)


@pytest.mark.parametrize("trainable", [True, False])
def test_frozen_weights_give_frozen_factors(trainable: bool) -> None:
    gm = fx.symbolic_trace(Three().requires_grad_(trainable))
    first = split(gm, *whole_sites(gm))
    result, _ = run(first, [ShareBasis(groups=shared_on_one_basis(first)), CleanUp()])
    assert {p.requires_grad for p in result.parameters()} == {trainable}


def test_a_call_by_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    gm = fx.symbolic_trace(Keyword())
    first = split(gm, *whole_sites(gm))
    result, _ = run(first, [ShareBasis(groups=shared_on_one_basis(first))])
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


def test_a_group_of_slices_that_are_never_called() -> None:
    gm = captured(TIED_MLP)
    empty = SharedGroup("unused", torch.eye(16, dtype=torch.float64))
    result, applied = run(gm, [ShareBasis(groups=(empty,)), CleanUp()])
    assert [a.rewrites for a in applied] == [0, 0]
    assert not hasattr(result, "unused")


# --- refusals ------------------------------------------------------------------------------------


def factors(**changed: object) -> SharedGroup:
    given: dict[str, object] = {
        "name": "basis",
        "basis_RI": torch.zeros(2, 6),
        "coefficients": {"attn.q": torch.zeros(4, 2)},
    }
    return SharedGroup(**{**given, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ((factors(name="attn"),), RequiresError, "basis name 'attn' is taken or dotted"),
        ((factors(name="a.b"),), RequiresError, "basis name 'a.b' is taken or dotted"),
        ((factors(name="forward"),), RequiresError, "basis name 'forward' is taken"),
        (
            (factors(), factors(coefficients={"attn.k": torch.zeros(3, 2)})),
            RequiresError,
            "basis name 'basis' is taken",
        ),
        (
            (factors(coefficients={"attn.z": torch.zeros(4, 2)}),),
            RequiresError,
            r"'attn.z' of group 'basis' is not a slice .* the graph has \['attn.k', 'attn.q'",
        ),
        ((factors(), factors(name="other")), RequiresError, "'attn.q' of group 'other' is not"),
        ((factors(basis_RI=torch.zeros(6)),), ShapeError, r"found \(6,\)"),
        (
            (factors(basis_RI=torch.zeros(2, 7)),),
            ShapeError,
            r"'attn.q' needs .* a basis over 6 features, found \(4, 2\) and 7",
        ),
        (
            (factors(coefficients={"attn.q": torch.zeros(4, 3)}),),
            ShapeError,
            r"'attn.q' needs a coefficient of shape \(4, 2\) .* found \(4, 3\) and 6",
        ),
        (
            (factors(coefficients={"attn.q": torch.zeros(2, 4)}),),
            ShapeError,
            r"coefficient of shape \(4, 2\)",
        ),
    ],
)
def test_refusals(wanted: tuple[SharedGroup, ...], error: type[Exception], message: str) -> None:
    gm = fx.symbolic_trace(Three())
    first = split(gm, *whole_sites(gm))
    with pytest.raises(error, match=message):
        run(first, [ShareBasis(groups=wanted)])


def test_a_slice_that_shares_already() -> None:
    gm = fx.symbolic_trace(Three())
    first = split(gm, *whole_sites(gm))
    result, _ = run(first, [ShareBasis(groups=shared_on_one_basis(first))])
    again = exact_factors({"attn.q": slice_weight(first, "attn.q")}, "second")
    with pytest.raises(RequiresError, match=r"'attn.q' .* not a slice that is still whole"):
        run(result, [ShareBasis(groups=(again,))])


def test_a_graph_that_was_not_split() -> None:
    with pytest.raises(RequiresError, match=r"not a slice that is still whole; the graph has \[\]"):
        run(fx.symbolic_trace(Three()), [SplitLinear(), ShareBasis(groups=(factors(),))])


def test_other_shapes_of_input() -> None:
    first = split(captured(NANOGPT), *sites(NANOGPT, captured(NANOGPT), "heads"))
    result, _ = run(first, [ShareBasis(groups=groups(first))])
    for batch, length in [(1, 1), (1, 9), (5, 2)]:
        x = inputs(NANOGPT, batch, length)
        assert equal_outputs(captured(NANOGPT), result, x, tolerance=1e-12)
