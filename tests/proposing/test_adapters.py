"""Adapters are left out of a proposal with the reason; what they are around is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from tests.toys import Residual


def test_lora_of_peft_is_left_out() -> None:
    peft = pytest.importorskip("peft")
    options: Any = {"r": 8, "target_modules": ["fc"], "modules_to_save": ["h.0.out", "h.1.out"]}
    model = peft.get_peft_model(Residual(24), peft.LoraConfig(**options))
    found = fxshare.propose(model)
    patterns = [spec.pattern for spec in found.config.weight_types.values()]
    assert patterns == [r".*\.fc\.base_layer$", r".*\.modules_to_save\.default$"]
    reasons = {left.name.partition("base_model.model.")[2]: left.reason for left in found.left_out}
    for part in ("fc.lora_A.default", "fc.lora_B.default"):
        assert reasons[f"h.0.{part} and 1 more"].startswith("is part of an adapter")
        assert "merge_and_unload()" in reasons[f"h.0.{part} and 1 more"]
    assert "modules_to_save" in reasons["h.0.out.original_module and 1 more"]
    assert "lora_" not in found.text.partition("Left as they are")[0]
    gm = fxshare.compile(model, example={"x": torch.randn(2, 3, 16)})
    assert not any("lora" in site.name for site in gm.fxshare.plan.sites)


class _WithLora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.lora_down = nn.Linear(16, 8, bias=False)
        self.lora_up = nn.Linear(8, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora_up(self.lora_down(x))


def test_so_is_one_of_another_package() -> None:
    found = fxshare.propose(nn.ModuleDict({"h": nn.Sequential(_WithLora(), _WithLora())}))
    assert len(found.config.weight_types) == 1
    assert {"lora_down" in left.name or "lora_up" in left.name for left in found.left_out} == {True}
