"""Is the graph with a cache what the model's own code does with one?

The plain graph is what a step is compared with first, since that needs nothing else. Some models do
something else with a cache than without: positions that count padding, attention to both sides
where the configuration does not say ``is_decoder``. Their ``generate`` is that of their own code,
so that decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.capture import quiet
from fxshare.errors import CaptureError
from fxshare.generation.check import CASES, compare, let_go, run_unguarded, tokens_of
from fxshare.generation.check_encoder_decoder import encoded_by, sizes_of, steps_of, target_of
from fxshare.generation.encoder_decoder import mark_filled, source_like
from fxshare.generation.program import Program
from fxshare.generation.step import Values, arguments_of, decoder_arguments, nested
from fxshare.result.module import record_of


def check_against_own_code(
    program: Program, first: Program, gm: nn.Module, shell: nn.Module, own: nn.Module
) -> float:
    """Compare steps with a cache to those of ``own``, the model's own code with the same weights;
    ``first`` is the graph of the step that fills the encoder's cache, or ``program``. Returns the
    largest relative difference.

    Raises :class:`CaptureError` where rounding does not explain it.
    """
    broken: set[int] = set()
    cache = program.kind.cache
    assert cache is not None
    if cache.cross is None:
        pairs = _decoder_alone(program, gm, shell, own, broken)
    else:
        pairs = _with_encoder(program, first, gm, shell, own, broken)
    error = compare(pairs, gm, "the model's own code")
    let_go(program, broken)
    return error


def _decoder_alone(
    program: Program, gm: nn.Module, shell: nn.Module, own: nn.Module, broken: set[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits of each row in each step, by the own code and by the graph, without those of
    padding."""
    config, kind = shell.config, program.kind
    assert kind.cache is not None
    for rows, splits in CASES:
        ids, mask = tokens_of(gm, shell, rows, sum(splits))
        caches = [kind.cache.new(config, 2 * ids.shape[1]) for _ in range(2)]
        at = 0
        for new in splits:
            at += new
            one, other = (
                arguments_of(shell, kind, ids[:, :at], mask[:, :at], cache, new) for cache in caches
            )
            expected = _logits(own, one)
            found = run_unguarded(program, gm, other, broken)
            there = mask[:, at - expected.shape[1] : at].bool()
            yield expected[there], found[there]


def _with_encoder(
    program: Program,
    first: Program,
    gm: nn.Module,
    shell: nn.Module,
    own: nn.Module,
    broken: set[int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits ``(B, T, vocabulary)`` of each step, by the own code and by the graph; of the
    first step alone where that is the graph to be checked."""
    config, kind = shell.config, program.kind
    assert kind.cache is not None
    for few_first in (False, True):
        number = few_first % len(record_of(gm).inputs)
        source = source_like(gm, kind, number)
        rows, length = sizes_of(gm, number)
        ids = target_of(gm, shell, rows, length, number)
        given = encoded_by(own, source)
        long = next(iter(given.values())).shape[1]
        steps = steps_of(length, few_first)
        if first is program:
            steps = steps[:1]
        caches = [kind.cache.new(config, 2 * sum(steps), long) for _ in range(2)]
        at = 0
        for new in steps:
            at += new
            if at > length:
                break
            now = first if at == new else program
            one, other = (
                decoder_arguments(shell, now.kind, ids[:, :at], given, cache, new)
                for cache in caches
            )
            expected = _logits(own, one)
            # a guard of the step before is none of this graph's
            found = run_unguarded(now, gm, other, broken if now is program else set())
            mark_filled(caches[1])
            yield expected, found


def _logits(own: nn.Module, call: Values) -> Tensor:
    try:
        with quiet(), torch.no_grad():
            output: Any = own(**nested(call))
    except Exception as error:  # code of the model
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CaptureError(f"the model's own code fails: {reason[0]}") from error
    logits: Tensor = output.logits
    return logits


__all__ = ["check_against_own_code"]
