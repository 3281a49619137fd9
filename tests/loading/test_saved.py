"""A folder that was just written is compared on a call of the form that was captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxshare
from fxshare.errors import FxShareError
from fxshare.loading.saved import check_saved
from tests.toys import WIDTH, Residual


class Switched(Residual):
    def forward(self, x: Tensor, mode: str = "one") -> Tensor:
        x = super().forward(x)
        return x * 2 if mode == "two" else x


CONFIG = {"weight_types": {"fc": {"pattern": r"h\.\d+\.fc"}}}


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    model = Switched().eval()
    example = {"x": torch.randn(3, 4, WIDTH), "mode": "two"}
    gm = fxshare.compile(model, CONFIG, example=example)
    fxshare.save(gm, tmp_path / "out")
    return tmp_path / "out", gm, model, example


@pytest.mark.parametrize("given", [True, False])
def test_the_options_of_the_example_are_part_of_the_call(saved: Any, given: bool) -> None:
    folder, gm, model, example = saved
    check_saved(folder, gm, model, example=example if given else None)


def test_other_values_are_told(saved: Any) -> None:
    folder, gm, model, example = saved
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FxShareError):
        check_saved(folder, gm, model, example=example)
