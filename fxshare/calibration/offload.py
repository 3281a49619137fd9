"""Activations in a file until the backward pass asks for them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.capture.widening import stored_of

_SMALL = 1 << 20


@contextmanager
def offloaded(module: nn.Module) -> Iterator[None]:
    """Write what autograd saves in here to an unnamed file, and read it back when it is asked for;
    the module's own tensors, and what has less than a mebibyte, stay in memory.

    The file is in the system's place for temporary ones (``TMPDIR``), and gone at the end.
    """
    own = {_storage(t) for t in (*module.parameters(), *module.buffers())}
    with tempfile.TemporaryFile(prefix="fxshare-") as file:

        def pack(saved: Tensor) -> Any:
            size = saved.numel() * saved.element_size()
            if size < _SMALL or _storage(saved) in own:
                return saved
            start = file.seek(0, os.SEEK_END)
            flat = saved.detach().cpu().contiguous().view(-1).view(torch.uint8)
            file.write(flat.numpy().data)
            return start, size, saved.dtype, saved.shape, saved.device

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            start, size, dtype, shape, device = packed
            file.seek(start)
            flat = torch.empty(size, dtype=torch.uint8)
            file.readinto(flat.numpy().data)
            return flat.view(dtype).view(shape).to(device)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


def _storage(tensor: Tensor) -> int:
    return int(stored_of(tensor).untyped_storage()._cdata)


__all__ = ["offloaded"]
