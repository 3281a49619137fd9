"""Token data: from text, token files or the standard library's source to windows of tokens.

Legend for shapes: T tokens of a stream, N windows, L tokens per window, V ids of the vocabulary.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxshare.errors import DataError, FxShareWarning

_TEXT_KEY = "text"
# Between the documents of one file, as the rows of a data set are joined in GPTQ's protocol.
_BETWEEN = "\n\n"


class TextTokenizer(Protocol):
    """What is asked of a tokenizer: transformers' and the demo's both do."""

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``."""


@dataclass(frozen=True)
class TokenStream:
    """All tokens of one source in order: ``ids`` is int64 (T,).

    ``bytes_per_token`` is the size of the text as UTF-8 over T, or, where the tokenizer tells, the
    size of every id, int64 (V,); None for token files.
    """

    name: str
    ids: Tensor
    bytes_per_token: float | Tensor | None = None

    def windows(self, length: int, *, count: int | None = None, seed: int = 0) -> Tensor:
        """Windows (N, length) in the order of the stream, without overlap; the rest is dropped.

        With ``count`` they are a random choice of that many, still in order; where there are fewer,
        all of them and a :class:`FxShareWarning`.
        """
        if length < 1:
            raise DataError(f"{self.name}: expected windows of at least 1 token, found {length}")
        found = len(self.ids) // length
        if found == 0:
            raise DataError(
                f"{self.name}: expected at least {length} tokens, one window, found "
                f"{len(self.ids)}; give more data or a smaller length"
            )
        windows = self.ids[: found * length].view(found, length)
        if count is None or count == found:
            return windows
        if count < 1:
            raise DataError(f"{self.name}: expected at least 1 window to choose, found {count}")
        if count > found:
            warnings.warn(
                f"{self.name}: {count} windows of {length} tokens were asked for, the data has "
                f"{found}: all of them are used",
                FxShareWarning,
                stacklevel=2,
            )
            return windows
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(found, generator=generator)[:count].sort().values
        return windows[chosen]


def load_tokens(
    spec: str,
    *,
    tokenizer: TextTokenizer | None,
    length: int,
    count: int | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
) -> Tensor:
    """Windows of tokens, int64 (N, length): :func:`read_stream`, then
    :meth:`TokenStream.windows`."""
    stream = read_stream(spec, tokenizer=tokenizer, vocabulary=vocabulary)
    return stream.windows(length, count=count, seed=seed)


def read_stream(
    spec: str, *, tokenizer: TextTokenizer | None, vocabulary: int | None = None
) -> TokenStream:
    """Read all tokens of a source.

    Parameters
    ----------
    spec
        One of: ``file.txt`` in UTF-8; ``file.jsonl``, an object with the key ``text`` a line
        (``file.jsonl:key`` for another key), the texts joined by an empty line; ``file.npy`` or
        ``file.safetensors`` with whole numbers of shape (T,) or (N, T), the rows one after the
        other (``file.safetensors:name`` chooses the tensor); ``stdlib``, a sample of the modules of
        Python's standard library that the demo's model was trained on; ``stdlib:held-out``, those
        that were held out.
    tokenizer
        For text; token files need none.
    vocabulary
        Number of ids that the model knows: a larger id in the data is an error.

    Raises
    ------
    DataError
        The data cannot be read, is empty, or has ids that the model does not know.
    """
    name, _, part = spec.partition(":")
    if name == "stdlib":
        stream = _stdlib(spec, part, tokenizer)
    else:
        path, key = _split(spec)
        if not path.is_file():
            raise DataError(
                f"{spec}: no such file; expected a .txt, .jsonl, .npy or .safetensors file, "
                "'stdlib' or 'stdlib:held-out'"
            )
        match path.suffix:
            case ".txt":
                stream = _encoded(spec, _decoded(path), tokenizer)
            case ".jsonl":
                stream = _encoded(spec, _jsonl(path, key or _TEXT_KEY), tokenizer)
            case ".npy":
                stream = TokenStream(spec, _npy(path))
            case ".safetensors":
                stream = TokenStream(spec, _safetensors(path, key))
            case other:
                raise DataError(
                    f"{spec}: expected a .txt, .jsonl, .npy or .safetensors file, found "
                    f"{other or 'a file without a suffix'}"
                )
    check_ids(stream.ids, vocabulary, name=spec)
    return stream


def check_ids(ids: Tensor, vocabulary: int | None, *, name: str) -> None:
    """Raise :class:`DataError` naming the first id that is negative or not in the vocabulary."""
    if ids.numel() == 0:
        raise DataError(f"{name}: expected tokens, found none")
    wrong = ids < 0 if vocabulary is None else (ids < 0) | (ids >= vocabulary)
    if bool(wrong.any()):
        at = int(wrong.flatten().int().argmax())
        limit = "of 0 or more" if vocabulary is None else f"of 0 to {vocabulary - 1}"
        raise DataError(
            f"{name}: expected token ids {limit}, found {int(ids.flatten()[at])} at position {at}; "
            "was the data made with this model's tokenizer?"
        )


def _split(spec: str) -> tuple[Path, str | None]:
    """``path:name`` in two; a path that exists is taken whole."""
    before, colon, after = spec.rpartition(":")
    if colon and not Path(spec).exists() and Path(before).suffix in (".jsonl", ".safetensors"):
        return Path(before), after
    return Path(spec), None


def _encoded(spec: str, text: str, tokenizer: TextTokenizer | None) -> TokenStream:
    if not text.strip():
        raise DataError(f"{spec}: expected text, found {'only white space' if text else 'nothing'}")
    ids = torch.tensor(_needed(spec, tokenizer).encode(text), dtype=torch.int64)
    return TokenStream(spec, ids, len(text.encode("utf-8")) / max(len(ids), 1))


def _needed(spec: str, tokenizer: TextTokenizer | None) -> TextTokenizer:
    if tokenizer is None:
        raise DataError(
            f"{spec}: text needs a tokenizer, and the model came without one; give token ids as a "
            ".npy or .safetensors file, or put the tokenizer's files into the model's folder"
        )
    return tokenizer


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8 text; byte {error.start} (0x{data[error.start]:02x}) is not "
            f"({error.reason}); convert the file, for example with iconv"
        ) from None


def _jsonl(path: Path, key: str) -> str:
    texts = []
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: expected JSON: {error}") from None
        text = row.get(key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            found = f"the keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"{path}, line {number}: expected an object with text under {key!r}, found "
                f"{found}; name another key as {path.name}:KEY"
            )
        texts.append(text)
    return _BETWEEN.join(texts)


def _npy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: cannot be read as .npy: {error}") from error
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{path}: expected whole numbers (token ids), found {array.dtype}")
    return _flat(str(path), torch.from_numpy(array.astype(np.int64)))


def _safetensors(path: Path, key: str | None) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if key is None and len(names) == 1:
                key = names[0]
            if key not in names:
                found = f"no tensor {key!r}" if key else f"{len(names)} tensors"
                raise DataError(
                    f"{path}: found {found}; choose one as {path.name}:NAME from "
                    f"{', '.join(names) or 'an empty file'}"
                )
            tensor: Tensor = file.get_tensor(key)
    except SafetensorError as error:
        raise DataError(f"{path}: cannot be read as safetensors: {error}") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(f"{path}:{key}: expected whole numbers (token ids), found {tensor.dtype}")
    return _flat(f"{path}:{key}", tensor.to(torch.int64))


def _flat(name: str, ids: Tensor) -> Tensor:
    if ids.ndim not in (1, 2):
        raise DataError(
            f"{name}: expected shape (tokens,) or (rows, tokens), found {tuple(ids.shape)}"
        )
    return ids.flatten()


def _stdlib(spec: str, part: str, tokenizer: TextTokenizer | None) -> TokenStream:
    from fxshare.demo import corpus
    from fxshare.demo.bpe import Tokenizer

    choices = {"": corpus.calibration, "held-out": corpus.held_out}
    if part not in choices:
        raise DataError(f"{spec}: expected 'stdlib' or 'stdlib:held-out', found {part!r}")
    tokenizer = _needed(spec, tokenizer)
    documents: Sequence[corpus.Document] = choices[part](corpus.load_documents())
    if not isinstance(tokenizer, Tokenizer):
        return _encoded(spec, _BETWEEN.join(d.text for d in documents), tokenizer)
    ids = torch.tensor(corpus.token_stream(documents, tokenizer), dtype=torch.int64)
    sizes = torch.tensor([len(token) for token in tokenizer.token_bytes], dtype=torch.int64)
    return TokenStream(spec, ids, sizes)


__all__ = ["TextTokenizer", "TokenStream", "check_ids", "load_tokens", "read_stream"]
