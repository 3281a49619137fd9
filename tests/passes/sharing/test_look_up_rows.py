"""LookUpRows: one owner for a weight that is looked up, and its reasons for refusing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from passes import (
    CleanUp,
    FuseCoefficients,
    LookedUp,
    LookUpRows,
    Materialise,
    ObserveLookups,
    RequiresError,
    ReuseBasis,
    ShareBasis,
    SharedGroup,
    StackBases,
    equal_outputs,
    lookups,
    observed_lookups,
    run,
    slices,
)

ROWS, WIDTH = 7, 4
IDS = torch.tensor([[0, 3, 6], [2, 2, 5]])


class Tied(nn.Module):
    """The same rows looked up twice and multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(ROWS, WIDTH, padding_idx=2)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + F.embedding(ids.flip(-1), self.wte.weight)
        return self.head(self.mix(x))


def traced(module: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(module.double())


TIED = LookedUp("wte", ("wte",), ("head",))


def test_all_readers_read_one_linear() -> None:
    gm = traced(Tied())
    assert [lookup.padding_idx for lookup in lookups(gm)] == [2, None]
    result, (applied, _) = run(gm, [LookUpRows(sites=(TIED,)), CleanUp()])
    assert applied.rewrites == 3
    assert equal_outputs(gm, result, [IDS], tolerance=0.0)
    assert [key for key in result.state_dict() if "mix" not in key] == ["wte.weight", "wte.bias"]
    assert slices(result)["wte"].module == "wte"
    reads = [n for n in result.graph.nodes if n.target is F.embedding]
    assert [n.kwargs.get("padding_idx") for n in reads] == [2, None]


def shared(rank: int = 2) -> tuple[fx.GraphModule, fx.GraphModule]:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(rank, WIDTH, generator=generator, dtype=torch.float64)
    rows = torch.randn(ROWS, rank, generator=generator, dtype=torch.float64)
    group = SharedGroup("basis", basis, {"wte": rows})
    gm = traced(Tied())
    result, _ = run(gm, [LookUpRows(sites=(TIED,)), ShareBasis(groups=(group,)), CleanUp()])
    expected = traced(Tied())
    product = {"wte.weight": rows @ basis, "head.weight": rows @ basis}
    expected.load_state_dict({**gm.state_dict(), **product})
    return expected, result


def test_what_is_looked_up_is_multiplied_by_the_basis() -> None:
    expected, result = shared()
    assert equal_outputs(expected, result, [IDS], tolerance=1e-14)
    assert [key for key in result.state_dict() if "mix" not in key] == [
        "wte.weight",
        "wte.bias",
        "basis.weight",
    ]


def test_lowering_leaves_what_is_read_without_a_call() -> None:
    expected, result = shared(rank=WIDTH)  # past break-even, which Materialise would take
    lowered, _ = run(
        result, [Materialise(), ReuseBasis(), FuseCoefficients(), StackBases(duplicate=True)]
    )
    assert equal_outputs(expected, lowered, [IDS], tolerance=1e-13)
    assert "basis.weight" in lowered.state_dict()


def test_the_wrong_basis_behind_one_lookup_is_not_equal() -> None:
    expected, result = shared()
    node = next(n for n in result.graph.nodes if n.target is torch.matmul)
    with result.graph.inserting_before(node):
        wrong = result.graph.call_function(torch.flip, (node.args[1], (0,)))
    node.args = (node.args[0], wrong)
    result.recompile()
    assert not equal_outputs(expected, result, [IDS], tolerance=1e-3)


def test_counters_and_taps() -> None:
    class Sink(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size
            self.seen: list[tuple[int, ...]] = []

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            self.seen.append(tuple(x.shape))
            return x

    gm = traced(Tied())
    watch = ObserveLookups(sites=("wte",), new_counter=Sink, new_tap=Sink)
    result, (applied,) = run(gm, [watch])
    assert applied.rewrites == 2
    assert equal_outputs(gm, result, [IDS], tolerance=0.0)
    counters = observed_lookups(result)["wte"]
    for counter, tap in counters:
        assert tap is not None
        assert result.get_submodule(counter).size == ROWS
        assert result.get_submodule(tap).size == WIDTH
        assert result.get_submodule(counter).seen[0] == tuple(IDS.shape)
        assert result.get_submodule(tap).seen[0] == (*IDS.shape, WIDTH)


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (LookedUp("mix", ("mix",)), "no node looks up rows of 'mix'"),
        (LookedUp("wte", ()), "no node looks up rows"),
        (LookedUp("wte", ("wte",), ("nothing",)), "no linear node reads 'nothing'"),
        (LookedUp("wte", ("wte",), ("mix",)), "have not one weight"),
    ],
)
def test_refusals(site: LookedUp, reason: str) -> None:
    with pytest.raises(RequiresError, match=reason):
        run(traced(Tied()), [LookUpRows(sites=(site,))])


def test_a_weight_with_another_reader_is_refused() -> None:
    class Odd(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.wte.weight.sum()

    with pytest.raises(RequiresError, match="neither looks rows up nor multiplies"):
        run(traced(Odd()), [LookUpRows(sites=(TIED,))])
