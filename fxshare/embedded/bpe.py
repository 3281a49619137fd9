"""Byte-level byte-pair encoding for Python source, in plain Python.

Ids 0..255 are the bytes, id 256 is the document separator (no text of its own), and id 257 + r is
the merge of rank r. Encoding never joins bytes across the pieces that :data:`PATTERN` cuts.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from fxshare.errors import DataError

SEPARATOR = 256
_FIRST_MERGE = 257
# Every character is a word character, white space or neither, so the alternatives cover any text.
PATTERN = (
    r"\n+ *"  # line ends together with the indentation that follows
    r"| ?[^\W\d]+"  # a name, with one leading space
    r"| ?\d{1,3}"  # digits in groups of at most three
    r"| ?[^\w\s]+"  # a run of punctuation
    r"| +(?= )"  # alignment: all spaces but the last, which leads the next piece
    r"|\s"
)


class Tokenizer:
    """Encode text to ids and back; ``decode(encode(text)) == text`` for any text."""

    # Sources repeat themselves; the bound only keeps adversarial input from filling the memory.
    CACHE_SIZE = 1 << 18

    def __init__(self, merges: Sequence[tuple[int, int]]) -> None:
        self._merges = tuple(merges)
        self._ranks = {pair: _FIRST_MERGE + rank for rank, pair in enumerate(self._merges)}
        token_bytes = [bytes([b]) for b in range(256)] + [b""]
        for left, right in self._merges:
            token_bytes.append(token_bytes[left] + token_bytes[right])
        self._token_bytes = tuple(token_bytes)
        self._split = re.compile(PATTERN).findall
        self._cache: dict[str, tuple[int, ...]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of ids: 256 bytes, the separator and the merges."""
        return len(self._token_bytes)

    @property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of every id; empty for the separator."""
        return self._token_bytes

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; a lone surrogate has no bytes and raises :class:`DataError`."""
        ids: list[int] = []
        cache = self._cache
        for piece in self._split(text):
            found = cache.get(piece)
            if found is None:
                found = self._encode_piece(piece)
                if len(cache) < self.CACHE_SIZE:
                    cache[piece] = found
            ids.extend(found)
        return ids

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        try:
            ids = list(piece.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise DataError(
                f"tokenizer: expected text that has a UTF-8 form, found {piece!r} with a lone"
                " surrogate; read the text with errors='replace'"
            ) from error
        ranks = self._ranks
        while len(ids) > 1:
            best = min(
                (ranks[pair] for pair in pairwise(ids) if pair in ranks),
                default=None,
            )
            if best is None:
                break
            ids = _merge(ids, self._merges[best - _FIRST_MERGE], best)
        return tuple(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are no UTF-8 (a cut character) become U+FFFD."""
        return b"".join(self._token_bytes[i] for i in ids).decode("utf-8", errors="replace")

    def save(self, path: Path) -> None:
        """Write the merges as JSON."""
        merges = ",\n".join(f"[{left},{right}]" for left, right in self._merges)
        text = f'{{"format":"fxshare-bpe-1","merges":[\n{merges}\n]}}\n'
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Build a tokenizer from the text that :meth:`save` writes."""
        return cls([(int(left), int(right)) for left, right in json.loads(text)["merges"]])


def _merge(ids: Sequence[int], pair: tuple[int, int], new: int) -> list[int]:
    out: list[int] = []
    i = 0
    while i < len(ids):
        if i + 1 < len(ids) and ids[i] == pair[0] and ids[i + 1] == pair[1]:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Learn merges by pair frequency; ties go to the smaller pair, so the result is deterministic.

    Stops early where no pair occurs twice. Counts are updated only in the pieces a merge touches.
    """
    split = re.compile(PATTERN).findall
    pieces: Counter[str] = Counter()
    for text in texts:
        pieces.update(split(text))
    words = [list(piece.encode("utf-8")) for piece in pieces]
    counts = list(pieces.values())
    pairs: Counter[tuple[int, int]] = Counter()
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for w, ids in enumerate(words):
        for pair in pairwise(ids):
            pairs[pair] += counts[w]
            where[pair].add(w)

    merges: list[tuple[int, int]] = []
    while _FIRST_MERGE + len(merges) < vocab_size and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        new = _FIRST_MERGE + len(merges)
        merges.append(best)
        for w in where.pop(best):
            old = words[w]
            for pair in pairwise(old):
                pairs[pair] -= counts[w]
                if not pairs[pair]:
                    del pairs[pair]
            words[w] = _merge(old, best, new)
            for pair in pairwise(words[w]):
                pairs[pair] += counts[w]
                where[pair].add(w)
    return Tokenizer(merges)


__all__ = ["PATTERN", "SEPARATOR", "Tokenizer", "train_bpe"]
