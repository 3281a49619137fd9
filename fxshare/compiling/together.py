"""What the processes that share a compilation owe each other: equal arguments, one who writes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from fxshare.base.processes import here
from fxshare.config import ShareConfig
from fxshare.errors import StoreError
from fxshare.planning.work import Work, opened
from fxshare.plans.plan import Plan


def agree(
    cfg: ShareConfig,
    batches: Iterable[object] | None,
    made_from: Mapping[str, str],
    folder: str | os.PathLike[str] | None,
) -> None:
    """Raise :class:`ProcessError` where ranks were given different things."""
    parts = {name: value for name, value in made_from.items() if name != "configuration"}
    named = {name: parts.pop(name) for name in ("seed", "loss", "versions")}
    sections = {f"configuration ({name})": value for name, value in cfg.model_dump().items()}
    here().agree(
        {
            **named,
            **sections,
            "number of batches": len(batches) if isinstance(batches, Sequence) else None,
            "work folder": None if folder is None else os.fspath(folder),
            # by its rounding: with more threads sums are cut elsewhere
            "number of threads (torch.set_num_threads)": torch.get_num_threads(),
            **{f"{name} (by its hash)": value for name, value in parts.items()},
        }
    )


def one_plan(plan: Plan) -> Plan:
    """The plan of the first rank, which the others have to have found as well; how long that took
    differs.

    Raises :class:`ProcessError` where one has found another.
    """
    together = here()
    together.agree(
        {"plan, found on other machines or with other libraries,": (plan.groups, plan.units)}
    )
    return together.broadcast(plan, "the plan")


@contextlib.contextmanager
def held(path: Path, made_from: Mapping[str, str], plan: str) -> Iterator[Work]:
    """The work folder, which the first rank holds and writes to, and the others read."""
    together = here()
    if together.is_first:
        with opened(path, made_from, plan) as work:
            together.gather(None, "the work folder")
            yield work
        return
    together.gather(None, "the work folder")
    if not (path / "work.json").exists():
        raise StoreError(
            f"work folder {path}: rank 0 has it and rank {together.rank} does not see it; give one "
            "on a file system that all ranks see"
        )
    yield Work(path, plan)


__all__ = ["agree", "held", "one_plan"]
