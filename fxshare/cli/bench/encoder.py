"""``fxshare bench encoder``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fxshare.cli.bench.quality import sizes_of
from fxshare.cli.options import AllowMissing, AsJson, Debug, Model, Quiet, Seed, Threads, Verbose
from fxshare.cli.output import Result, note, table


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
        str, typer.Option("--search", help="off, quick, thorough or refined.")
    ] = "quick",
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
    """
    from fxshare.bench.encoder import bench_encoder
    from fxshare.bench.speed.device import threads as using
    from fxshare.data.batches import Sampling, sample_batches
    from fxshare.loading.names import load_model
    from fxshare.models.traits import vocabulary_of
    from fxshare.proposing.propose import init

    del as_json, debug, verbose, quiet
    shares = sizes_of(sizes)
    loaded = load_model(model, allow_missing=allow_missing)
    types = init(loaded.model).model_dump(include={"weight_types", "block_pattern"})

    def batches(spec: str, count: int) -> list[Any]:
        return sample_batches(
            spec,
            Sampling(length=length, count=count, padded=True, batch_size=8, seed=seed),
            tokenizer=loaded.tokenizer,
            vocabulary=vocabulary_of(loaded.model),
        )

    fit, held_out = batches(calibration, samples), batches(data, texts)
    with using(threads):
        found = bench_encoder(
            loaded.model, types, fit, held_out, sizes=shares, search=search, seed=seed, say=note
        )
    rows = [
        [
            f"{row.size:.2f}",
            row.method,
            f"{row.params_kept:.4f}",
            f"{row.cosine:.4f}",
            f"{row.lowest:.4f}",
            f"{row.seconds:.0f}",
        ]
        for row in found.rows
    ]
    lines = [
        table(["size", "method", "kept", "mean cosine", "lowest", "cpu s"], rows),
        "",
        f"{found.texts} texts of {data}; calibrated on {found.tokens:,} tokens of {calibration}; "
        f"seed {seed}; no training",
        f"{found.environment}",
    ]
    return Result(found.to_dict(), "\n".join(lines))
