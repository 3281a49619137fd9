"""YAML as configurations are written in it: no duplicate keys, and ``1e-8`` is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml

from fxshare.config.wording import one_line
from fxshare.errors import ConfigError

# YAML 1.1, as PyYAML reads it, takes `1e-8` for text: it wants a dot and a signed exponent.
# Loader and dumper both get the wider rule, so that the *text* '1e-8' is written in quotes.
_EXPONENT_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses duplicate keys and reads ``1e-8`` as a number."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked on the nodes as written: construction comes after `<<` has put inherited keys
        # in, which may well be given again.
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            written = (key.tag, key.value)
            if written in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {one_line(key.value)!r}, first given on line "
                    f"{seen[written]}",
                    problem_mark=key.start_mark,
                )
            seen[written] = key.start_mark.line + 1
        return node


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper without anchors, with the loader's rule for numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, label: str, hint: str = "") -> object:
    """What ``text`` says.

    Raises
    ------
    ConfigError
        Where it is not valid YAML, with line and column, named ``label``.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        reason = ": ".join(part for part in (error.context, error.problem) if part)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        column = error.position - (before.rfind("\n") + 1) + 1
        where = f" at line {before.count(chr(10)) + 1}, column {column}"
        reason = f"the character {error.character!r} is not allowed"
    except RecursionError:
        where, reason = "", "it is nested too deeply"
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # PyYAML lets these out for a scalar that its tag does not fit: 2024-99-99, `!!int x`.
        where, reason = "", f"a value cannot be read ({error})"
    raise ConfigError(f"{label}: not valid YAML{where}: {one_line(str(reason))}{hint}")
