"""``python -m tests.refining.peak [READING ...]``: the memory refining takes beside the models.

Prints JSON: the bytes of both models, what is trained and what autograd keeps of a batch, what
docs/how-to/refine.md says that there is at most, and for each READING the anonymous memory at the
peak beyond that before. ``plain`` refines a random GPT-2 of which half is kept; ``recompute`` keeps
less for the backward pass; ``wasteful`` holds three more copies of what is trained, which a test of
the first must see.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from typing import Any
from unittest import mock

import torch

import fxshare
from fxshare.refining.optimiser import Optimiser
from fxshare.refining.parameters import trainable_of
from fxshare.refining.recompute import activations
from fxshare.refining.student import Student
from tests.peak import Peak, anonymous

ROWS, LENGTH, VOCABULARY = 2, 64, 512
STEPS = 9
"""The loss is measured after five of them, so that there is a best state beside the present one."""


def subject(width: int, layers: int) -> tuple[Any, Any, list[torch.Tensor]]:
    """A random GPT-2, what Basis Sharing keeps half of it by, and batches."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=layers, n_head=4, n_embd=width, vocab_size=VOCABULARY, n_positions=LENGTH
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    batches = list(torch.randint(VOCABULARY, (6, ROWS, LENGTH)).unbind(0))
    sharing = {"group_size": 2, "compression_rate": 0.5}
    return (
        model,
        fxshare.compile(model, [fxshare.init(model), sharing], example=batches[0]),
        batches,
    )


class Wasteful(Optimiser):
    """One that keeps three copies of what it trains."""

    def __init__(self, student: Student, *rest: Any) -> None:
        super().__init__(student, *rest)
        self.kept = [student.state() for _ in range(3)]


def peak(subject: Any, reading: str) -> int:
    """Of one reading, in a process of its own: what another freed is not free again."""
    model, gm, batches = subject
    source, target = os.pipe()
    if not os.fork():
        gc.collect()
        before = anonymous()
        optimiser = Wasteful if reading == "wasteful" else Optimiser
        with Peak() as seen, mock.patch("fxshare.refining.train.Optimiser", optimiser):
            options: dict[str, Any] = {"recompute": reading == "recompute", "seed": 0}
            fxshare.refine(gm, model, batches, steps=STEPS, learning_rate=1e-3, **options)
        os.write(target, str(seen.bytes - before).encode())
        os._exit(0)
    os.close(target)
    os.wait()
    with os.fdopen(source) as found:
        return int(found.read())


def main(*readings: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    small = subject(16, 2)
    fxshare.refine(small[1], small[0], small[2], steps=1)  # what libraries set up once
    model, gm, batches = used = subject(384, 6)
    trainable = trainable_of(gm, model, ())
    named = dict(gm.named_parameters())
    trained = sum(named[name].nbytes for name in trainable.names)
    kept = activations(Student(gm, trainable), gm.fxshare.caller(model)(batches[0]))
    logits = 4 * ROWS * LENGTH * VOCABULARY
    found = {
        "dense": sum(p.nbytes for p in model.parameters()),
        "compressed": sum(p.nbytes for p in gm.parameters()),
        "trained": trained,
        "activations": kept,
        # a copy, the gradient, two moments and the best state; "kl" has three of the logits' size
        "stated": 5 * trained + kept + 3 * logits,
    }
    print(json.dumps({**found, **{one: peak(used, one) for one in readings or ("plain",)}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
