"""Grammars of the names that are read from folders, plans and configurations.

Each check returns the name, or raises a ``ValueError`` that says what was found and expected;
whoever reads the file adds the file and the field. What may stand in generated code is in
``passes.graph.names``.
"""

from __future__ import annotations

import re

from passes.graph.names import no_identifier, shortened, unwritable

_GROUP = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_TYPES = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\+[A-Za-z_][A-Za-z0-9_-]*)*")
_LABELS = re.compile(r"[A-Za-z0-9_.+-]*")
_MODULE = re.compile(r"[\w-]+(\.[\w-]+)*")
_QUALIFIED = re.compile(r"([^\W\d]\w*|<locals>|<lambda>)(\.([^\W\d]\w*|<locals>|<lambda>))*")
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_LONGEST = 255
_LONGEST_CLASS = 1000


def as_argument(name: object) -> str:
    """The name of an argument of ``forward``."""
    reason = no_identifier(name)
    if reason is not None:
        raise ValueError(f"expected the name of an argument; {shortened(name)} {reason}")
    return str(name)


def as_module_path(name: str) -> str:
    """The dotted name of a module, a tensor, or a slice of one."""
    reason = unwritable(name)
    if reason is not None:
        raise ValueError(
            f"expected the dotted name of a module or tensor; {shortened(name)} {reason}"
        )
    return name


def as_group_name(name: str) -> str:
    """The name of a group, which its basis has as a submodule at the root."""
    _check(_GROUP, name, "the name of a group: a letter or '_', then letters, digits, '_' or '-'")
    return as_module_path(name)


def as_type_names(name: str) -> str:
    """The name of a weight type; of several that share a basis, with ``+`` between them."""
    return _check(_TYPES, name, "names of weight types: letters, digits, '_' or '-', joined by '+'")


def as_label(name: str) -> str:
    """Which slices: ``q.3``, ``q``, ``q+k``, or empty."""
    return _check(_LABELS, name, "the label of slices: letters, digits, '_', '.', '+' or '-'")


def as_class_name(name: str) -> str:
    """``package.module:Class``; the class may stand in a function (``make.<locals>.Class``)."""
    module, _, qualified = name.partition(":")
    known = _MODULE.fullmatch(module) and _QUALIFIED.fullmatch(qualified)
    if not known or len(name) > _LONGEST_CLASS:
        raise ValueError(f"expected 'package.module:Class'; found {shortened(name)}")
    return name


def as_file_name(name: str) -> str:
    """The name of a file in the folder itself."""
    return _check(_FILE, name, "the name of a file in the folder", longest=_LONGEST)


def _check(grammar: re.Pattern[str], name: str, expected: str, longest: int = 8000) -> str:
    if grammar.fullmatch(name) is None or len(name) > longest:
        raise ValueError(f"expected {expected}; found {shortened(name)}")
    return name


__all__ = [
    "as_argument",
    "as_class_name",
    "as_file_name",
    "as_group_name",
    "as_label",
    "as_module_path",
    "as_type_names",
]
