"""The demo: a small GPT, really trained, on the source of Python's standard library.

Importing this package is cheap; torch and the weights are loaded by the functions.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxshare.embedded.bpe import Tokenizer
    from fxshare.embedded.model import GPT


def _read(name: str) -> bytes:
    from fxshare.errors import DataError

    resource = files("fxshare.embedded").joinpath(name)
    if not resource.is_file():
        raise DataError(
            f"fxshare.embedded: expected the packaged file {name}, found none; install the wheel,"
            " or train it with `python -m fxshare.embedded.train --out DIR` and copy the file"
        )
    return resource.read_bytes()


def load_tokenizer() -> Tokenizer:
    """The packaged tokenizer."""
    from fxshare.embedded.bpe import Tokenizer

    return Tokenizer.from_json(_read("bpe.json").decode("utf-8"))


def load_embedded() -> GPT:
    """The packaged model, in eval mode; its weights are stored in bfloat16 and loaded as float32.

    Usable as the factory ``fxshare.embedded:load_embedded``.
    """
    from fxshare.embedded.model import from_safetensors

    return from_safetensors(_read("model.safetensors"))


__all__ = ["load_embedded", "load_tokenizer"]
