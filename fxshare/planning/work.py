"""A work folder: what a run has computed, so that another one goes on from there.

::

    work/
      work.json             what it was made from: a hash of the model, one of the data, ...
      lock                  held by the run that uses it
      problem.json          the slices and what they cost, to plan without the model
      statistics/part-*     of the dense model, one folder for each pass over the data
      spectra/              losses and decompositions of groups, on these statistics
      plans/HASH/           of one budget: statistics measured again, their spectra, judged trials

Every file is written aside and renamed, with a hash over its content: a run that is killed leaves a
file whole or not at all, and the next one computes what is not there. What is read is what would
have been computed, bit for bit, so a continued run gives what an uninterrupted one does.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxshare.base.cache import read_entry, write_entry
from fxshare.base.fingerprints import name_of, of_batches, of_json, of_model
from fxshare.base.lock import only_here
from fxshare.base.made_from import hold_to
from fxshare.calibration.losses import Loss
from fxshare.config import ShareConfig
from fxshare.errors import StoreError
from fxshare.sites.site import Site

FORMAT = 1
_DECIDES = ("weight_types", "block_pattern", "capture")
"""Sections of the configuration that statistics depend on; the budget is not among them."""
_CALLED = {
    "model": "another model, or other weights",
    "data": "other calibration data",
    "configuration": "another configuration (weight types, block pattern, capture, calibration, "
    "planner.labels, or planner.search on and off)",
    "loss": "another loss",
    "seed": "another seed",
    "versions": "other versions",
}


@dataclass(frozen=True)
class Work:
    """A work folder that this process holds, for one budget."""

    path: Path
    plan: str
    """A hash of what a plan depends on beside the statistics."""

    def statistics(self, number: int) -> Path:
        """Where the statistics of a round go; those of round 0 serve every budget."""
        return self.path / "statistics" if number == 0 else self._of_plan / f"statistics-{number}"

    @property
    def inputs(self) -> Path:
        """Where statistics without gradients go."""
        return self.path / "inputs"

    def spectra(self, number: int) -> Path:
        """Where what is computed on the statistics of a round goes."""
        return self.path / "spectra" if number == 0 else self._of_plan / f"spectra-{number}"

    def remembered(self, what: object, compute: Callable[[], float]) -> float:
        """A number that was computed before in this folder, or now; ``what`` says which, by its
        ``repr``."""
        key = hashlib.sha256(repr(what).encode()).hexdigest()
        content = read_entry(self._of_plan / "judged", key)
        if content is not None:
            (found,) = struct.unpack("<d", content)
            return float(found)
        found = compute()
        write_entry(self._of_plan / "judged", key, struct.pack("<d", found))
        return found

    @property
    def _of_plan(self) -> Path:
        return self.path / "plans" / self.plan


@contextlib.contextmanager
def opened(path: Path, fingerprint: Mapping[str, str], plan: str) -> Iterator[Work]:
    """Hold a work folder, which is made where there is none.

    Raises :class:`StoreError` for one that another process holds, that is none, or that was made
    from something else; it says from what.
    """
    if path.exists() and not path.is_dir():
        raise StoreError(f"work folder {path}: expected a folder, found a file; give another")
    if path.is_dir() and not (path / "work.json").exists():
        # a run that was killed at its very beginning leaves these
        begun = ("lock", ".work.json.")
        if not all(one.name.startswith(begun) for one in path.iterdir()):
            raise StoreError(
                f"work folder {path} has files and no work.json: it is no work folder; give another"
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make {path}: {error.strerror or error}") from error
    with only_here(path):
        _compare(path, fingerprint)
        yield Work(path, plan)


def _compare(path: Path, fingerprint: Mapping[str, str]) -> None:
    file = path / "work.json"
    if not file.exists() and "data" not in fingerprint:
        raise StoreError(f"work folder {path} has no statistics yet: give calibration data")
    hold_to(file, fingerprint, _CALLED, number=FORMAT, told=("versions", "seed"))


def check_versions(path: Path) -> None:
    """Raises :class:`StoreError` for a folder that other versions have written, or that does not
    say which."""
    file = path / "work.json"
    if not file.exists():
        raise StoreError(
            f"{path} has no {file.name}, which says what it was made from: plan with MODEL"
        )
    hold_to(file, {"versions": _versions()}, _CALLED, number=FORMAT, told=("versions",))


def _versions() -> str:
    return f"fxshare {version('fxshare')}, torch {torch.__version__}"


def fingerprint(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[object] | None,
    cfg: ShareConfig,
    *,
    loss: Loss | None,
    seed: int,
) -> dict[str, str]:
    """What statistics depend on, a hash for each part; of a loss of one's own its name alone.
    Without data there is none of it: what is in the folder already is asked for."""
    decides = deciding(cfg)
    decides["held_back"] = cfg.planner.search != "off"
    decides["sites"] = [site.model_dump(mode="json") for site in sites]
    data = {} if batches is None else {"data": of_batches(batches)}
    return data | {
        "model": of_model(model),
        "configuration": of_json(decides),
        "loss": "default" if loss is None else name_of(loss),
        "seed": str(seed),
        "versions": _versions(),
    }


def deciding(cfg: ShareConfig) -> dict[str, Any]:
    """What statistics depend on in a configuration, by its name there."""
    named = cfg.model_dump(mode="json")
    decides: dict[str, Any] = {name: named[name] for name in _DECIDES}
    decides["max_tokens"] = cfg.calibration.max_tokens
    decides["labels"] = cfg.planner.labels
    return decides


def plan_key(cfg: ShareConfig) -> str:
    """A hash of what a plan depends on, statistics apart."""
    named = cfg.model_dump(mode="json")
    parts = {name: named[name] for name in ("budget", "planner")}
    parts["relative_floor"] = cfg.calibration.relative_floor
    return of_json(parts)[:16]


__all__ = ["Work", "check_versions", "deciding", "fingerprint", "opened", "plan_key"]
