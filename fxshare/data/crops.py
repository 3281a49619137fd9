"""More texts out of a few: pieces as long as the texts themselves, from any place of them.

Distillation needs no labels, so any piece of text is an example; what is cut off of texts that are
longer than a sample would be lost otherwise. Lengths are drawn from those of the texts, so that
short ones, such as headings, stay as frequent as they are.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor


def cropped(
    rows: Sequence[Tensor], length: int, *, around: tuple[int, int] = (0, 0), seed: int = 0
) -> list[Tensor]:
    """Whole texts, int64 ``(2.., )`` each, cut at ``length``, and pieces of them, in random order.

    Texts and pieces together have at least as many tokens as whole texts and texts that were cut.
    ``around``: how many ids a tokenizer has put before and after each text; a piece has them too,
    but for those after it where it is as long as a text that was cut.
    """
    first, last = around
    generator = random.Random(seed)
    found = [row[:length] for row in rows]
    inner = [row[first : len(row) - last] for row in rows]
    totals = list(itertools.accumulate(map(len, inner)))
    lengths = [len(row) for row in found]
    left = sum(map(len, rows)) if totals and totals[-1] else 0
    while left > 0:
        size = generator.choice(lengths)
        at = generator.choices(range(len(rows)), cum_weights=totals)[0]
        body = max(size - first - (0 if size == length else last), 1)
        start = generator.randrange(max(len(inner[at]) - body, 0) + 1)
        end = rows[at][len(rows[at]) - last :]
        piece = torch.cat([rows[at][:first], inner[at][start : start + body], end])[:length]
        left -= len(piece)
        if len(piece) >= 2:
            found.append(piece)
    generator.shuffle(found)
    return found


__all__ = ["cropped"]
