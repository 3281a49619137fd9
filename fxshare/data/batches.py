"""Calibration batches from a source of text or tokens, of which only what is chosen is held.

Legend for shapes: B batch, L tokens per sample at most, N samples.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from fxshare.data.crops import cropped
from fxshare.data.documents import TEXT_FILES, documents, text_blocks
from fxshare.data.starts import around_text, before_text, started, warn_of_others
from fxshare.data.stream import (
    TextTokenizer,
    check_fit,
    choose_windows,
    encode,
    file_and_key,
    needed,
    no_text,
    read_stream,
)
from fxshare.data.tokens import check_ids, mask_rows, token_rows
from fxshare.errors import DataError, FxShareWarning

Batch: TypeAlias = "Tensor | Mapping[str, Tensor]"
T = TypeVar("T")
LARGE = 1 << 26
"""Bytes of text up to which everything is tokenised; of more a random choice of places is."""
DEFAULT_SAMPLES = 1024
"""What is taken of a large source where no number is given."""
# Characters in which L tokens surely are, for a token of usual text has less than five.
_PER_TOKEN = 16
_WHOLE = 32
"""Texts that are not cut at the length of a sample are cut at so many times that."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which samples, and how they are laid out.

    ``padded``: one document a sample, cut at ``length`` tokens, and shorter ones filled up on the
    right, with an ``attention_mask`` that leaves the filling out. Otherwise samples are windows of
    exactly ``length`` tokens over everything, one document after the other. ``count`` None: all, of
    a source of more than :data:`LARGE` bytes :data:`DEFAULT_SAMPLES`. ``bos``: every sample of text
    starts with what the tokenizer puts before a text, mostly a BOS token. ``batch_size`` None:
    :func:`rows_of_a_batch`.
    """

    length: int
    count: int | None = None
    padded: bool = False
    batch_size: int | None = 4
    seed: int = 0
    bos: bool = True


def sample_batches(
    spec: str,
    sampling: Sampling,
    *,
    tokenizer: TextTokenizer | None,
    vocabulary: int | None = None,
    key: str | None = None,
) -> list[Batch]:
    """The batches of a source (:func:`fxshare.data.stream.read_stream` lists the kinds).

    Packed samples are tensors int64 (B, L); padded ones mappings with ``input_ids`` and
    ``attention_mask``, both int64 (B, longest of the batch). Memory is that of the samples: large
    text is read through once and tokenised only where it was chosen, uniformly and by the seed.

    Raises :class:`DataError` for a source that is empty, cannot be read, or has ids that the model
    does not know. Warns (:class:`FxShareWarning`) where there are fewer samples than asked for.
    """
    if sampling.count is not None and sampling.count < 1:
        raise DataError(f"{spec}: expected at least 1 sample, found {sampling.count}")
    source = _Source(spec, tokenizer, vocabulary, key, sampling)
    if sampling.padded:
        return _padded_batches(*source.rows(), sampling)
    windows = source.windows()
    return list(torch.split(windows, sampling.batch_size or rows_of_a_batch(len(windows))))


def batches_to_refine_on(
    spec: str,
    sampling: Sampling,
    *,
    tokenizer: TextTokenizer | None,
    vocabulary: int | None = None,
    key: str | None = None,
) -> tuple[list[Batch], list[Batch]]:
    """Padded batches to train on and to measure on, of different texts: a tenth of them is
    measured on, and of the others pieces are taken too (:func:`fxshare.data.crops.cropped`), for
    ``count`` and the kinds of sources as in :func:`sample_batches`, whose errors it raises.

    :class:`DataError` too where there is one text only.
    """
    source = _Source(spec, tokenizer, vocabulary, key, sampling)
    rows, filling = source.rows(whole=True)
    if len(rows) < 2:
        raise DataError(f"{spec}: expected 2 texts at least, one to measure on, found {len(rows)}")
    chosen = set(random.Random(sampling.seed).sample(range(len(rows)), max(len(rows) // 10, 1)))
    apart = [row[: sampling.length] for at, row in enumerate(rows) if at in chosen]
    others = [row for at, row in enumerate(rows) if at not in chosen]
    fit = cropped(others, sampling.length, around=source.around, seed=sampling.seed)
    return _padded_batches(fit, filling, sampling), _padded_batches(apart, filling, sampling)


def rows_of_a_batch(count: int) -> int:
    """Of how many samples a batch is made of ``count``, where nobody says: four, and fewer where
    that would leave fewer than ten batches, of which a search holds one back."""
    return max(1, min(4, count // 10))


@dataclass(frozen=True)
class _Source:
    spec: str
    tokenizer: TextTokenizer | None
    vocabulary: int | None
    key: str | None
    sampling: Sampling

    def windows(self) -> Tensor:
        """Packed samples, int64 (N, L)."""
        length, count, seed = self.sampling.length, self.sampling.count, self.sampling.seed
        if self.spec.partition(":")[0] != "stdlib":
            path, key = file_and_key(self.spec, self.key)
            if path.suffix not in TEXT_FILES:
                ids = token_rows(path, key).flatten()
                check_ids(ids, self.vocabulary, name=self.spec)
                found = choose_windows(ids, length, count=count, seed=seed, name=self.spec)
                warn_of_others(found[:, 0], self._before(), name=self.spec)
                return found
            if path.stat().st_size > LARGE:
                return self._places(path, key, self._count())
        stream = read_stream(
            self.spec,
            tokenizer=self.tokenizer,
            vocabulary=self.vocabulary,
            key=self.key,
            bos=self.sampling.bos,
        )
        return stream.windows(length, count=count, seed=seed)

    def _count(self) -> int:
        count = self.sampling.count
        if count is None:
            count = DEFAULT_SAMPLES
            warnings.warn(
                f"{self.spec}: a random choice of {count} samples of {self.sampling.length} tokens "
                "is taken of this large source; give another number with --samples",
                FxShareWarning,
                stacklevel=2,
            )
        return count

    def _places(self, path: Path, key: str | None, count: int) -> Tensor:
        """A window each from blocks of text chosen over the whole file."""
        generator = random.Random(self.sampling.seed)
        before = self._before()
        length = self.sampling.length - len(before)
        blocks = text_blocks(path, key, _PER_TOKEN * length)
        chosen = _reservoir(blocks, _with_spare(count), generator)
        found = []
        for at, block in chosen:
            ids = self._encoded(block)
            if len(ids) >= length:
                start = generator.randrange(len(ids) - length + 1)
                found.append((at, ids[start : start + length]))
        if not found:
            raise DataError(
                f"{self.spec}: expected at least {length} tokens, one window, found fewer in every "
                "place that was tried; give text that is not mostly white space, or a smaller "
                "length"
            )
        self._warn_of_few(len(found), count)
        windows = torch.stack([ids for _, ids in sorted(found[:count], key=lambda one: one[0])])
        return started(windows, before)

    def rows(self, *, whole: bool = False) -> tuple[list[Tensor], int]:
        """Padded samples, each int64 (2..L,), and the id to fill up with; with ``whole`` texts are
        not cut at L, but at many times that."""
        if self.spec.partition(":")[0] == "stdlib":
            raise DataError(
                f"{self.spec}: is one stream of tokens without documents, and a padded sample is a "
                "document; give a file of texts, or leave --padded out where it was given"
            )
        path, key = file_and_key(self.spec, self.key)
        if path.suffix not in TEXT_FILES:
            return self._token_rows(path, key, whole), 0
        generator = random.Random(self.sampling.seed)
        count = self.sampling.count
        if count is None and path.stat().st_size > LARGE:
            count = self._count()
        # what is cut off anyway is neither kept nor tokenised
        length = self.sampling.length * (_WHOLE if whole else 1)
        most = _PER_TOKEN * length
        texts = (document[:most] for document in documents(path, key))
        chosen = _reservoir(texts, None if count is None else _with_spare(count), generator)
        if not chosen:
            raise no_text(self.spec, path.stat().st_size)
        found = []
        for at, text in chosen:
            ids = self._document(text)[:length]
            if len(ids) >= 2:  # one token alone has no next one
                found.append((at, ids))
        if not found:
            raise DataError(f"{self.spec}: expected documents of 2 tokens or more, found none")
        if count is not None:
            self._warn_of_few(len(found), count)
        filling = getattr(self.tokenizer, "pad_token_id", None)
        rows = [ids for _, ids in sorted(found[:count], key=lambda one: one[0])]
        return rows, int(rows[0][0]) if filling is None else int(filling)

    def _token_rows(self, path: Path, key: str | None, whole: bool) -> list[Tensor]:
        ids = token_rows(path, key)
        if ids.ndim != 2:
            raise DataError(
                f"{self.spec}: expected a row of tokens for each document, found one stream of "
                f"{tuple(ids.shape)}; leave --padded out"
            )
        mask = mask_rows(path)
        if mask is not None and mask.shape != ids.shape:
            raise DataError(
                f"{self.spec}: expected an attention_mask of shape {tuple(ids.shape)}, found "
                f"{tuple(mask.shape)}"
            )
        check_ids(ids, self.vocabulary, name=self.spec)
        warn_of_others(ids[:, 0], self._before(), name=self.spec)
        count, length = self.sampling.count, self.sampling.length
        chosen = _reservoir(range(len(ids)), count, random.Random(self.sampling.seed))
        rows = []
        for _, at in sorted(chosen):
            row = ids[at] if mask is None else ids[at][mask[at].bool()]
            if len(row) >= 2:
                rows.append((row if whole else row[:length]).to(torch.int64))
        if not rows:
            raise DataError(f"{self.spec}: expected rows of 2 tokens or more, found none")
        if count is not None:
            self._warn_of_few(len(rows), count)
        return rows

    @property
    def around(self) -> tuple[int, int]:
        """How many ids a tokenizer has put before and after each text."""
        path, _ = file_and_key(self.spec, self.key)
        if path.suffix not in TEXT_FILES:
            return 0, 0
        before, after = around_text(self.tokenizer)
        return len(before) if self.sampling.bos else 0, len(after)

    def _before(self) -> tuple[int, ...]:
        return before_text(self.tokenizer) if self.sampling.bos else ()

    def _document(self, text: str) -> Tensor:
        """The ids of a whole document, with what a tokenizer puts around one."""
        tokenizer = needed(self.spec, self.tokenizer)
        ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
        check_fit(ids, tokenizer, self.vocabulary, name=self.spec)
        return ids if self.sampling.bos else ids[len(before_text(tokenizer)) :]

    def _encoded(self, text: str) -> Tensor:
        ids = encode(needed(self.spec, self.tokenizer), text)
        check_fit(ids, self.tokenizer, self.vocabulary, name=self.spec)
        return ids

    def _warn_of_few(self, found: int, count: int) -> None:
        if found < count:
            warnings.warn(
                f"{self.spec}: {count} samples were asked for, the data has {found}: all of them "
                "are used",
                FxShareWarning,
                stacklevel=2,
            )


def _with_spare(count: int) -> int:
    """More than are wanted, for some turn out too short."""
    return count + count // 8 + 8


def _reservoir(
    items: Iterable[T], count: int | None, generator: random.Random
) -> list[tuple[int, T]]:
    """``count`` items chosen uniformly in one reading (Vitter's algorithm R), each with its number,
    in random order, so that any first few of them are a uniform choice too; all where None."""
    kept: list[tuple[int, T]] = []
    for number, item in enumerate(items):
        if count is None or len(kept) < count:
            kept.append((number, item))
            continue
        at = generator.randrange(number + 1)
        if at < count:
            kept[at] = (number, item)
    if count is not None:
        generator.shuffle(kept)
    return kept


def _padded_batches(rows: list[Tensor], filling: int, sampling: Sampling) -> list[Batch]:
    batches: list[Batch] = []
    size = sampling.batch_size or rows_of_a_batch(len(rows))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids_BL = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=filling)
        lengths_B = torch.tensor([len(row) for row in part])
        mask_BL = torch.arange(ids_BL.shape[1])[None, :] < lengths_B[:, None]
        batches.append({"input_ids": ids_BL, "attention_mask": mask_BL.long()})
    return batches


__all__ = [
    "DEFAULT_SAMPLES",
    "LARGE",
    "Batch",
    "Sampling",
    "batches_to_refine_on",
    "rows_of_a_batch",
    "sample_batches",
]
