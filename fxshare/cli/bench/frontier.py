"""``fxshare bench frontier``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxshare
from fxshare.cli.bench.quality import sizes_of
from fxshare.cli.options import AllowMissing, AsJson, Debug, Quiet, Seed, Threads, Verbose
from fxshare.cli.output import Result, note, table

if TYPE_CHECKING:
    from torch import Tensor

    from fxshare.bench.frontier import Texts
    from fxshare.bench.frontier_table import Frontier
    from fxshare.bench.quality import Case


def frontier(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="MODEL", help="Another model; needs --tokens and -c."),
    ] = None,
    tokens: Annotated[
        list[Path] | None,
        typer.Option(
            "--tokens", metavar="FILE", help="Its tokens: safetensors 'calibration', 'heldout'."
        ),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", "-c", metavar="FILE", help="Its weight types."),
    ] = None,
    second: Annotated[
        list[str] | None,
        typer.Option(
            "--second",
            metavar="SPEC",
            help="A second corpus for each model, the embedded one first; see 'eval --data'.",
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder", metavar="MODEL", help="An encoder too; needs --calibration and --texts."
        ),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Texts to calibrate the encoder on.")
    ] = None,
    texts: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Texts whose embeddings are compared.")
    ] = None,
    embedded: Annotated[
        bool, typer.Option("--embedded/--no-embedded", help="Measure the embedded model.")
    ] = True,
    sizes: Annotated[
        str, typer.Option("--sizes", help="Shares of the bfloat16 bytes kept, comma separated.")
    ] = "0.5,0.4,0.33,0.28,0.25,0.2,0.15",
    search: Annotated[
        str, typer.Option("--search", help="off, kinds, quick or thorough.")
    ] = "kinds",
    methods: Annotated[
        str | None, typer.Option("--methods", help="Methods that are planned, comma separated.")
    ] = None,
    refine: Annotated[
        float | None,
        typer.Option(
            "--refine", metavar="MINUTES", help="Refine everything and the best single method too."
        ),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Also measure a prompt and one token, in eager mode.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw loss against bytes.")
    ] = None,
    threads: Threads = 0,
    seed: Seed = 0,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Held-out loss at the same bytes: rounding, bases, hidden units, and all of them together.

    The model is cast to bfloat16; bytes are counted in the saved folder. Nothing is trained but by
    --refine.

    \b
    Example:
      fxshare bench frontier --sizes 0.5,0.25
      fxshare bench frontier --model ./stories --tokens tokens.safetensors -c llama.yaml
      fxshare bench frontier --encoder ./minilm --calibration valid.txt --texts test.txt
    """
    from fxshare.bench.frontier import bench_frontier
    from fxshare.bench.frontier_plot import draw
    from fxshare.bench.quality import Case, embedded_case, folder_case
    from fxshare.bench.speed.device import threads as using
    from fxshare.config import load_config
    from fxshare.views.figure import check_drawable

    del as_json, debug, verbose, quiet
    models, files, configs = model or [], tokens or [], config or []
    if not len(models) == len(files) == len(configs):
        raise fxshare.errors.ConfigError(
            f"bench frontier: expected one --tokens and one -c for each --model, found "
            f"{len(models)} models, {len(files)} token files, {len(configs)} configurations"
        )
    if not (embedded or models or encoder):
        raise fxshare.errors.ConfigError(
            "bench frontier: --no-embedded leaves nothing to measure; give --model, --tokens and "
            "-c, or --encoder"
        )
    if encoder is not None and (calibration is None or texts is None):
        raise fxshare.errors.ConfigError(
            f"bench frontier: --encoder {encoder} needs --calibration and --texts"
        )
    if plot is not None:
        check_drawable(plot)
    cases: list[Case | Texts] = [embedded_case()] if embedded else []
    for name, file, path in zip(models, files, configs, strict=True):
        types: dict[str, Any] = load_config(path).model_dump(
            include={"weight_types", "block_pattern"}
        )
        cases.append(folder_case(name, file, types, allow_missing=allow_missing))
    names = (["embedded"] if embedded else []) + models
    others = second or []
    if others and len(others) != len(names):
        raise fxshare.errors.ConfigError(
            f"bench frontier: expected one --second for each of {len(names)} models, found "
            f"{len(others)}"
        )
    more = {
        case.name: windows(name, spec, case)
        for case, name, spec in zip(cases, names, others, strict=False)
        if isinstance(case, Case)
    }
    if encoder is not None and calibration is not None and texts is not None:
        cases.append(encoder_case(encoder, calibration, texts, seed, allow_missing=allow_missing))
    with using(threads):
        result = bench_frontier(
            cases,
            sizes=sizes_of(sizes),
            second=more,
            methods=named(methods),
            search=search,
            refine=refine,
            speed=speed,
            seed=seed,
            say=note,
        )
    if plot is not None:
        draw(result, plot)
    return Result(result.to_dict(), shown(result, sizes_of(sizes), plot))


def named(methods: str | None) -> list[str] | None:
    """Methods by their names, of which one has a comma; None for all.

    Raises :class:`ConfigError` for a name that no method has.
    """
    from fxshare.bench.frontier import PLANNED

    if methods is None:
        return None
    left, found = methods.replace(", ", ","), list[str]()
    known = {name.replace(", ", ","): name for name in sorted(PLANNED, key=len, reverse=True)}
    while left:
        name = next((one for one in known if f"{left},".startswith(f"{one},")), None)
        if name is None:
            raise fxshare.errors.ConfigError(
                f"bench frontier: --methods {methods}: {left!r} is no method; expected of "
                f"{'; '.join(PLANNED)}"
            )
        found.append(known[name])
        left = left[len(name) + 1 :]
    return found


def shown(result: Frontier, sizes: Sequence[float], plot: Path | None) -> str:
    """The tables and what they were measured on."""
    from fxshare.bench.frontier_table import dense_table, refined_table, speed_table, table_of

    lines = [table(*table_of(result, sizes)), ""]
    if any(row.second is not None for row in result.rows):
        lines += ["on the second corpus:", table(*table_of(result, sizes, second=True)), ""]
    if any(row.size is None for row in result.rows):
        lines += ["dense weights in few bits:", table(*dense_table(result)), ""]
    trained = "no training"
    if any(row.refined is not None for row in result.rows):
        trained = "no training where it does not say refined"
        lines += ["refined:", table(*refined_table(result, sizes)), ""]
    if any(row.prompt is not None for row in result.rows):
        lines += ["tokens a second over dense, eager:", table(*speed_table(result)), ""]
    below = [
        "increase of the loss in nats per token on held-out tokens (of an encoder 1 - cosine), "
        f"{trained}; search: {result.search}; seed {result.seed}",
        *(f"{name}: dense {loss:.4f}" for name, loss in result.dense_loss.items()),
        f"{result.environment}; {result.seconds:.0f} s",
        *([] if plot is None else [f"written to {plot}"]),
    ]
    return "\n".join([*lines, *below])


def windows(name: str, spec: str, case: Case) -> Tensor:
    """Windows of another corpus ``(N, T)``, of as many tokens as are held out at most."""
    import torch

    from fxshare.data.batches import Sampling, sample_batches
    from fxshare.loading.names import load_model
    from fxshare.models.traits import vocabulary_of

    count, length = case.held_out.shape
    sampling = Sampling(length=length, count=count, batch_size=count)
    loaded = load_model(name)
    found = sample_batches(
        spec, sampling, tokenizer=loaded.tokenizer, vocabulary=vocabulary_of(case.model)
    )
    return torch.cat([one for one in found if isinstance(one, torch.Tensor)])


def encoder_case(
    name: str, calibration: str, texts: str, seed: int, *, allow_missing: bool
) -> Texts:
    """An encoder with texts, as :func:`fxshare.cli.bench.encoder.encoder` takes them."""
    from fxshare.bench.frontier import Texts
    from fxshare.data.batches import Sampling, sample_batches
    from fxshare.loading.names import load_model
    from fxshare.models.traits import vocabulary_of
    from fxshare.proposing.propose import init

    loaded = load_model(name, allow_missing=allow_missing)
    types = init(loaded.model).model_dump(include={"weight_types", "block_pattern"})

    def batches(spec: str, count: int) -> list[Any]:
        sampling = Sampling(length=128, count=count, padded=True, batch_size=8, seed=seed)
        vocabulary = vocabulary_of(loaded.model)
        return sample_batches(spec, sampling, tokenizer=loaded.tokenizer, vocabulary=vocabulary)

    return Texts(
        Path(name).name, loaded.model, types, batches(calibration, 400), batches(texts, 200)
    )
