"""Options that come together, each group with what it stands for.

A command takes a group as one keyword-only parameter, and :func:`spread` puts its options there.
"""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import fxshare
from fxshare.cli.options import (
    Bits,
    BytesKept,
    Calibration,
    Configs,
    Embeddings,
    Keep,
    Length,
    MaxBytes,
    MaxLoss,
    MaxMemory,
    NoBos,
    Padded,
    RowsOfABatch,
    Samples,
    Seed,
    Sets,
    TextKey,
    Tokens,
    window_length,
)
from fxshare.cli.output import note, say

if TYPE_CHECKING:
    from fxshare.config import ShareConfig
    from fxshare.data.batches import Batch, Sampling
    from fxshare.loading.names import LoadedModel
    from fxshare.proposing.proposal import Proposal

R = TypeVar("R")


def spread(command: Callable[..., R]) -> Callable[..., R]:
    """``command`` with the options of its groups as parameters of its own, which typer can read.

    ``f(model, *, data: Data)`` becomes ``f(*, model, calibration=None, tokens=None, ...)``.
    """
    # not get_type_hints: Python 3.10's wraps what defaults to None in Optional, typer then sees no
    # option in the annotation, and plan and compile had no -o
    hints = inspect.get_annotations(command, eval_str=True)
    parameters: dict[str, inspect.Parameter] = {}
    groups: dict[str, Any] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if not is_dataclass(kind):
            parameters[name] = _keyword(name, kind, parameter.default)
            continue
        groups[name] = kind
        options = get_type_hints(kind, include_extras=True)
        for each in fields(kind):
            parameters[each.name] = _keyword(each.name, options[each.name], _default(each))

    @functools.wraps(command)
    def run(**given: Any) -> R:
        grouped = {
            name: group(**{f.name: given.pop(f.name) for f in fields(group) if f.name in given})
            for name, group in groups.items()
        }
        return command(**given, **grouped)

    returned = hints.get("return", inspect.Signature.empty)
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        list(parameters.values()), return_annotation=returned
    )
    run.__annotations__ = {n: p.annotation for n, p in parameters.items()}
    return run


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _default(option: Field[Any]) -> Any:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return option.default


@dataclass(frozen=True)
class Wanted:
    """What is to be compressed, and how far: ``-c``, ``--set``, and a budget."""

    config: Configs = field(default_factory=list)
    set_: Sets = None
    keep: Keep = None
    max_bytes: MaxBytes = None
    bytes_kept: BytesKept = None
    max_loss: MaxLoss = None
    bits: Bits = None
    embeddings: Embeddings = False
    max_memory: MaxMemory = None

    @property
    def overrides(self) -> list[str]:
        """``--set``, and then ``--keep`` and its like as ``--set`` writes them."""
        given = {
            "params_kept": self.keep,
            "max_bytes": self.max_bytes,
            "bytes_kept": self.bytes_kept,
            "max_loss_increase": self.max_loss,
        }
        budget = [f"budget.{key}={value}" for key, value in given.items() if value is not None]
        memory = [] if self.max_memory is None else [f"calibration.max_memory={self.max_memory}"]
        return [*(self.set_ or ()), *budget, *self._widths(), *memory]

    def _widths(self) -> list[str]:
        if self.bits is None:
            return []
        widths = [width.strip() for width in self.bits.split(",")]
        if not all(width.isascii() and width.isdigit() for width in widths):
            raise fxshare.errors.ConfigError(
                f"--bits {self.bits}: expected one or more of 16, 8 and 4, with commas between "
                "them, such as --bits 16,8,4"
            )
        return [f"planner.bits=[{', '.join(widths)}]"]

    def from_files(self) -> ShareConfig | None:
        """The configuration, where files of it were given."""
        from fxshare.config import load_config

        if not self.config:
            return None
        self.refuse_embeddings(f"{self.config[0]} says what is matched")
        return load_config(self.config, overrides=self.overrides)

    def refuse_embeddings(self, why: str) -> None:
        """A ``ConfigError`` for ``--embeddings`` where the weights are told already."""
        if self.embeddings:
            raise fxshare.errors.ConfigError(
                f"--embeddings: takes what 'fxshare init' offers, and {why}; leave the option out, "
                "or -c, or give a weight type `embedding: true` in the file"
            )

    def proposed(self, found: Proposal) -> ShareConfig:
        """The configuration of a proposal, with the overrides."""
        from fxshare.config import load_config

        if self.embeddings and not found.optional:
            raise fxshare.errors.ConfigError(
                f"--embeddings: {found.model} has no embedding and no head worth rewriting beside "
                "its layers; leave the option out"
            )
        config = found.with_optional if self.embeddings else found.config
        return load_config(config, overrides=self.overrides)

    def from_model(self, loaded: LoadedModel, name: str, example: object = None) -> ShareConfig:
        """What ``fxshare init`` proposes for the model, with the overrides; says so on stderr.
        ``example`` is what it will be captured with."""
        refuse_compiled(name)
        cfg = self.proposed(propose_for(loaded, name, example=example))
        smaller = "" if cfg.mode != "exact" else "; exact mode, --keep 0.8 makes it smaller"
        say(
            f"no -c: the configuration that 'fxshare init' finds in the model, "
            f"{len(cfg.weight_types)} weight types ({', '.join(cfg.weight_types)}){smaller}; "
            f"'fxshare init {shlex.quote(name)} -o cfg.yaml' writes it down to edit"
        )
        return cfg


def refuse_compiled(name: str) -> None:
    """A ``ConfigError`` for a folder that fxshare saved, in which there is nothing to propose."""
    from fxshare.loading.names import is_saved

    if is_saved(name):
        raise fxshare.errors.ConfigError(
            f"{name}: expected an original model, found one that fxshare compiled; 'fxshare "
            "inspect' shows its configuration"
        )


def captured_with(loaded: LoadedModel, batches: Sequence[Batch] | None, made_up: object) -> object:
    """What ``fxshare.compile`` captures a model with: the first batch, or without any what was made
    up for it."""
    from fxshare.capture import Caller
    from fxshare.data.usable import usable

    return Caller(loaded.model, mask=False)(usable(batches[0])) if batches else made_up


def propose_for(
    loaded: LoadedModel,
    name: str,
    *,
    capture: bool = True,
    seed: int = 0,
    example: object = None,
) -> Proposal:
    """What ``fxshare init`` finds in a model."""
    from fxshare.models.examples import made_up_call
    from fxshare.proposing.propose import propose

    note(f"looking at {name} ({type(loaded.model).__name__})")
    if example is None and capture:
        example = made_up_call(loaded.model, seed=seed)
    return propose(loaded.model, example=example)


@dataclass(frozen=True)
class Data:
    """What statistics are gathered on: ``--calibration``, how much of it, and the seed."""

    calibration: Calibration = None
    tokens: Tokens = None
    samples: Samples = None
    text_key: TextKey = None
    padded: Padded = False
    length: Length = None
    batch_size: RowsOfABatch = None
    seed: Seed = 0
    no_bos: NoBos = False

    def batches(self, loaded: LoadedModel) -> list[Batch] | None:
        """The batches; None without ``--calibration``."""
        from fxshare.data.batches import sample_batches

        if self.calibration is None:
            self._refuse(self._reading_alone, "has no effect without data; give --calibration SPEC")
            return None
        return sample_batches(self.calibration, self._sampling(loaded), **self._reading(loaded))

    def batches_to_refine_on(self, loaded: LoadedModel) -> tuple[list[Batch], list[Batch]]:
        """Padded texts and pieces of them to train on, and others to measure on."""
        from fxshare.data.batches import batches_to_refine_on

        assert self.calibration is not None
        sampling = self._sampling(loaded)
        return batches_to_refine_on(self.calibration, sampling, **self._reading(loaded))

    def _reading(self, loaded: LoadedModel) -> dict[str, Any]:
        from fxshare.models.traits import vocabulary_of

        vocabulary = vocabulary_of(loaded.model)
        return {"tokenizer": loaded.tokenizer, "vocabulary": vocabulary, "key": self.text_key}

    def _sampling(self, loaded: LoadedModel) -> Sampling:
        from fxshare.data import batches

        if self.tokens is not None and self.samples is not None:
            raise fxshare.errors.ConfigError(
                f"--tokens {self.tokens} and --samples {self.samples} both say how much data to "
                "use; leave one out"
            )
        if self.padded:
            _check_takes_mask(loaded)
        size = window_length(loaded, self.length)
        samples = self.samples
        if self.tokens is not None:
            samples = max(1, -(-self.tokens // size))
        return batches.Sampling(
            length=size,
            count=samples,
            padded=self.padded,
            batch_size=self.batch_size,
            seed=self.seed,
            bos=not self.no_bos,
        )

    def refuse(self, why: str) -> None:
        """A ``ConfigError`` for data, and for what says how to read it, where none is read."""
        self._refuse({"--calibration": self.calibration, **self._reading_alone}, why)

    @property
    def _reading_alone(self) -> dict[str, object]:
        return {
            "--tokens": self.tokens,
            "--samples": self.samples,
            "--length": self.length,
            "--text-key": self.text_key,
            "--padded": self.padded or None,
            "--no-bos": self.no_bos or None,
        }

    def _refuse(self, options: Mapping[str, object], why: str) -> None:
        for option, value in options.items():
            if value is not None:
                given = option if value is True else f"{option} {value}"
                raise fxshare.errors.ConfigError(f"{given}: {why}, or leave {option} out")


def _check_takes_mask(loaded: LoadedModel) -> None:
    import inspect

    names = inspect.signature(loaded.model.forward).parameters
    if not {"input_ids", "attention_mask"} <= set(names):
        raise fxshare.errors.ConfigError(
            f"--padded: expected a model that takes input_ids and attention_mask, but "
            f"{type(loaded.model).__name__}.forward takes {', '.join(names)}; without a mask the "
            "filling would count as text, leave --padded out"
        )
