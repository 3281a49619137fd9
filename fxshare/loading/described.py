"""A model without its weights: what its name or its folder's configuration says, on meta."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from fxshare.base.building import at_most
from fxshare.base.json_text import parse_json
from fxshare.base.randomness import randomness_as_before
from fxshare.errors import ConfigError, DataError
from fxshare.loading.names import is_saved, load_model
from fxshare.loading.pretrained import import_transformers
from fxshare.models.shapes import SHAPES, ModelShape

_SIZES = re.compile(r"\d+(,\d+)*")
_MOST_MODULES = 1 << 20


def describe(name: str, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A model on the meta device: a shape of :class:`ModelShape` (``llama-7b``, ``d,L,h,f,vocab``),
    a transformers folder, of which ``config.json`` is enough, or what
    :func:`fxshare.loading.names.load_model` loads, weights and all.

    ``dtype`` is that of a shape, bfloat16 where None. Raises :class:`ConfigError` for a name of
    none of these, and :class:`DataError` for a folder whose model cannot be made.
    """
    folder = Path(name)
    if not folder.exists() and (name in SHAPES or _SIZES.fullmatch(name)):
        with torch.device("meta"):
            return ModelShape.parse(name).model(dtype or torch.bfloat16)
    if (folder / "config.json").is_file() and not is_saved(name):
        made = _of_folder(name, folder)
        if made is not None:
            return made
    try:
        return load_model(name).model
    except ConfigError as error:
        raise ConfigError(f"{error} Or a shape: {', '.join(SHAPES)}, or d,L,h,f,vocab") from None


def _of_folder(name: str, folder: Path) -> nn.Module | None:
    """The class that a configuration names, in the dtype that it names; None where it names none
    that transformers has."""
    transformers = import_transformers(name)
    try:
        named = parse_json((folder / "config.json").read_bytes())["architectures"][0]
        found = getattr(transformers, named)
        if not issubclass(found, transformers.PreTrainedModel):
            return None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    before = torch.get_default_dtype()
    try:
        config = found.config_class.from_pretrained(folder, local_files_only=True)
        dtype = getattr(config, "dtype", None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            torch.set_default_dtype(dtype)
        with randomness_as_before(), at_most(_MOST_MODULES), torch.device("meta"):
            made: nn.Module = found(config).eval()
    except Exception as error:  # transformers raises whatever the file at fault made it raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name}: transformers cannot make the model of this config.json: {reason}"
        ) from error
    finally:
        torch.set_default_dtype(before)
    return made


__all__ = ["describe"]
