"""Statistics in a folder: one safetensors file for each sum, and an index with their hashes.

A part of the statistics (:class:`Part`) is what one pass over the data gathered. It is written
beside its place and renamed, so that it is there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxshare.base.files import aside, swap_in
from fxshare.base.hashes import sha256_of
from fxshare.calibration.gradients import Moment
from fxshare.calibration.gram import DiagonalAccumulator, GramAccumulator, Summed, SummedRows
from fxshare.calibration.lookups import LookedUpSite, LookupStatistics, RowCounter
from fxshare.errors import CalibrationError, StoreError

INDEX = "part.json"


@dataclass(frozen=True)
class OnDisk:
    """A sum that was written; read when its moment is asked for, of which the mean and the trace
    alone stay in memory."""

    path: Path
    kind: str
    features: int
    tokens: int
    nbytes: int
    device: str
    total: float
    """The trace of the moment, or of ``A`` where ``Wᵀ A W`` was kept; NaN without tokens."""
    mean_I: Tensor | None = None

    def gram(self) -> Tensor:
        """As the accumulator's."""
        return self._restored().gram()

    def mean(self) -> Tensor:
        """As the accumulator's."""
        if self.mean_I is None:
            raise CalibrationError(f"{self.features} features: expected at least 1 row, found 0")
        return self.mean_I

    def times(self, left_OI: Tensor, mean_I: Tensor | None = None) -> Tensor:
        """As the accumulator's."""
        restored = self._restored()
        assert isinstance(restored, GramAccumulator)
        return restored.times(left_OI, mean_I)

    def trace(self) -> float:
        """As the accumulator's."""
        return self.total

    def check_finite(self) -> None:
        """What is not finite is not written."""

    def _restored(self) -> GramAccumulator | DiagonalAccumulator:
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise StoreError(f"cannot read statistics from {self.path}: {error}") from error
        on = {name: value.to(self.device) for name, value in tensors.items()}
        if self.kind == "diagonal":
            return DiagonalAccumulator.restored(self.features, self.tokens, on)
        return GramAccumulator.restored(self.features, self.tokens, on)


@dataclass(frozen=True)
class Part:
    """What one pass over the data gathered of some sites."""

    inputs: Mapping[str, tuple[SummedRows, ...]]
    """Per site one for each distinct input of its calls."""
    batches: int
    tokens: int
    """Of the busiest linear or lookup of the whole model."""
    gradients: Mapping[str, tuple[Summed, ...]] = field(default_factory=dict)
    lookups: Mapping[str, LookedUpSite] = field(default_factory=dict)
    unmasked: int = 0
    """Inputs without one row a token."""
    loss: str = ""
    total_loss: float = 0.0
    starts: tuple[int, ...] = ()

    def sums(self) -> list[Summed]:
        """Every sum once."""
        found: dict[int, Summed] = {}
        for parts in (*self.inputs.values(), *self.gradients.values()):
            found |= {id(one): one for one in parts}
        for looked_up in self.lookups.values():
            found |= {id(x.gradient): x.gradient for x in looked_up.parts if x.gradient is not None}
        return list(found.values())


def write_part(folder: Path, part: Part) -> Part:
    """Write a part as the folder of that name; the same part, on disk.

    Raises :class:`StoreError` where the disk refuses; nothing is written then.
    """
    with aside(folder) as beside:
        numbers: dict[int, int] = {}
        entries = []
        for number, one in enumerate(part.sums()):
            numbers[id(one)] = number
            entries.append(_write(beside / f"{number}.safetensors", one))
        index: dict[str, Any] = {
            "sums": entries,
            "inputs": _numbered(part.inputs, numbers),
            "gradients": _numbered(part.gradients, numbers),
            "lookups": {},
            "batches": part.batches,
            "tokens": part.tokens,
            "unmasked": part.unmasked,
            "loss": part.loss,
            "total_loss": part.total_loss.hex(),
            "starts": list(part.starts),
        }
        for at, (site, one_site) in enumerate(part.lookups.items()):
            rows = {str(i): x.counter.counts_V for i, x in enumerate(one_site.parts)}
            file = f"rows-{at}.safetensors"
            save_file({name: counts.cpu() for name, counts in rows.items()}, beside / file)
            index["lookups"][site] = {
                "slice": one_site.slice_name,
                "width": one_site.width,
                "file": file,
                "sha256": sha256_of(beside / file),
                "gradients": [
                    None if x.gradient is None else numbers[id(x.gradient)] for x in one_site.parts
                ],
            }
        (beside / INDEX).write_text(json.dumps(index, indent=1))
        swap_in(beside, folder)
    return read_part(folder, check=False)


def _numbered(
    parts: Mapping[str, tuple[Summed, ...]], numbers: Mapping[int, int]
) -> dict[str, list[int]]:
    return {name: [numbers[id(one)] for one in found] for name, found in parts.items()}


def _write(path: Path, one: Summed) -> dict[str, Any]:
    assert isinstance(one, Moment)
    tensors = one.state()
    device = next((str(t.device) for t in tensors.values()), "cpu")
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path)
    return {
        "file": path.name,
        "sha256": sha256_of(path),
        "kind": one.kind,
        "features": one.features,
        "tokens": one.tokens,
        "bytes": one.nbytes,
        "device": device,
        "trace": one.trace().hex() if one.tokens else "nan",
    }


def read_part(folder: Path, *, check: bool = True) -> Part:
    """The part that :func:`write_part` wrote, with ``check`` only where every file is as it was
    written.

    Raises :class:`StoreError` naming what is not.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        sums = [_read(folder, entry, check) for entry in index["sums"]]

        def of(key: str) -> dict[str, tuple[Any, ...]]:
            return {name: tuple(sums[i] for i in found) for name, found in index[key].items()}

        return Part(
            inputs=of("inputs"),
            batches=int(index["batches"]),
            tokens=int(index["tokens"]),
            gradients=of("gradients"),
            lookups={
                name: _read_lookups(folder, entry, sums.__getitem__, check)
                for name, entry in index["lookups"].items()
            },
            unmasked=int(index["unmasked"]),
            loss=str(index["loss"]),
            total_loss=float.fromhex(index["total_loss"]),
            starts=tuple(index["starts"]),
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise StoreError(
            f"{folder} has no statistics that can be read: {type(error).__name__}: {error}; remove "
            "it, and they are gathered again"
        ) from error


def _read(folder: Path, entry: Mapping[str, Any], check: bool) -> OnDisk:
    path = _checked(folder, entry, check)
    found = OnDisk(
        path=path,
        kind=str(entry["kind"]),
        features=int(entry["features"]),
        tokens=int(entry["tokens"]),
        nbytes=int(entry["bytes"]),
        device=str(entry["device"]),
        total=float.fromhex(entry["trace"]),
    )
    if found.kind != "whole" or not found.tokens:
        return found
    with safe_open(path, framework="pt") as file:
        mean_I = file.get_tensor("sum").to(found.device) / found.tokens
    return OnDisk(**{**vars(found), "mean_I": mean_I})


def _read_lookups(
    folder: Path, entry: Mapping[str, Any], sum_of: Callable[[int], OnDisk], check: bool
) -> LookedUpSite:
    parts = []
    with safe_open(_checked(folder, entry, check), framework="pt") as file:
        for at, number in enumerate(entry["gradients"]):
            counts_V: Tensor = file.get_tensor(str(at))
            counter = RowCounter(len(counts_V))
            counter.counts_V = counts_V
            parts.append(LookupStatistics(counter, None if number is None else sum_of(number)))
    return LookedUpSite(str(entry["slice"]), int(entry["width"]), tuple(parts))


def _checked(folder: Path, entry: Mapping[str, Any], check: bool) -> Path:
    name = str(entry["file"])
    if Path(name).name != name:
        raise StoreError(f"{folder / INDEX} names a file outside of its folder: {name!r}")
    path = folder / name
    if check and sha256_of(path) != entry["sha256"]:
        raise StoreError(
            f"{path} is not what was written (its hash differs); remove {folder}, and the "
            "statistics are gathered again"
        )
    return path


__all__ = ["OnDisk", "Part", "read_part", "write_part"]
