"""Spectra and decompositions in a folder, by the names of groups."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fxshare.base.cache import read_entry, write_entry
from fxshare.factors.decompose import Decomposition


def options_key(name: str, relative_floor: float, sketch: int | None, seed: int = 0) -> str:
    """See :attr:`Spectra.key_of_options`."""
    return f"{name} {relative_floor} {sketch} {seed}"


def entry_of(options: str, names: tuple[str, ...]) -> str:
    """The name of a group's spectrum among others of named statistics."""
    return hashlib.sha256(repr((options, names)).encode()).hexdigest()


def read_tails(folder: Path, entry: str) -> NDArray[np.float64] | None:
    """The tails that were kept under a name; None where they were not."""
    content = read_entry(folder, f"{entry}.spectrum")
    return None if content is None else np.frombuffer(content, np.float64).copy()


def read_decomposition(folder: Path, entry: str, device: torch.device) -> Decomposition | None:
    """The decomposition that was kept under a name; None where it was not."""
    content = read_entry(folder, entry)
    if content is None:
        return None
    numbers = torch.frombuffer(bytearray(content), dtype=torch.float64)
    # N values and N² numbers of the vectors, and how many values are significant
    size = math.isqrt(len(numbers))
    numbers = numbers.to(device)
    vectors = numbers[1 + size :].view(size, size)
    return Decomposition(numbers[1 : 1 + size], vectors, int(numbers[0]))


def write_decomposition(folder: Path, entry: str, found: Decomposition) -> None:
    """Keep a decomposition under a name."""
    parts = [found.vectors.new_tensor([found.significant]), found.spectrum]
    numbers = torch.cat([*parts, found.vectors.reshape(-1)]).cpu().numpy()
    write_entry(folder, entry, numbers.tobytes())
