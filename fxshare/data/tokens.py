"""Files of token ids, mapped and not read: what is not looked at takes no memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxshare.errors import DataError

TOKEN_FILES = (".npy", ".safetensors")
_MASK = "attention_mask"
_AT_ONCE = 1 << 22  # ids that are checked at a time


def token_rows(path: Path, key: str | None) -> Tensor:
    """The ids of a file in the dtype they are stored in, (T,) or (N, T), mapped from the disk; not
    to be written to.

    Raises :class:`DataError` where there are no whole numbers, or not in one of these shapes.
    """
    ids = _npy(path) if path.suffix == ".npy" else _safetensors(path, key)
    if ids.ndim not in (1, 2):
        name = str(path) if key is None else f"{path}:{key}"
        raise DataError(
            f"{name}: expected shape (tokens,) or (rows, tokens), found {tuple(ids.shape)}"
        )
    return ids


def mask_rows(path: Path) -> Tensor | None:
    """The tensor ``attention_mask`` of a safetensors file; None where there is none."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        if _MASK not in list(file.keys()):
            return None
        mask: Tensor = file.get_tensor(_MASK)
        return mask


def check_ids(ids: Tensor, vocabulary: int | None, *, name: str) -> None:
    """Raise :class:`DataError` naming the first id that is negative or not in the vocabulary."""
    if ids.numel() == 0:
        raise DataError(f"{name}: expected tokens, found none")
    flat = ids.flatten()
    for start in range(0, len(flat), _AT_ONCE):
        part = flat[start : start + _AT_ONCE].to(torch.int64)
        wrong = part < 0 if vocabulary is None else (part < 0) | (part >= vocabulary)
        if not bool(wrong.any()):
            continue
        at = int(wrong.int().argmax())
        limit = "of 0 or more" if vocabulary is None else f"of 0 to {vocabulary - 1}"
        raise DataError(
            f"{name}: expected token ids {limit}, found {int(part[at])} at position {start + at}; "
            "was the data made with this model's tokenizer?"
        )


def _npy(path: Path) -> Tensor:
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        if path.stat().st_size and _is_empty_array(path):
            return torch.zeros(0, dtype=torch.int64)
        raise DataError(f"{path}: cannot be read as .npy: {error}") from error
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.integer):
        found = getattr(array, "dtype", type(array).__name__)
        raise DataError(f"{path}: expected whole numbers (token ids), found {found}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array)


def _is_empty_array(path: Path) -> bool:
    # nothing can be mapped of an array without entries
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return False
    return bool(np.issubdtype(array.dtype, np.integer)) and array.size == 0


def _safetensors(path: Path, key: str | None) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            choices = [name for name in names if name != _MASK]
            if key is None and len(choices) == 1:
                key = choices[0]
            if key not in names:
                found = f"no tensor {key!r}" if key else f"{len(names)} tensors"
                raise DataError(
                    f"{path}: found {found}; choose one as {path.name}:NAME from "
                    f"{', '.join(names) or 'an empty file'}"
                )
            tensor: Tensor = file.get_tensor(key)
    except SafetensorError as error:
        raise DataError(f"{path}: cannot be read as safetensors: {error}") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(f"{path}:{key}: expected whole numbers (token ids), found {tensor.dtype}")
    return tensor


__all__ = ["TOKEN_FILES", "check_ids", "mask_rows", "token_rows"]
