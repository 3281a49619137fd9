"""``einsum`` of an input and a stack of matrices, read as linears.

Letters: e numbers the matrices, i is contracted, o is new.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Contraction:
    """``einsum("x,weight->output", input, w)`` where ``weight`` is three letters, the first that of
    the matrices, and one of the others is contracted with ``x``."""

    input: fx.Node
    x: str
    weight: str
    output: str

    @property
    def transposed(self) -> bool:
        """Whether the matrices are ``(in, out)``."""
        return self.weight[1] in self.x

    @property
    def contracted(self) -> str:
        """i."""
        return self.weight[1 if self.transposed else 2]

    @property
    def at(self) -> int | None:
        """The dimension of the input that numbers the matrices; None where they share the input."""
        where = self.x.replace("...", ".")
        found = where.find(self.weight[0])
        if found < 0:
            return None
        return found - len(where) if "." in where[:found] else found

    @property
    def total(self) -> bool:
        """Whether the products of all matrices are added up."""
        return self.weight[0] not in self.output

    @property
    def before(self) -> str:
        """The equation that makes i the last dimension of the input of one matrix; empty where it
        is. e is the first there, where ``with_e``."""
        left = self.x.replace(self.weight[0], "")
        right = self._batch + self.contracted
        return "" if left == right else f"{left}->{right}"

    @property
    def before_all(self) -> str:
        """The same for the inputs of all matrices, e first."""
        right = self.weight[0] + self._batch + self.contracted
        return "" if self.x == right else f"{self.x}->{right}"

    @property
    def after(self) -> str:
        """The equation that orders the dimensions of the products, e first."""
        e = "" if self.total else self.weight[0]
        left = e + self._batch + self._new
        return "" if left == self.output else f"{left}->{self.output}"

    @property
    def _new(self) -> str:
        return self.weight[2 if self.transposed else 1]

    @property
    def _batch(self) -> str:
        return self.x.replace(self.weight[0], "").replace(self.contracted, "")


def contraction(node: fx.Node, weight: fx.Node) -> Contraction | None:
    """What an ``einsum`` does with a stack; None where it is not one linear for each matrix."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or node.kwargs:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    first, comma, second = inputs.partition(",")
    if not arrow or not comma or "," in second:
        return None
    if operands[0] is weight:
        first, second, operands = second, first, operands[::-1]
    x = operands[0]
    if operands[1] is not weight or not isinstance(x, fx.Node):
        return None
    found = Contraction(x, first, second, output)
    return found if _is_linear(found) else None


def _is_linear(found: Contraction) -> bool:
    letters = found.x.replace("...", "")
    if len(set(found.weight)) != 3 or "." in found.weight or len(set(letters)) != len(letters):
        return False
    e, matrix = found.weight[0], found.weight[1:]
    if e not in found.x + found.output or sum(m in found.x for m in matrix) != 1:
        return False
    i = found.contracted
    kept = {*letters, *matrix} - {i, e}
    written = found.output.replace("...", "")
    if len(set(written)) != len(written) or set(written) - {e} != kept:
        return False
    return ("..." in found.x) == ("..." in found.output)
