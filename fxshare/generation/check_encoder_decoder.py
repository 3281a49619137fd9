"""Are the graphs of an encoder and of a decoder's steps the same function as the plain graph?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.capture import device_of, quiet
from fxshare.capture.call import LABELS, MASK
from fxshare.errors import CaptureError
from fxshare.generation.check import compare, let_go, run_unguarded
from fxshare.generation.encoder_decoder import mark_filled, source_like
from fxshare.generation.program import Program
from fxshare.generation.step import DECODER_MASK, ENCODED, decoder_arguments
from fxshare.result.inputs import InputSpec
from fxshare.result.module import record_of
from fxshare.verifying.evaluated import evaluated

_ENCODED = "encoder_last_hidden_state"


def check_encoder(program: Program, gm: nn.Module) -> float:
    """Compare the graph of the encoder to what the plain graph says the encoder made, on inputs of
    both sizes that ``gm`` was captured with. Returns the largest relative difference.

    Raises :class:`CaptureError` where rounding does not explain it.
    """
    broken: set[int] = set()
    whole = evaluated(gm, False)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(len(record_of(gm).inputs)):
            source = source_like(gm, program.kind, number)
            ids = torch.ones(sizes_of(gm, number), dtype=torch.long, device=device_of(gm))
            expected = _plain(whole, source, ids)[_ENCODED]
            call = {**source, **dict(program.kind.constants)}
            found = run_unguarded(program, gm, call, broken, "last_hidden_state")
            mask = source.get(MASK)
            if mask is not None and mask.shape == found.shape[:2]:  # padding is nobody's business
                expected, found = expected[mask.bool()], found[mask.bool()]
            yield expected, found

    error = compare(pairs(), gm)
    let_go(program, broken)
    return error


def check_decoder(program: Program, first: Program, gm: nn.Module, shell: nn.Module) -> float:
    """Compare steps of the decoder to the plain graph on the whole; ``first`` is the graph of the
    step that fills the cache, the one to be checked or the one before. Returns the largest relative
    difference.

    Raises :class:`CaptureError` where rounding does not explain it.
    """
    broken: set[int] = set()
    whole = evaluated(gm, False)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for few_first in (False, True):
            number = few_first % len(record_of(gm).inputs)
            yield from _compared(program, first, gm, whole, shell, number, few_first, broken)

    error = compare(pairs(), gm)
    let_go(program, broken)
    return error


def _compared(
    program: Program,
    first: Program,
    gm: nn.Module,
    whole: nn.Module,
    shell: nn.Module,
    number: int,
    few_first: bool,
    broken: set[int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits ``(B, T, vocabulary)`` of each step, by the plain graph and by these; of the first
    one alone where that is the graph to be checked."""
    config: Any = shell.config
    source = source_like(gm, program.kind, number)
    rows, length = sizes_of(gm, number)
    steps = steps_of(length, few_first)  # the plain graph gets all at once
    ids = target_of(gm, shell, rows, length, number)
    plain = _plain(whole, source, ids)
    given = {ENCODED: plain[_ENCODED]} | {n: t for n, t in source.items() if n == MASK}
    assert program.kind.cache is not None
    cache = program.kind.cache.new(config, 2 * sum(steps), plain[_ENCODED].shape[1])
    at = 0
    for new in steps if first is not program else steps[:1]:
        at += new
        if at > length:
            return
        now = first if at == new else program
        call = decoder_arguments(shell, now.kind, ids[:, :at], given, cache, new)
        # a guard of the step before is none of this graph's
        logits = run_unguarded(now, gm, call, broken if now is program else set())
        mark_filled(cache)
        yield plain["logits"][:, at - logits.shape[1] : at], logits


def steps_of(length: int, few_first: bool) -> tuple[int, ...]:
    """New tokens of each step: of one and of several, in either order."""
    return (1, 1, max(length - 2, 1)) if few_first else (max(length - 4, 1), 3, 1)


def target_of(gm: nn.Module, shell: nn.Module, rows: int, length: int, seed: int) -> Tensor:
    """Random tokens ``(B, T)`` for the decoder, as a generation has them: the start token first."""
    config: Any = shell.config
    vocabulary = config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    # some count positions by what is not padding, and there is none between tokens
    padding = getattr(config, "pad_token_id", None)
    if padding is not None:
        ids = torch.where(ids == padding, (ids + 1) % vocabulary, ids)
    start = getattr(config, "decoder_start_token_id", None)
    if start is not None:
        ids[:, 0] = start
    return ids.to(device_of(gm))


def encoded_by(own: Any, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the decoder reads of an input of the encoder, made by the model's own code."""
    with quiet(), torch.no_grad():
        made: Tensor = own.get_encoder()(**source).last_hidden_state
    return {ENCODED: made} | {n: t for n, t in source.items() if n == MASK}


def sizes_of(gm: nn.Module, number: int) -> tuple[int, int]:
    """Rows and tokens of the decoder in example ``number``."""
    inputs = record_of(gm).inputs[number]
    for name in ("decoder_input_ids", *sorted(LABELS)):
        if isinstance(inputs.get(name), InputSpec):
            rows, length = inputs[name].shape
            return rows, length
    raise CaptureError("the model was captured without an example of what its decoder reads")


def _plain(whole: nn.Module, source: Mapping[str, Tensor], ids: Tensor) -> Mapping[str, Tensor]:
    """The outputs of the plain graph for the decoder's tokens ``ids`` ``(B, T)``, captured with
    labels or without."""
    named = record_of(whole).inputs[0]
    call = {**source, "decoder_input_ids": ids}
    (main, *_) = source.values()
    rows, length = len(main), main.shape[-1]
    for name, like in ((MASK, (rows, length)), (DECODER_MASK, tuple(ids.shape))):
        # a mask that the plain graph does not take is none that the model reads, or it would show
        if name not in named:
            call.pop(name, None)
        elif name not in call:
            call[name] = torch.ones(like, dtype=torch.long, device=ids.device)
    for name in LABELS.intersection(named):
        call[name] = ids.roll(-1, 1)
        if "decoder_input_ids" not in named:  # the model makes them of the labels
            call.pop("decoder_input_ids", None)
    try:
        with quiet():
            output = whole(**call)
    except Exception as error:  # torch.export's guards are assertions
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CaptureError(f"the plain graph cannot be compared with: {reason[0]}") from error
    if not isinstance(output, Mapping) or not {"logits", _ENCODED} <= set(output):
        raise CaptureError(
            f"the plain graph returns a {type(output).__name__} without logits and "
            f"{_ENCODED} to compare with"
        )
    return output


__all__ = ["check_decoder", "check_encoder", "encoded_by", "sizes_of", "steps_of", "target_of"]
