"""Which constants belong to a model: those of its device and dtype, at the threads in use."""

from __future__ import annotations

import torch
from torch import nn

from fxshare.base.machine import environment
from fxshare.capture import device_of, dtype_of
from fxshare.cost_model.rates import Rates, how_to_measure, read_rates


def device_name(device: torch.device) -> str:
    """The name of the processor or the GPU, under which its constants are kept."""
    return str(environment()["cpu" if device.type == "cpu" else "gpu"])


def rates_for(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """The constants measured before for this device and dtype at the threads in use, or None."""
    name = str(dtype).removeprefix("torch.")
    return read_rates(device.type, device_name(device), name, threads_of(device))


def rates_of_model(model: nn.Module) -> Rates | None:
    """:func:`rates_for` where the model is and its dtype; a model on meta is taken to be for the
    CPU."""
    return rates_for(_place(model), dtype_of(model))


def how_to_measure_for(model: nn.Module) -> str:
    """The command that measures what :func:`rates_of_model` looks for."""
    device, dtype = _place(model), str(dtype_of(model)).removeprefix("torch.")
    return how_to_measure(device.type, dtype, threads_of(device))


def _place(model: nn.Module) -> torch.device:
    device = device_of(model)
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def threads_of(device: torch.device) -> int:
    """Processor threads; 1 on a GPU, where they do not matter."""
    return torch.get_num_threads() if device.type == "cpu" else 1
