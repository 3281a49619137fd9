"""What the processes that refine together owe each other: equal arguments, a share of each step.

The batches of a step are divided by turns, so a step has as many at least as there are processes,
and the same call has the same result in one process, but for the order in which gradients are
added. All ranks end with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from fxshare.base.processes import here
from fxshare.errors import RefineError
from fxshare.refining.checkpoint import Checkpoints, opened
from fxshare.refining.optimiser import Optimiser
from fxshare.refining.options import RefineOptions
from fxshare.refining.run import Run
from fxshare.refining.student import Student


def check_shared(options: RefineOptions) -> None:
    """Raise :class:`RefineError` for what several processes cannot share."""
    size = here().size
    if size == 1:
        return
    if options.accumulate < size:
        raise RefineError(
            f"accumulate={options.accumulate}: expected at least {size}, since {size} processes "
            f"divide the batches of a step; give accumulate={size}, and smaller batches to have as "
            "many tokens in a step"
        )
    if options.shard and options.accumulate % size:
        raise RefineError(
            f"accumulate={options.accumulate} and shard=True: expected a multiple of {size}, since "
            f"{size} processes run their passes together; give accumulate="
            f"{-(-options.accumulate // size) * size}"
        )


def divide_state(student: Student, run: Run, optimiser: Optimiser | None) -> Optimiser | None:
    """Leave each process its part of what is trained, of the best state and of the moments."""
    moments = None if optimiser is None else optimiser.state()
    student.shard()
    if run.state is not None:
        run.state = {name: student.part(name, t).clone() for name, t in run.state.items()}
    if moments is None:
        return None
    tensors, numbers = moments
    parts = {key: student.part(key.partition(".")[2], t) for key, t in tensors.items()}
    divided = Optimiser(student, numbers["scales"], numbers["kind"])
    divided.restore(parts, numbers)
    return divided


def agree(made_from: Mapping[str, str]) -> None:
    """Raise :class:`ProcessError` where ranks were given different things."""
    found: dict[str, object] = {"call": "refine", **made_from}
    # by its rounding: with more threads sums are cut elsewhere
    found["number of threads (torch.set_num_threads)"] = torch.get_num_threads()
    here().agree(found)


@contextmanager
def held(path: Path, made_from: Mapping[str, str]) -> Iterator[Checkpoints]:
    """The work folder, which the first rank holds and writes to, and the others read."""
    together = here()
    if together.is_first:
        with opened(path, made_from) as checkpoints:
            together.gather(None, "the work folder")
            yield checkpoints
        return
    together.gather(None, "the work folder")
    yield Checkpoints(path)


__all__ = ["agree", "check_shared", "divide_state", "held"]
