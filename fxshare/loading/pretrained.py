"""A transformers folder: its class, and its weights held to what the class has."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fxshare.base.building import at_most
from fxshare.base.json_text import parse_json
from fxshare.errors import DataError
from fxshare.loading.architecture import class_of
from fxshare.loading.keys import Keys, check_keys
from fxshare.loading.weights import check_weights, tensor_names
from fxshare.models.quantised import quantisation_of, refusal_of_quantised
from fxshare.store.sizes import most_modules
from fxshare.store.transformers import MODEL_TYPE
from passes.errors import FxShareError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_ADAPTER = "adapter_config.json"
_REPORTS = "transformers.modeling_utils"


def load_pretrained(name: str, folder: Path, *, allow_missing: bool) -> nn.Module:
    """The model of a folder with ``config.json`` and weights, in the class that it was saved as.

    Raises :class:`DataError` for a folder that is not whole, is quantised, has an adapter of PEFT,
    or, unless ``allow_missing``, whose weights are not exactly those of the class.
    """
    config = _config_of(folder)
    if config.get("model_type") == MODEL_TYPE:
        raise DataError(
            f"{name}: config.json is that of a folder of fxshare.save, but fxshare.json is missing;"
            " copy the whole folder"
        )
    if str(config.get("model_type")).startswith(f"{MODEL_TYPE}_"):
        raise DataError(
            f"{name}: an export of fxshare to 'vllm', whose code runs in transformers and vLLM "
            "where one says so, and never here; name the folder that it was made from"
        )
    quantised = config.get("quantization_config")
    if quantised is not None and not isinstance(quantised, Mapping):
        raise DataError(
            f'{name}: config.json: expected "quantization_config" to be an object, found '
            f"{quantised!r:.80}; leave it out where the weights are not quantised"
        )
    method = quantisation_of(config)
    if method is not None:
        raise DataError(refusal_of_quantised(name, method))
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise DataError(
            f"{name}: expected weights ({' or '.join(_WEIGHTS)}) beside config.json, found "
            f"{contents(folder)}"
        )
    most = most_modules(check_weights(folder))
    transformers = import_transformers(name)
    report = _Report()
    try:
        with _progress_on_terminals_only(transformers), at_most(most), report:
            found = class_of(name, folder, config, transformers, most)
            model, info = found.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                # a shape that differs is named below, which transformers would only print
                ignore_mismatched_sizes=True,
            )
    except FxShareError:
        raise
    except Exception as error:  # transformers raises whatever the file at fault made it raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{name}: transformers cannot load this folder: {reason[0]}{report.conversions()}"
        ) from error
    keys = Keys.of(
        info["missing_keys"],
        info["unexpected_keys"],
        info["mismatched_keys"],
        names=tensor_names(folder),
    )
    check_keys(name, type(model).__name__, keys, allow_missing=allow_missing)
    loaded: nn.Module = model
    return loaded


def refuse_adapter(name: str, folder: Path) -> None:
    """A :class:`DataError` for a folder with an adapter: merged, it is no model that its
    configuration describes, and what is compiled from it could not be loaded."""
    if not (folder / _ADAPTER).is_file():
        return
    try:
        base = parse_json((folder / _ADAPTER).read_bytes())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    of = f" of {base}" if isinstance(base, str) else ""
    raise DataError(
        f"{name}: an adapter of PEFT{of} ({_ADAPTER}), whose products are not the model's weights "
        "yet; merge it and give the folder of the result: peft.AutoPeftModelForCausalLM."
        f"from_pretrained({name!r}).merge_and_unload().save_pretrained(FOLDER)"
    )


def contents(folder: Path) -> str:
    """What lies in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"


class _Report(logging.Filter):
    """Takes the table that transformers prints about weights which do not fit: what is in it is
    raised, or warned of, here."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" not in text:
            return True
        self._lines += text.splitlines()
        return False

    def __enter__(self) -> _Report:
        logging.getLogger(_REPORTS).addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger(_REPORTS).removeFilter(self)

    def conversions(self) -> str:
        """The names in it, to follow an error's text."""
        plain = (re.sub(r"\x1b\[[0-9;]*m", "", line) for line in self._lines)
        found = [line.split("|")[0].strip() for line in plain if "| CONVERSION" in line]
        few = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        return f" ({len(found)} of them: {few})" if found else ""


def _config_of(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, found {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: expected a JSON object, found a {type(config).__name__}")
    return config


def import_transformers(name: str) -> Any:
    """The library, or a :class:`DataError` that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise DataError(
            f"{name}: a transformers folder needs the transformers library, which cannot be "
            f"imported ({error}); pip install 'fxshare[hf]'"
        ) from error
    return transformers


@contextmanager
def _progress_on_terminals_only(transformers: Any) -> Iterator[None]:
    bars = transformers.utils.logging
    if sys.stderr.isatty() or not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


__all__ = ["contents", "import_transformers", "load_pretrained", "refuse_adapter"]
