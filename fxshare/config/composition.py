"""From files, mappings and ``--set`` overrides to one configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from fxshare.config.section import DEPTH, Section, Source, as_config_error
from fxshare.config.share_config import ShareConfig, canonical
from fxshare.config.wording import Loc, dotted, nearest, one_line, shown
from fxshare.config.yaml_text import parse_yaml
from fxshare.errors import ConfigError

ConfigSource: TypeAlias = "ShareConfig | Mapping[str, Any] | str | os.PathLike[str]"


def load_config(
    source: ConfigSource | Sequence[ConfigSource], *, overrides: Sequence[str] = ()
) -> ShareConfig:
    """The configuration that ``source`` describes, with ``overrides`` applied last.

    Parameters
    ----------
    source
        A :class:`ShareConfig`, a mapping, a path to a YAML file, or a sequence of these. A sequence
        composes by deep merge: later sources win key by key, lists are replaced, and ``null`` for a
        weight type removes it.
    overrides
        ``"key.sub=value"`` each, the value in YAML, as ``--set`` takes them on the command line:
        ``"weight_types.attn.n_head=12"``.

    Raises
    ------
    ConfigError
        For whatever is wrong, all faults of the merged configuration at once. Nothing that the
        caller gave is changed.
    """
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        raise ConfigError(
            f"overrides: expected a list of 'key.sub=value'; found {shown(overrides)}"
        )
    if isinstance(source, ShareConfig) and not overrides:
        return source
    sources = [*_read_all(source), *(_read_override(text) for text in overrides)]
    merged = _merge_all(sources)
    try:
        return ShareConfig.model_validate(merged)
    except ValidationError as error:
        raise as_config_error(error, ShareConfig, sources) from None


def _read_all(source: object) -> list[Source]:
    several = isinstance(source, Sequence) and not isinstance(source, str | bytes | bytearray)
    if not several:
        return [_read(source, "the mapping given")]
    assert isinstance(source, Sequence)
    if not source:
        raise ConfigError("the list of sources given is empty: expected a path or a mapping in it")
    if len(source) == 1:
        return [_read(source[0], "the mapping given")]
    return [_read(one, f"the mapping given as source {i}") for i, one in enumerate(source, 1)]


def _read(source: object, label: str) -> Source:
    if isinstance(source, ShareConfig):
        values: object = source.model_dump(exclude_unset=True)
    elif isinstance(source, Mapping):
        values = source
    elif isinstance(source, str | os.PathLike):
        label, values = _read_file(source)
    else:
        raise ConfigError(
            "expected a ShareConfig, a mapping, a path to a YAML file, or a list of mappings and "
            f"paths; found {shown(source)}"
        )
    if values is None:
        raise ConfigError(f"{label}: empty; expected a mapping with the key weight_types")
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{label}: expected a mapping with the key weight_types; found {shown(values)}"
        )
    return Source(label, canonical(_plain(values, label)))


def _read_file(path: str | os.PathLike[str]) -> tuple[str, object]:
    label = one_line(os.fsdecode(path))
    try:
        text = Path(os.fsdecode(path)).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label}: expected UTF-8 text; byte {error.start} is not") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        reason = getattr(error, "strerror", None) or str(error)
        hint = (
            "; a string is taken as a path: pass YAML text as a mapping, `yaml.safe_load(text)`"
            if isinstance(path, str) and ("\n" in path or ": " in path)
            else ""
        )
        raise ConfigError(
            f"{label}: cannot be read: {reason}; expected the path of a YAML file{hint}"
        ) from None
    return label, parse_yaml(text, label)


def _read_override(text: object) -> Source:
    expected = "expected key.sub=value, such as weight_types.attn.n_head=12"
    if not isinstance(text, str):
        raise ConfigError(f"--set: {expected}; found {shown(text)}")
    label = f"--set {one_line(text)}"
    key, equals, value = text.partition("=")
    steps = [step.strip() for step in key.split(".")]
    if not equals:
        raise ConfigError(f"{label}: {expected}; found no '='")
    if not all(steps):
        raise ConfigError(f"{label}: {expected}; found an empty key before or between dots")
    if not value.strip():
        raise ConfigError(f"{label}: {expected}; found no value (write {key}=null to unset it)")
    hint = "; a value with special characters needs quotes inside the shell's own"
    values = parse_yaml(value, label, hint=hint)
    for step in reversed(steps):
        values = {step: values}
    assert isinstance(values, dict)
    return Source(label, canonical(_plain(values, label)))


def _plain(values: Mapping[Any, Any], label: str) -> dict[str, Any]:
    """A copy in plain dicts down to the depth of a configuration, its keys checked to be text."""
    faults: list[str] = []

    def copied(given: Mapping[Any, Any], loc: Loc) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in given.items():
            if not isinstance(key, str):
                faults.append(
                    f"{label}: {dotted(loc) + ': ' if loc else ''}expected text as a key; found "
                    f"{shown(key)} (in YAML, put it in quotes)"
                )
                continue
            if isinstance(value, Section):
                value = value.model_dump(exclude_unset=True)
            deeper = isinstance(value, Mapping) and len(loc) + 1 < DEPTH
            result[key] = copied(value, (*loc, key)) if deeper else value
        return result

    result = copied(values, ())
    if faults:
        raise ConfigError("\n".join(faults))
    return result


def _merge_all(sources: Sequence[Source]) -> dict[str, Any]:
    """The deep merge of all sources, with the weight types that are null taken out."""
    merged: dict[str, Any] = {}
    faults: list[str] = []
    for source in sources:
        before = merged.get("weight_types")
        before = before if isinstance(before, dict) else {}
        merged = _merged(merged, source.values)
        types = merged.get("weight_types")
        if not isinstance(types, dict):
            continue
        faults += [
            f"{source.label}: {dotted(('weight_types', name))}: null removes a weight type, but "
            f"no source before this one has it; expected a mapping with the key pattern, or a "
            f"known name.{nearest(name, before)}"
            for name, value in types.items()
            if value is None and name not in before
        ]
        merged["weight_types"] = {n: value for n, value in types.items() if value is not None}
    if faults:
        raise ConfigError("\n".join(faults))
    return merged


def _merged(base: Mapping[str, Any], over: Mapping[str, Any], depth: int = 1) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        mine = result.get(key)
        if isinstance(mine, dict) and isinstance(value, dict) and depth < DEPTH:
            result[key] = _merged(mine, value, depth + 1)
        else:
            result[key] = value
    return result
