"""Compiled models under ``torch.compile``, and ``fxshare.backend`` for those who keep their model.

Most graphs go to dynamo alone or to AOTAutograd: what breaks, breaks there. Inductor compiles two.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.errors import GuardError
from passes.errors import FxShareError
from tests.strategies import SHARING, Sizes, gpt, gpt_config, no_warnings_of_ours
from tests.strategies import token_batches as batches
from tests.toys import GPT2, LLAMA, Toy

SHAPES = [(2, 7), (3, 9), (2, 12), (5, 4)]
EXACT: dict[str, Any] = {}
PLANNED = {"budget": {"params_kept": 0.8}}
HF = {
    "weight_types": {
        "attn": {"pattern": r".*(c_attn|[qkv]_proj)$"},
        "mlp": {"pattern": r".*(c_fc|gate_proj|up_proj)$"},
    },
    "block_pattern": r"(?:h|layers)\.(\d+)",
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@functools.cache
def _planned() -> Any:
    with no_warnings_of_ours():
        return fxshare.compile(gpt(), gpt_config(**PLANNED), calibration=batches())


def compiled(model: nn.Module, mode: dict[str, Any], **keys: Any) -> Any:
    """A new result; of planned mode a copy, because the search takes seconds."""
    if mode is PLANNED:  # always asked for of the same model
        return copy.deepcopy(_planned())
    with no_warnings_of_ours():
        return fxshare.compile(model, gpt_config(**mode), **{"calibration": batches(), **keys})


def ids(rows: int, length: int) -> Tensor:
    return batches(1, rows, length, seed=9)[0]


def limit(gm: Any, dtype: torch.dtype = torch.float32) -> float:
    return tolerance(dtype, 2 * len(gm.fxshare.plan.sites) + 1)


# torch.compile(gm)


@pytest.mark.parametrize(
    ("front_end", "mode"),
    [
        pytest.param("fx", EXACT, marks=pytest.mark.slow),
        ("fx", PLANNED),
        ("export", SHARING),
        ("modules", SHARING),
    ],
)
def test_one_graph_for_all_shapes(front_end: Any, mode: dict[str, Any]) -> None:
    gm = compiled(gpt(), mode, capture=front_end)
    dynamic, default = CompileCounter(), CompileCounter()
    once = torch.compile(gm, fullgraph=True, dynamic=True, backend=dynamic)
    at_most_twice = torch.compile(gm, fullgraph=True, backend=default)
    with torch.no_grad():
        expected = [gm(ids(*shape)) for shape in SHAPES]
        for fast, most, counter in ((once, 1, dynamic), (at_most_twice, 2, default)):
            torch.compiler.reset()
            found = [fast(ids(*shape)) for shape in SHAPES]
            assert 1 <= counter.frame_count <= most
            assert worst(expected, found).relative <= limit(gm)


@pytest.mark.parametrize("toy", [GPT2, LLAMA], ids=lambda toy: toy.name)
def test_hugging_face_models_without_breaks(toy: Toy) -> None:
    model = toy.model()
    with no_warnings_of_ours():
        gm = fxshare.compile(model, {**HF, **SHARING}, example=toy.inputs())
    counter = CompileCounter()
    fast = torch.compile(gm, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for number, shape in enumerate(SHAPES[:2]):
            (tokens,) = toy.inputs(*shape, seed=number)
            assert worst(gm(tokens), fast(tokens)).relative <= limit(gm)
        assert counter.frame_count == 1
        if toy is GPT2:
            return
        # and after a cast, which the switches follow
        half = torch.compile(copy.deepcopy(gm).half(), fullgraph=True, backend=CompileCounter())
        assert half(tokens).logits.dtype == torch.float16


def test_inductor() -> None:
    gm = compiled(gpt(n_layer=1), SHARING)
    fast = torch.compile(gm, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in SHAPES[:2]:
            assert worst(gm(ids(*shape)), fast(ids(*shape))).relative <= limit(gm)


def _loss(module: Callable[..., Any], tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(
        module(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )


def test_training_through_the_compiled_graph() -> None:
    # group_size 2 over 2 layers: every basis has a reader in each layer
    gm = compiled(gpt(torch.float64), SHARING, copy=True)
    fast = torch.compile(gm, fullgraph=True, backend="aot_eager")
    tokens = ids(3, 12)
    grads = []
    for run in (gm, fast):
        gm.zero_grad(set_to_none=True)
        _loss(run, tokens).backward()
        grads.append({n: p.grad.clone() for n, p in gm.named_parameters()})
    assert worst(*grads).relative <= limit(gm, torch.float64)
    basis = gm.fxshare.plan.groups[0].name
    assert grads[1][f"{basis}.weight"].abs().max() > 0
    assert len({id(p) for p in gm.parameters()}) == len(list(gm.parameters()))

    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = _loss(fast, tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_shared_basis_gets_the_sum_over_its_readers_when_compiled() -> None:
    gm = compiled(gpt(torch.float64), SHARING)
    group = gm.fxshare.plan.groups[0]
    weight = gm.get_submodule(group.name).weight
    tokens = ids(2, 8)
    fast = torch.compile(gm, fullgraph=True, backend="aot_eager")
    _loss(fast, tokens).backward()
    whole = weight.grad.clone()

    apart = copy.deepcopy(gm)
    readers = [n for n in apart.graph.nodes if n.target == group.name]
    assert len(readers) == len({s.split(".")[2] for s in group.slices}) > 1
    for number, node in enumerate(readers):
        apart.add_module(f"reader_{number}", copy.deepcopy(apart.get_submodule(group.name)))
        node.target = f"reader_{number}"
    apart.recompile()
    apart.zero_grad(set_to_none=True)
    _loss(apart, tokens).backward()
    parts = [apart.get_submodule(f"reader_{n}").weight.grad for n in range(len(readers))]
    assert worst(sum(parts), whole).relative <= limit(gm, torch.float64)
    assert worst(parts[0], whole).relative > 1e-3  # one reader alone is not enough


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_for_the_gpu(mode: str) -> None:
    gm = compiled(gpt().cuda(), SHARING)
    tokens = ids(2, 8).cuda()
    fast = torch.compile(gm, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(3):  # the graph is recorded on the second call
            assert worst(gm(tokens), fast(tokens).clone()).relative <= limit(gm)


# torch.compile(model, backend=fxshare.backend(gm))


@pytest.mark.parametrize(
    ("front_end", "mode"), [("fx", EXACT), ("fx", PLANNED), ("modules", SHARING)]
)
def test_the_backend_gives_what_gm_gives(front_end: Any, mode: dict[str, Any]) -> None:
    model = gpt()
    gm = compiled(model, mode, capture=front_end)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    backend = fxshare.backend(gm, inner="eager")
    fast = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for shape in SHAPES[:3]:
            assert worst(gm(ids(*shape)), fast(ids(*shape))).relative <= limit(gm)
        if mode:  # the model alone is something else, so it was the factors that computed this
            assert worst(gm(ids(2, 7)), model(ids(2, 7))).relative > 10 * limit(gm)
    assert backend.rewritten == {site.name for site in gm.fxshare.plan.sites}
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_the_backend_computes_through_the_factors_and_not_the_weights() -> None:
    model = gpt()
    gm = compiled(model, SHARING)
    seen: list[fx.GraphModule] = []

    def inner(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        seen.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=fxshare.backend(gm, inner=inner))(ids(2, 7))
    (graph,) = seen
    weights = [n for n in graph.graph.nodes if n.op == "placeholder" and "_c_fc_" in str(n.target)]
    assert weights
    assert not any(n.users for n in weights)
    called = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
    assert {g.name for g in gm.fxshare.plan.groups} <= called


def test_the_backend_on_conv1d_and_ties_through_aot() -> None:
    model = gpt(conv1d=True)
    cfg = gpt_config(Sizes(conv1d=True), **SHARING)
    with no_warnings_of_ours():
        gm = fxshare.compile(model, cfg, calibration=batches())
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, backend=fxshare.backend(gm, inner=counter), dynamic=True)
    for shape in SHAPES[:3]:
        assert worst(gm(ids(*shape)), fast(ids(*shape))).relative <= limit(gm)
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_the_backend_before_inductor() -> None:
    model = gpt(n_layer=1)
    gm = compiled(model, SHARING)
    fast = torch.compile(model, backend=fxshare.backend(gm))
    with torch.no_grad():
        assert worst(gm(ids(2, 7)), fast(ids(2, 7))).relative <= limit(gm)


class Broken(nn.Module):
    """A model that dynamo cannot take in one piece: names are then relative to a block."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = gpt(n_layer=2)
        for block in self.gpt.transformer["h"]:
            block.register_forward_pre_hook(_break)

    def forward(self, idx: Tensor) -> Tensor:
        out: Tensor = self.gpt(idx)
        return out


@torch.compiler.disable
def _break(module: nn.Module, args: Any) -> None:
    return None


def test_a_graph_that_dynamo_runs_on_the_weights_of_another_block_is_refused() -> None:
    model = Broken()
    gm = compiled(model, SHARING, capture="modules")
    backend = fxshare.backend(gm, inner="eager")
    with pytest.raises(GuardError, match=r"factors of 'gpt\.transformer\.h\.0\..*fullgraph=True"):
        torch.compile(model, backend=backend)(ids(2, 7))
    # both blocks have a c_fc: the numbers told which one this was
    assert backend.rewritten == {s.name for s in gm.fxshare.plan.sites if ".h.0." in s.name}


def test_a_trained_result_needs_check_off() -> None:
    model = gpt()
    gm = compiled(model, SHARING, copy=True)
    with torch.no_grad():
        gm.get_submodule(gm.fxshare.plan.groups[0].name).weight.mul_(1.5)
    with pytest.raises(BackendCompilerFailed, match="check=False if the compiled") as caught:
        torch.compile(model, backend=fxshare.backend(gm, inner="eager"))(ids(2, 7))
    assert isinstance(caught.value.inner_exception, FxShareError)
    torch.compiler.reset()
    fast = torch.compile(model, backend=fxshare.backend(gm, inner="eager", check=False))
    with torch.no_grad():
        assert worst(gm(ids(2, 7)), fast(ids(2, 7))).relative <= limit(gm)


def test_another_model_and_another_dtype_are_refused() -> None:
    gm = compiled(gpt(), SHARING)
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    cases = [
        (other, torch.zeros(2, 8), "no linear of the graph is a site"),
        (gpt(seed=3), ids(2, 7), "is not the one that"),
        (copy.deepcopy(gpt()).double(), ids(2, 7), "float64"),
    ]
    for model, given, message in cases:
        torch.compiler.reset()
        with pytest.raises(BackendCompilerFailed, match=message) as caught:
            torch.compile(model, backend=fxshare.backend(gm, inner="eager"))(given)
        assert isinstance(caught.value.inner_exception, FxShareError)


class Experts(nn.Module):
    """Two of them in one parameter, between no linear and one."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, 8, 6))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.bmm(x.expand(2, -1, -1), self.down.transpose(1, 2)))
        return y


def test_parameters_that_would_stay_dense_are_refused() -> None:
    model, x = Experts().eval(), torch.randn(1, 5, 6)
    for pattern, refused in (("down", True), ("out", False)):
        cfg = {"weight_types": {"w": {"pattern": pattern}}, "compression_rate": 0.5}
        gm = fxshare.compile(model, {**cfg, "group_size": 1}, example=x)
        torch.compiler.reset()
        fast = torch.compile(model, backend=fxshare.backend(gm, inner="eager"))
        if refused:
            with pytest.raises(BackendCompilerFailed, match=r"'down', of which parts.*compile\(gm"):
                fast(x)
        else:
            assert worst(gm(x), fast(x)).relative <= limit(gm)


def test_bad_arguments_of_the_backend() -> None:
    gm = compiled(gpt(), SHARING)
    with pytest.raises(FxShareError, match="a Plan has no factors"):
        fxshare.backend(gm.fxshare.plan)
    with pytest.raises(FxShareError, match="found str; compile the model"):
        fxshare.backend("out/")  # type: ignore[arg-type]
    with pytest.raises(FxShareError, match="was not made by fxshare"):
        fxshare.backend(gpt())
    with pytest.raises(FxShareError, match=r"no backend 'nonesuch'; it has .*inductor"):
        fxshare.backend(gm, inner="nonesuch")
