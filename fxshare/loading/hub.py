"""Models of the Hugging Face hub, for names that the user wrote as hub ids, and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fxshare.errors import DataError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# pickled weights are left where they are: nothing here unpickles
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.yaml", "*.md")


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form ``owner/model``, and is not a path that was mistyped: neither
    it nor a folder ``owner`` is here."""
    owner = name.partition("/")[0]
    return _ID.fullmatch(name) is not None and not Path(owner).exists()


def snapshot(name: str, **options: Any) -> Path:
    """The folder of a hub repository: from the cache where it is complete there, else downloaded.

    Raises :class:`DataError` saying everything that was tried.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise DataError(
            f"{name}: no such folder, and a hub id needs huggingface_hub, which cannot be imported "
            f"({error}); pip install 'fxshare[hf]', or give a folder"
        ) from error
    options = {key: value for key, value in options.items() if value is not None}
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=list(_PATTERNS), **options)
        )
    except Exception as error:  # of requests, of the hub, or of the file system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        cache = options.get("cache_dir") or huggingface_hub.constants.HF_HUB_CACHE
        raise DataError(
            f"{name}: cannot be found; tried the local folder {Path(name)} (not there), the cache "
            f"{cache} (no complete copy), and the Hugging Face hub ({type(error).__name__}: "
            f"{reason}). Download it where there is a network and give its folder"
        ) from error


__all__ = ["is_hub_id", "snapshot"]
