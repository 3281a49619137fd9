"""What a target hands back to be checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxshare.capture.call import Call


@dataclass(frozen=True, eq=False)
class Written:
    """An export that was read back.

    ``run`` calls it as its runtime does, with the subject's inputs by name; None where nothing can
    run it here. ``batch`` and ``sequence`` say which sizes vary; ``unmasked_only`` that rows which
    the attention mask leaves out are not defined. ``generate`` gives so many tokens after a prompt,
    where the runtime has a loop of its own, with a cache.
    """

    run: Callable[[Call], Any] | None
    batch: bool
    sequence: bool
    notes: tuple[str, ...] = ()
    unmasked_only: bool = False
    generate: Callable[[list[int], int], list[int]] | None = None
