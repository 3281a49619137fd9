"""Spectra and decompositions in a folder, by the names of groups."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fxshare.base.cache import read_entry, write_entry
from fxshare.factors.decompose import Decomposition
from fxshare.factors.metric import SliceStatistics

_EXACT = "priced-exactly"


def options_key(name: str, relative_floor: float, sketch: int | None, seed: int = 0) -> str:
    """See :attr:`Spectra.key_of_options`."""
    return f"{name} {relative_floor} {sketch} {seed}"


def priced_exactly(folder: Path) -> bool:
    """Whether groups were priced in float64 there although their weights are no finer than
    float32."""
    return read_entry(folder, _EXACT) is not None


def note_exact(folder: Path) -> None:
    """Say so."""
    write_entry(folder, _EXACT, b"")


def spectra_name(number: int, aware: bool, bias: bool, exact: bool) -> str:
    """What tells the statistics of a round, a metric and a precision from others of a folder."""
    return f"{number} {aware} {bias}{' exact' if exact else ''}"


def entry_of(options: str, names: tuple[str, ...]) -> str:
    """The name of a group's spectrum among others of named statistics."""
    return hashlib.sha256(repr((options, names)).encode()).hexdigest()


def content_entry(options: str, members: Sequence[SliceStatistics]) -> str:
    """The name of a group's spectrum by what it is computed from: weights and statistics."""
    digest = hashlib.sha256(options.encode())
    inputs = [one.input for one in members]
    for one in members:
        # the Gram is pooled over distinct inputs: which members have the same one counts too
        shape, number = tuple(one.weight_OI.shape), inputs.index(one.input)
        kinds = f"{one.moment_OO is None} {one.is_projected}"
        digest.update(f"{shape} {number} {kinds}".encode())
        for t in (one.weight_OI, one.gram_II, one.moment_OO, one.product_II):
            if t is not None:
                digest.update(t.detach().double().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_tails(folder: Path, entry: str) -> NDArray[np.float64] | None:
    """The tails that were kept under a name; None where they were not."""
    content = read_entry(folder, f"{entry}.spectrum")
    return None if content is None else np.frombuffer(content, np.float64).copy()


def read_decomposition(
    folder: Path, entry: str, dtype: torch.dtype, device: torch.device
) -> Decomposition | None:
    """The decomposition in a dtype that was kept under a name; None where it was not."""
    content = read_entry(folder, entry)
    if content is None:
        return None
    # how many values are significant, N values, and N² numbers of the vectors
    size = math.isqrt((len(content) - 8) // dtype.itemsize)
    while 8 + 8 * size + dtype.itemsize * size * size > len(content):
        size -= 1
    own = bytearray(content)
    numbers = torch.frombuffer(own, dtype=torch.float64, count=1 + size).to(device)
    vectors = torch.frombuffer(own, dtype=dtype, offset=8 + 8 * size).to(device)
    return Decomposition(numbers[1:], vectors.view(size, size), int(numbers[0]))


def write_decomposition(folder: Path, entry: str, found: Decomposition) -> None:
    """Keep a decomposition under a name."""
    numbers = torch.cat([found.spectrum.new_tensor([found.significant]), found.spectrum])
    parts = (numbers, found.vectors.contiguous())
    write_entry(folder, entry, b"".join(t.cpu().numpy().tobytes() for t in parts))
