"""What a pass is.

A pass is graph → graph with a contract: ``requires`` is checked on the graph it is given,
``ensures`` on the graph it made, and ``rewrite`` returns how many rewrites it made. Zero rewrites
means that the graph text is unchanged. ``exact`` says whether the rewritten graph computes the same
function up to rounding; tests and the verifier use it.

Write your own as one frozen dataclass whose fields are its options::

    @dataclass(frozen=True)
    class DoubleNegation(Pass):
        '''neg(neg(x)) → x'''
        name: ClassVar[str] = "double-negation"
        exact: ClassVar[bool] = True

        def rewrite(self, gm: fx.GraphModule) -> int: ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import fx


@dataclass(frozen=True)
class Pass(ABC):
    """Base of every pass. Subclasses are frozen dataclasses; their fields are their options."""

    name: ClassVar[str] = ""
    """Short name in lower case with hyphens; shown in reports and errors."""
    exact: ClassVar[bool] = True
    """Whether the result computes the same function as its input, up to rounding."""

    def requires(self, gm: fx.GraphModule) -> None:  # noqa: B027 - no requirement is a valid contract
        """Raise :class:`passes.RequiresError` when ``gm`` is not what this pass can work on."""

    @abstractmethod
    def rewrite(self, gm: fx.GraphModule) -> int:
        """Rewrite ``gm`` in place and return the number of rewrites.

        The runner hands over a copy whose tensors are shared with the caller's graph: replace
        tensors, never write into them.
        """

    def ensures(self, gm: fx.GraphModule) -> None:  # noqa: B027 - no promise is a valid contract
        """Raise :class:`passes.EnsuresError` when the rewritten ``gm`` is not what was promised."""
