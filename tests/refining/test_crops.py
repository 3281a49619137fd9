"""Pieces of texts to refine on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxshare.data.batches import Sampling, batches_to_refine_on
from fxshare.data.crops import cropped
from fxshare.errors import DataError

BEFORE, AFTER = 1, 2


def texts(*lengths: int) -> list[Tensor]:
    """Ids that tell where they stand, between those that stand around a text."""
    around = torch.tensor([BEFORE]), torch.tensor([AFTER])
    starts = [100 * at + 10 for at in range(len(lengths))]
    inner = [torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    return [torch.cat([around[0], one, around[1]]) for one in inner]


def test_pieces_are_runs_of_texts_with_what_stands_around_them() -> None:
    rows = texts(50, 4, 30, 6)
    found = cropped(rows, 16, around=(1, 1), seed=3)
    whole = [row[:16].tolist() for row in rows]
    given = [row.tolist() for row in found]
    assert all(row in given for row in whole)
    assert sum(map(len, found)) - sum(map(len, whole)) >= sum(map(len, rows))
    starts = set()
    for row in given:
        assert row[0] == BEFORE
        assert len(row) <= 16
        inner = row[1:-1] if row[-1] == AFTER else row[1:]
        assert (row[-1] == AFTER) or len(row) == 16
        assert inner == list(range(inner[0], inner[0] + len(inner)))
        starts.add(inner[0])
    assert len(starts) > len(rows)  # and not only where texts begin
    assert {len(row) for row in given} == {6, 8, 16}  # lengths are those of the texts
    assert given != [row.tolist() for row in cropped(rows, 16, around=(1, 1), seed=4)]
    assert given == [row.tolist() for row in cropped(rows, 16, around=(1, 1), seed=3)]


def test_texts_without_anything_between_are_left_as_they_are() -> None:
    rows = texts(0, 0)
    assert [row.tolist() for row in cropped(rows, 16, around=(1, 1))] == [[BEFORE, AFTER]] * 2


class Letters:
    """A tokenizer of letters, as transformers' put tokens around a text."""

    pad_token_id = 0

    def save_pretrained(self) -> None:
        """What tells such a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        inner = [10 + ord(c) % 90 for c in text]
        return [BEFORE, *inner, AFTER] if add_special_tokens else inner


def test_what_is_measured_on_is_not_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(chr(65 + n) * (5 + 3 * n) for n in range(20)))
    tokenizer: Any = Letters()
    sampling = Sampling(length=16, padded=True, batch_size=4, seed=1)
    found: Any = batches_to_refine_on(str(path), sampling, tokenizer=tokenizer)
    fit, held_out = found

    def letters(batches: Any) -> set[int]:
        ids = [int(one) for batch in batches for one in batch["input_ids"].flatten()]
        return {one for one in ids if one >= 10}

    assert len(letters(held_out)) == 2
    assert len(letters(fit)) == 18
    assert not letters(held_out) & letters(fit)
    assert max(batch["input_ids"].shape[1] for batch in fit) == 16


def test_one_text_cannot_be_divided(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one text")
    tokenizer: Any = Letters()
    with pytest.raises(DataError, match="expected 2 texts at least, one to measure on, found 1"):
        batches_to_refine_on(str(path), Sampling(length=8, padded=True), tokenizer=tokenizer)
