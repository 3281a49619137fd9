"""A served folder read back by transformers, as its users do."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fxshare.errors import CheckFailed
from fxshare.exporting.targets.dense import no_progress

_PACKAGE = "transformers_modules"


def read_back(folder: Path, auto: str) -> Any:
    """The model that the auto class ``auto`` makes of a folder, in eval mode, with the folder's
    own code.

    Raises :class:`CheckFailed` where it does not load, or weights are missing or left over.
    """
    transformers: Any = importlib.import_module("transformers")
    auto_class = getattr(transformers, auto)
    with own_modules(), no_progress():
        try:
            model, info = auto_class.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=True,
                dtype="auto",
                output_loading_info=True,
            )
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise CheckFailed(
                f"transformers does not load what was written: {type(error).__name__}: {lines[0]}"
            ) from error
        for each in (auto_class, transformers.AutoModel):
            each._model_mapping._extra_content.pop(type(model.config), None)
    odd = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if odd:
        raise CheckFailed(f"transformers does not load what was written as it is: {odd}")
    return model.eval()


@contextmanager
def own_modules() -> Iterator[None]:
    """Let code that transformers imports from folders go to a place that is gone afterwards: it
    copies it to the user's cache, where it would stay under the name of a temporary folder."""
    dynamic: Any = importlib.import_module("transformers.dynamic_module_utils")
    before = dynamic.HF_MODULES_CACHE
    known = {name: module for name, module in sys.modules.items() if _is_of_folders(name)}
    path = list(sys.path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in known:
                del sys.modules[name]
            sys.path[:] = [each for each in path if each != before]
            dynamic.HF_MODULES_CACHE = folder
            yield
        finally:
            dynamic.HF_MODULES_CACHE = before
            sys.path[:] = path
            for name in [name for name in sys.modules if _is_of_folders(name)]:
                del sys.modules[name]
            sys.modules.update(known)


def _is_of_folders(name: str) -> bool:
    return name == _PACKAGE or name.startswith(f"{_PACKAGE}.")
