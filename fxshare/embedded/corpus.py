"""The demo's corpus: the source of the running Python's standard library.

Modules are split by a hash of their name alone, so a module that was held out when the packaged
model was trained is held out on every machine and under every Python version.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from torch import Tensor

from fxshare.embedded.bpe import SEPARATOR, Tokenizer
from fxshare.errors import DataError

WINDOW = 256
"""Tokens per window."""
Role = Literal["training", "held_out"]
# Chosen for a split with few lines copied between its sides and no module that later versions
# moved across it (a look at the text alone, before any training).
_SPLIT_SEED = "fxshare-demo-split-25"
_CALIBRATION_SEED = "fxshare-demo-calibration-1"
_HELD_OUT_PER_MILLE = 50
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
# Of encodings/ only the hand-written modules: the rest is character tables.
_ENCODINGS = frozenset({"__init__.py", "aliases.py", "idna.py", "punycode.py", "utf_8_sig.py"})
# Tables that a program wrote.
_GENERATED = frozenset(
    {"html/entities.py", "msilib/schema.py", "msilib/sequence.py", "re/_casefix.py"}
)


@dataclass(frozen=True)
class Document:
    """One module: its posix path below the standard library, and its source."""

    name: str
    text: str


def _hash(seed: str, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")


def role_of(name: str) -> Role:
    """Role of the module with posix path ``name``; about 5 % of all modules are held out.

    ``a/b.py`` and ``a/b/__init__.py`` have one role: modules became packages between versions.
    """
    module = name.removesuffix(".py").removesuffix("/__init__")
    return "held_out" if _hash(_SPLIT_SEED, module) % 1000 < _HELD_OUT_PER_MILLE else "training"


def _belongs(name: str) -> bool:
    path = PurePosixPath(name)
    if _SKIPPED_FOLDERS.intersection(path.parts[:-1]) or name in _GENERATED:
        return False
    if path.parts[0] == "encodings":
        return path.name in _ENCODINGS
    return not path.name.startswith("_sysconfigdata") and not path.parts[0].startswith("config-")


def load_documents(root: Path | None = None) -> list[Document]:
    """Every module of the corpus, sorted by name.

    ``root`` is the library's folder, by default that of the running Python. Line ends are
    normalised to a newline; a file that its declared encoding cannot read is left out.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    documents: list[Document] = []
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder).as_posix()
        if not _belongs(name):
            continue
        try:
            with tokenize.open(str(path)) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        if text.strip():
            documents.append(Document(name, text))
    if not documents:
        raise DataError(
            f"demo corpus: expected the .py files of the standard library in {folder}, found none;"
            " run the demo with a Python installed with its source (not zipped or stripped)"
        )
    return sorted(documents, key=lambda document: document.name)


def training(documents: Iterable[Document]) -> list[Document]:
    """The modules that the packaged model was trained on."""
    return [document for document in documents if role_of(document.name) == "training"]


def held_out(documents: Iterable[Document]) -> list[Document]:
    """The modules that neither the packaged model nor its tokenizer saw."""
    return [document for document in documents if role_of(document.name) == "held_out"]


def calibration(documents: Iterable[Document], *, n_bytes: int = 500_000) -> list[Document]:
    """A sample of training modules: in the order of their hash, until ``n_bytes`` are reached."""
    sample: list[Document] = []
    total = 0
    for document in sorted(training(documents), key=lambda d: _hash(_CALIBRATION_SEED, d.name)):
        if total >= n_bytes:
            break
        sample.append(document)
        total += len(document.text.encode("utf-8"))
    return sample


def token_stream(documents: Iterable[Document], tokenizer: Tokenizer) -> list[int]:
    """Ids of all documents in order, each followed by the separator."""
    ids: list[int] = []
    for document in documents:
        ids.extend(tokenizer.encode(document.text))
        ids.append(SEPARATOR)
    return ids


def pack(ids: Sequence[int], *, window: int = WINDOW) -> Tensor:
    """Cut a token stream into windows, int64 (N, window); the incomplete last one is dropped."""
    n = len(ids) // window
    if n == 0:
        raise DataError(
            f"demo corpus: expected at least {window} tokens (one window), found {len(ids)};"
            " pass more documents or a smaller window"
        )
    return torch.tensor(ids[: n * window], dtype=torch.int64).view(n, window)


__all__ = [
    "WINDOW",
    "Document",
    "Role",
    "calibration",
    "held_out",
    "load_documents",
    "pack",
    "role_of",
    "token_stream",
    "training",
]
