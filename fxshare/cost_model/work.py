"""What a forward pass does, operation by operation, and how long that takes.

Roofline (Williams, Waterman & Patterson 2009): an operation takes the longer of its arithmetic at
the device's FLOP/s and its traffic at the device's bandwidth. To this we add a launch for each
operation, which dominates small models in eager mode. Where an operation of a shape was measured
(``fxshare bench device MODEL``), it takes that instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from fxshare.cost_model.measured import AttentionKey
from fxshare.cost_model.rates import Floats, Rates


@dataclass(frozen=True)
class Matmul:
    """``batch`` products ``(rows, inner) @ (inner, out)``."""

    rows: int
    inner: int
    out: int
    batch: int = 1

    @property
    def flops(self) -> int:
        """2 a multiplication."""
        return 2 * self.batch * self.rows * self.inner * self.out

    @property
    def weight_numbers(self) -> int:
        """Numbers in the right operands."""
        return self.batch * self.inner * self.out

    @property
    def numbers(self) -> int:
        """Numbers in both operands and the result."""
        return self.weight_numbers + self.batch * self.rows * (self.inner + self.out)


@dataclass(frozen=True)
class Attention:
    """Scaled dot-product attention as one operation, ``batch`` heads; ``causal`` halves its
    arithmetic."""

    batch: int
    rows: int
    keys: int
    width: int
    causal: bool = False

    @property
    def key(self) -> AttentionKey:
        """Under which its seconds are kept."""
        return (self.batch, self.rows, self.keys, self.width, int(self.causal))

    @property
    def flops(self) -> int:
        """Of both products."""
        return 4 * self.batch * self.rows * self.keys * self.width // (1 + self.causal)

    @property
    def numbers(self) -> int:
        """Queries, keys, values and the result."""
        return 2 * self.batch * self.width * (self.rows + self.keys)


@dataclass(frozen=True)
class Traffic:
    """Anything else: an operation that reads and writes numbers."""

    reads: int
    writes: int

    @property
    def flops(self) -> int:
        """Not counted."""
        return 0

    @property
    def numbers(self) -> int:
        """Read and written."""
        return self.reads + self.writes


Operation: TypeAlias = Matmul | Attention | Traffic
Step = Sequence[Operation]
"""The operations of one forward pass, in order."""


def matmul_seconds(
    rates: Rates,
    rows: int,
    inner: ArrayLike,
    out: ArrayLike,
    *,
    working_set: float = np.inf,
    compiled: bool = True,
) -> Floats:
    """Seconds of products of these sizes, elementwise over ``inner`` and ``out``.

    ``working_set`` are the bytes of all the weights of the pass, which are read in turn.
    """
    inner, out = np.asarray(inner, dtype=np.float64), np.asarray(out, dtype=np.float64)
    arithmetic = 2 * rows * inner * out / rates.flops_per_second(np.minimum(inner, out))
    weights = inner * out * rates.element_size
    activations = rows * (inner + out) * rates.element_size
    traffic = weights / rates.bytes_per_second(working_set)
    traffic = traffic + activations / rates.bytes_per_second(activations)
    measured = rates.measured.product_seconds(rows, inner, out)
    found: Floats = np.where(np.isnan(measured), np.maximum(arithmetic, traffic), measured)
    return found + rates.launch_seconds(compiled=compiled)


def seconds(rates: Rates, step: Step, *, compiled: bool, working_set: float | None = None) -> float:
    """Predicted seconds of the operations of a forward pass, or of some of them.

    Under ``compiled`` a run of operations between matrix products counts as one, which reads what
    its first one reads and writes what its last one writes. ``working_set`` is by default the
    bytes of the step's own right operands.
    """
    if working_set is None:
        working_set = sum(_weight_numbers(o) for o in step) * rates.element_size
    return sum(
        _seconds(rates, o, compiled=compiled, working_set=working_set)
        for o in (_fused(step) if compiled else step)
    )


def pass_seconds(rates: Rates, step: Step, *, compiled: bool) -> float:
    """Predicted seconds of a whole forward pass: of its operations, and of entering it."""
    return seconds(rates, step, compiled=compiled) + (rates.entry if compiled else 0.0)


def launches(step: Step, *, compiled: bool) -> int:
    """How many operations of a forward pass are launched, as :func:`seconds` counts them."""
    return sum(1 for _ in (_fused(step) if compiled else step))


def _seconds(rates: Rates, o: Operation, *, compiled: bool, working_set: float) -> float:
    if isinstance(o, Matmul):
        one = matmul_seconds(
            rates, o.rows, o.inner, o.out, working_set=working_set, compiled=compiled
        )
        launch = rates.launch_seconds(compiled=compiled)
        return o.batch * (float(one) - launch) + launch
    size = o.numbers * rates.element_size
    traffic = size / float(rates.bytes_per_second(size))
    arithmetic = 0.0
    if isinstance(o, Attention):
        measured = rates.measured.attention_seconds(o.key)
        if measured is not None:
            return measured + rates.launch_seconds(compiled=compiled)
        narrowest = min(o.width, o.keys)
        arithmetic = o.flops / float(rates.flops_per_second(narrowest))
    return max(arithmetic, traffic) + rates.launch_seconds(compiled=compiled)


def _fused(step: Step) -> Iterator[Operation]:
    run: list[Traffic] = []
    for o in step:
        if isinstance(o, Traffic):
            run.append(o)
            continue
        yield from _one(run)
        run = []
        yield o
    yield from _one(run)


def _one(run: Sequence[Traffic]) -> Iterable[Traffic]:
    return [Traffic(run[0].reads, run[-1].writes)] if run else []


def _weight_numbers(o: Operation) -> int:
    return o.weight_numbers if isinstance(o, Matmul) else 0


def step_flops(step: Step) -> int:
    """Operations of all products of a forward pass."""
    return sum(o.flops for o in step)


def step_bytes(step: Step, element_size: int) -> int:
    """Bytes of the weights that the products of a forward pass read."""
    return sum(_weight_numbers(o) for o in step) * element_size
