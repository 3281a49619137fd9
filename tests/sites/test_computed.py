"""Weights that something computes or fetches are refused with the module and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import fxshare
from fxshare.errors import CaptureError, MatchError
from tests.toys import Residual

_FC = {"weight_types": {"fc": {"pattern": r"h\.\d+\.fc"}}}


def _with(change: Callable[[nn.Module], object], at: str) -> nn.Module:
    model = Residual()
    for block in model.h:
        change(block.get_submodule(at))
    return model


def _pruned(module: nn.Module, name: str = "weight") -> None:
    prune.l1_unstructured(module, name, 0.3)


def _iterated(module: nn.Module) -> None:
    _pruned(module)
    prune.random_unstructured(module, "weight", 0.3)  # a container of both


_COMPUTED: dict[str, tuple[Callable[[Any], object], str]] = {
    "weight_norm": (weight_norm, r"weight_norm\); call .*remove_weight_norm\(module, 'weight'"),
    "spectral_norm": (spectral_norm, r"spectral_norm\); call .*remove_spectral_norm\(module"),
    "pruning": (_pruned, r"prune\); call .*prune\.remove\(module, 'weight'\)"),
    "pruned twice": (_iterated, r"prune\); call .*prune\.remove\(module, 'weight'\)"),
    "pruned bias": (lambda m: _pruned(m, "bias"), r"its bias .*prune\.remove\(module, 'bias'\)"),
    "parametrised": (
        parametrizations.weight_norm,
        r"WeightNorm\); call .*remove_parametrizations\(module, 'weight'\)",
    ),
    "parametrised bias": (
        lambda m: parametrize.register_parametrization(m, "bias", nn.Tanh()),
        r"Tanh\); call .*remove_parametrizations\(module, 'bias'\)",
    ),
}


@pytest.mark.parametrize("capture", ["auto", "modules"])
@pytest.mark.parametrize("kind", list(_COMPUTED))
def test_a_matched_weight_that_is_computed_is_refused(kind: str, capture: Any) -> None:
    change, reason = _COMPUTED[kind]
    model = _with(change, "fc")
    with pytest.raises(MatchError, match=rf"'h\.0\.fc' .*{reason}"):
        fxshare.compile(model, _FC, example=torch.randn(2, 3, 16), capture=capture)


@pytest.mark.parametrize("capture", ["auto", "modules"])
@pytest.mark.parametrize("kind", ["weight_norm", "pruning", "pruned twice"])
def test_one_elsewhere_that_cannot_be_copied_is_named(kind: str, capture: Any) -> None:
    change, reason = _COMPUTED[kind]
    model = _with(change, "out")
    with pytest.raises(CaptureError, match=rf"module 'h\.0\.out': .*{reason}"):
        fxshare.compile(model, _FC, example=torch.randn(2, 3, 16), capture=capture)


def test_what_changes_when_it_is_read_is_named_or_taken_in_eval_mode() -> None:
    model = _with(parametrizations.spectral_norm, "out").train()
    x = torch.randn(2, 3, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reason = r"'h\.0\.out' is in training mode.*remove_parametrizations.*model\.eval\(\)"
    with pytest.raises(CaptureError, match=reason):
        fxshare.compile(model, _FC, example=x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gm = fxshare.compile(model.eval(), _FC, example=x)
    torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize("kind", list(_COMPUTED))
@pytest.mark.parametrize("at", ["fc", "out"])
def test_a_proposal_leaves_them_out_with_the_reason(kind: str, at: str) -> None:
    change, reason = _COMPUTED[kind]
    found = fxshare.propose(_with(change, at))
    (left,) = found.left_out
    assert left.name == f"h.0.{at} and 1 more"
    with pytest.raises(MatchError, match=reason):
        raise MatchError(left.reason)
    assert list(found.config.weight_types) == [{"fc": "out", "out": "fc"}[at]]


def test_one_pruned_layer_leaves_the_others_in_the_proposal() -> None:
    model = Residual()
    _pruned(model.get_submodule("h.0.fc"))
    found = fxshare.propose(model)
    assert [left.name for left in found.left_out] == ["h.0.fc"]
    assert {one.name: one.sites for one in found.types} == {"fc": 1, "out": 2}


def _hooked(module: nn.Module, **options: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", **options))


def test_hooks_of_accelerate_on_a_matched_module_are_named() -> None:
    reason = r"'h\.0\.fc' has accelerate's AlignDevicesHook.*remove_hook_from_module"
    with pytest.raises(MatchError, match=reason):
        fxshare.compile(_with(_hooked, "fc"), _FC, example=torch.randn(2, 3, 16))


@pytest.mark.parametrize("at", ["fc", "out"])
def test_weights_that_accelerate_fetches_are_refused(at: str) -> None:
    def change(module: nn.Module) -> None:
        _hooked(module, offload=True, weights_map=dict(module.state_dict()))

    model = _with(change, at)
    reason = rf"module 'h\.0\.{at}' are offloaded by .*AlignDevicesHook.*remove_hook_from_module"
    with pytest.raises(CaptureError, match=reason):
        fxshare.compile(model, _FC, example=torch.randn(2, 3, 16))
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.remove_hook_from_module(model, recurse=True)
    fxshare.compile(model, _FC, example=torch.randn(2, 3, 16))
