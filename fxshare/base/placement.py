"""Where a module's tensors are, and in what numbers."""

from __future__ import annotations

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; CPU where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter; float32 where it has none."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrices of bfloat16 are multiplied there by instructions of their own."""
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a dtype is worth computing in there: half precision is not on a CPU without
    instructions for its products, and of float16 none is taken to have some."""
    if device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return True
    return dtype == torch.bfloat16 and multiplies_bfloat16(device)


__all__ = ["device_of", "dtype_of", "multiplies", "multiplies_bfloat16"]
