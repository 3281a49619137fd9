"""Attention written out draws the dropout masks that the original draws with the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxshare.base.numerics import tolerance
from fxshare.capture import capture


class _Attending(nn.Module):
    """A dropout stands behind the attention: how its output lies in memory orders the draws."""

    def __init__(self, *, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, dropout=0.4, batch_first=batch_first)
        self.read = nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.4)
        self.need_weights = need_weights

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        y, weights = self.attention(x, memory, memory, need_weights=self.need_weights)
        return self.read(self.dropout(y)), weights


class _Layers(nn.Module):
    def __init__(self, *, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        options: Any = {"batch_first": batch_first, "norm_first": norm_first, "dropout": 0.3}
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, **options)
        self.decoder = nn.TransformerDecoderLayer(16, 4, 32, **options)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        memory = self.encoder(x, src_key_padding_mask=padding)
        return self.decoder(x, memory, memory_key_padding_mask=padding)


def _compare(model: nn.Module, *inputs: Tensor) -> None:
    gm = capture(model, inputs, mode="fx").graph
    model.train()
    gm.train()
    torch.manual_seed(1)
    expected = model(*inputs)
    torch.manual_seed(1)
    limit = tolerance(torch.float32, 32)
    torch.testing.assert_close(gm(*inputs), expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_the_same_seed_gives_the_same_masks(batch_first: bool, need_weights: bool) -> None:
    model = _Attending(batch_first=batch_first, need_weights=need_weights)
    _compare(model, torch.randn(3, 5, 16), torch.randn(3, 5, 16))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_so_do_the_layers_of_torch(batch_first: bool, norm_first: bool) -> None:
    model = _Layers(batch_first=batch_first, norm_first=norm_first)
    x = torch.randn(3, 5, 16)
    padding = torch.zeros(*((3, 5) if batch_first else (5, 3)), dtype=torch.bool)
    padding[0, -1] = True
    _compare(model, x, padding)
