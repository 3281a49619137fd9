"""What is inside a stretch of layers, computed again in the backward pass: the same bits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxshare.errors import RefineError
from fxshare.refining import recompute
from fxshare.refining.parameters import trainable_of
from fxshare.refining.recompute import activations, recomputed
from fxshare.refining.student import Student
from fxshare.result.module import record_of
from passes.graph.modes import caller_modes, set_modes
from tests.refining.build import equal, everything, ids, refined, subject, usual

EXACT = torch.float64


def student_of(model: nn.Module, gm: Any) -> tuple[Student, Any]:
    """A student, and the first batch as a call."""
    return Student(gm, trainable_of(gm, model, ())), record_of(gm).caller(model)(ids()[0])


@pytest.mark.parametrize(
    ("name", "how"), [("llama", "shared"), ("gpt2", "planned"), ("llama-like", "shared")]
)
def test_outputs_and_gradients_are_the_same_bits(name: str, how: Any) -> None:
    model, gm = usual() if (name, how) == ("llama", "shared") else subject(name, how)
    student, call = student_of(model, gm)
    found = []
    for module in (student.module, recomputed(student)):
        output = student(call, run=module)
        logits = output if isinstance(output, Tensor) else output["logits"]
        student.backward(logits.float().logsumexp(-1).sum())
        found.append({"logits": logits.detach(), **student.gradients()})
    assert equal(*found)
    assert any(bool(gradient.any()) for gradient in found[1].values())


def test_what_is_inside_is_forgotten_and_computed_again() -> None:
    model, gm = usual()
    student, call = student_of(model, gm)
    module = recomputed(student)
    basis = student.trainable.groups[0].basis.removesuffix(".weight")
    runs: list[str] = []
    for name, part in module.named_modules():
        if name.endswith(basis):
            part.register_forward_hook(lambda *_: runs.append("run"))
    output = student(call, run=module)["logits"]
    once = len(runs)
    output.sum().backward()
    assert once > 0
    assert len(runs) == 2 * once
    plain = activations(student, call)
    student.module = module
    assert activations(student, call) < plain / 2


def test_activations_are_what_autograd_keeps() -> None:
    model, gm = usual()
    student, call = student_of(model, gm)
    own = {t.untyped_storage()._cdata for t in student.module.parameters()}
    kept: dict[int, Tensor] = {}  # all are held, so that none has the place of another

    def pack(saved: Tensor) -> Tensor:
        if saved.untyped_storage()._cdata not in own:
            kept[saved.untyped_storage()._cdata] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        output = student(call)
        buffers = {t.untyped_storage()._cdata for t in student.module.buffers()}
    expected = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in buffers)
    assert activations(student, call) == expected
    del output


def test_refining_is_the_same_with_it_and_asks_for_it_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, gm = usual()
    plain = everything(refined(gm, model))
    assert equal(plain, everything(refined(gm, model, recompute=True)))
    student, call = student_of(model, gm)
    needed = activations(student, call)
    for free, said in ((2 * needed, False), (2 * needed - 2, True)):
        caplog.clear()
        monkeypatch.setattr(recompute, "free", lambda free=free: free)
        with caplog.at_level(logging.INFO, logger="fxshare"):
            assert equal(plain, everything(refined(gm, model)))
        assert ("computed again in the backward pass" in caplog.text) is said


def test_what_cannot_be_cut_says_so_and_stays_as_it_is_unasked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, gm = subject("llama", "shared", capture="modules")
    with pytest.raises(RefineError, match="captured at module granularity"):
        refined(gm, model, recompute=True)
    plain = everything(refined(gm, model))
    monkeypatch.setattr(recompute, "free", lambda: 0)
    assert equal(plain, everything(refined(gm, model)))


def test_no_cut_inside_other_modes_or_over_a_write() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    one = graph.call_function(torch.relu, (x,))
    two = graph.call_function(torch.sin, (one,))
    three = graph.call_method("add_", (one, 1))
    graph.output(graph.call_function(torch.mul, (two, three)))
    assert recompute._whole(graph, [0, 2, 3, 4]) == [0, 4]
    graph = fx.Graph()
    caller = graph.call_function(caller_modes)
    x = graph.placeholder("x")
    graph.call_function(set_modes, (caller, False))
    one = graph.call_function(torch.relu, (x,))
    graph.call_function(set_modes, (caller,))
    graph.output(graph.call_function(torch.sin, (one,)))
    assert recompute._whole(graph, [0, 2, 3, 4, 5]) == [0, 2, 5]


def test_a_write_into_the_models_own_tensor_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    count = graph.get_attr("count")
    graph.call_method("add_", (count, 1))
    graph.output(x)
    with pytest.raises(RefineError, match="may write into a tensor of the model"):
        recompute._whole(graph, [0, 2])
