"""Refining block by block: each against what the dense block makes of the dense model's values.

The student's block reads what the student's blocks before it have come to, the dense one what the
dense blocks before it made, so that later blocks make up for the errors of earlier ones. The loss
is half the squared distance of the blocks' outputs in the metric of what it costs the model
(:mod:`fxshare.refining.metric`). Beside the models, memory holds what one block needs: its inputs
(the first 64 MB, then in files), its gradients, moments and activations; for the metrics the
activations of the dense model, once.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxshare.base.numerics import beyond_rounding, tolerance, worst
from fxshare.base.processes import here
from fxshare.base.spool import Picked, Spooled
from fxshare.capture import Call, Caller
from fxshare.capture.call import to_device
from fxshare.errors import FxShareWarning, RefineError
from fxshare.refining.batches import Batches
from fxshare.refining.checkpoint import Checkpoints
from fxshare.refining.cuts import STUDENT, TEACHER, Block, Cuts, as_items, cuts_of, part_of
from fxshare.refining.dense_graph import dense_graph
from fxshare.refining.measure import Measure, Teacher
from fxshare.refining.metric import InMetric, metrics_of
from fxshare.refining.optimiser import Optimiser
from fxshare.refining.options import RefineOptions
from fxshare.refining.run import Run
from fxshare.refining.steps import Stepper
from fxshare.refining.student import Student
from fxshare.refining.train import Training, train
from fxshare.result.refinement import BlockLoss, Point

_LOG = logging.getLogger(__name__)
_FEW = 4
_FLOWING = 0.2
"""The largest share of a block's time that passing its values on may take."""


@dataclass(frozen=True)
class Blockwise:
    """What is trained, on what; ``teacher``, ``measure`` and ``checkpoints`` are of the whole
    model."""

    student: Student
    model: nn.Module
    teacher: Teacher
    data: Batches
    caller: Caller
    options: RefineOptions
    measure: Measure
    checkpoints: Checkpoints | None = None


def train_blocks(work: Blockwise, run: Run) -> None:
    """Train one block after the other; ``run`` holds the state that is best for the whole model.

    Raises :class:`RefineError` where the graph cannot be cut, or a block's loss is not finite.
    """
    if run.stopped is not None:
        return
    cuts = cuts_of(work.student.module, work.student.trainable)
    dense = dense_graph(work.student.gm, work.model).eval()
    try:
        _check_dense(work, dense)
        _train(work, run, cuts, dense)
    except KeyboardInterrupt:
        if here().size > 1:  # the others are in the middle of another step
            raise
        run.stopped = "interrupted"
    except RefineError as error:
        if run.state is None:
            raise
        run.stopped = "not finite"
        warnings.warn(
            f"{error}. The best state, of {run.mark} blocks, is returned",
            FxShareWarning,
            stacklevel=3,
        )
    _LOG.info("refine: %d blocks, the best is the state of step %d", len(run.blocks), run.kept)


def _train(work: Blockwise, run: Run, cuts: Cuts, dense: fx.GraphModule) -> None:
    options = work.options
    metrics = metrics_of(dense, cuts, work.data.fit, work.caller, options.seed)
    items: list[Sequence[object]] = [
        Spooled(dict(work.caller(batch)) for batch in batches)
        for batches in (_in_turn(work.data, options), work.data.held_out)
    ]
    for number, block in enumerate(cuts.blocks):
        if len(cuts.blocks) <= run.mark:  # a finished run was read
            break
        student = _of_block(work.student, cuts, block)
        objective = InMetric(block.outputs, metrics)
        teacher = Teacher(part_of(dense, cuts, block, TEACHER), objective)
        left = options.limit - here().broadcast(run.elapsed(), "the time")
        limit = left * len(block.layers) / sum(len(b.layers) for b in cuts.blocks[number:])
        if limit <= 0:
            break
        if number >= run.mark:
            if block.trainable.names:
                fit, held_out = items
                data = Batches(fit, held_out, (), _numbers(work.data, options), options.seed)
                _train_block(work, run, block, student, teacher, data, limit)
            if run.stopped is not None:
                return
            run.mark = number + 1
            if work.checkpoints is not None:
                plain = Optimiser(work.student, work.student.scales(), options.optimiser)
                work.checkpoints.write(work.student, plain, run)
        if number + 1 < len(cuts.blocks):
            items = [
                Spooled(_passed_on(one, block, student, teacher, most))
                for one, most in zip(items, (_FLOWING * limit, math.inf), strict=True)
            ]
    run.stopped = "done"


def _in_turn(data: Batches, options: RefineOptions) -> Iterator[object]:
    """The batches in the order of the first epoch, and of these as many as there are steps."""
    for number in _places(data, options):
        yield data.fit[number]


def _numbers(data: Batches, options: RefineOptions) -> list[int]:
    return [data.numbers[number] for number in _places(data, options)]


def _places(data: Batches, options: RefineOptions) -> list[int]:
    most = math.inf if options.steps is None else options.steps * options.accumulate
    return [data.at(place) for place in range(int(min(most, len(data.fit))))]


def _of_block(whole: Student, cuts: Cuts, block: Block) -> Student:
    """A student of the block alone, in the state in which ``whole`` is."""
    student = Student(whole.gm, block.trainable)
    student.put({name: whole.masters[name] for name in block.trainable.names})
    assert isinstance(student.module, fx.GraphModule)
    student.module = part_of(student.module, cuts, block, STUDENT)
    return student


def _train_block(
    work: Blockwise,
    run: Run,
    block: Block,
    student: Student,
    teacher: Teacher,
    data: Batches,
    limit: float,
) -> None:
    minutes = None if math.isinf(limit) else limit / 60
    options = replace(work.options, objective=None, minutes=minutes, recompute=False)
    measure = Measure(data.held_out, _given, teacher)
    few = Measure(Picked(data.held_out, range(min(_FEW, len(data.held_out)))), _given, teacher)
    before = student.state()
    first = measure(student)
    own = Run(first, first)
    stepper = Stepper(student, teacher, data, _given, options)
    train(Training(stepper, measure, lambda: few(student), options), own, None)
    student.put(before if own.state is None else own.state)
    for name, master in student.masters.items():
        work.student.masters[name].copy_(master)
    run.step += own.step
    run.tokens += own.tokens
    run.dropped += own.dropped
    run.rate = max(run.rate, own.rate)
    run.blocks.append(
        BlockLoss(block.layers, own.step, first.objective, own.best.objective, own.rate)
    )
    _LOG.info("refine: %s, loss %.4f → %.4f", block, first.objective, own.best.objective)
    if own.stopped == "interrupted":
        run.stopped = "interrupted"
    found = work.measure(work.student)
    run.curve.append(Point(run.step, run.elapsed(), found.objective))
    if run.improved(found):
        run.best, run.state, run.kept = found, work.student.state(), run.step


def _given(item: Any) -> Call:
    """What is handed from block to block is a call already."""
    found: Call = item
    return found


def _passed_on(
    items: Sequence[object], block: Block, student: Student, teacher: Teacher, limit: float
) -> Iterator[object]:
    """The inputs of the next block, of as many items as the time suffices for. Of several processes
    each computes one of a round, and has all of them then."""
    began, together = time.monotonic(), here()
    for first in range(0, len(items), together.size):
        places = range(first, min(first + together.size, len(items)))
        yield from together.spread(
            places, lambda at: _next_item(items[at], block, student, teacher), at="passing on"
        )
        if together.broadcast(time.monotonic() - began, "the time") > limit:
            break


def _next_item(item: Any, block: Block, student: Student, teacher: Teacher) -> dict[str, Any]:
    """What the next block reads of one item: what both sides make of it, and the call's own
    arguments."""
    assert teacher.module is not None
    with torch.no_grad():
        own = student(item)
        dense = teacher.module(**to_device(item, student.device))
    found = {k: v for k, v in item.items() if k not in _names(block.inputs)}
    for whose, values in ((STUDENT, own), (TEACHER, dense)):
        found.update(as_items(dict(zip(block.outputs, values, strict=True)), whose))
    return found


def _names(inputs: Sequence[str]) -> set[str]:
    return {f"{whose}_{name}" for whose in (STUDENT, TEACHER) for name in inputs}


def _check_dense(work: Blockwise, dense: fx.GraphModule) -> None:
    """Compare the dense graph with the model on the first batch."""
    assert work.teacher.module is not None
    call = to_device(work.caller(work.data.fit[0]), work.student.device)
    with torch.no_grad():
        wanted = work.teacher.module(**call)
        try:
            own = dense(**call)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # sizes that its code names
            raise RefineError(
                "objective='blocks': the compiled graph cannot run with the dense weights, since "
                "it names the sizes of what is left where heads or hidden units went or became "
                f"narrower ({next(iter(str(error).splitlines()), '')}). Take objective='kl' or "
                "'hidden', which train the whole at once"
            ) from error
        found = worst(wanted, own)
    dtype = next(p.dtype for p in work.student.gm.parameters() if p.is_floating_point())
    limit = tolerance(dtype, len(work.student.trainable.names))
    if not found.relative <= limit:
        raise RefineError(
            f"objective='blocks': the graph with dense weights is not the model: "
            f"{beyond_rounding(found, limit)}. Take objective='kl' or 'hidden'"
        )


__all__ = ["Blockwise", "train_blocks"]
