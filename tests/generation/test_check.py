"""A graph with a cache that is wrong is found out, and then the model's own code generates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fxshare.generation.shell as shell_module
from fxshare.errors import CaptureError, FxShareWarning
from fxshare.generation.check import check_program
from fxshare.generation.program import Program, capture_program
from fxshare.generation.shell import shell_of
from tests.generation.models import causal, compiled, notes, pair, prompts


def later(position_ids: Tensor) -> Tensor:
    return position_ids + (position_ids.shape[1] == 1)


def unmasked(mask: Tensor) -> Tensor:
    return torch.ones_like(mask)


def shifted(mask: Tensor) -> Tensor:
    return mask.roll(1, -1)


def _replace_input(program: Program, name: str, by: Callable[[Tensor], Tensor]) -> None:
    graph = program.graph.graph
    node = next(n for n in graph.nodes if n.target == name)
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        new = graph.call_function(by, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    program.graph.recompile()
    program.forget()


def _forget_the_past(program: Program) -> None:
    """Attention over the new keys alone: the cache is written, and not read."""
    graph: fx.Graph = program.graph.graph
    node = next(n for n in graph.nodes if n.op == "call_method" and n.target == "update")
    with graph.inserting_after(node):
        own = graph.call_function(
            lambda kv, k: (torch.cat([kv[0][..., : -k.shape[2], :] * 0, k], 2), kv[1]),
            (node, node.args[1]),
        )
    node.replace_all_uses_with(own, delete_user_cb=lambda user: user is not own)
    program.graph.recompile()
    program.forget()


def program_of(gm: Any) -> tuple[Program, Any]:
    """A program as capture makes it, before it is checked."""
    gm.generate(**prompts(), max_new_tokens=2)
    steps = gm.meta["structure"].made["steps"]
    shell = shell_of(gm)
    return capture_program(gm, shell, next(iter(steps.programs))), shell


def test_a_sound_program_passes() -> None:
    _, gm = pair("llama")
    program, shell = program_of(gm)
    assert check_program(program, gm, shell) < 1e-5


@pytest.mark.parametrize(
    ("what", "name"),
    [(later, "position_ids"), (unmasked, "attention_mask"), (shifted, "attention_mask")],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_input_that_is_off_by_one_is_caught(family: str, what: Any, name: str) -> None:
    _, gm = pair(family)
    program, shell = program_of(gm)
    _replace_input(program, name, what)
    with pytest.raises(CaptureError, match="differs from the plain graph"):
        check_program(program, gm, shell)


def test_a_cache_that_is_not_read_is_caught() -> None:
    _, gm = pair("llama")
    program, shell = program_of(gm)
    _forget_the_past(program)
    with pytest.raises(CaptureError, match="differs from the plain graph"):
        check_program(program, gm, shell)


def test_a_parameter_of_another_shape_is_caught() -> None:
    _, gm = pair("llama")
    program, _ = program_of(gm)
    name = next(
        str(n.target)
        for n in program.graph.graph.nodes
        if n.op == "get_attr" and str(n.target).endswith("weight")
    )
    owner, _, leaf = name.rpartition(".")
    setattr(program.graph.get_submodule(owner), leaf, torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(CaptureError, match=name.replace(".", r"\.")):
        program.bound(gm)


def test_what_no_graph_runs_runs_the_models_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Program:
        raise CaptureError("it is Tuesday")

    monkeypatch.setattr(shell_module, "capture_program", refuse)
    model = causal("mistral")
    gm = compiled("mistral", model)
    options = {**prompts(), "max_new_tokens": 24, "do_sample": False}
    with pytest.warns(FxShareWarning, match="it is Tuesday"):
        found = gm.generate(**options)
    assert torch.equal(model.generate(**options), found)
    assert len(notes(gm)) == 1
    gm.generate(**options)
    assert len(notes(gm)) == 1


def test_what_a_graph_has_no_inputs_for(recwarn: pytest.WarningsRecorder) -> None:
    model, gm = pair("llama")
    gm = copy.deepcopy(gm)  # the pair is every test's, and this leaves a note
    options = {**prompts(), "max_new_tokens": 6, "do_sample": False, "use_cache": False}
    assert torch.equal(model.generate(**options), gm.generate(**options))
