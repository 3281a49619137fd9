"""What refining is asked to do, checked."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from fxshare.errors import ConfigError

ObjectiveName = Literal["kl", "ce", "hidden", "blocks"]
Also = Literal["norms", "biases"]
OptimiserName = Literal["adamw", "muon"]
_LARGEST_SEED = 1 << 42
"""Times a million, as the orders of epochs are drawn by, it is still an integer of 64 bits."""


@dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """The options of :func:`fxshare.refine` that are plain values; its docstring says what they
    are."""

    minutes: float | None = None
    steps: int | None = None
    objective: ObjectiveName | None = None
    temperature: float = 1.0
    data_weight: float = 0.0
    pool_weight: float = 0.0
    learning_rate: float | None = None
    also: tuple[Also, ...] = ()
    optimiser: OptimiserName = "adamw"
    accumulate: int = 1
    autocast: bool | None = None
    compile: bool = False
    offload: bool = False
    recompute: bool | None = None
    shard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises :class:`ConfigError` for the first value that cannot be meant."""
        if self.minutes is None and self.steps is None:
            raise ConfigError(
                "refine: expected minutes=... or steps=..., found neither; say how long it may take"
            )
        _check("minutes", self.minutes, 0.0, math.inf, "a number above 0")
        _check("temperature", self.temperature, 0.0, math.inf, "a number above 0")
        _check("learning_rate", self.learning_rate, 0.0, 1.0, "a number above 0 and below 1")
        for name in ("steps", "accumulate"):
            value = getattr(self, name)
            if not (_is_whole(value) and value >= 1) and (value is not None or name != "steps"):
                raise ConfigError(f"{name}: expected a whole number of at least 1, found {value!r}")
        if not (_is_whole(self.seed) and abs(self.seed) <= _LARGEST_SEED):
            raise ConfigError(
                f"seed: expected a whole number of at most {_LARGEST_SEED:,}, found {self.seed!r}"
            )
        for name in ("data_weight", "pool_weight"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= 1):
                raise ConfigError(f"{name}: expected 0 to 1, found {value!r}")
        for name, known in (("objective", ObjectiveName), ("optimiser", OptimiserName)):
            value, names = getattr(self, name), get_args(known)
            if value not in names and not (value is None and name == "objective"):
                raise ConfigError(f"{name}: expected one of {', '.join(names)}, found {value!r}")
        for name in ("autocast", "compile", "offload", "recompute", "shard"):
            value = getattr(self, name)
            unset = value is None and name in ("autocast", "recompute")
            if not (unset or isinstance(value, bool)):
                raise ConfigError(f"{name}: expected True or False, found {value!r}")
        if self.shard:
            self._check_shard()

    def _check_shard(self) -> None:
        for name, unwanted, instead in (
            ("objective", "blocks", "which holds what one block needs as it is"),
            ("compile", True, "whose steps run without the exchanges between them"),
            ("optimiser", "muon", "which turns whole matrices"),
            ("offload", True, "which would write gathered parameters too; take recompute"),
        ):
            if getattr(self, name) == unwanted:
                raise ConfigError(
                    f"shard=True and {name}={unwanted!r}, {instead}: expected one of them"
                )

    @property
    def limit(self) -> float:
        """The seconds that there are; infinite where steps alone are counted."""
        return math.inf if self.minutes is None else 60 * self.minutes


def check_given(loss: object, teacher: object, work: object) -> None:
    """Raise :class:`ConfigError` for what is of another kind than :func:`fxshare.refine` takes."""
    if loss is not None and not callable(loss):
        raise ConfigError(f"loss: expected a function (output, batch) -> scalar, found {loss!r}")
    module = isinstance(teacher, nn.Module)
    if not (module or teacher is None or (isinstance(teacher, str) and teacher == "model")):
        raise ConfigError(
            f"teacher: expected an nn.Module, or None for the data's own loss, found {teacher!r}; "
            "load it first, or leave teacher out to learn from the model that was compiled"
        )
    if not (work is None or isinstance(work, (str, os.PathLike))) or work == "":
        raise ConfigError(f"work: expected the name of a folder, found {work!r}")


def also_of(names: Collection[str] | str) -> tuple[Also, ...]:
    """``names`` as a tuple without repetitions; :class:`ConfigError` for another kind."""
    known = get_args(Also)
    if not isinstance(names, Collection):
        raise ConfigError(f"also: expected some of {', '.join(known)}, found {names!r}")
    given = (names,) if isinstance(names, str) else tuple(names)
    for name in given:
        if name not in known:
            raise ConfigError(f"also: expected some of {', '.join(known)}, found {name!r}")
    return tuple(name for name in known if name in given)


def _check(name: str, value: Any, low: float, high: float, expected: str) -> None:
    unset = value is None and name != "temperature"
    if not (unset or (_is_number(value) and low < value < high)):
        raise ConfigError(f"{name}: expected {expected}, found {value!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


__all__ = [
    "Also",
    "ObjectiveName",
    "OptimiserName",
    "RefineOptions",
    "also_of",
    "check_given",
]
