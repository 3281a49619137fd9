"""How far refining is, on a terminal: a bar with the held-out loss and the time left."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from fxshare.base.processes import here
from fxshare.refining.options import RefineOptions
from fxshare.refining.run import Run

_WHOLE = 1000


class Shown:
    """The bar for the time of the loop; nothing where stderr is no terminal, since the lines about
    measurements go through ``logging`` there."""

    def __init__(self, options: RefineOptions) -> None:
        self._options = options
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Shown:
        if sys.stderr.isatty() and here().is_first:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("time left"))
            console = Console(stderr=True)
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._bar.__enter__()
            self._task = self._bar.add_task("refining", total=_WHOLE)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)

    def step(self, progress: float) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=min(progress, 1.0) * _WHOLE)

    def at(self, run: Run, progress: float) -> None:
        """Say the held-out loss."""
        if self._bar is not None:
            losses = f"{run.first.objective:.4f} → {run.best.objective:.4f}"
            self._bar.update(self._task, description=f"refining, held-out loss {losses}")
            self.step(progress)


__all__ = ["Shown"]
