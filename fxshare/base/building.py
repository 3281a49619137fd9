"""Making a module from sizes that a file states, which may be any."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


class TooMany(Exception):
    """More parameters or modules were made than there can be."""


@contextmanager
def at_most(count: int | None) -> Iterator[None]:
    """Let this thread register at most ``count`` parameters and submodules meanwhile: a
    configuration of a million layers is noticed while the first of them are made. None is no limit.

    Raises :class:`TooMany`.
    """
    thread, made = threading.get_ident(), 0

    def counted(module: nn.Module, name: str, registered: object) -> None:
        nonlocal made
        if threading.get_ident() == thread:
            made += 1
            if count is not None and made > count:
                raise TooMany(f"more than {count:,} parameters and submodules")

    hooks = [
        register_module_module_registration_hook(counted),
        register_module_parameter_registration_hook(counted),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


__all__ = ["TooMany", "at_most"]
