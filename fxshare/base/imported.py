"""What a user names as ``package.module:Name``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_origin

from fxshare.errors import ConfigError


def imported(name: str, key: str, of: type = object) -> object:
    """What ``package.module:Name`` says, from the current folder or the Python path; where it is
    ``of``'s or a subclass, an instance, made without arguments. ``key`` is where the name stands.

    Raises :class:`ConfigError` where there is no such thing, or where its module or its class
    raises.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"{key}: expected 'package.module:Name'; found {name!r}")
    with current_folder_on_path():
        try:
            made: object = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{key}: cannot import {name!r}: {error}; expected 'package.module:Name' in the "
                "current folder or on the Python path"
            ) from error
        except Exception as error:
            raise ConfigError(
                f"{key}: importing {name!r} failed: {type(error).__name__}: {error}"
            ) from error
        # Python 3.10 takes dict[str, int] for an instance of type, but not for a class.
        if get_origin(made) is not None or not isinstance(made, type) or not issubclass(made, of):
            return made
        try:
            return made()
        except Exception as error:
            raise ConfigError(
                f"{key}: {name!r} cannot be made without arguments: {type(error).__name__}: {error}"
            ) from error


@contextmanager
def current_folder_on_path() -> Iterator[None]:
    """Modules in the current folder are found."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


__all__ = ["current_folder_on_path", "imported"]
