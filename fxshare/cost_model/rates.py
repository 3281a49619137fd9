"""What a device does per second, measured by ``fxshare bench device`` and kept by device, dtype and
thread count in the user's cache folder."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fxshare.base.files import write_text
from fxshare.base.json_text import parse_json
from fxshare.cost_model.measured import Measured, parsed
from fxshare.errors import FxShareWarning

VERSION = 1
Floats = NDArray[np.float64]
Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Rates:
    """Constants of one device at one dtype and thread count.

    ``matmul`` are FLOP/s of products of 512 rows by their narrowest dimension: thin products reach
    less of the peak. ``bandwidth`` are bytes/s of products of one row by the bytes of all the
    weights that are read in turn: what fits a cache is read faster. Both rise in their first
    number, are interpolated between points, and are constant beyond them. ``launch`` are the
    seconds of an operation that has nothing to do, in eager mode and under ``torch.compile``: there
    between products whose weights come from memory, with the guards of its module. ``entry`` are
    those of entering a compiled pass.
    ``measured`` are seconds of single operations at the shapes of models; where it has one, the
    others are not asked.
    """

    device: str
    name: str
    dtype: str
    threads: int
    element_size: int
    matmul: Points
    bandwidth: Points
    launch: float
    launch_compiled: float
    torch: str = ""
    entry: float = 0.0
    measured: Measured = field(default_factory=Measured)

    def flops_per_second(self, narrowest: ArrayLike) -> Floats:
        """FLOP/s of products whose narrowest dimension is ``narrowest``."""
        return _interpolated(self.matmul, narrowest)

    def bytes_per_second(self, working_set: ArrayLike) -> Floats:
        """Bytes/s where ``working_set`` bytes are read in turn."""
        return _interpolated(self.bandwidth, working_set)

    def launch_seconds(self, *, compiled: bool) -> float:
        """Seconds per operation beside its work."""
        return self.launch_compiled if compiled else self.launch

    def to_dict(self) -> dict[str, Any]:
        """The constants as plain data."""
        return {"version": VERSION, **asdict(self)}


def _interpolated(points: Points, at: ArrayLike) -> Floats:
    """Linear in the logarithms of both axes."""
    x, y = (np.log([point[axis] for point in points]) for axis in (0, 1))
    found: Floats = np.exp(np.interp(np.log(np.maximum(np.asarray(at, dtype=np.float64), 1)), x, y))
    return found


def rates_folder() -> Path:
    """``$XDG_CACHE_HOME/fxshare/device``, by default ``~/.cache/fxshare/device``."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    # the XDG specification has relative paths ignored
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "fxshare" / "device"


def rates_path(device: str, name: str, dtype: str, threads: int) -> Path:
    """The file of a device's constants."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return rates_folder() / f"{device}-{slug}-{dtype}-{threads}.json"


def write_rates(rates: Rates) -> Path:
    """Keep the constants; returns the file. :class:`StoreError` where it cannot be written."""
    path = rates_path(rates.device, rates.name, rates.dtype, rates.threads)
    write_text(path, json.dumps(rates.to_dict(), indent=1) + "\n")
    return path


def read_rates(device: str, name: str, dtype: str, threads: int) -> Rates | None:
    """The constants of a device, None where they were never measured.

    A file that cannot be used counts as none, with a :class:`FxShareWarning`.
    """
    path = rates_path(device, name, dtype, threads)
    try:
        content = path.read_bytes()
    except OSError:
        return None
    try:
        return _parsed(parse_json(content))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        warnings.warn(
            f"{path}: not a file of device constants ({error}), times are not predicted; measure "
            f"again: {how_to_measure(device, dtype, threads)}",
            FxShareWarning,
            stacklevel=2,
        )
        return None


def how_to_measure(device: str, dtype: str, threads: int) -> str:
    """The command that measures a device's constants."""
    where = "" if device == "cpu" else f" --device {device}"
    return f"fxshare bench device --dtype {dtype} --threads {threads}{where}"


def _parsed(data: Any) -> Rates:
    if data["version"] != VERSION:
        raise ValueError(f"expected version {VERSION}, found {data['version']!r}")
    return Rates(
        device=str(data["device"]),
        name=str(data["name"]),
        dtype=str(data["dtype"]),
        threads=int(data["threads"]),
        element_size=int(data["element_size"]),
        matmul=_points("matmul", data["matmul"]),
        bandwidth=_points("bandwidth", data["bandwidth"]),
        launch=_positive("launch", data["launch"]),
        launch_compiled=_positive("launch_compiled", data["launch_compiled"]),
        torch=str(data.get("torch", "")),
        entry=float(data.get("entry", 0.0)),
        measured=parsed(**data.get("measured", {"products": (), "attentions": ()})),
    )


def _points(name: str, values: Sequence[Sequence[float]]) -> Points:
    found = tuple((int(at), _positive(name, rate)) for at, rate in values)
    if not found or [at for at, _ in found] != sorted({at for at, _ in found}) or found[0][0] < 1:
        raise ValueError(f"{name}: expected pairs that rise in their first number from 1")
    return found


def _positive(name: str, value: float) -> float:
    if not 0 < float(value) < float("inf"):
        raise ValueError(f"{name}: expected positive finite numbers, found {value!r}")
    return float(value)
