"""Is the graph with a cache the same function as the plain graph?"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshare.base.numerics import beyond_rounding, tolerance, worst
from fxshare.capture import (
    device_of,
    dtype_of,
    erase_guards,
    evaluate_unguarded,
    guard_nodes,
    quiet,
)
from fxshare.capture.call import LABELS, MASK
from fxshare.errors import CaptureError, GuardError
from fxshare.generation.program import Program
from fxshare.generation.step import Values, arguments_of
from fxshare.result.module import record_of
from fxshare.verifying.evaluated import evaluated
from passes.errors import FxShareError

# (tokens of each row, new tokens of each step): an empty cache, one with something in it, one
# token alone; rows of different length, and one row alone. Each case has padding, because code that
# finds none leaves the mask out
CASES = (((9, 6), (5, 3, 1)), ((5,), (4, 1, 1)))


def check_program(program: Program, gm: nn.Module, shell: nn.Module) -> float:
    """Compare steps with a cache, left-padded rows among them, to the plain graph on the whole.

    Guards that these steps break without consequences are let go, as in capture: that is how one
    graph serves the prompt and single tokens. Returns the largest relative difference.

    Raises :class:`CaptureError` where rounding does not explain it.
    """
    broken: set[int] = set()
    error = 0.0
    for rows, splits in CASES:
        error = max(error, compare(_compared(program, gm, shell, rows, splits, broken), gm))
    let_go(program, broken)
    return error


def compare(
    pairs: Iterable[tuple[Tensor, Tensor]], gm: nn.Module, what: str = "the plain graph"
) -> float:
    """The largest relative difference of what was found from what was expected, which is that of
    ``what``.

    Raises :class:`CaptureError` where rounding does not explain it.
    """
    limit = tolerance(dtype_of(gm), 2 * len(record_of(gm).plan.sites) + 1)
    error = 0.0
    for expected, found in pairs:
        distance = worst(expected, found)
        if not distance.relative <= limit:
            raise CaptureError(
                f"self-check: the graph with a cache differs from {what} by "
                f"{beyond_rounding(distance, limit)}"
            )
        error = max(error, distance.relative)
    return error


def let_go(program: Program, broken: Container[int]) -> None:
    """Take the guards out that were broken without consequences."""
    numbers = [n for n in range(len(guard_nodes(program.graph))) if n in broken]
    if numbers:
        erase_guards(program.graph, numbers)
        program.forget()


def _compared(
    program: Program,
    gm: nn.Module,
    shell: nn.Module,
    rows: tuple[int, ...],
    splits: tuple[int, ...],
    broken: set[int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits ``(tokens, vocabulary)`` of each row in each step, by the plain graph and by this
    one; without those of padding."""
    config: Any = shell.config
    length = sum(splits)
    ids, mask = tokens_of(gm, shell, rows, length)
    # a batch of one may be what a guard of the plain graph refuses
    whole = evaluated(gm, False)
    plain = [_plain(whole, r[length - n :].expand(2, n))[0] for r, n in zip(ids, rows, strict=True)]
    assert program.kind.cache is not None
    cache = program.kind.cache.new(config, 2 * length)
    at = 0
    for new in splits:
        at += new
        call = arguments_of(shell, program.kind, ids[:, :at], mask[:, :at], cache, new)
        logits = run_unguarded(program, gm, call, broken)
        kept = program.kind.logits or new
        for n, expected, row in zip(rows, plain, logits, strict=True):
            first = max(at - min(kept, new), length - n)
            if first < at:
                yield expected[first - length + n : at - length + n], row[-(at - first) :]


def tokens_of(
    gm: nn.Module, shell: nn.Module, rows: tuple[int, ...], length: int
) -> tuple[Tensor, Tensor]:
    """Random tokens ``(B, T)`` and their mask, of rows of these lengths, padded on the left."""
    config: Any = shell.config
    vocabulary = config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (len(rows), length), generator=generator)
    mask = torch.stack([torch.arange(length) >= length - n for n in rows]).long()
    return ids.to(device_of(gm)), mask.to(device_of(gm))


def run_unguarded(
    program: Program, gm: nn.Module, call: Values, broken: set[int], name: str = "logits"
) -> Tensor:
    """One output of a step, such as the logits ``(B, T, vocabulary)``, and into ``broken``
    the numbers of the guards it breaks."""
    bound = program.bound(gm, code=False)
    try:
        output, found = evaluate_unguarded(bound, call)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise CaptureError(
            f"self-check: the graph with a cache fails: {type(error).__name__}: {reason[0]}"
        ) from error
    broken |= {n for n, node in enumerate(guard_nodes(bound)) if node in found}
    found_there: Tensor = output[name]
    return found_there


def _plain(gm: nn.Module, ids: Tensor) -> Tensor:
    """The logits of the plain graph, captured with labels or without."""
    assert isinstance(gm, fx.GraphModule)
    inputs = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    call = {"input_ids": ids, **{name: torch.ones_like(ids) for name in inputs if name == MASK}}
    labels = {name: ids for name in inputs if name in LABELS}
    with quiet():
        try:
            output = gm(**call)
        except GuardError as error:
            try:
                output = gm(**call, **labels)
            except FxShareError:
                raise CaptureError(f"the plain graph cannot be compared with: {error}") from error
    logits = output["logits"] if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor):
        raise CaptureError(
            f"the plain graph returns a {type(output).__name__} without logits to compare with"
        )
    return logits
