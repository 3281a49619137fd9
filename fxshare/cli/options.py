"""The options that several commands take."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxshare.errors import ConfigError

if TYPE_CHECKING:
    from fxshare.config import ShareConfig
    from fxshare.models import LoadedModel
    from fxshare.sampling import Batch

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder that fxshare saved, a transformers folder, package.module:factory, "
        "'embedded' (the demo's model), or owner/name on the Hugging Face hub.",
    ),
]
Configs = Annotated[
    list[Path],
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="Configuration in YAML. Give it again to merge several; later files win.",
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one key of the configuration: group_size=2, weight_types.attn.n_head=16.",
    ),
]
Keep = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Plan to keep this share of the matched weights' numbers: --set "
        "budget.params_kept=SHARE.",
    ),
]
MaxBytes = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Plan for a whole model of at most N bytes: --set budget.max_bytes=N."
    ),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Plan the smallest model whose loss per token rises by at most NATS: --set "
        "budget.max_loss_increase=NATS.",
    ),
]
Draw = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Draw the plan: .svg, .png or .pdf. Needs 'fxshare[viz]'."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error (or FXSHARE_DEBUG=1).")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Data to gather statistics on: FILE.txt, FILE.jsonl[:KEY], FILE.parquet[:KEY], "
        "FILE.npy, FILE.safetensors[:NAME], stdlib, stdlib:held-out. Without it: plain SVD; a "
        "budget needs it.",
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Use about N tokens: a random choice of windows. Default: all."
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Use N samples (windows, or with --padded documents) chosen by the seed. Default: "
        "all, of more than 64 MiB of text 1024.",
    ),
]
TextKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY", help="Where the text is in the rows of .jsonl and .parquet. Default: text."
    ),
]
Padded = Annotated[
    bool,
    typer.Option(
        "--padded",
        help="One document a sample, filled up to the longest of its batch and masked. Default: "
        "packed, windows over all documents one after the other.",
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="L",
        help="Tokens per window. Default: what the model was made for, at most 2048.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="B", help="Windows per batch.")]
Seed = Annotated[int, typer.Option(metavar="S", help="Seed of every random choice.")]

Original = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The model that a saved folder was made from, where the folder cannot tell its class.",
    ),
]

LONGEST_DEFAULT = 2048
"""Window length of the published perplexities; the default where the model takes that much."""


class Capture(str, Enum):
    """Values of ``--capture``."""

    AUTO = "auto"
    FX = "fx"
    EXPORT = "export"
    MODULES = "modules"


class Protocol(str, Enum):
    """Values of ``--protocol``."""

    A = "A"
    B = "B"


def budget_overrides(
    keep: float | None, max_bytes: int | None, max_loss: float | None
) -> list[str]:
    """``--keep`` and its like as ``--set`` writes them."""
    given = {"params_kept": keep, "max_bytes": max_bytes, "max_loss_increase": max_loss}
    return [f"budget.{key}={value}" for key, value in given.items() if value is not None]


def config_of(configs: list[Path], sets: list[str] | None, more: Sequence[str] = ()) -> ShareConfig:
    """The configuration that ``-c``, ``--set`` and then ``more`` overrides describe."""
    from fxshare.config import load_config

    if not configs:
        raise ConfigError(
            "expected a configuration; give it with -c FILE.yaml "
            "('fxshare init MODEL -o FILE.yaml' writes one)"
        )
    return load_config(configs, overrides=[*(sets or ()), *more])


def window_length(loaded: LoadedModel, length: int | None) -> int:
    """The window length that was asked for, or the model's own up to 2048."""
    from fxshare.models import context_of

    context = context_of(loaded.model)
    if length is None and context is None:
        raise ConfigError(
            f"{loaded.name}: the model does not say how many tokens it reads at once; give "
            "--length L"
        )
    if length is None:
        assert context is not None
        return min(context, LONGEST_DEFAULT)
    if context is not None and length > context:
        raise ConfigError(
            f"--length {length}: {loaded.name} was made for at most {context} tokens; give a "
            "smaller length"
        )
    return length


def calibration_batches(
    loaded: LoadedModel,
    spec: str | None,
    *,
    tokens: int | None,
    length: int | None,
    batch_size: int,
    seed: int,
    samples: int | None = None,
    text_key: str | None = None,
    padded: bool = False,
) -> list[Batch] | None:
    """The batches that ``--calibration`` and its options describe; None without it."""
    from fxshare.models import vocabulary_of
    from fxshare.sampling import Sampling, sample_batches

    options = {
        "--tokens": tokens,
        "--samples": samples,
        "--length": length,
        "--text-key": text_key,
        "--padded": padded or None,
    }
    if spec is None:
        for option, value in options.items():
            if value is not None:
                given = option if value is True else f"{option} {value}"
                raise ConfigError(
                    f"{given}: has no effect without data; give --calibration SPEC, or leave "
                    f"{option} out"
                )
        return None
    if tokens is not None and samples is not None:
        raise ConfigError(
            f"--tokens {tokens} and --samples {samples} both say how much data to use; leave one "
            "out"
        )
    if padded:
        _check_takes_mask(loaded)
    size = window_length(loaded, length)
    if tokens is not None:
        samples = max(1, -(-tokens // size))
    return sample_batches(
        spec,
        Sampling(length=size, count=samples, padded=padded, batch_size=batch_size, seed=seed),
        tokenizer=loaded.tokenizer,
        vocabulary=vocabulary_of(loaded.model),
        key=text_key,
    )


def _check_takes_mask(loaded: LoadedModel) -> None:
    import inspect

    names = inspect.signature(loaded.model.forward).parameters
    if not {"input_ids", "attention_mask"} <= set(names):
        raise ConfigError(
            f"--padded: expected a model that takes input_ids and attention_mask, but "
            f"{type(loaded.model).__name__}.forward takes {', '.join(names)}; without a mask the "
            "filling would count as text, leave --padded out"
        )
