"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import functools
import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from typing import Any, ParamSpec, TextIO

import typer
from rich.console import Console

import fxshare
from fxshare.cli.ranks import in_ranks, is_first
from fxshare.cli.stages import stages_shown

P = ParamSpec("P")
ShowWarning = Callable[..., None]


@dataclass(frozen=True)
class Result:
    """What a command found: ``data`` for ``--json``, ``text`` for people, and its exit code."""

    data: Any
    text: str
    code: int = 0


def reports(command: Callable[P, Result]) -> Callable[P, None]:
    """A command that prints its result at its end.

    Until then stdout is stderr: what a model or a library prints does not get into the result; and
    every warning of ours is shown as a line. A command that takes ``verbose`` and ``quiet`` works
    long, and its stages are shown as these say. Of several processes the first prints.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with ExitStack() as during:
            during.enter_context(redirect_stdout(sys.stderr))
            during.enter_context(warnings.catch_warnings())
            if "quiet" in kwargs:
                how = {name: bool(kwargs.get(name)) for name in ("verbose", "quiet")}
                during.enter_context(stages_shown(**how))
            warnings.simplefilter("always", fxshare.errors.FxShareWarning)
            warnings.showwarning = _show_warning(warnings.showwarning)
            name = command.__name__.partition("_")[0]
            during.enter_context(in_ranks(name, verbose=bool(kwargs.get("verbose"))))
            result = command(*args, **kwargs)
        if not is_first():
            return
        if kwargs.get("as_json"):
            print(json_text(result.data))
        elif result.text:
            print(result.text)
        if result.code:
            raise typer.Exit(result.code)

    return run


def json_text(data: Any) -> str:
    """One JSON document; numbers that JSON cannot hold (NaN, infinity) become null."""
    return json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Aligned columns, the first ``left`` of them to the left; never cut to the terminal's width.

    A cut number is worse than a long line, and pipes have no width.
    """
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def show_error(message: str, *, hint: str | None = None) -> None:
    """``error: message`` on stderr, red on a terminal; a hint follows on a line of its own."""
    _stderr(f"error: {message}", "red")
    if hint:
        _stderr(hint, "")


def _show_warning(otherwise: ShowWarning) -> ShowWarning:
    """Our warnings as one line ``warning: message`` on stderr; others as they were shown before."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, fxshare.errors.FxShareWarning):
            _stderr(f"warning: {message}", "yellow")
        else:
            otherwise(message, category, filename, lineno, file, line)

    return show


def note(message: str) -> None:
    """A line on stderr about what is going on; only on a terminal."""
    if sys.stderr.isatty():
        say(message)


def say(message: str) -> None:
    """A line on stderr about what was decided for the user; also in a pipe."""
    _stderr(message, "dim")


def _stderr(text: str, style: str) -> None:
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(text, style=style)
