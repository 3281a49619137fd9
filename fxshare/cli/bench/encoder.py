"""``fxshare bench encoder``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxshare.cli.bench.quality import sizes_of
from fxshare.cli.options import AllowMissing, AsJson, Debug, Model, Quiet, Seed, Threads, Verbose
from fxshare.cli.output import Result, note, table

if TYPE_CHECKING:
    from fxshare.bench.encoder import EncoderRow


_ROWS = 8
"""Texts of a batch."""


def encoder(
    model: Model,
    calibration: Annotated[
        str, typer.Option(metavar="SPEC", help="Texts to gather statistics on, see 'compile'.")
    ],
    data: Annotated[
        str, typer.Option(metavar="SPEC", help="Texts whose embeddings are compared, others.")
    ],
    samples: Annotated[int, typer.Option(min=2, help="Calibration texts.")] = 100,
    texts: Annotated[int, typer.Option(min=1, help="Texts that are compared.")] = 200,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a text at most.")] = 128,
    sizes: Annotated[
        str, typer.Option("--sizes", help="Shares of stored numbers kept, comma separated.")
    ] = "0.7,0.5",
    search: Annotated[
        str, typer.Option("--search", help="off, kinds, quick, thorough or refined.")
    ] = "quick",
    kinds: Annotated[
        str, typer.Option("--kinds", help="What planned plans choose from, such as basis,units.")
    ] = "basis",
    refine: Annotated[
        float | None,
        typer.Option(
            "--refine",
            metavar="MINUTES",
            help="Refine Basis Sharing and planned plans so long each, on texts of --calibration "
            "and pieces of them.",
        ),
    ] = None,
    refine_samples: Annotated[
        int | None,
        typer.Option(
            "--refine-samples",
            min=2,
            metavar="N",
            help="Texts to refine on. Default: all of --calibration.",
        ),
    ] = None,
    threads: Threads = 0,
    seed: Seed = 0,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Cosine of sentence embeddings with the dense model's, beside Basis Sharing and SVD.

    \b
    Example:
      fxshare bench encoder ./minilm --calibration valid.txt --data test.txt
      fxshare bench encoder ./minilm --calibration valid.txt --data test.txt --refine 10
    """
    from fxshare.bench.encoder import Refining, bench_encoder
    from fxshare.bench.speed.device import threads as using
    from fxshare.data.batches import Sampling, batches_to_refine_on, sample_batches
    from fxshare.loading.names import load_model
    from fxshare.models.traits import vocabulary_of
    from fxshare.proposing.propose import init
    from fxshare.refining.options import RefineOptions

    del as_json, debug, verbose, quiet
    shares = sizes_of(sizes)
    if refine is not None:
        RefineOptions(minutes=refine)  # a wrong value is told before anything is compiled
    loaded = load_model(model, allow_missing=allow_missing)
    # half precision without instructions for it takes many times as long, and rounds each step
    dense = loaded.model.float()
    types = init(dense).model_dump(include={"weight_types", "block_pattern"})

    reading: dict[str, Any] = {"tokenizer": loaded.tokenizer, "vocabulary": vocabulary_of(dense)}

    def sampling(count: int | None) -> Sampling:
        return Sampling(length=length, count=count, padded=True, batch_size=_ROWS, seed=seed)

    fit: list[Any] = sample_batches(calibration, sampling(samples), **reading)
    held_out: list[Any] = sample_batches(data, sampling(texts), **reading)
    refining = None
    if refine is not None:
        further: tuple[Any, Any] = batches_to_refine_on(
            calibration, sampling(refine_samples), **reading
        )
        refining = Refining(refine, *further)
    with using(threads):
        found = bench_encoder(
            dense,
            types,
            fit,
            held_out,
            sizes=shares,
            search=search,
            kinds=tuple(kind.strip() for kind in kinds.split(",")),
            refine=refining,
            seed=seed,
            say=note,
        )
    header = ["size", "method", "kept", "mean cosine", "lowest", "cpu s"]
    if refining is not None:
        header += ["refined", "lowest refined", "s refining", "tokens seen"]
    trained = "no training" if refining is None else f"refined for {refine:g} min each"
    lines = [
        table(header, [_cells(row, refining is not None) for row in found.rows]),
        "",
        f"{found.texts} texts of {data}; calibrated on {found.tokens:,} tokens of {calibration}; "
        f"seed {seed}; {trained}",
        f"{found.environment}",
    ]
    return Result(found.to_dict(), "\n".join(lines))


def _cells(row: EncoderRow, with_refined: bool) -> list[str]:
    cells = [
        f"{row.size:.2f}",
        row.method,
        f"{row.params_kept:.4f}",
        f"{row.cosine:.4f}",
        f"{row.lowest:.4f}",
        f"{row.seconds:.0f}",
    ]
    after = row.refined
    if after is not None:
        cells += [f"{after.cosine:.4f}", f"{after.lowest:.4f}"]
        cells += [f"{after.seconds:.0f}", f"{after.tokens:,}"]
    elif with_refined:
        cells += ["–"] * 4
    return cells
