"""Which line of the model's own code is running, for messages and guards."""

from __future__ import annotations

import sys
from types import FrameType

_NOT_MODEL = ("torch", "fxshare.capture", "contextlib", "passes", "importlib", "transformers.utils")


def _is_model_code(module: str, filename: str) -> bool:
    outside = any(module == name or module.startswith(f"{name}.") for name in _NOT_MODEL)
    return not outside and not filename.startswith("<")


def model_line() -> str:
    """``module:line`` of the innermost frame that is the model's own code.

    The module and not the file, because the text stays in the graph and travels with it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if _is_model_code(module, frame.f_code.co_filename):
            return f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


def failing_line(error: BaseException) -> str:
    """``file.py:line`` of the innermost frame of the model's own code in a traceback."""
    found = "an unknown line"
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if _is_model_code(trace.tb_frame.f_globals.get("__name__", ""), code.co_filename):
            found = f"{code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
