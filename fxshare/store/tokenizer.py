"""The tokenizer beside a saved model: files that are copied, or a tokenizer that writes them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from fxshare.base.json_text import parse_json
from fxshare.errors import StoreError


class SavesItself(Protocol):
    """A tokenizer or processor of transformers."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write the files."""


TokenizerSource: TypeAlias = "str | os.PathLike[str] | SavesItself"
_CONFIG = "tokenizer_config.json"
_FILES = (
    _CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
    "chat_template.json",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Names that transformers gives to the files of tokenizers and processors."""


def is_tokenizer_file(name: str) -> bool:
    """Whether transformers gives this name to a file of a tokenizer or processor."""
    return name in _FILES


def write_tokenizer(source: TokenizerSource, folder: Path) -> None:
    """Copy the tokenizer's files of the folder ``source`` as they are, or let the tokenizer write
    its own.

    Raises :class:`StoreError` where ``source`` is neither.
    """
    if isinstance(source, (str, os.PathLike)):
        _copy(Path(source), folder)
        return
    save_pretrained = getattr(source, "save_pretrained", None)
    if save_pretrained is None:
        raise StoreError(
            f"tokenizer: expected a folder or a tokenizer with save_pretrained, found a "
            f"{type(source).__name__}"
        )
    save_pretrained(str(folder))


def _copy(source: Path, folder: Path) -> None:
    if not source.is_dir():
        raise StoreError(f"tokenizer: expected a folder with tokenizer files, found no {source}")
    found = [name for name in _FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, folder / name)
    if found and not _names_its_class(folder / _CONFIG):
        _name_class(source, folder / _CONFIG)


def _names_its_class(path: Path) -> bool:
    try:
        return "tokenizer_class" in parse_json(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _name_class(source: Path, path: Path) -> None:
    """Write down the class of the tokenizer, which otherwise follows from the model's type: the
    type of a folder of ours says nothing."""
    try:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # the files are copied all the same, for whoever can read them
        return
    content = json.loads(path.read_bytes()) if path.is_file() else {}
    content["tokenizer_class"] = type(tokenizer).__name__
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


__all__ = ["SavesItself", "TokenizerSource", "is_tokenizer_file", "write_tokenizer"]
