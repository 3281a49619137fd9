"""What every part of a configuration is: frozen, without unknown keys, exact about its faults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from fxshare.config.wording import Loc, dotted, nearest, shown
from fxshare.errors import ConfigError

# How deep a configuration nests: weight_types -> name -> key. Merging goes no deeper, so YAML
# aliases that refer to themselves, or fan out exponentially, cost nothing.
DEPTH = 3


class Section(BaseModel):
    """Frozen, no unknown keys, and a :class:`ConfigError` from the constructor too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Second names of fields that files may use, each with the field's own name."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            cls = type(self)
            raise as_config_error(error, cls, [Source(f"{cls.__name__}(...)", values)]) from None

    # Pydantic runs an overridden __init__ for nested values and in `model_validate` as well, which
    # would end validation at the first fault and lose its key. This mark, which pydantic sets on
    # its own __init__, keeps ours to direct construction.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Source:
    """One mapping to be merged, and what a message calls the place it came from."""

    label: str
    values: dict[str, Any]


def as_config_error(
    error: ValidationError, model: type[Section], sources: Sequence[Source]
) -> ConfigError:
    """Every fault of ``error`` in one message, one a line, each with the source that has it."""
    return ConfigError("\n".join(_lines(error, model, sources)))


def _lines(
    error: ValidationError, model: type[Section], sources: Sequence[Source]
) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        # Pydantic marks an error in a mapping's key by a last step "[key]".
        loc = fault["loc"][:-1] if fault["loc"][-1:] == ("[key]",) else fault["loc"]
        text = _text(fault["type"], loc, fault["input"], fault.get("ctx", {}), model, sources)
        yield f"{_label_of(loc, sources)}: {dotted(loc)}: {text or fault['msg']}"


def _text(
    kind: str,
    loc: Loc,
    found: object,
    ctx: Mapping[str, Any],
    model: type[Section],
    sources: Sequence[Source],
) -> str | None:
    """What is wrong at ``loc``; None for a kind of error that no field here can have."""
    if kind == "value_error":
        return str(ctx["error"])
    if kind == "extra_forbidden":
        return _unknown_key(str(loc[-1]), _section_at(loc[:-1], model))
    if kind == "missing":
        field = _section_at(loc[:-1], model).model_fields[str(loc[-1])]
        return f"required, but not given. {field.description}{_nearest_type(loc, sources)}"
    expected = {
        "string_type": "text",
        "int_type": "a whole number",
        "bool_type": "true or false",
        "greater_than_equal": f"a whole number of at least {ctx.get('ge')}",
        "literal_error": f"one of {ctx.get('expected')}",
        "dict_type": "a mapping of names to weight types, such as attn: {pattern: '...'}",
        "tuple_type": "a list of names, such as [a, b]",
        "model_type": "a mapping of keys to values",
        "too_short": "at least one weight type",
    }.get(kind)
    return None if expected is None else f"expected {expected}; found {shown(found)}"


def _section_at(loc: Loc, model: type[Section]) -> type[Section]:
    """The model whose fields are the valid keys at ``loc`` inside a ``model``."""
    if not loc:
        return model
    return next(_sections_in(model.model_fields[str(loc[0])].annotation))


def _sections_in(annotation: object) -> Iterator[type[Section]]:
    """The sections in a field's type: ``dict[str, WeightType]``, ``Budget | None``, ``Planner``."""
    # Python 3.10 takes dict[str, WeightType] for an instance of type, but not for a class.
    plain = get_origin(annotation) is None
    if plain and isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)


def _unknown_key(key: str, section: type[Section]) -> str:
    if key in section.aliases:
        return f"an alias of {section.aliases[key]}, which is also given: remove one of the two"
    keys = [*section.model_fields, *section.aliases]
    return f"unknown key.{nearest(key, keys)} Valid keys: {', '.join(keys)}"


def _nearest_type(loc: Loc, sources: Sequence[Source]) -> str:
    """For ``--set weight_types.atn.n_head=12``, which makes a weight type without a pattern."""
    if loc[:1] != ("weight_types",) or len(loc) != DEPTH:
        return ""
    types: dict[object, None] = {}
    for source in sources:
        given = source.values.get("weight_types")
        types |= dict.fromkeys(given if isinstance(given, dict) else ())
    return nearest(str(loc[1]), [n for n in types if isinstance(n, str) and n != loc[1]])


def _label_of(loc: Loc, sources: Sequence[Source]) -> str:
    """The last source that gives this key, or as much of its path as any source gives."""
    deepest, label = 1, " + ".join(source.label for source in sources)
    for source in sources:
        depth = 0
        value: Any = source.values
        while depth < len(loc) and isinstance(value, dict) and loc[depth] in value:
            value = value[loc[depth]]
            depth += 1
        if depth >= deepest:
            deepest, label = depth, source.label
    return label
