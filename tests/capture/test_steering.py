"""Captured graphs have the model's gradients and its training mode, not only its values."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
import tests.capture.steered_models as models
from fxshare.base.numerics import tolerance, worst
from fxshare.capture import capture
from fxshare.errors import CaptureError, GuardError
from tests.capture.steered_models import CONFIG, Stack, reference, x_of

LIMIT = tolerance(torch.float32, 3 * 7)
GRAPHS = (
    models.NoGrad,
    models.Decorated,
    models.SetGrad,
    models.Inference,
    models.InferenceAlone,
    models.Nested,
    models.EnableGrad,
    models.SameInput,
    models.InTraining,
    models.InEval,
    models.Detached,
    models.StraightThrough,
    models.Reversal,
    models.TwoOutputs,
    models.StraightThroughDetach,
    models.Checkpointed,
    models.Reentrant,
    models.HeadHook,
    models.Autocast,
    models.Island,
    models.IslandInAutocast,
    models.AsksForGrad,
    models.Normed,
    models.FrozenNorm,
    models.EvalInForward,
    models.NeverTrained,
)
ELSEWHERE = (
    models.Clipped,
    models.ClippedAlways,
    models.BackwardHook,
    models.BackwardPreHook,
    models.RootHook,
    models.RootPreHook,
    models.FrozenInForward,
    models.FrozenByAttribute,
    models.Noisy,
    models.LayerDrop,
)
AROUND: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def run(module: nn.Module, x: Tensor, around: str, training: bool) -> tuple[Tensor, dict[str, Any]]:
    """Outputs, and gradients by name: of the input, and of every parameter."""
    module.train(training)
    module.zero_grad()
    x = x.clone().requires_grad_()
    before = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with AROUND[around]():
            y = module(x)
    assert before == (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
    if y.requires_grad:
        y.square().sum().backward()
    # at module granularity the linear is a part of what stands in its place
    grads = {name.replace(".linear.", "."): p.grad for name, p in module.named_parameters()}
    return y.detach(), {"x": x.grad, **grads}


def agree(model: nn.Module, gm: nn.Module, around: str, training: bool) -> None:
    """The same outputs and gradients, to rounding."""
    y, gradients = run(reference(model), x_of(1), around, training)
    found, others = run(copy.deepcopy(gm), x_of(1), around, training)
    assert y.dtype == found.dtype
    assert worst(y, found).relative <= LIMIT
    assert {n for n, g in gradients.items() if g is None} == {
        n for n, g in others.items() if g is None
    }
    for name, gradient in gradients.items():
        assert gradient is None or worst(gradient, others[name]).relative <= LIMIT, name


@pytest.mark.parametrize("kind", GRAPHS, ids=lambda k: k.__name__)
def test_a_graph_has_the_models_gradients(kind: type[Stack]) -> None:
    model = kind().eval()
    gm = fxshare.compile(model, CONFIG, example=x_of(), copy=True)
    assert gm.fxshare.report.front_end == "fx"
    assert len(gm.fxshare.plan.sites) == 6
    for around in AROUND:
        for training in (False, True):
            agree(model, gm, around, training)


@pytest.mark.parametrize("kind", ELSEWHERE, ids=lambda k: k.__name__)
def test_what_no_graph_holds_is_left_to_the_modules(kind: type[Stack]) -> None:
    model = kind().eval()
    gm = fxshare.compile(model, CONFIG, example=x_of(), copy=True)
    assert gm.fxshare.report.front_end == "modules"
    for training in (False, True):
        agree(model, gm, "plain", training)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (models.Clipped, "the gradient at"),
        (models.BackwardHook, "module 'layers.1' has backward hooks"),
        (models.RootHook, "RootHook itself has a forward hook"),
        (models.FrozenInForward, "changes requires_grad of 'layers.0.2.weight'"),
        (models.Noisy, "training takes another path"),
        (models.LayerDrop, "in training mode, the graph differs"),
    ],
    ids=lambda k: getattr(k, "__name__", ""),
)
def test_the_reason_is_said(kind: type[Stack], reason: str) -> None:
    model = kind().eval()
    captured = capture(model, x_of())
    assert captured.front_end == "modules"
    (note,) = captured.notes
    assert note.startswith("tried fx: ") != (kind is models.RootHook)  # nothing is tried with it
    assert reason in note
    assert all(p.requires_grad for p in model.parameters())
    if kind is models.Noisy:
        assert "(capture='fx' gives it)" in note
        assert capture(model, x_of(), mode="fx").front_end == "fx"
        return
    with pytest.raises(CaptureError) as caught:
        capture(model, x_of(), mode="fx")
    assert reason in str(caught.value)


@pytest.mark.parametrize("mode", ["fx", "export"])
def test_a_graph_of_eval_mode_refuses_training(mode: Any) -> None:
    model = models.Noisy().eval()
    gm = fxshare.compile(model, CONFIG, example=x_of(), copy=True, capture=mode)
    agree(model, gm, "plain", False)
    with pytest.raises(GuardError, match=r"holds eval mode alone: .*capture='modules'"):
        gm.train()(x_of())
    for other in (copy.deepcopy(gm), fxshare.lower(gm), fxshare.readable(gm)):
        with pytest.raises(GuardError, match="holds eval mode alone"):
            other.train()(x_of())


def test_an_exported_graph_that_needs_no_mode_trains() -> None:
    model = Stack().eval()
    gm = fxshare.compile(model, CONFIG, example=x_of(), copy=True, capture="export")
    agree(model, gm, "plain", True)


def test_a_model_that_trains_nowhere_is_captured_with_a_note() -> None:
    model = models.Interrupted().eval()
    captured = capture(model, x_of(), mode="fx")
    assert "training takes another path" in captured.notes[0]


def test_another_path_under_autocast_is_refused() -> None:
    model = models.AsksForAutocast().eval()
    gm = fxshare.compile(model, CONFIG, example=x_of(), copy=True)
    assert gm.fxshare.report.front_end == "fx"
    agree(model, gm, "plain", False)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(GuardError, match="under autocast the model takes another path"),
    ):
        gm(x_of())


def test_dropout_that_is_always_on_stays_on() -> None:
    model = models.AlwaysDropping().eval()
    captured = capture(model, x_of(), mode="fx")  # verify has no random function to compare with
    gm: Any = captured.graph.eval()
    assert not torch.equal(gm(x_of()), gm(x_of()))
    assert gm.layers.get_submodule("0.4").training
    assert not gm.layers.get_submodule("0.3").training


MADE: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda gm: pickle.loads(pickle.dumps(gm)),
    "lower": fxshare.lower,
    "readable": fxshare.readable,
}
SHARING = {**CONFIG, "group_size": 3, "compression_rate": 0.5}


@pytest.mark.parametrize("how", [*MADE, "load"])
@pytest.mark.parametrize(
    "kind",
    [models.SameInput, models.Nested, models.Reversal, models.FrozenNorm, models.IslandInAutocast],
    ids=lambda k: k.__name__,
)
def test_what_is_made_of_a_graph_steers_like_it(kind: type[Stack], how: str, tmp_path: Any) -> None:
    model = kind().eval()
    gm = fxshare.compile(model, SHARING, calibration=[x_of()], copy=True)
    assert gm.fxshare.report.front_end == "fx"
    if how == "load":
        fxshare.save(gm, tmp_path / "saved")
        made = fxshare.load(tmp_path / "saved", model=kind().eval())
    else:
        made = MADE[how](gm)
    for training in (False, True):
        y, gradients = run(gm, x_of(1), "plain", training)
        found, others = run(made, x_of(1), "plain", training)
        assert worst(y, found).relative <= LIMIT
        assert worst(gradients["x"], others["x"]).relative <= LIMIT
        assert worst(gradients["head.weight"], others["head.weight"]).relative <= LIMIT
        has = {n for n, g in gradients.items() if g is not None}
        if how != "lower":
            assert {n for n, g in others.items() if g is not None} == has


def test_a_basis_is_not_shared_by_products_with_and_without_gradients() -> None:
    model = models.SameInput().eval()
    gm = fxshare.compile(model, SHARING, calibration=[x_of()], copy=True)
    online = [n for n, g in run(gm, x_of(), "plain", False)[1].items() if g is not None]
    assert any(name.startswith("basis") for name in online)
    assert "layers.0.0.weight" in online


def test_an_error_in_a_region_leaves_no_mode_behind() -> None:
    model = models.IslandInAutocast().eval()
    for gm in (
        capture(model, x_of()).graph,
        fxshare.compile(model, CONFIG, example=x_of(), copy=True),
    ):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            gm(x_of()[..., :3])
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "kind", [models.NoGrad, models.Nested, models.SameInput], ids=lambda k: k.__name__
)
def test_torch_compile_and_export_keep_regions(kind: type[Stack]) -> None:
    model = kind().eval()
    gm = fxshare.compile(model, CONFIG, example=x_of(), copy=True)
    torch._dynamo.reset()
    compiled: Any = torch.compile(gm, backend="aot_eager", fullgraph=True)
    _, gradients = run(gm, x_of(1), "plain", False)
    gm.zero_grad()
    compiled(x_of(1)).square().sum().backward()
    for name, parameter in gm.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
    program = torch.export.export(gm, (x_of(),)).module()
    program(x_of(1)).square().sum().backward()
    none = {n for n, p in program.named_parameters() if p.grad is None}
    assert none == {n for n, p in gm.named_parameters() if gradients[n] is None}


class Rotary(nn.Module):
    """Angles from positions, without gradients: nothing there has any."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()
        self.register_buffer("frequencies", torch.arange(1, models.WIDTH + 1) / 10.0)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            positions = torch.arange(x.shape[1], device=x.device)
            angles = (positions[:, None].float() * self.frequencies).cos()
        y: Tensor = self.stack(x * angles)
        return y


def test_a_region_without_gradients_anyway_is_not_in_the_graph() -> None:
    captured = capture(Rotary().eval(), x_of())
    assert captured.front_end == "fx"
    assert "set_modes" not in captured.graph.code


def test_capture_leaves_generators_flags_and_gradients_alone() -> None:
    model = models.Normed().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    capture(model, x_of())
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    apply = torch.autograd.Function.__dict__["apply"]
    assert apply.__func__.__module__ == "torch.autograd.function"


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_capture_sees_the_same_whatever_is_around_it(around: Callable[[], Any]) -> None:
    model = models.Nested().eval()
    expected = capture(model, x_of()).graph.code
    with around():
        assert capture(model, x_of()).graph.code == expected


def test_on_the_meta_device_regions_are_kept_and_nothing_is_run() -> None:
    model = models.NoGrad().to("meta").eval()
    captured = capture(model, x_of().to("meta"))
    assert captured.error is None
    assert captured.graph.code.count("set_modes(") == 2
    noisy = capture(models.Noisy().to("meta").eval(), x_of().to("meta"))
    assert noisy.front_end == "modules"


@pytest.mark.parametrize("how", ["module", "weight", "accumulated"])
def test_a_site_with_backward_hooks_is_left_alone(how: str) -> None:
    model = Stack().eval()
    linear = model.layers[1][0]
    if how == "module":
        linear.register_full_backward_hook(models.BackwardHook.reverse)
    elif how == "weight":
        linear.weight.register_hook(lambda gradient: gradient * 2)
    else:
        linear.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    plan = fxshare.plan(model, CONFIG, example=x_of())
    skipped = {one.name: one.reason for one in plan.skipped}
    assert "hooks" in skipped["layers.1.0"]
    assert len(plan.sites) == 5


def test_a_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxshare.capture.tracing.trace, "keep_modes", lambda *_: 0)
    with pytest.raises(CaptureError, match=r"'layers.0.0.bias' has a gradient, in the original no"):
        capture(models.NoGrad().eval(), x_of(), mode="fx")


def test_a_frozen_parameter_and_integer_outputs_are_no_difference() -> None:
    class Chosen(Stack):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return {"logits": y, "best": y.argmax(-1), "none": y.detach()}

    model = Chosen().eval()
    model.layers[0].requires_grad_(False)
    assert capture(model, x_of(), mode="fx").error is not None


def test_a_model_without_a_backward_pass_is_captured_with_a_note() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            raise NotImplementedError("inference only")

    class Forward(models.First):
        def first(self, x: Tensor) -> Tensor:
            y: Tensor = Once.apply(self.layers[0](x))  # type: ignore[no-untyped-call]
            return y

    captured = capture(Forward().eval(), x_of(), mode="fx")
    assert "gradients in eval mode were not compared" in captured.notes[0]
    assert "inference only" in captured.notes[0]
