"""``aoti``: machine code from AOTInductor, for this kind of machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from fxshare.capture import device_of
from fxshare.errors import ExportError
from fxshare.exporting.program import traced
from fxshare.exporting.subject import Subject
from fxshare.exporting.written import Written


def write(subject: Subject, path: Path) -> Written:
    """Compile into the package ``path``; ``torch._inductor.aoti_load_package(path)`` takes the
    inputs by name and returns plain containers of tensors.

    Raises :class:`ExportError` where there is no C++ compiler or inductor fails.
    """
    inductor: Any = torch._inductor
    if device_of(subject.model).type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise ExportError(
            "to='aoti' compiles C++ and there is no g++ or clang++ on the PATH; install one, or "
            "export to='pt2' and compile where there is one"
        )
    found = traced(subject)
    try:
        inductor.aoti_compile_and_package(found.program, package_path=str(path))
        loaded = inductor.aoti_load_package(str(path))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ExportError(
            f"AOTInductor cannot compile {subject.name}: {type(error).__name__}: {lines[0]}; "
            "to='pt2' needs no compiler"
        ) from error
    return Written(lambda call: loaded(**call), found.batch, found.sequence, found.notes)
