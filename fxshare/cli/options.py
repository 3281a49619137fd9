"""The options that several commands take."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import fxshare

if TYPE_CHECKING:
    from fxshare.config import ShareConfig
    from fxshare.loading.names import LoadedModel

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
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Plan for a whole model of at most so many bytes (20000000, 350MB): --set "
        "budget.max_bytes=SIZE.",
    ),
]
BytesKept = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Plan to keep this share of the matched weights' bytes: --set "
        "budget.bytes_kept=SHARE.",
    ),
]
Bits = Annotated[
    str | None,
    typer.Option(
        metavar="BITS",
        help="How many bits a number may have (16,8,4; 16 is the model's own dtype): --set "
        "planner.bits=[BITS]. Several need a budget in bytes.",
    ),
]
Embeddings = Annotated[
    bool,
    typer.Option(
        "--embeddings",
        help="Without -c: take the embeddings and heads as well that 'fxshare init' offers and "
        "leaves off.",
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
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most resident memory while calibrating and planning, the model included (8GB); what "
        "does not fit goes to disk: --set calibration.max_memory=SIZE.",
    ),
]
WorkFolder = Annotated[
    Path | None,
    typer.Option(
        "--work",
        metavar="DIR",
        help="Keep here what is computed on the way: a run that was ended goes on from there, and "
        "another budget takes no second calibration of the dense model.",
    ),
]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="As for compile. Without it --work must name a folder of an earlier run: another "
        "budget is planned from what is there.",
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
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Show each stage and each pass on stderr, with its rewrites and seconds.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="In a pipe, leave out the lines about stages as well."),
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
NoBos = Annotated[
    bool,
    typer.Option(
        "--no-bos",
        help="Windows of text do not start with the token that the tokenizer puts before a text "
        "(BOS), as in GPTQ's protocol. Default: they do, where it puts one.",
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
RowsOfABatch = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="B",
        help="Windows per batch. Default: 4, and fewer where that would leave fewer than ten.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(metavar="S", help="Seed of every random choice.")]
Original = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The model that a saved folder was made from, where the folder cannot tell its class.",
    ),
]
AllowMissing = Annotated[
    bool,
    typer.Option(
        "--allow-missing",
        help="Go on where weights of a transformers folder are missing (random then), have no "
        "place or another shape.",
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


def config_of(configs: list[Path], sets: list[str] | None) -> ShareConfig:
    """The configuration that ``-c`` and then ``--set`` describe."""
    from fxshare.config import load_config

    if not configs:
        raise fxshare.errors.ConfigError(
            "expected a configuration; give it with -c FILE.yaml "
            "('fxshare init MODEL -o FILE.yaml' writes one)"
        )
    return load_config(configs, overrides=sets or ())


def window_length(loaded: LoadedModel, length: int | None) -> int:
    """The window length that was asked for, or the model's own up to 2048."""
    from fxshare.models.traits import context_of

    context = context_of(loaded.model)
    if length is None and context is None:
        raise fxshare.errors.ConfigError(
            f"{loaded.name}: the model does not say how many tokens it reads at once; give "
            "--length L"
        )
    if length is None:
        assert context is not None
        return min(context, LONGEST_DEFAULT)
    if context is not None and length > context:
        raise fxshare.errors.ConfigError(
            f"--length {length}: {loaded.name} was made for at most {context} tokens; give a "
            "smaller length"
        )
    return length


Threads = Annotated[
    int, typer.Option("--threads", min=0, help="Processor threads; 0 leaves torch's choice.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
