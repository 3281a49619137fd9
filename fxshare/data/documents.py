"""Text files as streams of text: never more than a block of one is in memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fxshare.errors import DataError

TEXT_FILES = (".txt", ".jsonl", ".parquet")
TEXT_KEY = "text"
# Between the documents of one file, as the rows of a data set are joined in GPTQ's protocol.
BETWEEN = "\n\n"
_READ = 1 << 20  # bytes at a time
_ROWS = 64  # of parquet at a time
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def text_blocks(path: Path, key: str | None, size: int) -> Iterator[str]:
    """The text of a file in blocks of ``size`` characters and up to twice as many, the last one
    excepted.

    Put one after the other they are the file's text; that of rows is joined by an empty line.
    Blocks end where a line does, or a word in a line that is longer than a block.

    Raises :class:`DataError` where the file is not UTF-8, not JSON, or has no text under ``key``
    (``text`` where None).
    """
    pieces = _decoded(path) if path.suffix == ".txt" else _joined(_rows(path, key))
    held: list[str] = []
    length = 0
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length < size:
            continue
        text, start = "".join(held), 0
        while len(text) - start >= size:
            end = text.find("\n", start + size - 1, start + 2 * size) + 1
            if not end and len(text) - start < 2 * size:
                break
            end = end or text.rfind(" ", start + size, start + 2 * size) + 1 or start + 2 * size
            yield text[start:end]
            start = end
        held, length = [text[start:]], len(text) - start
    rest = "".join(held)
    if rest:
        yield rest


def documents(path: Path, key: str | None) -> Iterator[str]:
    """The documents of a file: a row's text each; of plain text the paragraphs, between lines with
    nothing but white space. Documents without text are left out.

    Raises :class:`DataError` like :func:`text_blocks`.
    """
    found = _paragraphs(_decoded(path)) if path.suffix == ".txt" else _rows(path, key)
    return (document for document in found if document.strip())


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    before = 0
    with path.open("rb") as file:
        while True:
            data = file.read(_READ)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, before - pending) from None
            yield text.removeprefix("\ufeff") if before == 0 else text
            before += len(data)
            if not data:
                return


def _not_utf8(path: Path, error: UnicodeDecodeError, offset: int) -> DataError:
    with path.open("rb") as file:
        wide = file.read(2) in _UTF16
    what = "; it begins like UTF-16" if wide else ""
    return DataError(
        f"{path}: expected UTF-8 text; byte {offset + error.start} "
        f"(0x{error.object[error.start]:02x}) is not ({error.reason}){what}; convert the file, for "
        "example with iconv"
    )


def _paragraphs(pieces: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    for line in _lines(pieces):
        if line.strip():
            held.append(line)
        elif held:
            yield "\n".join(held)
            held = []
    yield "\n".join(held)


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    yield rest


def _joined(rows: Iterable[str]) -> Iterator[str]:
    for number, row in enumerate(rows):
        yield BETWEEN + row if number else row


def _rows(path: Path, key: str | None) -> Iterator[str]:
    read: Callable[[Path, str], Iterator[str]] = _parquet if path.suffix == ".parquet" else _jsonl
    return read(path, key or TEXT_KEY)


def _jsonl(path: Path, key: str) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, offset) from None
            offset += len(line)
            text = text.removeprefix("\ufeff") if number == 1 else text
            if text.strip():
                yield _text_of(path, number, text, key)


def _text_of(path: Path, number: int, line: str, key: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: expected JSON: {error}") from None
    text = row.get(key) if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = f"the keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"{path}, line {number}: expected an object with text under {key!r}, found {found}; "
            f"name another key as {path.name}:KEY or with --text-key KEY"
        )
    return text


def _parquet(path: Path, key: str) -> Iterator[str]:
    file = _opened_parquet(path)
    names = list(file.schema_arrow.names)
    if key not in names:
        raise DataError(
            f"{path}: expected a column {key!r} with text, found the columns {', '.join(names)}; "
            f"name another one as {path.name}:KEY or with --text-key KEY"
        )
    number = 0
    try:
        for batch in file.iter_batches(batch_size=_ROWS, columns=[key]):
            for value in batch.column(0).to_pylist():
                number += 1
                if value is None:
                    continue
                if not isinstance(value, str):
                    raise DataError(
                        f"{path}, row {number}: expected text under {key!r}, found "
                        f"{type(value).__name__}"
                    )
                yield value
    except (OSError, ValueError) as error:  # what pyarrow raises derives from these
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error
    finally:
        file.close()


def _opened_parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path}: parquet needs pyarrow, which cannot be imported ({error}); "
            "pip install 'fxshare[data]'"
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error


__all__ = ["BETWEEN", "TEXT_FILES", "TEXT_KEY", "documents", "text_blocks"]
