"""The processes that torchrun starts: all work, the first one writes and speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

import fxshare

_SET = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SHARED = ("compile", "plan", "refine")


def size() -> int:
    """How many processes torchrun has started; 1 where it has not."""
    if not all(name in os.environ for name in _SET):
        return 1
    try:
        return int(os.environ["WORLD_SIZE"])
    except ValueError:
        return 1


def is_first() -> bool:
    """Whether this process writes and speaks."""
    return size() == 1 or os.environ["RANK"] == "0"


def speaks_of(error: BaseException) -> bool:
    """Whether this process is the one to show an error: the first, or where that one is gone, the
    others."""
    return is_first() or bool(getattr(error, "of_first", False))


@contextmanager
def in_ranks(name: str, *, verbose: bool) -> Iterator[None]:
    """The process group of torchrun's processes for the time of a command, which all of them end
    together. Only the first one writes to stderr, all with ``verbose``.

    Raises :class:`ConfigError` for a command that is one process' work.
    """
    if size() == 1:
        yield
        return
    if name not in _SHARED:
        raise fxshare.errors.ConfigError(
            f"fxshare {name} is the work of one process, and torchrun has started {size()}; start "
            f"it without torchrun. {', '.join(_SHARED[:-1])} and {_SHARED[-1]} share theirs"
        )
    import torch.distributed as dist

    from fxshare.base.processes import in_step

    dist.init_process_group("gloo")
    try:
        with ExitStack() as during:
            if not (is_first() or verbose):
                nowhere = during.enter_context(open(os.devnull, "w", encoding="utf-8"))
                during.enter_context(redirect_stdout(nowhere))
                during.enter_context(redirect_stderr(nowhere))
            during.enter_context(in_step())
            yield
    finally:
        dist.destroy_process_group()


__all__ = ["in_ranks", "is_first", "size", "speaks_of"]
