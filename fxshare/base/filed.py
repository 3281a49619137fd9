"""Matrices in a temporary file, of which the first rows are read."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from io import FileIO

import torch
from torch import Tensor

from fxshare.errors import StoreError


class Filed:
    """Rows of matrices in a file that is gone with the process, however that ends."""

    def __init__(self) -> None:
        self._file: FileIO | None = None
        self._size = 0

    def keep(self, rows_NX: Tensor) -> Callable[[int], Tensor] | None:
        """Write a matrix; what reads its first rows, or None where there is no disk for
        it. Reading raises :class:`StoreError` where the disk fails."""
        begin = self._size
        try:
            if self._file is None:
                # unbuffered: what a full disk refused must not be tried again by a later read
                self._file = tempfile.TemporaryFile(prefix="fxshare-", buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            self._file.seek(begin)
            left = _bytes_of(rows_NX.cpu().contiguous())
            while left:  # at most 2 GB go at a time
                left = left[self._file.write(left) :]
            self._size = self._file.tell()
        except OSError:
            return None
        width, dtype, device = rows_NX.shape[1], rows_NX.dtype, rows_NX.device
        return lambda count: self._read(begin, count, width, dtype).to(device)

    def _read(self, begin: int, count: int, width: int, dtype: torch.dtype) -> Tensor:
        assert self._file is not None
        found_RX = torch.empty(count, width, dtype=dtype)
        left = _bytes_of(found_RX)
        try:
            self._file.seek(begin)
            while left:
                read = self._file.readinto(left)
                if not read:
                    raise OSError("it is shorter than what was written")
                left = left[read:]
        except OSError as error:
            raise StoreError(
                f"cannot read a temporary file in {tempfile.gettempdir()}: {error}; set TMPDIR to "
                "another disk"
            ) from error
        return found_RX


def _bytes_of(rows_NX: Tensor) -> memoryview:
    return rows_NX.view(torch.uint8).numpy().data.cast("B")  # numpy has no bfloat16


__all__ = ["Filed"]
