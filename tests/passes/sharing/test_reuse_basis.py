"""ReuseBasis: the same input and the same basis, and nothing written in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes import (
    CleanUp,
    FuseCoefficients,
    Pass,
    ReuseBasis,
    ShareBasis,
    equal_outputs,
    run,
    slice_weight,
    slices,
)
from tests.passes.build import (
    Three,
    captured,
    exact_factors,
    inputs,
    shared_on_one_basis,
    split,
    whole_sites,
    x_of,
)
from tests.toys import IN_PLACE


def shared(gm: fx.GraphModule) -> fx.GraphModule:
    first = split(gm, *whole_sites(gm))
    return run(first, [ShareBasis(groups=shared_on_one_basis(first))])[0]


def calls(gm: fx.GraphModule, name: str = "basis") -> int:
    return sum(n.target == name for n in gm.graph.nodes)


def test_readers_of_one_input_share_one_product() -> None:
    gm = fx.symbolic_trace(Three())
    result, (applied,) = run(shared(gm), [ReuseBasis()])
    assert (applied.rewrites, calls(result)) == (2, 1)
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


def test_other_inputs_and_other_bases_stay_apart() -> None:
    class Apart(Three):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.attn.q(x), self.attn.k(x), self.attn.v(x * 2), self.attn.q(x)

    gm = fx.symbolic_trace(Apart())
    first = split(gm, *whole_sites(gm))
    weights = {name: slice_weight(first, name) for name in slices(first)}
    k = {"attn.k": weights.pop("attn.k")}
    factors = (exact_factors(weights, "basis"), exact_factors(k, "other"))
    result, applied = run(first, [ShareBasis(groups=factors), ReuseBasis()])
    assert [a.rewrites for a in applied] == [4, 1]  # only the two calls of q on x
    assert (calls(result), calls(result, "other")) == (2, 1)
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


def test_a_graph_without_bases_is_left_alone() -> None:
    gm = fx.symbolic_trace(Three())
    _, applied = run(split(gm, *whole_sites(gm)), [ReuseBasis()])
    assert applied[0].rewrites == 0


class Written(nn.Module):
    """q and k read ``x``, and ``write`` comes between them."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.q = nn.Linear(6, 4)
        self.k = nn.Linear(6, 4)
        self.relu = nn.ReLU(inplace=True)
        self.write = write
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        q = self.q(x)
        self.write(x)
        return q + self.k(x)


class WrittenByModule(Written):
    def __init__(self) -> None:
        super().__init__(lambda x: self.relu(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Written(lambda x: x.add_(1)),
        lambda: Written(lambda x: x.view(-1).add_(1)),
        lambda: Written(lambda x: F.relu(x, inplace=True)),
        lambda: Written(lambda x: F.relu(x, True)),
        lambda: Written(lambda x: torch.add(x, 1, out=x)),
        WrittenByModule,
    ],
    ids=["method", "view", "keyword", "position", "out", "module"],
)
def test_an_input_that_is_written_is_left_alone(make: Callable[[], nn.Module]) -> None:
    gm = fx.symbolic_trace(make())
    rest: list[Pass] = [ReuseBasis(), FuseCoefficients(), CleanUp()]
    result, applied = run(shared(gm), rest)
    assert [a.rewrites for a in applied] == [0, 0, 0]
    assert calls(result) == 2
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


def test_a_product_that_is_written_is_left_alone() -> None:
    """A pass of the user's own may have put a write there."""
    gm = fx.symbolic_trace(Three())
    first = shared(gm)
    product = next(n for n in first.graph.nodes if n.target == "basis")
    with first.graph.inserting_after(product):
        doubled = first.graph.call_method("mul_", (product, 2.0))
    reader = next(n for n in first.graph.nodes if n.target == "attn.q")
    reader.args = (doubled,)
    first.recompile()
    result, (applied,) = run(first, [ReuseBasis()])
    assert (applied.rewrites, calls(result)) == (1, 2)
    assert equal_outputs(first, result, [x_of(6)], tolerance=1e-12)


def test_the_toy_whose_activations_are_written() -> None:
    gm = captured(IN_PLACE)
    result, applied = run(shared(gm), [ReuseBasis(), FuseCoefficients(), CleanUp()])
    assert [a.rewrites for a in applied] == [0, 0, 0]
    assert equal_outputs(gm, result, inputs(IN_PLACE), tolerance=1e-12)
