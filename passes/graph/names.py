"""Names that generated code can hold.

fx writes the name of a submodule, a tensor or an argument into the source of ``forward`` as it is:
``self.NAME``, or ``getattr(self, "NAME")`` where it is no identifier, without escaping anything. A
quote in a name ends the string, and what follows runs. Python also folds an attribute's letters
(NFKC), so that ``self.ﬁ`` reads ``self.fi``. What is let through is therefore plain ASCII.
"""

from __future__ import annotations

import keyword
import re
import reprlib

from torch import fx

from passes.errors import NameFault

LONGEST_NAME = 8000
"""Fused coefficients are named by the heads that are in them, so long names are usual."""
_LONGEST_ARGUMENT = 200
_PART = re.compile(r"[A-Za-z0-9_ +:/@|=~,-]+")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHORT = reprlib.Repr()
_SHORT.maxstring = 60


def shortened(name: object) -> str:
    """``repr`` of a name, of 60 characters at most."""
    return _SHORT.repr(name)


def odd_characters(name: str) -> str | None:
    """Why the dotted ``name`` could end the string it is written into; None where it cannot."""
    if len(name) > LONGEST_NAME:
        return f"has {len(name):,} characters, and at most {LONGEST_NAME:,} are written"
    for part in name.split("."):
        if part and _PART.fullmatch(part) is None:
            return "has other characters than ASCII letters, digits and _ +-:/@|=~, between dots"
    return None


def unwritable(name: str) -> str | None:
    """Why no generated code can hold the dotted ``name`` of a submodule or tensor; None where it
    can."""
    reason = odd_characters(name)
    if reason is not None:
        return reason
    for part in name.split("."):
        if not part:
            return "is empty, or has an empty part between dots"
        if keyword.iskeyword(part):
            return f"has the part {part!r}, which is a keyword of Python"
        if _is_dunder(part):
            return f"has the part {shortened(part)}, which is a name of Python's own"
    return None


def no_identifier(name: object) -> str | None:
    """Why ``name`` cannot be an argument's name in generated code; None where it can."""
    if not isinstance(name, str) or _IDENTIFIER.fullmatch(name) is None:
        return "is not an identifier of ASCII letters, digits and '_'"
    if len(name) > _LONGEST_ARGUMENT:
        return f"has {len(name):,} characters, and at most {_LONGEST_ARGUMENT} are written"
    if keyword.iskeyword(name):
        return "is a keyword of Python"
    if _is_dunder(name):
        return "is a name of Python's own"
    return "stands for the module itself" if name == "self" else None


def check_names(graph: fx.Graph) -> None:
    """Hold every name that code is made from to the grammar, before any is made.

    Raises :class:`passes.NameFault` naming the node.
    """
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            what, reason = "submodule or tensor", unwritable(str(node.target))
        elif node.op == "placeholder":
            what, reason = "argument", no_identifier(str(node.target).lstrip("*"))
        else:
            continue
        if reason is not None:
            raise NameFault(
                f"the {what} {shortened(node.target)} of node {shortened(node.name)} {reason}; the "
                "graph's code would hold the name as it is: give it another one"
            )


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


__all__ = [
    "LONGEST_NAME",
    "check_names",
    "no_identifier",
    "odd_characters",
    "shortened",
    "unwritable",
]
