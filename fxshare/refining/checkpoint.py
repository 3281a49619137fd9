"""A work folder for refining: the whole state of a run, replaced as one file.

::

    work/
      refine.json     what the run was made from: hashes of the models and the data, the options
      lock            held by the process that uses it
      checkpoint      the run's numbers, its factors, the best ones, the optimiser's moments

A kill at any moment leaves the checkpoint before or the one after. On a CPU a run that goes on from
one computes what an uninterrupted one does, bit for bit, where steps are counted and not minutes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fxshare.base.cache import read_entry, write_entry
from fxshare.base.json_text import parse_json
from fxshare.base.lock import only_here
from fxshare.base.made_from import hold_to
from fxshare.base.processes import here
from fxshare.errors import StoreError
from fxshare.refining.optimiser import Optimiser
from fxshare.refining.run import Run
from fxshare.refining.student import Student

FORMAT = 1
_MADE_FROM = "refine.json"
_ENTRY = "checkpoint"
_NOW, _BEST = "now.", "best."
_CALLED = {
    "compiled": "another compiled model, or other weights",
    "model": "another model, or other weights",
    "teacher": "another teacher",
    "data": "other data",
    "held out": "other held-out data",
    "second": "another second corpus",
    "loss": "another loss",
    "options": "other options (steps, minutes, objective, learning rate, seed, ...)",
    "versions": "other versions",
}


class Checkpoints:
    """The checkpoint of one folder, which this process holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, student: Student, optimiser: Optimiser, run: Run) -> None:
        """Replace the checkpoint. Where that is not possible training goes on, with a warning."""
        moments, numbers = optimiser.state()
        tensors = {_NOW + name: value for name, value in student.masters.items()}
        tensors |= {_BEST + name: value for name, value in (run.state or {}).items()}
        tensors |= moments
        plain = {
            "run": run.to_dict(),
            "optimiser": numbers,
            "loss_scale": student.loss_scale,
        }
        packed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            whole = student.whole(name.partition(".")[2], tensor)  # of ranks that have parts
            if here().is_first:
                packed[name] = whole.detach().cpu().contiguous()
        if not here().is_first:
            return
        content = save(packed, metadata={"fxshare": json.dumps(plain)})
        write_entry(self.folder, _ENTRY, content)

    def read(self, student: Student) -> tuple[Run, Optimiser] | None:
        """Put the student where the checkpoint was; None, and nothing, where there is none. One
        that is damaged counts as none."""
        content = read_entry(self.folder, _ENTRY)
        if content is None:
            return None
        tensors, plain = _unpacked(content, self.folder)
        now = _named(tensors, _NOW, student.device)
        best = _named(tensors, _BEST, student.device)
        student.put(now)
        student.loss_scale = plain.get("loss_scale", student.loss_scale)
        optimiser = Optimiser(student, plain["optimiser"]["scales"], plain["optimiser"]["kind"])
        optimiser.restore(tensors, plain["optimiser"])
        return Run.from_dict(plain["run"], best or None), optimiser


def _unpacked(content: bytes, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    # its hash is right, so this is what was written; a later version may write something else
    try:
        length = int.from_bytes(content[:8], "little")
        header = parse_json(content[8 : 8 + length])
        return load(content), json.loads(header["__metadata__"]["fxshare"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{folder / _ENTRY} cannot be read: {error}; remove the folder, or give another"
        ) from error


def _named(tensors: Mapping[str, Tensor], start: str, device: torch.device) -> dict[str, Tensor]:
    return {
        name.removeprefix(start): tensor.to(device)
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


@contextlib.contextmanager
def opened(path: Path, made_from: Mapping[str, str]) -> Iterator[Checkpoints]:
    """Hold a work folder, which is made where there is none.

    Raises :class:`StoreError` for one that another process holds, that cannot be written, that is
    none, or that was made from something else; it says from what.
    """
    if path.exists() and not path.is_dir():
        raise StoreError(f"work folder {path}: expected a folder, found a file; give another")
    if path.is_dir() and not (path / _MADE_FROM).exists():
        begun = ("lock", f".{_MADE_FROM}.")  # what a run leaves that was killed at its beginning
        if not all(one.name.startswith(begun) for one in path.iterdir()):
            raise StoreError(
                f"work folder {path} has files and no {_MADE_FROM}: it is none of refining; give "
                "another"
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make {path}: {error.strerror or error}") from error
    with only_here(path):
        hold_to(path / _MADE_FROM, made_from, _CALLED, number=FORMAT, told=("versions",))
        yield Checkpoints(path)


__all__ = ["Checkpoints", "opened"]
