"""A model by its name, as the command line and scripts give it; downloaded only where the name is
a hub id."""

from __future__ import annotations

import difflib
import importlib
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fxshare.base.imported import current_folder_on_path
from fxshare.base.progress import stage
from fxshare.base.unfinished import settle
from fxshare.data.stream import TextTokenizer
from fxshare.errors import ConfigError, DataError, FxShareWarning
from fxshare.loading.hub import is_hub_id, snapshot
from fxshare.loading.pretrained import (
    contents,
    import_transformers,
    load_pretrained,
    refuse_adapter,
)
from fxshare.loading.state import SUFFIXES
from fxshare.models.source import EMBEDDED, USER
from passes.errors import FxShareError

_LOG = logging.getLogger(__name__)
Kind = Literal["saved", "transformers", "factory", "embedded"]
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class LoadedModel:
    """A model, what kind of name it was loaded by, its tokenizer where it came with one, and the
    folder of its files."""

    name: str
    kind: Kind
    model: nn.Module
    tokenizer: TextTokenizer | None = None
    folder: Path | None = None


def load_model(
    name: str, *, original: nn.Module | None = None, allow_missing: bool = False
) -> LoadedModel:
    """Load a model from the disk or from Python.

    Parameters
    ----------
    name
        One of: a folder that :func:`fxshare.save` wrote; a transformers folder (``config.json`` and
        weights); ``package.module:factory``, an ``nn.Module`` or a callable without arguments that
        returns one, imported with the current folder on the Python path; ``embedded``, the demo's
        model (a folder of that name is ``./embedded``); ``owner/name`` on the Hugging Face hub,
        where there is no folder ``owner`` here, from the cache or downloaded.
    original
        The model that a saved folder was made from; used where the folder cannot tell its class.
    allow_missing
        Warn where the weights of a transformers folder are not exactly those of its class, instead
        of refusing it: parameters without weights are random then.

    Raises
    ------
    ConfigError
        The name is none of these; the message says what was tried.
    DataError
        A folder without weights, with weights that are incomplete, quantised, an adapter, or not
        those of the class that it names; one that transformers cannot read; a hub id that is
        neither cached nor to be had.
    StoreError
        A saved folder that is damaged or needs ``original``.
    """
    if name == "embedded":
        from fxshare.embedded import load_embedded, load_tokenizer

        with stage("load", _LOG):
            return LoadedModel(name, "embedded", load_embedded(), load_tokenizer())
    folder = Path(name)
    settle(folder.resolve() if folder.is_symlink() else folder)
    if not folder.exists() and is_hub_id(name):
        with stage("download", _LOG):
            folder = snapshot(name)
    if folder.is_dir():
        if is_saved(str(folder)):
            return _saved(name, folder, original)
        refuse_adapter(name, folder)
        if (folder / "config.json").is_file():
            with stage("load", _LOG) as running:
                model = load_pretrained(name, folder, allow_missing=allow_missing)
                running.found(type(model).__name__)
            return LoadedModel(name, "transformers", model, _tokenizer(folder), folder)
        raise DataError(
            f"{name}: expected fxshare.json (a folder written by fxshare.save) or config.json (a "
            f"transformers folder), found {contents(folder)}"
        )
    module_name, colon, attribute = name.partition(":")
    if colon and module_name and attribute and not folder.exists():
        with stage("load", _LOG) as running:
            made = _made(name, module_name, attribute)
            running.found(type(made).__name__)
        return LoadedModel(name, "factory", made)
    if folder.is_file() and folder.suffix in SUFFIXES:
        raise ConfigError(
            f"{name}: weights without a model; write a function that makes it, and name that as "
            "package.module:function: def make(): return fxshare.loading.state.load_weights(Net(), "
            f"{name!r})"
        )
    near = difflib.get_close_matches(name, ["embedded"], n=1)
    file = "it is a file" if folder.is_file() else "no such folder"
    raise ConfigError(
        f"{name!r} is not a model: expected a folder written by fxshare.save or a transformers "
        f"folder ({file}), package.module:factory (no ':' with names on both sides), or "
        f"'embedded', or owner/name on the Hugging Face hub."
        f"{' Did you mean embedded?' if near else ''}"
    )


def is_saved(name: str) -> bool:
    """Whether the name is that of a folder that :func:`fxshare.save` wrote."""
    from fxshare.store.manifest import MANIFEST

    folder = Path(name)
    settle(folder.resolve() if folder.is_symlink() else folder)  # it may be back by it
    return (folder / MANIFEST).is_file()


def _saved(name: str, folder: Path, original: nn.Module | None) -> LoadedModel:
    from fxshare.loading.load import load
    from fxshare.store.manifest import read_manifest

    tells = read_manifest(folder).source.kind != USER
    model = load(folder, None if tells else original)
    tokenizer = _tokenizer(folder)
    if tokenizer is None and model.fxshare.source.kind == EMBEDDED:
        from fxshare.embedded import load_tokenizer

        tokenizer = load_tokenizer()
    return LoadedModel(name, "saved", model, tokenizer, folder)


def _tokenizer(folder: Path) -> TextTokenizer | None:
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        return None
    transformers = import_transformers(str(folder))
    try:
        # Whole files are encoded at once and cut into windows: no length is too much.
        tokenizer: TextTokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, model_max_length=sys.maxsize
        )
    except Exception as error:  # as above; token files can still be used
        warnings.warn(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}); only "
            "token files can be used as data",
            FxShareWarning,
            stacklevel=4,
        )
        return None
    return tokenizer


def _made(name: str, module_name: str, attribute: str) -> nn.Module:
    with current_folder_on_path():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{name}: there is no module {error.name!r} in the current folder or on the "
                "Python path; expected package.module:factory"
            ) from error
        except Exception as error:
            raise FxShareError(
                f"{name}: importing {module_name} failed: {type(error).__name__}: {error}"
            ) from error
        if not hasattr(module, attribute):
            near = difflib.get_close_matches(attribute, dir(module), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name}: module {module_name} has no {attribute!r}.{hint}")
        made = getattr(module, attribute)
        if not isinstance(made, nn.Module) and callable(made):
            made = _called(name, made)
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"{name}: expected an nn.Module or a callable that returns one, found a "
            f"{type(made).__name__}"
        )
    return made


def _called(name: str, factory: Any) -> Any:
    try:
        return factory()
    except FxShareError:
        raise
    except Exception as error:
        raise FxShareError(f"{name}: the factory raised {type(error).__name__}: {error}") from error


__all__ = ["Kind", "LoadedModel", "is_saved", "load_model"]
