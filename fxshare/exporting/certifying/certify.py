"""A certificate of an export that was just read back."""

from __future__ import annotations

import importlib
import time
from dataclasses import replace
from typing import Any

import torch

from fxshare.base.numerics import worst
from fxshare.base.randomness import randomness_as_before
from fxshare.capture import dtype_of
from fxshare.errors import CheckFailed
from fxshare.exporting.certifying.certificate import Certificate
from fxshare.exporting.certifying.trial import Trial, trial_of
from fxshare.exporting.outputs import leaves
from fxshare.exporting.subject import Subject
from fxshare.exporting.written import Written
from fxshare.store.manifest import dtype_name, versions

ENGINES = {
    "pt2": "torch",
    "aoti": "torch",
    "py": "torch",
    "dense": "torch",
    "onnx": "onnxruntime",
    "vllm": "transformers",
    "ort-genai": "onnxruntime_genai",
}
"""What runs a target here, when it is checked."""
_SHOWN = 8


def certify(subject: Subject, written: Written, to: str, *, seed: int) -> Certificate:
    """What the compiled model and the export say, to be kept beside the export.

    Raises :class:`CheckFailed` where their tokens differ by more than rounding.
    """
    engine = ENGINES[to]
    if to == "ort-genai" and written.generate is None:
        engine = "onnxruntime"
    blank = Certificate(
        target=to,
        model=subject.name,
        dtype=dtype_name(dtype_of(subject.model)),
        engine=engine,
        engine_version=_version(engine),
        seed=seed,
        kind="none",
        made_by=f"fxshare {versions().get('fxshare', '')}".strip(),
    )
    if written.run is None:
        return replace(blank, note="nothing here can run it")
    started = time.perf_counter()
    with randomness_as_before(), torch.no_grad():
        trial = trial_of(subject, written, seed)
        if trial is None:
            found = _outputs(subject, written, blank, seed)
        else:
            found = _tokens(subject, written, trial, blank)
    return replace(found, seconds=round(time.perf_counter() - started, 3))


def _tokens(subject: Subject, written: Written, trial: Trial, blank: Certificate) -> Certificate:
    assert written.run is not None
    logits_PTV = trial.run(written.run)
    limit = subject.limit(trial.call(trial.texts_PT[: trial.rows]), trial.logits_PTV)
    expected, given = trial.steps(trial.logits_PTV), trial.steps(logits_PTV)
    distance = worst(expected, given)
    allowed = limit * float(expected.abs().max())
    if written.generate is None:
        # greedy: where each token of a text is the likeliest after those before it, the same are
        # generated; after the first that is not, nothing is known and nothing is compared
        found = given.argmax(-1).tolist()
    else:
        found = [written.generate(prompt, trial.new) for prompt in trial.prompts()]
    first = trial.difference(found, allowed)
    if first is not None and not first.within_rounding:
        raise CheckFailed(
            f"the {blank.target} export of {subject.name} says token {first.found} where the "
            f"compiled model says {first.expected}, at {first.position} after prompt "
            f"{first.prompt}, by a margin of {first.margin:.3g}; rounding explains "
            f"{2 * allowed:.1e}. Nothing was written"
        )
    return replace(
        blank,
        kind="tokens",
        prompts=tuple(map(tuple, trial.prompts())),
        expected=tuple(map(tuple, trial.expected())),
        found=tuple(map(tuple, found)),
        logits=tuple(map(tuple, trial.chosen())),
        margins=tuple(map(tuple, trial.margins())),
        equal=first is None,
        first_difference=first,
        gap=distance.absolute,
        limit=allowed,
        inputs=tuple(subject.inputs),
        rows=None if written.batch else trial.rows,
        width=None if written.sequence else trial.texts_PT.shape[1],
    )


def _outputs(subject: Subject, written: Written, blank: Certificate, seed: int) -> Certificate:
    """Of a model that makes no tokens: the first numbers of what it makes."""
    assert written.run is not None
    calls = subject.other_calls(batch=written.batch, sequence=written.sequence, seed=seed)
    first = dict(calls[:1])  # the others may be refused by the runtime
    prompts, expected, found, gaps, limits = [], [], [], [], []
    for what, call in first.items():
        left, right = subject.run(call), written.run(call)
        prompts.append(what)
        expected.append(_start(left))
        found.append(_start(right))
        distance = worst(left, right)
        gaps.append(0.0 if written.unmasked_only else distance.absolute)
        limits.append(subject.limit(call, left) * _largest(left))
    return replace(
        blank,
        kind="outputs",
        prompts=tuple(prompts),
        expected=tuple(expected),
        found=tuple(found),
        equal=True,
        gap=max(gaps, default=0.0),
        limit=max(limits, default=0.0),
    )


def _start(output: Any) -> tuple[float, ...]:
    first = next((t for t in leaves(output) if t.is_floating_point()), torch.empty(0))
    return tuple(first.detach().flatten()[:_SHOWN].double().tolist())


def _largest(output: Any) -> float:
    found = [t for t in leaves(output) if t.is_floating_point() and t.numel()]
    return max((float(t[t.isfinite()].abs().max()) for t in found), default=0.0)


def _version(engine: str) -> str:
    module: Any = importlib.import_module(engine)
    return str(module.__version__)


__all__ = ["ENGINES", "certify"]
