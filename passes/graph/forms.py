"""The ways in which a model multiplies by a stack of matrices.

Legend for shapes: E experts, O output features, I input features, S pairs of a token and an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from passes.graph.contractions import Contraction


@dataclass(frozen=True)
class Routed:
    """Row ``s`` of the input is multiplied by matrix ``experts[s]``, ``experts`` ``(S,)``."""

    experts: fx.Node
    turned: bool = False
    spread: int | None = None
    contraction: Contraction | None = None


@dataclass(frozen=True)
class Batched:
    """All matrices at once: of the input (``turned``: transposed) the entry of dimension ``at`` for
    each, or where that is None the whole for all; ``spread`` is its number of dimensions where
    there may be one entry for all. ``shift`` is added."""

    at: int | None
    turned: bool = False
    spread: int | None = None
    contraction: Contraction | None = None
    shift: fx.Node | None = None


@dataclass(frozen=True)
class One:
    """Matrix ``number`` alone; ``shift`` is added."""

    number: int
    shift: fx.Node | None = None


@dataclass(frozen=True)
class Grouped:
    """Runs of rows of the input, of which ``ends`` ``(E,)`` are the ends."""

    ends: fx.Node


Form = Routed | Batched | One | Grouped


@dataclass(frozen=True)
class Stack:
    """A product with one matrix or with all of a stack.

    ``parameter`` is the stack's name, ``(E, O, I)`` or with ``transposed`` ``(E, I, O)``; ``bias``
    that of its biases ``(E, O)``, where ``added`` adds them in place to a routed ``result``. A bias
    that is added otherwise stays where it is.
    """

    parameter: str
    transposed: bool
    input: fx.Node
    result: fx.Node
    form: Form
    bias: str | None = None
    added: fx.Node | None = None
    rows: tuple[int, int] | None = None
    """The outputs that are computed, where others are by another product of the same input."""
