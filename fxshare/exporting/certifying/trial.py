"""Prompts, what the compiled model says to them, and what an engine does.

Letters: P prompts, T tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxshare.capture.call import MASK, Call
from fxshare.exporting.certifying.certificate import Difference
from fxshare.exporting.outputs import leaves
from fxshare.exporting.subject import Subject
from fxshare.exporting.written import Written
from fxshare.models.traits import context_of, vocabulary_of

NEW = 16
"""Tokens after each prompt."""
_LENGTHS = (3, 11, 24)


@dataclass(frozen=True, eq=False)
class Trial:
    """``texts_PT`` are the prompts of ``lengths`` with the compiled model's ``new`` greedy tokens
    after each, filled up on the right; ``logits_PTV`` its logits."""

    texts_PT: Tensor
    lengths: tuple[int, ...]
    new: int
    logits_PTV: Tensor
    call: Callable[[Tensor], Call]
    rows: int

    def prompts(self) -> list[list[int]]:
        """The prompts."""
        return [row[:n].tolist() for row, n in zip(self.texts_PT, self.lengths, strict=True)]

    def expected(self) -> list[list[int]]:
        """What follows each."""
        return [
            row[n : n + self.new].tolist()
            for row, n in zip(self.texts_PT, self.lengths, strict=True)
        ]

    def steps(self, logits_PTV: Tensor) -> Tensor:
        """The logits ``(P, new, V)`` that chose the tokens."""
        rows = [
            row[n - 1 : n - 1 + self.new] for row, n in zip(logits_PTV, self.lengths, strict=True)
        ]
        return torch.stack(rows)

    def chosen(self) -> list[list[float]]:
        """The compiled model's logit of each of its tokens."""
        steps = self.steps(self.logits_PTV)
        index = torch.tensor(self.expected(), device=steps.device)[..., None]
        found: list[list[float]] = steps.gather(-1, index)[..., 0].double().tolist()
        return found

    def margins(self) -> list[list[float]]:
        """By how much the compiled model preferred each of its tokens to the next likely one."""
        best = self.steps(self.logits_PTV).double().topk(2).values
        found: list[list[float]] = (best[..., 0] - best[..., 1]).tolist()
        return found

    def run(self, run: Callable[[Call], Any]) -> Tensor:
        """The logits ``(P, T, V)`` of the texts, in as many rows as the runtime takes."""
        return _in_rows(self.texts_PT, self.rows, lambda ids: _logits(run(self.call(ids))))

    def difference(self, found: list[list[int]], allowed: float) -> Difference | None:
        """The first token that is not the compiled model's; logits may be ``allowed`` apart."""
        steps = self.steps(self.logits_PTV).double()
        for prompt, (left, right) in enumerate(zip(self.expected(), found, strict=True)):
            for at in range(self.new):
                other = right[at] if at < len(right) else -1
                if left[at] == other:
                    continue
                known = 0 <= other < steps.shape[-1]
                one = steps[prompt, at]
                margin = float(one[left[at]] - one[other]) if known else float("inf")
                return Difference(prompt, at, left[at], other, margin, margin <= 2 * allowed)
        return None


def trial_of(subject: Subject, written: Written, seed: int) -> Trial | None:
    """The trial of a causal language model; None for another model.

    One is known by what it does: of token ids ``(B, T)`` it makes logits ``(B, T, V)``, and those
    of a token do not depend on the ones after it.
    """
    name = _ids_of(subject.inputs)
    if name is None:
        return None
    example = subject.inputs[name]
    assert isinstance(example, Tensor)
    total = _most_tokens(subject, written, example)
    if total < 2:
        return None
    new = min(NEW, total // 2)
    lengths = tuple(min(n, total - new) for n in _LENGTHS)
    width = max(lengths) + new if written.sequence else example.shape[1]
    rows = len(lengths) if written.batch else example.shape[0]

    def call(ids: Tensor) -> Call:
        given = {name: ids.to(example.device, example.dtype)}
        if MASK in subject.inputs:
            mask = subject.inputs[MASK]
            assert isinstance(mask, Tensor)
            given[MASK] = torch.ones(ids.shape, dtype=mask.dtype, device=mask.device)
        return {key: given[key] for key in subject.inputs}

    generator = torch.Generator().manual_seed(seed)
    low, high = int(example.min()), int(example.max())
    vocabulary = vocabulary_of(subject.model) or high + 1
    texts = torch.randint(min(low, 3), vocabulary, (len(lengths), width), generator=generator)
    _leave_out(_padding_of(subject.model), texts, vocabulary)

    def run(ids: Tensor) -> Tensor:
        return _in_rows(ids, rows, lambda part: _logits(subject.run(call(part))))

    if not _is_causal(run, texts, min(lengths)):
        return None
    ends = torch.tensor(lengths)
    for _ in range(new):
        logits = run(texts).cpu()
        texts[torch.arange(len(lengths)), ends] = logits[
            torch.arange(len(lengths)), ends - 1
        ].argmax(-1)
        ends = ends + 1
    return Trial(texts, lengths, new, run(texts), call, rows)


def _padding_of(model: object) -> set[int]:
    """The tokens that an engine may take for padding, and mask wherever they are in a prompt."""
    config = getattr(model, "config", None)
    named = [getattr(config, name, None) for name in ("pad_token_id", "eos_token_id")]
    ids = {i for one in named for i in (one if isinstance(one, list) else [one])}
    return {i for i in ids if isinstance(i, int)}


def _leave_out(tokens: set[int], texts: Tensor, vocabulary: int) -> None:
    """Put the next other token in the place of each of ``tokens``, where there is one."""
    if len(tokens) < vocabulary:
        while (found := torch.isin(texts, torch.tensor(sorted(tokens), dtype=texts.dtype))).any():
            texts[found] = (texts[found] + 1) % vocabulary


def _ids_of(inputs: Call) -> str | None:
    """The one input of token ids, beside a mask at most."""
    others = [name for name in inputs if name != MASK]
    if len(others) != 1:
        return None
    ids = inputs[others[0]]
    is_ids = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()
    mask = inputs.get(MASK)
    plain = mask is None or (isinstance(mask, Tensor) and mask.shape == getattr(ids, "shape", None))
    return others[0] if is_ids and plain else None


def _most_tokens(subject: Subject, written: Written, example: Tensor) -> int:
    if not written.sequence:
        return int(example.shape[1])
    context = context_of(subject.model)
    return min(context or int(example.shape[1]), max(_LENGTHS) + NEW)


def _logits(output: Any) -> Tensor:
    if isinstance(output, dict) and "logits" in output:
        found = output["logits"]
    else:
        found = next(iter(leaves(output)), torch.empty(0))
    assert isinstance(found, Tensor)
    return found.detach()


def _in_rows(ids: Tensor, rows: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Run in batches of ``rows``, the last one filled up."""
    found = []
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows]
        filled = torch.cat([part, part[-1:].expand(rows - len(part), -1)])
        found.append(run(filled)[: len(part)])
    return torch.cat(found)


def _is_causal(run: Callable[[Tensor], Tensor], ids: Tensor, at: int) -> bool:
    """Whether other tokens from ``at`` on leave the outputs before it as they are."""
    first = run(ids)
    if first.ndim != 3 or first.shape[:2] != ids.shape or not first.is_floating_point():
        return False
    changed = ids.clone()
    changed[:, at:] = ids[:, at:].flip(1).roll(1, 0)
    second = run(changed)
    return torch.allclose(first[:, :at], second[:, :at], rtol=1e-3, atol=1e-4)
