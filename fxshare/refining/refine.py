"""``fxshare.refine``: the factors of a compiled model, trained towards the original's outputs."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fxshare.base.fingerprints import name_of, of_batches, of_json, of_model
from fxshare.base.processes import here, in_step
from fxshare.base.progress import stage
from fxshare.base.randomness import randomness_as_before
from fxshare.base.spool import Picked
from fxshare.base.surroundings import plain_surroundings
from fxshare.calibration.losses import Loss
from fxshare.capture import Caller
from fxshare.capture.adapted import runnable
from fxshare.errors import RefineError
from fxshare.models.wrapped import unwrapped
from fxshare.refining.balance import balance
from fxshare.refining.batches import Batches, divided
from fxshare.refining.blocks import Blockwise, train_blocks
from fxshare.refining.checkpoint import Checkpoints
from fxshare.refining.float32 import is_wide
from fxshare.refining.measure import Measure, Teacher, in_the_model
from fxshare.refining.objectives import Objective, objective_of
from fxshare.refining.options import (
    ObjectiveName,
    OptimiserName,
    RefineOptions,
    also_of,
    check_given,
)
from fxshare.refining.parameters import trainable_of
from fxshare.refining.run import Run
from fxshare.refining.shards import check_graph
from fxshare.refining.steps import Stepper
from fxshare.refining.student import Student
from fxshare.refining.together import agree, check_shared, divide_state, held
from fxshare.refining.train import Training, train
from fxshare.refining.written import refined_record
from fxshare.result.face import verbs_of
from fxshare.result.module import Compiled, attach, record_of
from fxshare.result.refinement import Refinement
from fxshare.rewriting.lowering import lower, readable
from fxshare.verifying.evaluated import evaluated
from fxshare.verifying.verify import check_sites

_LOG = logging.getLogger(__name__)
_FEW = 4
"""Held-out batches that learning rates are compared on."""


@stage("refine", _LOG)
@plain_surroundings()
@in_step()
def refine(
    gm: nn.Module,
    model: nn.Module,
    batches: Iterable[object],
    *,
    minutes: float | None = None,
    steps: int | None = None,
    objective: ObjectiveName | None = None,
    loss: Loss | None = None,
    teacher: nn.Module | Literal["model"] | None = "model",
    temperature: float = 1.0,
    data_weight: float = 0.0,
    pool_weight: float = 0.0,
    heldout: Iterable[object] | None = None,
    second: Iterable[object] | None = None,
    learning_rate: float | None = None,
    also: Collection[str] | str = (),
    optimiser: OptimiserName = "adamw",
    accumulate: int = 1,
    autocast: bool | None = None,
    compile: bool = False,
    offload: bool = False,
    recompute: bool | None = None,
    shard: bool = False,
    seed: int = 0,
    work: str | os.PathLike[str] | None = None,
) -> Compiled:
    """Train the factors of a compiled model, so that it comes nearer to the original; plan and size
    stay as they are. What comes back is never worse on the held-out data than ``gm``.

    Bases, coefficients and pivot tables are trained in eval mode, with a warm-up, a cosine
    and a gradient of norm 1 at most. ``gm``, ``model``, ``teacher`` and the random state stay as
    they are. What was lowered is refined as :func:`fxshare.readable` gives it, and lowered again.

    Parameters
    ----------
    gm
        What :func:`fxshare.compile`, :func:`fxshare.load`, :func:`fxshare.lower` or this function
        returned.
    model
        The model that it was compiled from.
    batches
        Batches as for :func:`fxshare.compile`.
    minutes, steps
        How long it may take; one of them, or both, of which the first that is reached counts.
    objective
        ``"kl"``: the divergence from the teacher's distribution of logits. ``"hidden"``: the
        distance to the teacher's outputs, per token, each by its size. ``"ce"``: the data's own
        loss, next-token cross-entropy or what the model returns as ``loss``. ``"blocks"``: the
        distance of each block's output to the dense block's, one block after the other, for want of
        memory; ``steps`` are those of each block, and the whole is measured by the default. Where
        None, ``"kl"``
        for a language model and ``"hidden"`` for others, without a teacher ``"ce"``.
    loss
        In place of these: ``(output, batch) -> scalar``, summed over tokens.
    teacher
        The model to learn from, ``model`` itself where it is not given. None: no teacher.
    temperature, data_weight
        For ``"kl"``: the temperature of both distributions, and the share of the data's own loss.
    pool_weight
        For ``"hidden"``: the share of the distance between the means over the tokens of each
        sample, which sentence embeddings are.
    heldout
        Batches to measure on along the way; the best state on them is returned. Where None, a tenth
        of ``batches``, drawn by the seed, that is not trained on then.
    second
        Batches of another kind of text, whose loss before and after is reported beside: refining
        on one corpus flatters that corpus.
    learning_rate
        Relative to the size (root mean square) of each tensor. Where None, the best of some that
        are tried for a few steps each, within a tenth of the time.
    also
        ``"norms"``, ``"biases"`` or both: trained as well.
    optimiser
        ``"adamw"``, or ``"muon"`` (Jordan et al. 2024): matrices step along an orthogonal matrix,
        the rest by AdamW. Its steps take longer and may bring more. Not with ``shard``.
    accumulate
        So many batches make one step.
    autocast
        Run the model under autocast in bfloat16. Where None, on a GPU that has it.
    compile
        Run the step through ``torch.compile``, which itself takes a minute or more.
    offload
        Keep activations in a temporary file until the backward pass, where memory is short.
    recompute
        Keep what goes from layer to layer and compute the rest again in the backward pass, for the
        time of a second forward pass. Where None, where the activations of the first batch take
        more than half of the memory that is free.
    shard
        Of several processes each keeps a part of what is trained, of its gradients and of the
        optimiser's state (FSDP2), and gathers it where it is needed; ``accumulate`` is a multiple
        of their number. One process keeps all of it.
    seed
        Of the order of batches, and of what is held out.
    work
        A folder for checkpoints: a run that was ended goes on from the last one.

    In a process group of torch.distributed the processes divide the batches of each step, of which
    ``accumulate`` gives as many at least; every rank is given the same, and ends with the result.

    Returns
    -------
    Compiled
        A new compiled model. ``record.refined`` says what was done; Ctrl-C returns the best state
        so far.

    Raises
    ------
    RefineError
        There is nothing to train, the data or the teacher do not fit, or the loss is not finite.
    FxShareError
        One of its other kinds.
    """
    options = RefineOptions(
        minutes=minutes,
        steps=steps,
        objective=objective,
        temperature=temperature,
        data_weight=data_weight,
        pool_weight=pool_weight,
        learning_rate=learning_rate,
        also=also_of(also),
        optimiser=optimiser,
        accumulate=accumulate,
        autocast=autocast,
        compile=compile,
        offload=offload,
        recompute=recompute,
        shard=shard,
        seed=seed,
    )
    check_given(loss, teacher, work)
    check_shared(options)
    gm = getattr(gm, "_orig_mod", gm)  # what torch.compile wraps
    record = record_of(gm)
    model = unwrapped(model)
    check_sites(model, record.plan)
    if objective == "blocks" and isinstance(teacher, nn.Module):
        raise RefineError(
            "objective='blocks' compares with the blocks of the model that was compiled; leave "
            "teacher out"
        )
    from_teacher = model if isinstance(teacher, str) else teacher
    data = divided(batches, heldout, second, seed=seed)
    lowered = record.lowered
    if lowered is not None:
        gm = readable(gm)
    with randomness_as_before():
        prepared = _prepared(gm, model, from_teacher, data, options, loss)
        with _checkpoints(prepared, model, from_teacher, work) as checkpoints:
            result = _refined(prepared, model, checkpoints)
    return result if lowered is None else lower(result, prefer=lowered.prefer)


@dataclass(frozen=True)
class _Prepared:
    student: Student
    objective: Objective
    teacher: Teacher
    data: Batches
    caller: Caller
    options: RefineOptions
    loss: Loss | None

    def measure(self, batches: Any, name: str = "held-out batch") -> Measure:
        return Measure(batches, self.caller, self.teacher, name)


def _prepared(
    gm: nn.Module,
    model: nn.Module,
    teacher: nn.Module | None,
    data: Batches,
    options: RefineOptions,
    loss: Loss | None,
) -> _Prepared:
    caller = record_of(gm).caller(model)
    if options.shard and here().size > 1:
        check_graph(gm)
    wide = loss is None and is_wide(gm, options)
    student = Student(gm, trainable_of(gm, model, options.also), wide=wide)
    module = None if teacher is None else evaluated(runnable(unwrapped(teacher)), wide)
    call = caller(data.fit[0])
    with torch.no_grad(), in_the_model(f"batch {data.numbers[0]}"):
        output = student(call)
    objective = objective_of(options, loss, output, call, teacher=module is not None)
    return _Prepared(
        student, objective, Teacher(module, objective, wide), data, caller, options, loss
    )


def _refined(prepared: _Prepared, model: nn.Module, checkpoints: Checkpoints | None) -> Compiled:
    student, data, options = prepared.student, prepared.data, prepared.options
    measure = prepared.measure(data.held_out)
    second = prepared.measure(data.second, "second corpus, batch") if len(data.second) else None
    few = prepared.measure(Picked(data.held_out, range(min(_FEW, len(data.held_out)))))
    found = None if checkpoints is None else checkpoints.read(student)
    here().gather(None, "the checkpoint")  # before it is replaced
    run, optimiser = found or (_first(student, measure, second), None)
    if options.objective == "blocks":
        parts = (student, model, prepared.teacher, data, prepared.caller, options, measure)
        train_blocks(Blockwise(*parts, checkpoints), run)
    else:
        stepper = Stepper(student, prepared.teacher, data, prepared.caller, options)
        if options.shard and here().size > 1:
            optimiser = divide_state(student, run, optimiser)
        train(
            Training(stepper, measure, lambda: few(student), options, checkpoints), run, optimiser
        )
    after = None
    if second is not None:
        after = run.second if run.state is None else _of_state(student, second, run.state)
    if not measure.tokens:  # a finished run was read
        measure(student)
    return _result(prepared, model, run, measure.tokens, after)


def _first(student: Student, measure: Measure, second: Measure | None) -> Run:
    """The first state measured, before anything is touched; then its factors are balanced."""
    first = measure(student)
    if measure.bad is not None:
        raise RefineError(
            f"the loss of the model as it is, on held-out batch {measure.bad}, is not finite; look "
            "for NaN in that batch or the weights"
        )
    run = Run(first, first, None if second is None else second(student))
    for one, name in ((measure, "held-out"), (second, "second")):
        if one is not None and not one.tokens:
            raise RefineError(
                f"{name} data: expected tokens to measure on, found none: the masks of all its "
                "batches leave everything out; give data whose attention_mask is not all 0"
            )
    balance(student.trainable.groups, student.masters)
    student.round()
    return run


def _of_state(student: Student, second: Measure, state: Any) -> Any:
    student.put(state)
    return second(student)


def _result(
    prepared: _Prepared, model: nn.Module, run: Run, held_out: int, second_after: Any
) -> Compiled:
    student, options = prepared.student, prepared.options
    factors = ("factors",) if student.trainable.groups or student.trainable.units else ()
    done = Refinement(
        objective="blocks" if options.objective == "blocks" else prepared.objective.name,
        trained=(*factors, *options.also),
        steps=run.step,
        tokens=run.tokens,
        seconds=run.elapsed(),
        learning_rate=run.rate,
        seed=options.seed,
        held_out=held_out,
        before=run.first,
        after=run.best,
        kept=run.kept,
        stopped=run.stopped or "done",
        dropped=run.dropped,
        second_before=run.second,
        second_after=second_after,
        curve=tuple(run.curve),
        blocks=tuple(run.blocks),
    )
    done = here().broadcast(done, "what was done")  # with the first one's seconds
    result = student.result(run.state)
    record = refined_record(model, student.gm, result, student.trainable, done)
    return attach(result, record, verbs_of(student.gm))


@contextmanager
def _checkpoints(
    prepared: _Prepared, model: nn.Module, teacher: nn.Module | None, work: Any
) -> Iterator[Checkpoints | None]:
    if work is None and here().size == 1:
        yield None
        return
    data = prepared.data
    made_from = {
        "compiled": of_model(prepared.student.gm),
        "model": of_model(model),
        "teacher": "none" if teacher is None else of_model(teacher),
        "data": of_batches(data.fit),
        "held out": of_batches(data.held_out),
        "second": of_batches(data.second),
        "loss": "none" if prepared.loss is None else name_of(prepared.loss),
        "options": of_json({k: v for k, v in asdict(prepared.options).items() if k != "shard"}),
        "versions": f"fxshare {version('fxshare')}, torch {torch.__version__}",
    }
    agree({**made_from, "work folder": str(work), "shard": str(prepared.options.shard)})
    if work is None:
        yield None
        return
    with held(Path(work), made_from) as checkpoints:
        yield checkpoints


__all__ = ["refine"]
