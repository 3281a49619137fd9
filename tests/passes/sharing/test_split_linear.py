"""SplitLinear: both dialects, uneven slices, repeated and tied modules, views, and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes import (
    CleanUp,
    PassError,
    RequiresError,
    Rows,
    SplitLinear,
    SplitSite,
    equal_outputs,
    linear_calls,
    run,
    slice_weight,
    slices,
)
from passes.graph.graph import LinearCall
from tests.passes.build import captured, inputs, site_of, sites, split, whole_sites, x_of
from tests.toys import BRANCHES, ENCODER, GPT2, IN_PLACE, TIED_MLP, Toy

# torch's own, while it copies an exported graph
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Conv1D(nn.Module):
    """transformers' linear that stores ``(in, out)``, without transformers."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(nf, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(size)


class Leaves(fx.Tracer):
    """Like capture: linears are leaves, whoever wrote them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Conv1D) or super().is_leaf_module(m, module_qualified_name)


class One(nn.Module):
    """A linear at ``fc``, called as ``call`` says."""

    def __init__(self, fc: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = fc.double()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.fc, x)


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, Leaves().trace(model))


def _linear(bias: bool) -> nn.Linear:
    return nn.Linear(5, 6, bias=bias)


FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "module": (lambda: _linear(True), lambda fc, x: fc(x)),
    "module, no bias": (lambda: _linear(False), lambda fc, x: fc(x)),
    "module, keyword": (lambda: _linear(True), lambda fc, x: fc(input=x)),
    "Conv1D": (lambda: Conv1D(6, 5), lambda fc, x: fc(x)),
    "F.linear": (lambda: _linear(True), lambda fc, x: F.linear(x, fc.weight, fc.bias)),
    "F.linear, no bias": (lambda: _linear(False), lambda fc, x: F.linear(x, fc.weight)),
    "F.linear, keywords": (
        lambda: _linear(True),
        lambda fc, x: F.linear(input=x, bias=fc.bias, weight=fc.weight),
    ),
    "addmm": (
        lambda: Conv1D(6, 5),
        lambda fc, x: torch.addmm(fc.bias, x.flatten(0, 1), fc.weight),
    ),
}


def one_call(gm: fx.GraphModule) -> LinearCall:
    (call,) = linear_calls(gm)
    return call


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dialect", ["traced", "exported"])
def test_every_way_to_call_a_linear(form: str, dialect: str) -> None:
    make, call = FORMS[form]
    model = One(make(), call)
    x = x_of(5)
    gm = traced(model) if dialect == "traced" else torch.export.export(model, (x,)).module()
    assert isinstance(gm, fx.GraphModule)
    found = one_call(gm)
    assert (found.name, found.weight_OI.shape) == ("fc", (6, 5))

    site = site_of(["fc"], [(".a", 1), (".b", 3), (".c", 2)])
    result, applied = run(gm, [SplitLinear(sites=(site,)), CleanUp()])

    assert applied[0].rewrites == 1
    assert equal_outputs(gm, result, [x], tolerance=1e-12)
    assert [c.name for c in linear_calls(result)] == ["fc.a", "fc.b", "fc.c"]
    assert all(isinstance(result.get_submodule(c.name), nn.Linear) for c in linear_calls(result))
    assert torch.equal(slice_weight(result, "fc.b"), found.weight_OI[1:4])
    bias = ".bias" if found.bias_O is not None else ".weight"
    expected = {f"fc.{s}{field}" for s in "abc" for field in (".weight", bias)}
    assert set(result.state_dict()) == expected  # the whole weight is not kept beside its slices


@pytest.mark.parametrize(
    ("form", "rewrites"), [("module", 0), ("module, keyword", 0), ("Conv1D", 1), ("F.linear", 1)]
)
def test_a_single_slice_becomes_one_linear_and_a_linear_stays(form: str, rewrites: int) -> None:
    make, call = FORMS[form]
    gm = traced(One(make(), call))
    result, (applied,) = run(gm, [SplitLinear(sites=(site_of(["fc"], [("", 6)]),))])
    assert applied.rewrites == rewrites
    assert isinstance(result.get_submodule("fc"), nn.Linear)
    assert list(slices(result)) == ["fc"]
    assert equal_outputs(gm, result, [x_of(5)], tolerance=1e-12)


@pytest.mark.parametrize("toy", [ENCODER, TIED_MLP, GPT2, IN_PLACE, BRANCHES], ids=lambda t: t.name)
def test_exported_toys(toy: Toy) -> None:
    gm = captured(toy, "export")
    result, _ = run(gm, [SplitLinear(sites=sites(toy, gm, "uneven")), CleanUp()])
    assert equal_outputs(gm, result, inputs(toy), tolerance=1e-12)
    assert sum(p.numel() for p in result.parameters()) == sum(p.numel() for p in gm.parameters())


def test_attention_that_keeps_its_projection_as_a_bare_parameter() -> None:
    gm = captured(ENCODER, "export")
    name = "encoder.layers.0.self_attn.in_proj_weight"
    site = site_of([name], [(".q", 16), (".k", 16), (".v", 16)])
    result, _ = run(gm, [SplitLinear(sites=(site,)), CleanUp()])
    assert isinstance(result.get_submodule(f"{name}.k"), nn.Linear)
    assert equal_outputs(gm, result, inputs(ENCODER), tolerance=1e-12)


def test_slices_are_views_of_the_original_weight() -> None:
    gm = captured(GPT2)
    name = "transformer.h.1.attn.c_attn"
    whole = gm.get_submodule(name).weight
    result = split(gm, *sites(GPT2, gm, "heads"))
    start, stop = whole.data_ptr(), whole.data_ptr() + whole.numel() * whole.element_size()
    for head in range(4):
        rows = result.get_submodule(f"{name}.k.{head}").weight
        assert start <= rows.data_ptr() < stop
        assert rows.untyped_storage()._cdata == whole.untyped_storage()._cdata
        assert torch.equal(rows, whole.t()[16 + 4 * head : 20 + 4 * head])


def test_linears_in_a_row_and_a_module_called_on_its_own_result() -> None:
    gm = captured(TIED_MLP)
    result, (applied,) = run(gm, [SplitLinear(sites=sites(TIED_MLP, gm, "uneven"))])
    called = [c.name for c in linear_calls(result)]
    assert called.count("twice.b") == 2
    assert applied.rewrites == len(linear_calls(gm)) == 6
    assert equal_outputs(gm, result, inputs(TIED_MLP), tolerance=1e-12)


def test_tied_modules_are_one_site_and_stored_once() -> None:
    gm = captured(TIED_MLP)
    tied = site_of(["left", "right"], [(".a", 10), (".b", 6)])
    result, (applied, _) = run(gm, [SplitLinear(sites=(tied,)), CleanUp()])
    assert applied.rewrites == 2
    assert [c.name for c in linear_calls(result)].count("left.a") == 2
    assert not any(key.startswith("right") for key in result.state_dict())
    assert sum(p.numel() for p in result.parameters()) == sum(p.numel() for p in gm.parameters())
    assert equal_outputs(gm, result, inputs(TIED_MLP), tolerance=1e-12)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("form", ["module", "Conv1D", "addmm"])
def test_what_is_frozen_stays_frozen_and_nothing_else(form: str, grad: bool) -> None:
    make, call = FORMS[form]
    model = One(make(), call)
    model.fc.bias.requires_grad_(False)
    with torch.set_grad_enabled(grad):  # views made under no_grad say that they need no gradient
        site = site_of(["fc"], [(".a", 2), (".b", 4)])
        result, _ = run(traced(model), [SplitLinear(sites=(site,)), CleanUp()])
    flags = {name: p.requires_grad for name, p in result.named_parameters()}
    assert flags == {f"fc.{s}.{f}": f == "weight" for s in "ab" for f in ("weight", "bias")}


def test_a_model_on_the_meta_device() -> None:
    gm = fx.symbolic_trace(TIED_MLP.model().to("meta"))
    result = split(gm, *sites(TIED_MLP, gm, "uneven"))
    assert result.get_submodule("left.b").weight.shape == (14, 16)


def test_an_empty_pass_changes_nothing() -> None:
    gm = captured(TIED_MLP)
    result, (applied,) = run(gm, [SplitLinear()])
    assert applied.rewrites == 0
    assert str(result.graph) == str(gm.graph)


# --- refusals ------------------------------------------------------------------------------------


class Readers(nn.Module):
    """A head that reads the embedding's weight, beside a plain linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 5)
        self.fc = nn.Linear(5, 5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.fc(self.embed(ids))
        return F.linear(h, self.embed.weight), self.fc.weight.sum()


class Pair(nn.Module):
    """Two linears; ``tie`` gives them one weight but two biases."""

    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.a = nn.Linear(5, 5)
        self.b = nn.Linear(5, 5)
        if tie:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + torch.relu(self.b(x))


def refusal(gm: fx.GraphModule, *wanted: SplitSite) -> str:
    with pytest.raises(RequiresError) as caught:
        run(gm, [SplitLinear(sites=wanted)])
    return str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", 0, 2), ("b", 3, 5)], "'b' of 'a' takes rows 3:5, expected it to start at row 2"),
        ([("a", 0, 0), ("b", 0, 5)], "'a' of 'a' takes rows 0:0, expected .* not to be empty"),
        ([("a", 0, 2), ("b", 1, 5)], "'b' of 'a' takes rows 1:5, expected it to start at row 2"),
        ([("a", 0, 4)], "the slices of 'a' cover 4 rows, its weight has 5"),
        ([("a", 0, 6)], "the slices of 'a' cover 6 rows, its weight has 5"),
        ([], "the slices of 'a' cover 0 rows, its weight has 5"),
        ([("a", 0, 2), ("b", 2, 5)], "the name 'b' of rows 2:5 is taken"),
        ([("a.x", 0, 2), ("a.x", 2, 5)], "the name 'a.x' of rows 2:5 is taken"),
    ],
)
def test_rows_that_are_no_partition(rows: list[tuple[str, int, int]], message: str) -> None:
    gm = fx.symbolic_trace(Pair(tie=False))
    with pytest.raises(RequiresError, match=message):
        run(gm, [SplitLinear(sites=(SplitSite(("a",), tuple(Rows(*row) for row in rows)),))])


def test_a_name_that_no_linear_has() -> None:
    text = refusal(fx.symbolic_trace(Pair(tie=False)), site_of(["c"], [("", 5)]))
    assert "no linear node reads 'c'; the graph has linears ['a', 'b']" in text


def test_a_site_of_two_weights_or_two_biases() -> None:
    both = site_of(["a", "b"], [("", 5)])
    assert "'a' and 'b' of one site have not the same weight" in refusal(
        fx.symbolic_trace(Pair(tie=False)), both
    )
    assert "'a' and 'b' of one site have not the same bias" in refusal(
        fx.symbolic_trace(Pair(tie=True)), both
    )


def test_a_weight_that_something_else_reads() -> None:
    gm = fx.symbolic_trace(Readers())
    assert "'embed' is also used by node 'embed' (call_module)" in refusal(
        gm, site_of(["embed"], [("", 6)])
    )
    assert "'fc.weight' is also used by node 'sum_1' (call_method)" in refusal(
        gm, site_of(["fc"], [("", 5)])
    )


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("form", "fc"),
    [
        (lambda fc, x: fc(x), Doubling(5, 6)),
        (lambda fc, x: torch.addmm(fc.bias, x[0], fc.weight.t(), beta=2), _linear(True)),
        (lambda fc, x: F.linear(x, fc.weight * 2, fc.bias), _linear(True)),
        (lambda fc, x: F.linear(x, fc.weight, fc.bias * 2), _linear(True)),
        (lambda fc, x: torch.addmm(fc.bias[None], x[0], fc.weight), Conv1D(6, 5)),
    ],
    ids=["own forward", "beta", "computed weight", "computed bias", "matrix bias"],
)
def test_what_only_looks_like_a_linear(
    form: Callable[[nn.Module, Tensor], Tensor], fc: nn.Module
) -> None:
    class AsLeaf(Leaves):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Doubling) or super().is_leaf_module(m, module_qualified_name)

    model = One(fc, form)
    assert linear_calls(fx.GraphModule(model, AsLeaf().trace(model))) == []


def test_an_unknown_slice_names_the_known_ones() -> None:
    gm = split(captured(TIED_MLP), *sites(TIED_MLP, captured(TIED_MLP), "uneven"))
    with pytest.raises(PassError, match=r"no slice named 'twice.z'; the graph has twice.a"):
        slice_weight(gm, "twice.z")
    with pytest.raises(PassError, match="the graph has none"):
        slice_weight(captured(TIED_MLP), "twice.a")


def test_splitting_twice_is_refused_because_the_linears_are_gone() -> None:
    gm = captured(TIED_MLP)
    wanted = sites(TIED_MLP, gm, "uneven")
    assert "no linear node reads 'twice'" in refusal(split(gm, *wanted), *wanted)


def test_whole_sites_may_be_split_again() -> None:
    gm = fx.symbolic_trace(Pair(tie=False))
    once = split(gm, *whole_sites(gm))
    again, (applied,) = run(once, [SplitLinear(sites=whole_sites(gm))])
    assert applied.rewrites == 0
    assert slices(again) == slices(once)
