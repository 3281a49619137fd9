"""Token data: from text, token files or the standard library's source to windows of tokens.

Legend for shapes: T tokens of a stream, N windows, L tokens per window, V ids of the vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fxshare.data.documents import BETWEEN, TEXT_FILES, text_blocks
from fxshare.data.starts import before_text, started, warn_of_others
from fxshare.data.tokens import TOKEN_FILES, check_ids, token_rows
from fxshare.errors import DataError, FxShareWarning

# Characters that are tokenised at a time: words that a block's end cuts are too few to matter.
_BLOCK = 1 << 22
_WITH_KEY = (".jsonl", ".parquet", ".safetensors")


class TextTokenizer(Protocol):
    """What is asked of a tokenizer: transformers' and the demo's both do."""

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``."""


@dataclass(frozen=True)
class TokenStream:
    """All tokens of one source in order: ``ids`` is int64 (T,).

    ``bytes_per_token`` is the size of the text as UTF-8 over T, or, where the tokenizer tells, the
    size of every id, int64 (V,); None for token files. ``before`` are the ids that the tokenizer
    puts before a text, which ``ids`` does not contain.
    """

    name: str
    ids: Tensor
    bytes_per_token: float | Tensor | None = None
    before: tuple[int, ...] = ()

    def windows(self, length: int, *, count: int | None = None, seed: int = 0) -> Tensor:
        """Windows (N, length) in the order of the stream, without overlap; the rest is dropped.
        Each starts with ``before``.

        With ``count`` they are a random choice of that many, still in order; where there are fewer,
        all of them and a :class:`FxShareWarning`.
        """
        return choose_windows(
            self.ids, length, count=count, seed=seed, name=self.name, before=self.before
        )


def choose_windows(
    ids: Tensor,
    length: int,
    *,
    count: int | None,
    seed: int,
    name: str,
    before: tuple[int, ...] = (),
) -> Tensor:
    """:meth:`TokenStream.windows` of ids (T,) in any dtype; only what is chosen is looked at."""
    own = length - len(before)
    if own < 1:
        raise DataError(
            f"{name}: expected windows of at least {len(before) + 1} tokens, found {length}"
        )
    found = len(ids) // own
    if found == 0:
        raise DataError(
            f"{name}: expected at least {own} tokens, one window, found {len(ids)}; give more data "
            "or a smaller length"
        )
    windows = ids[: found * own].view(found, own)
    return started(_chosen(windows, length, count, seed, name).to(torch.int64), before)


def _chosen(windows: Tensor, length: int, count: int | None, seed: int, name: str) -> Tensor:
    found = len(windows)
    if count is None or count == found:
        return windows
    if count < 1:
        raise DataError(f"{name}: expected at least 1 window to choose, found {count}")
    if count > found:
        warnings.warn(
            f"{name}: {count} windows of {length} tokens were asked for, the data has {found}: all "
            "of them are used",
            FxShareWarning,
            stacklevel=3,
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
    bos: bool = True,
) -> Tensor:
    """Windows of tokens, int64 (N, length): :func:`read_stream`, then
    :meth:`TokenStream.windows`."""
    stream = read_stream(spec, tokenizer=tokenizer, vocabulary=vocabulary, bos=bos, length=length)
    return stream.windows(length, count=count, seed=seed)


def read_stream(
    spec: str,
    *,
    tokenizer: TextTokenizer | None,
    vocabulary: int | None = None,
    key: str | None = None,
    bos: bool = True,
    length: int | None = None,
) -> TokenStream:
    """Read all tokens of a source.

    Parameters
    ----------
    spec
        One of: ``file.txt`` in UTF-8; ``file.jsonl``, an object with the key ``text`` a line
        (``file.jsonl:key`` for another key), or ``file.parquet`` with a column of that name, the
        texts joined by an empty line; ``file.npy`` or ``file.safetensors`` with whole numbers of
        shape (T,) or (N, T), the rows one after the other (``file.safetensors:name`` chooses the
        tensor); ``stdlib``, a sample of the modules of Python's standard library that the demo's
        model was trained on; ``stdlib:held-out``, those that were held out.
    tokenizer
        For text; token files need none.
    vocabulary
        Number of ids that the model knows: a larger id in the data is an error.
    key
        What could also follow the file's name after a colon.
    bos
        Whether windows of text start with what the tokenizer puts before a text.
    length
        Of the windows that a token file will be cut into: those that do not start so are warned of.

    Raises
    ------
    DataError
        The data cannot be read, is empty, or has ids that the model does not know.
    """
    if spec.partition(":")[0] == "stdlib":
        stream = _stdlib(spec, spec.partition(":")[2], tokenizer, bos)
        check_fit(stream.ids, tokenizer, vocabulary, name=spec)
        return stream
    path, key = file_and_key(spec, key)
    if path.suffix in TOKEN_FILES:
        ids = token_rows(path, key).flatten().to(torch.int64)
        check_ids(ids, vocabulary, name=spec)
        if bos and length is not None:
            warn_of_others(
                ids[: max(1, len(ids) // length) * length : length],
                before_text(tokenizer),
                name=spec,
            )
        return TokenStream(spec, ids)
    parts: list[tuple[Tensor, bool]] = []
    size = 0
    for block in text_blocks(path, key, _BLOCK):
        ids = encode(needed(spec, tokenizer), block)
        check_fit(ids, tokenizer, vocabulary, name=spec)
        size += len(block.encode("utf-8"))
        parts.append((ids, bool(block.strip())))
    if not any(has_text for _, has_text in parts):
        raise no_text(spec, path.stat().st_size)
    ids = torch.cat([ids for ids, _ in parts])
    before = before_text(tokenizer) if bos else ()
    return TokenStream(spec, ids, size / max(len(ids), 1), before)


def file_and_key(spec: str, key: str | None = None) -> tuple[Path, str | None]:
    """The file that a spec names, and the key, column or tensor in it.

    Raises :class:`DataError` where there is no such file, or of no kind that is read here.
    """
    path, named = _split(spec)
    kinds = ", ".join((*TEXT_FILES, *TOKEN_FILES))
    if not path.is_file():
        raise DataError(
            f"{spec}: no such file; expected a file of {kinds}, 'stdlib' or 'stdlib:held-out'"
        )
    if path.suffix not in (*TEXT_FILES, *TOKEN_FILES):
        raise DataError(
            f"{spec}: expected a .txt, .jsonl, .parquet, .npy or .safetensors file, found "
            f"{path.suffix or 'a file without a suffix'}"
        )
    if path.stat().st_size == 0:
        raise no_text(spec, 0)
    return path, key if named is None else named


def encode(tokenizer: TextTokenizer, text: str) -> Tensor:
    """The ids of ``text`` (T,) int64, without what a tokenizer puts around a text."""
    of_transformers: Any = tokenizer
    if hasattr(tokenizer, "save_pretrained"):
        return torch.tensor(of_transformers.encode(text, add_special_tokens=False)).long()
    return torch.tensor(tokenizer.encode(text), dtype=torch.int64)


def no_text(spec: str, size: int) -> DataError:
    """What is raised for a source of ``size`` bytes in which there is nothing to read."""
    return DataError(f"{spec}: expected text, found {'only white space' if size else 'nothing'}")


def check_fit(
    ids: Tensor, tokenizer: TextTokenizer | None, vocabulary: int | None, *, name: str
) -> None:
    """Raise :class:`DataError` where the tokenizer gives ids that the model does not know."""
    if vocabulary is None or ids.numel() == 0 or int(ids.max()) < vocabulary:
        return
    size = f" of {len(tokenizer)} ids" if isinstance(tokenizer, Sized) else ""
    raise DataError(
        f"{name}: the tokenizer{size} does not fit the model: expected ids of 0 to "
        f"{vocabulary - 1}, found {int(ids.max())}; put the files of this model's own tokenizer "
        "into its folder"
    )


def _split(spec: str) -> tuple[Path, str | None]:
    """``path:name`` in two; a path that exists is taken whole."""
    before, colon, after = spec.rpartition(":")
    if colon and not Path(spec).exists() and Path(before).suffix in _WITH_KEY:
        return Path(before), after
    return Path(spec), None


def needed(spec: str, tokenizer: TextTokenizer | None) -> TextTokenizer:
    """The tokenizer; :class:`DataError` where there is none."""
    if tokenizer is None:
        raise DataError(
            f"{spec}: text needs a tokenizer, and the model came without one; give token ids as a "
            ".npy or .safetensors file, or put the tokenizer's files into the model's folder"
        )
    return tokenizer


def _stdlib(spec: str, part: str, tokenizer: TextTokenizer | None, bos: bool) -> TokenStream:
    from fxshare.embedded import corpus
    from fxshare.embedded.bpe import Tokenizer

    choices = {"": corpus.calibration, "held-out": corpus.held_out}
    if part not in choices:
        raise DataError(f"{spec}: expected 'stdlib' or 'stdlib:held-out', found {part!r}")
    tokenizer = needed(spec, tokenizer)
    documents: Sequence[corpus.Document] = choices[part](corpus.load_documents())
    if not isinstance(tokenizer, Tokenizer):
        text = BETWEEN.join(d.text for d in documents)
        ids = encode(tokenizer, text)
        before = before_text(tokenizer) if bos else ()
        return TokenStream(spec, ids, len(text.encode("utf-8")) / max(len(ids), 1), before)
    ids = torch.tensor(corpus.token_stream(documents, tokenizer), dtype=torch.int64)
    sizes = torch.tensor([len(token) for token in tokenizer.token_bytes], dtype=torch.int64)
    return TokenStream(spec, ids, sizes)


__all__ = [
    "TextTokenizer",
    "TokenStream",
    "check_fit",
    "choose_windows",
    "encode",
    "file_and_key",
    "load_tokens",
    "needed",
    "no_text",
    "read_stream",
]
