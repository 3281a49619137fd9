"""The configuration of a compression: what is matched, how it is split, what shares a basis.

A :class:`ShareConfig` is frozen and complete. :func:`load_config` builds one from YAML files,
mappings and ``--set`` overrides, and is where everything a user writes is checked: it returns a
:class:`ShareConfig` or raises one :class:`~fxshare.errors.ConfigError` that lists every fault,
one a line, each naming the source, the dotted key, what was found and what is expected.

This module imports neither torch nor transformers, so a configuration can be checked without them.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from fxshare.errors import ConfigError

CONFIG_VERSION = 1
"""The newest ``version`` of a configuration that this fxshare reads."""

Loc: TypeAlias = tuple[str | int, ...]

_TYPE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_PASS_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)

# How deep a configuration nests: weight_types -> name -> key. Merging goes no deeper, so YAML
# aliases that refer to themselves, or fan out exponentially, cost nothing.
_DEPTH = 3


# What a message shows ------------------------------------------------------------------------


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 2, 4, 4, 4
_SHORT.maxstring = _SHORT.maxother = 80


def _shown(value: object) -> str:
    """``value`` as the user wrote it, shortened, with its kind where the spelling does not tell."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    try:
        text = _SHORT.repr(value)
    except Exception:  # a foreign __repr__, or an int beyond Python's limit on digits
        return f"a value of type {type(value).__name__}"
    return f"{text} (text)" if isinstance(value, str) else text


def _name(text: str) -> str:
    """``text`` on one line: as it is where printable, else quoted and escaped."""
    return text if text.isprintable() and 0 < len(text) <= 200 else _SHORT.repr(text)


def _dotted(loc: Loc) -> str:
    """``("weight_types", "attn", "n_head")`` -> ``weight_types.attn.n_head``."""
    return ".".join(
        f"'{_name(str(step))}'" if isinstance(step, str) and "." in step else _name(str(step))
        for step in loc
    )


def _nearest(word: str, choices: Iterable[str]) -> str:
    """``" Did you mean 'x'?"``, or nothing where no choice is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    word = word.lower()[:100]
    # A whole part of a name first: to difflib `rate` is nearer to private than compression_rate.
    near = [choice for choice in by_lower if word in choice.split("_")]
    near = near or difflib.get_close_matches(word, by_lower, n=1)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""


# Checks of single values ---------------------------------------------------------------------


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        where = "" if error.pos is None else f" at position {error.pos}"
        glob = (
            "; patterns are regular expressions: write '.*' for a glob's '*'"
            if error.msg.startswith("nothing to repeat")
            else ""
        )
        raise ValueError(
            f"expected a regular expression, found {_shown(pattern)}: "
            f"{_name(error.msg)}{where}{glob}"
        ) from None
    except (OverflowError, RecursionError) as error:
        raise ValueError(
            f"expected a regular expression, found {_shown(pattern)}: {error}"
        ) from None


def _number(value: object, expected: str) -> float:
    """``value`` as a finite float; ``true`` and ``"0.5"`` are refused, not converted."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected {expected}; found {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"expected {expected}; found {_shown(value)}, which is not finite")
    return number


def _as_split(value: object) -> object:
    """The spellings of ``split``: true is qkv; false, null and "none" are no split."""
    if value is True:
        return "qkv"
    if value is None or value is False or (isinstance(value, str) and value == "none"):
        return False
    if isinstance(value, str) and value in ("qkv", "heads", "gate_up"):
        return value
    raise ValueError(
        f"expected false, qkv, heads or gate_up (true means qkv); found {_shown(value)}."
        + (_nearest(value, ("qkv", "heads", "gate_up", "none")) if isinstance(value, str) else "")
    )


def _as_permutation(value: str) -> str:
    counts = Counter(value)
    if sorted(value) == sorted("qkv"):
        return value
    faults = [f"{part} twice" for part in "qkv" if counts[part] == 2]
    faults += [f"{part} {counts[part]} times" for part in "qkv" if counts[part] > 2]
    faults += [f"{part} missing" for part in "qkv" if counts[part] == 0]
    foreign = "".join(sorted(set(value) - set("qkv")))
    if foreign:
        faults.append(f"{_SHORT.repr(foreign)} not among q, k, v")
    raise ValueError(
        "expected a permutation of 'qkv', the order of the fused projection's row blocks; "
        f"found {_shown(value)}: {', '.join(faults)}"
    )


def _as_kept(value: object) -> float | None:
    if value is None:
        return None
    expected = (
        "the fraction of parameters kept, a finite number above 0 (0.8 keeps 80 % of the "
        "parameters and removes 20 %)"
    )
    kept = _number(value, expected)
    if kept <= 0:
        raise ValueError(f"expected {expected}; found {_shown(value)}")
    return kept


def _as_loss(value: object) -> float | None:
    if value is None:
        return None
    expected = "an increase of the loss per token in nats, a finite number above 0"
    loss = _number(value, expected)
    if loss <= 0:
        raise ValueError(f"expected {expected}; found {_shown(value)}")
    return loss


def _as_part(value: object) -> float:
    expected = "a share of the dense cost, a number from 0 to 1"
    part = _number(value, expected)
    if not 0 <= part <= 1:
        raise ValueError(f"expected {expected}; found {_shown(value)}")
    return part


def _as_floor(value: object) -> float:
    expected = "a fraction of the largest eigenvalue, a number above 0 and below 1"
    floor = _number(value, expected)
    if not 0 < floor < 1:
        raise ValueError(f"expected {expected}; found {_shown(value)}")
    return floor


def _as_pattern(value: str) -> str:
    _compiled(value)
    return value


def _as_block_pattern(value: str) -> str:
    if _compiled(value).groups < 1:
        raise ValueError(
            "expected a regular expression whose group 1 is the layer number, as in "
            rf"'h\.(\d+)'; found {_shown(value)}, which has no group"
        )
    return value


def _as_type_name(value: str) -> str:
    if _TYPE_NAME.fullmatch(value) is None:
        raise ValueError(
            "expected a name of a weight type: a letter or '_', then letters, digits, '_' or '-' "
            f"(no dots, slashes or spaces); found {_shown(value)}"
        )
    return value


def _as_pass_name(value: str) -> str:
    if _PASS_NAME.fullmatch(value) is None:
        raise ValueError(
            "expected a pass as 'package.module:Name', the name of a class in an importable "
            f"module; found {_shown(value)}"
        )
    return value


def _as_version(value: int) -> int:
    if value > CONFIG_VERSION:
        raise ValueError(
            f"expected at most {CONFIG_VERSION}; found {_shown(value)}: this configuration was "
            "made for a newer fxshare, update fxshare"
        )
    return value


def _as_list(value: object) -> object:
    # Pydantic would also take a set, whose order means nothing.
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list, such as [a, b]; found {_shown(value)}")
    return value


# The models ----------------------------------------------------------------------------------


class _Section(BaseModel):
    """Frozen, no unknown keys, and a :class:`ConfigError` from the constructor too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            cls = type(self)
            raise _as_config_error(error, cls, [_Source(f"{cls.__name__}(...)", values)]) from None

    # Pydantic runs an overridden __init__ for nested values and in `model_validate` as well, which
    # would end validation at the first fault and lose its key. This mark, which pydantic sets on
    # its own __init__, keeps ours to direct construction.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


_SplitValue = Annotated[
    Literal[False, "qkv", "heads", "gate_up"],
    BeforeValidator(_as_split),
    WithJsonSchema({"enum": [False, True, None, "none", "qkv", "heads", "gate_up"]}),
]
_Count = Annotated[int, Field(strict=True, ge=1)]


class WeightType(_Section):
    """One kind of linear module of the model, matched by name, and how its rows are split."""

    pattern: Annotated[str, AfterValidator(_as_pattern)] = Field(
        description="Regular expression of the qualified names of this type's modules, matched "
        "from the start of the name (`re.match`)."
    )
    split: _SplitValue = Field(
        default=False,
        description="How the rows of each module are cut into slices: false (one slice), qkv "
        "(one slice each for q, k and v), heads (one slice per head) or gate_up (two halves, the "
        "gate first). true means qkv; null and none mean false.",
    )
    qkv_order: Annotated[str, AfterValidator(_as_permutation)] | None = Field(
        default=None,
        description="Order of the row blocks of a fused projection, a permutation of qkv. Not "
        "given: qkv with `split: qkv`, and an unfused projection with `split: heads`.",
    )
    n_head: _Count | None = Field(
        default=None,
        description="Number of heads of the projection; of query heads where it is fused and has "
        "fewer key and value heads.",
    )
    n_kv_head: _Count | None = Field(
        default=None,
        description="Number of key heads and of value heads where it is not `n_head` "
        "(grouped-query attention): the blocks of q, k and v are then of unequal height.",
    )
    interleaved: Annotated[bool, Field(strict=True)] = Field(
        default=False,
        description="Rows are per head [q k v], as in GPT-NeoX, not in three blocks; with "
        "`n_kv_head` per key head [its q heads, k, v], as in Falcon-40B. Needs `split: heads` and "
        "`qkv_order`.",
    )
    basis: Literal["slice", "part", "site"] = Field(
        default="slice",
        description="Which slices of one layer pool into one basis in the sharing mode: slice "
        "(each slice has its own basis per layer group, Basis Sharing as published), part (all "
        "heads of q together, likewise k and v) or site (all slices of the module).",
    )

    @field_validator("qkv_order")
    @classmethod
    def _order_needs_split(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("split", value) is False:
            raise ValueError(
                f"found {_shown(value)} without a split, where it has no effect: add `split: qkv` "
                "(or `split: heads`), or remove qkv_order"
            )
        if value is not None and info.data.get("split") == "gate_up":
            raise ValueError(
                f"found {_shown(value)} with `split: gate_up`, which has no q, k and v: remove it"
            )
        return value

    @field_validator("interleaved")
    @classmethod
    def _interleaved_needs_heads(cls, value: bool, info: ValidationInfo) -> bool:
        if not value or "split" not in info.data:
            return value
        split = info.data["split"]
        if split == "qkv":
            raise ValueError(
                "found true with `split: qkv`: in interleaved rows [q k v] per head the rows of q "
                "are not one run; use `split: heads`"
            )
        if split in (False, "gate_up"):
            raise ValueError(
                "found true without a split into heads, where it has no effect: add `split: heads` "
                "and `qkv_order: qkv`, or remove interleaved"
            )
        if info.data.get("qkv_order", "") is None:
            raise ValueError(
                "found true without qkv_order, which means an unfused projection: add "
                "`qkv_order: qkv` (the order inside each head), or remove interleaved"
            )
        return value

    @property
    def order(self) -> str | None:
        """Order of q, k and v in the fused projection; None where the projection is not fused."""
        if self.split == "qkv":
            return self.qkv_order or "qkv"
        return self.qkv_order


class Calibration(_Section):
    """How much data is looked at, and how its statistics are made invertible."""

    max_tokens: _Count | None = Field(
        default=None,
        description="Stop gathering statistics after this many tokens. Not given: all batches.",
    )
    relative_floor: Annotated[float, BeforeValidator(_as_floor)] = Field(
        default=1e-8,
        description="Eigenvalues of the Gram matrix below this fraction of the largest are raised "
        "to it.",
        json_schema_extra={"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    )


_Share = Annotated[float | None, BeforeValidator(_as_kept)]


class Budget(_Section):
    """What a planned compression may cost: exactly one limit, and perhaps a bound on FLOPs."""

    params_kept: _Share = Field(
        default=None,
        description="Stored numbers after over weights before, of the matched linears (0.8 keeps "
        "80 %).",
    )
    max_bytes: _Count | None = Field(
        default=None, description="Bytes of the whole model: every parameter and buffer."
    )
    max_loss_increase: Annotated[float | None, BeforeValidator(_as_loss)] = Field(
        default=None,
        description="The cheapest plan whose loss per token rises by at most this much (predicted, "
        "then checked on held-back calibration data).",
    )
    flops_kept: _Share = Field(
        default=None,
        description="FLOPs per token after over before, of the matched linears. It may stand "
        "alone or beside another limit, and then both are kept.",
    )
    time_kept: _Share = Field(
        default=None,
        description="Predicted seconds per token after over before, of the matched linears, for a "
        "prompt and for one token alike. Stands beside another limit, and both are kept; needs the "
        "constants that `fxshare bench device` measures.",
    )

    @model_validator(mode="after")
    def _one_limit(self) -> Budget:
        given = [
            name
            for name in ("params_kept", "max_bytes", "max_loss_increase")
            if getattr(self, name) is not None
        ]
        if len(given) > 1 or (not given and self.flops_kept is None):
            raise ValueError(
                "expected one limit of params_kept, max_bytes, max_loss_increase and flops_kept "
                "(flops_kept or time_kept may stand beside another); found "
                f"{', '.join(given) or 'none'}"
            )
        if given and None not in (self.flops_kept, self.time_kept):
            raise ValueError(
                f"found flops_kept and time_kept beside {given[0]}: one limit may stand beside "
                "another; remove one of the two"
            )
        return self


class Planner(_Section):
    """How a budget is spent."""

    strategy: Literal["auto", "layers", "pairs", "same_input", "agglomerative", "separate"] = Field(
        default="auto",
        description="How slices are grouped: layers (runs of consecutive layers, exact), pairs "
        "(at most two, exact), same_input (slices that read one activation first), agglomerative "
        "(any group, heuristic), separate (no sharing), or auto (the best of them).",
    )
    storage: Literal["auto", "plain", "pivoted"] = Field(
        default="auto",
        description="plain (basis and coefficient), pivoted (some inputs kept as they are: fewer "
        "numbers at the same rank), or auto (whichever is cheaper).",
    )
    max_group: _Count | None = Field(
        default=None, description="Most layers that may share one basis."
    )
    rank_multiple: _Count | None = Field(
        default=None,
        description="Ranks are multiples of this (8, 16 or 64 suit accelerators). Not given: 1, "
        "or a small power of two for large matrices.",
    )
    floor: Annotated[float, BeforeValidator(_as_part)] = Field(
        default=0.0, description="Least share of its dense cost that every group keeps."
    )
    ceiling: Annotated[float, BeforeValidator(_as_part)] = Field(
        default=1.0,
        description="Most of its dense cost that a group may keep; below 1 nothing stays dense.",
    )
    keep_dense: Annotated[
        tuple[Annotated[int, Field(strict=True)], ...], BeforeValidator(_as_list)
    ] = Field(default=(), description="Numbers of layers whose weights stay as they are.")
    may_share: Annotated[tuple[tuple[str, ...], ...], BeforeValidator(_as_list)] = Field(
        default=(),
        description="Sets of weight types that may meet in one basis, such as [[q, k], [gate, up]]"
        ". A type may always share with itself.",
    )
    tie: Annotated[tuple[tuple[str, ...], ...], BeforeValidator(_as_list)] = Field(
        default=(), description="Sets of slice names that must share one basis."
    )
    search: Annotated[
        Literal["off", "quick", "thorough"],
        # YAML 1.1 reads a bare off as false
        BeforeValidator(lambda value: "off" if value is False else value),
        WithJsonSchema({"enum": ["off", False, "quick", "thorough"]}),
    ] = Field(
        default="quick",
        description="How many plans are tried on held-back calibration data: off (one, not "
        "measured), quick or thorough.",
    )
    remeasure: Annotated[int, Field(strict=True, ge=0)] = Field(
        default=1,
        description="How often the statistics are measured again on an intermediate compressed "
        "model. No effect with `search: off`.",
    )
    refit: Annotated[bool | None, Field(strict=True)] = Field(
        default=None,
        description="Fit each coefficient to its own layer's inputs. Not given: where it measures "
        "better.",
    )
    bias: Annotated[bool, Field(strict=True)] = Field(
        default=True,
        description="Move the mean of what is lost into the bias, where there is one.",
    )
    cache: str | None = Field(
        default=None,
        description="Folder in which spectra are kept by content, so that planning the same model "
        "on the same data again is quick.",
    )
    sketch: _Count | None = Field(
        default=None,
        description="Compute only this many leading eigenvalues of a candidate; what a group loses "
        "is then an upper bound. Not given: all of them.",
    )
    labels: Literal["data", "sampled"] = Field(
        default="data",
        description="Next tokens for the gradient statistics: those of the data, or drawn from "
        "the model (the Fisher matrix proper).",
    )


class Lower(_Section):
    """What the result is packed for after rewriting."""

    prefer: Literal["memory", "speed"] = Field(
        default="memory",
        description="memory (never more numbers than the readable graph) or speed (may store a "
        "basis twice, and multiplies out what needs fewer operations as a dense weight).",
    )


class ShareConfig(_Section):
    """A complete configuration, as :func:`fxshare.compile` takes it."""

    version: Annotated[int, Field(strict=True, ge=1), AfterValidator(_as_version)] = Field(
        default=CONFIG_VERSION, description="Version of the configuration's format."
    )
    weight_types: dict[Annotated[str, AfterValidator(_as_type_name)], WeightType] = Field(
        min_length=1, description="The kinds of linear modules to rewrite, each under its name."
    )
    block_pattern: Annotated[str, AfterValidator(_as_block_pattern)] | None = Field(
        default=None,
        description="Regular expression searched for in a module's name (`re.search`); its group "
        "1 is the layer number. `layer_pattern` is an alias.",
    )
    group_size: _Count | None = Field(
        default=None,
        description="How many consecutive layers share one basis; 1 is one basis per matrix. "
        "Given together with `compression_rate`.",
    )
    compression_rate: Annotated[float | None, BeforeValidator(_as_kept)] = Field(
        default=None,
        validate_default=True,
        description="Fraction of parameters kept (0.8 keeps 80 %). Given together with "
        "`group_size`; turns the sharing mode on.",
        json_schema_extra={"exclusiveMinimum": 0},
    )
    private: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        default=(),
        description="Names of weight types that share nothing between layers (groups of one).",
    )
    budget: Budget | None = Field(
        default=None,
        description="What the result may cost; turns the planned mode on. Not together with "
        "`group_size` and `compression_rate`.",
    )
    planner: Planner = Field(
        default_factory=Planner, description="How the budget is spent; needs `budget`."
    )
    fuse: Annotated[bool, Field(strict=True)] = Field(
        default=True,
        description="Fuse the matrix products of the result again where it stays equivalent.",
    )
    lower: Lower | None = Field(
        default=None,
        description="Pack the result for speed (`fxshare.lower`). Not given: it stays readable.",
    )
    passes: Annotated[
        tuple[Annotated[str, AfterValidator(_as_pass_name)], ...], BeforeValidator(_as_list)
    ] = Field(
        default=(), description="Further passes to run, each as `package.module:Name`, in order."
    )
    calibration: Calibration = Field(
        default_factory=Calibration, description="How statistics of the activations are gathered."
    )
    capture: Literal["auto", "fx", "export", "modules"] = Field(
        default="auto",
        description="Front end that captures the model: fx (tracing with fake values), export "
        "(`torch.export`), modules (a copy with each matched module replaced), or auto (the first "
        "of these that passes its self-check).",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_block_pattern(cls, values: Any) -> Any:
        return _canonical(values) if isinstance(values, dict) else values

    @field_validator("compression_rate")
    @classmethod
    def _rate_with_group_size(cls, value: float | None, info: ValidationInfo) -> float | None:
        if "group_size" not in info.data:
            return value
        group_size = info.data["group_size"]
        if value is not None and group_size is None:
            raise ValueError(
                f"found {_shown(value)} without group_size: add group_size, the number of "
                "consecutive layers that share a basis (`group_size: 1` is one basis per matrix)"
            )
        if value is None and group_size is not None:
            raise ValueError(
                f"not given, but group_size is ({_shown(group_size)}): add compression_rate, the "
                "fraction of parameters kept (`compression_rate: 0.8` keeps 80 %), or remove "
                "group_size"
            )
        return value

    @field_validator("private")
    @classmethod
    def _private_are_types(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if value and info.data.get("group_size", 1) is None:
            raise ValueError(
                f"found {_shown(list(value))} without group_size, where it has no effect: add "
                "group_size and compression_rate, or remove private"
            )
        # Absent where a weight type is itself at fault, which is then reported instead.
        types = list(info.data.get("weight_types", value))
        unknown = [name for name in value if name not in types]
        if unknown:
            named = " ".join(
                f"{_shown(name)} is no weight type.{_nearest(name, types)}" for name in unknown[:8]
            )
            raise ValueError(f"{named} Weight types: {', '.join(types)}")
        return value

    @field_validator("budget")
    @classmethod
    def _budget_or_rate(cls, value: Budget | None, info: ValidationInfo) -> Budget | None:
        if value is not None and info.data.get("compression_rate") is not None:
            raise ValueError(
                "found together with compression_rate: a budget plans the ranks, a rate fixes "
                "them; remove one of the two"
            )
        return value

    @field_validator("planner")
    @classmethod
    def _planner_fits(cls, value: Planner, info: ValidationInfo) -> Planner:
        if info.data.get("budget", value) is None and value != Planner():
            raise ValueError("found without budget, where it has no effect: add a budget")
        types = list(info.data.get("weight_types", {}))
        for name in [name for names in value.may_share for name in names]:
            if types and name not in types:
                raise ValueError(
                    f"may_share: {_shown(name)} is no weight type.{_nearest(name, types)} Weight "
                    f"types: {', '.join(types)}"
                )
        if value.floor > value.ceiling:
            raise ValueError(f"floor {value.floor} is above ceiling {value.ceiling}")
        return value

    @property
    def mode(self) -> Literal["exact", "sharing", "planned"]:
        """``"planned"`` with a budget, ``"sharing"`` with a compression rate, else ``"exact"``."""
        if self.budget is not None:
            return "planned"
        return "exact" if self.compression_rate is None else "sharing"

    def group_size_of(self, type_name: str) -> int:
        """How many consecutive layers of this weight type share a basis: 1 for private types."""
        if type_name not in self.weight_types:
            raise ConfigError(
                f"{_shown(type_name)} is no weight type.{_nearest(type_name, self.weight_types)} "
                f"Weight types: {', '.join(self.weight_types)}"
            )
        if self.group_size is None or type_name in self.private:
            return 1
        return self.group_size


# From sources to one mapping -----------------------------------------------------------------


ConfigSource: TypeAlias = "ShareConfig | Mapping[str, Any] | str | os.PathLike[str]"


@dataclass(frozen=True)
class _Source:
    """One mapping to be merged, and what a message calls the place it came from."""

    label: str
    values: dict[str, Any]


def load_config(
    source: ConfigSource | Sequence[ConfigSource], *, overrides: Sequence[str] = ()
) -> ShareConfig:
    """The configuration that ``source`` describes, with ``overrides`` applied last.

    Args:
        source: a :class:`ShareConfig`, a mapping, a path to a YAML file, or a sequence of these.
            A sequence composes by deep merge: later sources win key by key, lists are replaced,
            and ``null`` for a weight type removes it.
        overrides: ``"key.sub=value"`` each, the value in YAML, as ``--set`` takes them on the
            command line: ``"weight_types.attn.n_head=12"``.

    Raises:
        ConfigError: for whatever is wrong, all faults of the merged configuration at once.
            Nothing that the caller gave is changed.
    """
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        raise ConfigError(
            f"overrides: expected a list of 'key.sub=value'; found {_shown(overrides)}"
        )
    if isinstance(source, ShareConfig) and not overrides:
        return source
    sources = [*_read_all(source), *(_read_override(text) for text in overrides)]
    merged = _merge_all(sources)
    try:
        return ShareConfig.model_validate(merged)
    except ValidationError as error:
        raise _as_config_error(error, ShareConfig, sources) from None


def _read_all(source: object) -> list[_Source]:
    several = isinstance(source, Sequence) and not isinstance(source, str | bytes | bytearray)
    if not several:
        return [_read(source, "the mapping given")]
    assert isinstance(source, Sequence)
    if not source:
        raise ConfigError("the list of sources given is empty: expected a path or a mapping in it")
    if len(source) == 1:
        return [_read(source[0], "the mapping given")]
    return [_read(one, f"the mapping given as source {i}") for i, one in enumerate(source, 1)]


def _read(source: object, label: str) -> _Source:
    if isinstance(source, ShareConfig):
        values: object = source.model_dump(exclude_unset=True)
    elif isinstance(source, Mapping):
        values = source
    elif isinstance(source, str | os.PathLike):
        label, values = _read_file(source)
    else:
        raise ConfigError(
            "expected a ShareConfig, a mapping, a path to a YAML file, or a list of mappings and "
            f"paths; found {_shown(source)}"
        )
    if values is None:
        raise ConfigError(f"{label}: empty; expected a mapping with the key weight_types")
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{label}: expected a mapping with the key weight_types; found {_shown(values)}"
        )
    return _Source(label, _canonical(_plain(values, label)))


def _read_file(path: str | os.PathLike[str]) -> tuple[str, object]:
    label = _name(os.fsdecode(path))
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
    return label, _parse_yaml(text, label)


def _read_override(text: object) -> _Source:
    expected = "expected key.sub=value, such as weight_types.attn.n_head=12"
    if not isinstance(text, str):
        raise ConfigError(f"--set: {expected}; found {_shown(text)}")
    label = f"--set {_name(text)}"
    key, equals, value = text.partition("=")
    steps = [step.strip() for step in key.split(".")]
    if not equals:
        raise ConfigError(f"{label}: {expected}; found no '='")
    if not all(steps):
        raise ConfigError(f"{label}: {expected}; found an empty key before or between dots")
    if not value.strip():
        raise ConfigError(f"{label}: {expected}; found no value (write {key}=null to unset it)")
    hint = "; a value with special characters needs quotes inside the shell's own"
    values = _parse_yaml(value, label, hint=hint)
    for step in reversed(steps):
        values = {step: values}
    assert isinstance(values, dict)
    return _Source(label, _canonical(_plain(values, label)))


def _plain(values: Mapping[Any, Any], label: str) -> dict[str, Any]:
    """A copy in plain dicts down to the depth of a configuration, its keys checked to be text."""
    faults: list[str] = []

    def copied(given: Mapping[Any, Any], loc: Loc) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in given.items():
            if not isinstance(key, str):
                faults.append(
                    f"{label}: {_dotted(loc) + ': ' if loc else ''}expected text as a key; found "
                    f"{_shown(key)} (in YAML, put it in quotes)"
                )
                continue
            if isinstance(value, _Section):
                value = value.model_dump(exclude_unset=True)
            deeper = isinstance(value, Mapping) and len(loc) + 1 < _DEPTH
            result[key] = copied(value, (*loc, key)) if deeper else value
        return result

    result = copied(values, ())
    if faults:
        raise ConfigError("\n".join(faults))
    return result


def _canonical(values: dict[str, Any]) -> dict[str, Any]:
    """``layer_pattern`` renamed to ``block_pattern``, before merging: one overrides the other.

    Where one source has both, both stay, and ``layer_pattern`` is reported as an unknown key.
    """
    if "layer_pattern" not in values or "block_pattern" in values:
        return values
    return {"block_pattern" if k == "layer_pattern" else k: v for k, v in values.items()}


def _merge_all(sources: Sequence[_Source]) -> dict[str, Any]:
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
            f"{source.label}: {_dotted(('weight_types', name))}: null removes a weight type, but "
            f"no source before this one has it; expected a mapping with the key pattern, or a "
            f"known name.{_nearest(name, before)}"
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
        if isinstance(mine, dict) and isinstance(value, dict) and depth < _DEPTH:
            result[key] = _merged(mine, value, depth + 1)
        else:
            result[key] = value
    return result


# YAML ----------------------------------------------------------------------------------------


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
                    problem=f"duplicate key {_name(key.value)!r}, first given on line "
                    f"{seen[written]}",
                    problem_mark=key.start_mark,
                )
            seen[written] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper without anchors, with the loader's rule for numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))


def _parse_yaml(text: str, label: str, hint: str = "") -> object:
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
    raise ConfigError(f"{label}: not valid YAML{where}: {_name(str(reason))}{hint}")


# From pydantic's errors to ours --------------------------------------------------------------


def _as_config_error(
    error: ValidationError, model: type[_Section], sources: Sequence[_Source]
) -> ConfigError:
    return ConfigError("\n".join(_lines(error, model, sources)))


def _lines(
    error: ValidationError, model: type[_Section], sources: Sequence[_Source]
) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        # Pydantic marks an error in a mapping's key by a last step "[key]".
        loc = fault["loc"][:-1] if fault["loc"][-1:] == ("[key]",) else fault["loc"]
        text = _text(fault["type"], loc, fault["input"], fault.get("ctx", {}), model, sources)
        yield f"{_label_of(loc, sources)}: {_dotted(loc)}: {text or fault['msg']}"


def _text(
    kind: str,
    loc: Loc,
    found: object,
    ctx: Mapping[str, Any],
    model: type[_Section],
    sources: Sequence[_Source],
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
    return None if expected is None else f"expected {expected}; found {_shown(found)}"


def _section_at(loc: Loc, model: type[_Section]) -> type[_Section]:
    """The model whose fields are the valid keys at ``loc`` inside a ``model``."""
    if not loc:
        return model
    sections: dict[str, type[_Section]] = {
        "weight_types": WeightType,
        "budget": Budget,
        "planner": Planner,
        "lower": Lower,
    }
    return sections.get(str(loc[0]), Calibration)


def _unknown_key(key: str, section: type[_Section]) -> str:
    keys = list(section.model_fields)
    if section is ShareConfig:
        if key == "layer_pattern":
            return "an alias of block_pattern, which is also given: remove one of the two"
        keys.append("layer_pattern")
    return f"unknown key.{_nearest(key, keys)} Valid keys: {', '.join(keys)}"


def _nearest_type(loc: Loc, sources: Sequence[_Source]) -> str:
    """For ``--set weight_types.atn.n_head=12``, which makes a weight type without a pattern."""
    if loc[:1] != ("weight_types",) or len(loc) != _DEPTH:
        return ""
    types: dict[object, None] = {}
    for source in sources:
        given = source.values.get("weight_types")
        types |= dict.fromkeys(given if isinstance(given, dict) else ())
    return _nearest(str(loc[1]), [n for n in types if isinstance(n, str) and n != loc[1]])


def _label_of(loc: Loc, sources: Sequence[_Source]) -> str:
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


# Out -----------------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors that complete and check YAML."""
    schema = ShareConfig.model_json_schema()
    # Accepted under this name too, so an editor must not mark it as unknown.
    alias = {**schema["properties"]["block_pattern"], "description": "Alias of `block_pattern`."}
    schema["properties"]["layer_pattern"] = {**alias, "title": "Layer Pattern"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def dump_config(cfg: ShareConfig) -> str:
    """YAML text that :func:`load_config` reads back to an equal configuration.

    Defaults are written out, so the file keeps its meaning should a default ever change; what is
    not given (null) is left out.
    """
    values = cfg.model_dump(exclude_none=True)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=100)


__all__ = [
    "CONFIG_VERSION",
    "Budget",
    "Calibration",
    "ConfigSource",
    "Lower",
    "Planner",
    "ShareConfig",
    "WeightType",
    "dump_config",
    "json_schema",
    "load_config",
]
