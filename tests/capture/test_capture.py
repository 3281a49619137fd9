"""Every front end captures every toy; what cannot be captured is refused with the model's line."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.capture import Captured, capture
from fxshare.errors import CaptureError, GuardError
from passes.graph.graph import linear_calls
from tests.toys import (
    BRANCHES,
    ENCODER,
    GPT2,
    IN_PLACE,
    LLAMA,
    LLAMA_LIKE,
    NANOGPT,
    TIED_MLP,
    VOCABULARY,
    WIDTH,
    Toy,
)

TOYS = (NANOGPT, ENCODER, TIED_MLP, GPT2, LLAMA, LLAMA_LIKE, IN_PLACE, BRANCHES)


def ids(batch: int = 2, length: int = 6, seed: int = 0) -> Tensor:
    return NANOGPT.inputs(batch, length, seed)[0]


@torch.no_grad()
def distance(model: nn.Module, gm: nn.Module, *args: Any, **keys: Any) -> float:
    return worst(model(*args, **keys), gm(*args, **keys)).relative


def limit(captured: Captured) -> float:
    return tolerance(torch.float32, len(linear_calls(captured.graph)))


def named(toys: tuple[Toy, ...]) -> Any:
    return pytest.mark.parametrize("toy", toys, ids=[t.name for t in toys])


# The same function


@named(TOYS)
def test_fx_graph_equals_the_model_at_other_shapes(toy: Toy) -> None:
    model = toy.model()
    captured = capture(model, toy.inputs(), mode="fx")
    assert captured.front_end == "fx"
    assert captured.error is not None
    assert captured.error <= limit(captured)
    for batch, length in ((2, 6), (3, 9), (1, 5), (2, 1), (1, 1)):
        assert distance(model, captured.graph, *toy.inputs(batch, length, 1)) <= limit(captured)


@named((NANOGPT, TIED_MLP, GPT2))
def test_exported_graph_equals_the_model_at_other_shapes(toy: Toy) -> None:
    model = toy.model()
    captured = capture(model, toy.inputs(), mode="export")
    assert captured.front_end == "export"
    assert "baked" in captured.notes[0]
    assert linear_calls(captured.graph)
    first = next(iter(inspect.signature(model.forward).parameters))
    for batch, length in ((2, 6), (3, 9)):
        call = {first: toy.inputs(batch, length, 1)[0]}
        if toy is GPT2:  # torch.export has no optional inputs
            call["attention_mask"] = torch.ones_like(call[first])
        assert distance(model, captured.graph, **call) <= limit(captured)


def test_a_tie_is_exported_under_one_of_its_names() -> None:
    model, (x,) = TIED_MLP.model(), TIED_MLP.inputs()
    cfg = {"weight_types": {"w": {"pattern": "left"}}}
    gm = fxshare.compile(model, cfg, example=x, capture="export")
    assert len(gm.fxshare.plan.sites) == 1
    assert distance(model, gm, x) <= tolerance(torch.float32, 6)


@named(tuple(toy for toy in TOYS if toy is not ENCODER))
def test_modules_front_end_replaces_linears_in_place(toy: Toy) -> None:
    model = toy.model()
    # MultiheadAttention reads the weight of its out_proj, and a head may be tied to an embedding
    cfg = {"weight_types": {"w": {"pattern": r"(?!.*(out_proj|lm_head)$).*"}}}
    gm = fxshare.compile(model, cfg, capture="modules")
    assert isinstance(gm, type(model))
    assert len(gm.fxshare.plan.sites) >= 3
    for batch, length in ((2, 6), (1, 1)):
        assert distance(model, gm, *toy.inputs(batch, length)) <= tolerance(torch.float32, 50)


@named((NANOGPT, ENCODER, GPT2, LLAMA))
def test_auto_takes_fx_first(toy: Toy) -> None:
    assert capture(toy.model(), toy.inputs()).front_end == "fx"


def test_auto_without_an_example_takes_modules_and_says_so() -> None:
    captured = capture(NANOGPT.model())
    assert captured.front_end == "modules"
    assert captured.notes == ("no example inputs: captured at module granularity",)


def test_signature_and_names_are_the_models_own() -> None:
    model = NANOGPT.model()
    graph = capture(model, ids()).graph
    placeholders = [n.target for n in graph.graph.nodes if n.op == "placeholder"]
    assert placeholders == ["idx", "targets"]
    for call in linear_calls(graph):
        assert graph.get_submodule(call.name).weight is model.get_submodule(call.name).weight
    assert graph.lm_head.weight is graph.transformer.wte.weight


def test_a_module_called_twice_is_called_twice() -> None:
    graph = capture(TIED_MLP.model(), TIED_MLP.inputs()).graph
    names = [call.name for call in linear_calls(graph)]
    assert names == ["twice", "twice", "left", "right", "down", "up"]


@named((GPT2, LLAMA))
def test_captured_with_a_mask_of_ones_it_masks_padding_too(toy: Toy) -> None:
    model = toy.model()
    ones = torch.ones(2, 6, dtype=torch.long)
    graph = capture(model, {"input_ids": ids(), "attention_mask": ones}, mode="fx").graph
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, 5:] = 0
    x = ids(3, 8, 2)
    with torch.no_grad():
        expected = model(x, attention_mask=mask).logits
        found = graph(x, attention_mask=mask).logits
        unmasked = graph(x).logits
    assert worst(expected[mask.bool()], found[mask.bool()]).relative <= tolerance(torch.float32, 20)
    assert worst(expected[0, 3:], unmasked[0, 3:]).relative > 1e-3


def test_half_precision_is_captured() -> None:
    model = LLAMA.model(dtype=torch.bfloat16)
    captured = capture(model, ids(), mode="fx")
    assert distance(model, captured.graph, ids(3, 7)) == 0


# Guards


class Switching(nn.Module):
    """Another function for short sequences."""

    def __init__(self, above: int) -> None:
        super().__init__()
        self.above = above
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.shape[1] > self.above else self.b(x)


def test_a_branch_on_the_length_is_guarded() -> None:
    model = Switching(above=4)
    graph = capture(model, torch.randn(2, 8, WIDTH), mode="fx").graph
    assert distance(model, graph, torch.randn(3, 5, WIDTH)) <= tolerance(torch.float32, 1)
    with pytest.raises(
        GuardError, match=r"captured on the path where the condition at .* gave True"
    ):
        graph(torch.randn(2, 4, WIDTH))


def test_a_model_that_differs_at_another_length_falls_back_and_says_why() -> None:
    model = Switching(above=7)  # the second shape of the self-check is one shorter
    with pytest.raises(CaptureError, match="different operations at another batch size or length"):
        capture(model, torch.randn(2, 8, WIDTH), mode="fx")
    captured = capture(model, torch.randn(2, 8, WIDTH))
    assert captured.front_end != "fx"
    assert any("tried fx" in note and "different operations" in note for note in captured.notes)


class Unfaithful(nn.Module):
    """Gives another result while it is traced, and so must fail the self-check."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * (1.0 if type(x) is Tensor else 1.01)


def test_the_self_check_catches_a_graph_that_is_not_the_model() -> None:
    x = torch.randn(2, 8, WIDTH)
    for mode in ("fx", "export"):
        with pytest.raises(CaptureError, match="self-check: the graph differs from the original"):
            capture(Unfaithful(), x, mode=mode)  # type: ignore[arg-type]
    captured = capture(Unfaithful(), x)
    assert captured.front_end == "modules"
    assert len(captured.notes) == 2
    assert all("rounding explains" in note for note in captured.notes)


class Counting(nn.Module):
    """Keeps a state in Python that its output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.a(x) * self.calls


def test_state_in_python_is_not_touched_by_capturing() -> None:
    model = Counting()
    capture(model, torch.randn(2, 8, WIDTH))
    assert model.calls == 0


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        total = self.a(x).sum()
        if total > 0:
            return self.a(x)
        return self.b(x)


def test_a_branch_on_data_names_the_node_and_the_line() -> None:
    line = DataDependent.forward.__code__.co_firstlineno + 2
    with pytest.raises(CaptureError) as caught:
        capture(DataDependent(), torch.randn(2, 8, WIDTH), mode="fx")
    assert f"branches on the data of a tensor (gt) at tests.capture.test_capture:{line}" in str(
        caught.value
    )


def test_a_branch_on_data_is_left_to_the_modules_front_end() -> None:
    model = DataDependent()
    captured = capture(model, torch.randn(2, 8, WIDTH))
    assert captured.front_end == "modules"
    assert [note.split(":")[0] for note in captured.notes] == ["tried fx", "tried export"]
    gm = fxshare.compile(
        model, {"weight_types": {"w": {"pattern": "[ab]"}}}, example=torch.ones(2, 8, WIDTH)
    )
    for x in (torch.ones(2, 3, WIDTH), -torch.ones(2, 3, WIDTH)):
        assert distance(model, gm, x) <= tolerance(torch.float32, 1)


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if type(y) is not Tensor:
            raise RuntimeError("no tracing here")
        return y


def test_an_error_inside_the_model_names_file_line_and_node() -> None:
    line = Raises.forward.__code__.co_firstlineno + 3
    with pytest.raises(CaptureError) as caught:
        capture(Raises(), torch.randn(2, 8, WIDTH), mode="fx")
    text = str(caught.value)
    assert f"test_capture.py:{line}" in text
    assert "tracing Raises failed" in text
    assert "after %a " in text
    assert "no tracing here" in text


FACTORIES = ("arange", "ones", "zeros", "full", "empty", "tensor")


@pytest.mark.parametrize(
    "model", [Raises(), DataDependent(), NANOGPT.model()], ids=lambda m: type(m).__name__
)
def test_what_tracing_swaps_is_restored(model: nn.Module) -> None:
    before = [getattr(torch, name) for name in FACTORIES]
    hooks = (nn.Module.__call__, nn.Module.__getattr__)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    example: Any = ids() if type(model).__name__ == "NanoGPT" else torch.randn(2, 8, WIDTH)
    kind = type(model)
    capture(model, example)
    assert [getattr(torch, name) for name in FACTORIES] == before
    assert (nn.Module.__call__, nn.Module.__getattr__) == hooks
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert type(model) is kind


# Linears that a front end does not show


def test_a_linear_that_a_function_reads_is_looked_for_with_export() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # with zero attention it is not written out for the tracer, as it is otherwise
            options = {"batch_first": True, "add_zero_attn": True}
            attentions = (nn.MultiheadAttention(WIDTH, 4, **options) for _ in range(3))
            self.layers = nn.ModuleList(attentions)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x, x, x, need_weights=False)[0]
            return x

    model, x = Attends().eval(), torch.randn(2, 8, WIDTH)
    cfg = {"weight_types": {"o": {"pattern": r".*\.out_proj$"}}, "block_pattern": r"layers\.(\d+)"}
    with pytest.raises(CaptureError, match=r"does not show the matched linear '.*out_proj' \(3 in"):
        fxshare.compile(model, cfg, example=x, capture="fx")
    gm = fxshare.compile(model, cfg, example=x)
    assert gm.fxshare.front_end == "export"
    assert len(gm.fxshare.plan.sites) == 3
    assert any("out_proj" in note for note in gm.fxshare.report.notes)


def test_a_linear_inside_a_leaf_is_looked_for_with_export() -> None:
    class Leaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.softmax = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, 20, [5, 10])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.softmax(self.first(x), (x[:, 0] > 0).long()).output
            return y

    model = Leaf()
    cfg = {"weight_types": {"head": {"pattern": r"softmax\.head$"}}}
    gm = fxshare.compile(model, cfg, example=torch.randn(4, WIDTH))
    assert gm.fxshare.front_end in ("export", "modules")
    assert distance(model, gm, torch.randn(3, WIDTH)) <= tolerance(torch.float32, 2)


def test_out_proj_is_not_offered_at_module_granularity() -> None:
    cfg = {"weight_types": {"w": {"pattern": r".*(out_proj|head)$"}}}
    model = ENCODER.model()
    gm = fxshare.compile(model, cfg, capture="modules")
    assert {s.name.rpartition(".")[2] for s in gm.fxshare.plan.sites} == {"head"}
    assert {s.name.rpartition(".")[2] for s in gm.fxshare.report.skipped} == {"out_proj"}
    assert distance(model, gm, ids()) <= tolerance(torch.float32, 20)


def test_modules_front_end_serves_code_that_reads_a_linears_weight() -> None:
    model = ENCODER.model()
    cfg = {"weight_types": {"w": {"pattern": r".*linear[12]$"}}}
    gm = fxshare.compile(model, cfg, capture="modules")
    assert distance(model, gm, ids()) <= tolerance(torch.float32, 20)


# Where and when


@named((NANOGPT, GPT2, LLAMA))
def test_a_model_on_the_meta_device_is_captured(toy: Toy) -> None:
    reference = capture(toy.model(), toy.inputs(), mode="fx").graph
    captured = capture(toy.model().to("meta"), toy.inputs(), mode="fx")
    assert captured.error is None
    assert [c.name for c in linear_calls(captured.graph)] == [
        c.name for c in linear_calls(reference)
    ]
    assert all(p.device.type == "meta" for p in captured.graph.parameters())


def in_threads(*jobs: Callable[[], None]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_two_threads_may_capture_at_once() -> None:
    def job(toy: Toy) -> Callable[[], None]:
        def work() -> None:
            model = toy.model()
            for _ in range(3):
                captured = capture(model, toy.inputs(), mode="fx")
                assert distance(model, captured.graph, *toy.inputs(3, 5)) <= limit(captured)

        return work

    assert not in_threads(job(NANOGPT), job(LLAMA_LIKE))


def test_another_thread_may_run_a_model_meanwhile() -> None:
    model, other = NANOGPT.model(), LLAMA_LIKE.model()
    expected = other(ids())
    done = threading.Event()

    def tracing() -> None:
        try:
            for _ in range(3):
                capture(model, ids(), mode="fx")
        finally:
            done.set()

    def running() -> None:
        while not done.is_set():
            assert torch.equal(other(ids()), expected)

    assert not in_threads(tracing, running)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = NANOGPT.model()
    model.lock = threading.Lock()
    with pytest.raises(CaptureError, match=r"NanoGPT cannot be copied .* cannot pickle"):
        capture(model, ids())


def test_an_example_that_the_model_refuses_is_described() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(NANOGPT.model(), torch.full((2, 6), VOCABULARY + 1))
    assert "NanoGPT does not accept the example call {'idx': 'int64 (2, 6)'}" in str(caught.value)
    assert "IndexError" in str(caught.value)


def test_a_front_end_that_needs_an_example_says_so() -> None:
    with pytest.raises(CaptureError, match="capture='fx' needs an example"):
        capture(NANOGPT.model(), mode="fx")


def test_the_graph_survives_a_deepcopy_and_retracing() -> None:
    import copy

    model = NANOGPT.model()
    graph = copy.deepcopy(capture(model, ids(), mode="fx").graph)
    assert distance(model, graph, ids(3, 4)) <= tolerance(torch.float32, 20)
    assert isinstance(fx.Interpreter(graph).run(ids(), None), tuple)
