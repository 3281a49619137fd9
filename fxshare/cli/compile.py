"""``fxshare compile``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxshare
from fxshare.cli.option_groups import Data, Wanted, captured_with, spread
from fxshare.cli.options import (
    AllowMissing,
    AsJson,
    Capture,
    Debug,
    Model,
    Quiet,
    Verbose,
    WorkFolder,
)
from fxshare.cli.output import Result, note
from fxshare.cli.plan import read_plan
from fxshare.cli.ranks import is_first

if TYPE_CHECKING:
    from fxshare.config import ShareConfig
    from fxshare.loading.names import LoadedModel


@spread
def compile_model(
    model: Model,
    *,
    wanted: Wanted,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Realise this plan (of 'fxshare plan') as it is."),
    ] = None,
    data: Data,
    capture: Annotated[
        Capture | None,
        typer.Option(
            help="How the model is captured. Default: the configuration's.", show_default=False
        ),
    ] = None,
    work: WorkFolder = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Save the result here."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an output folder of fxshare.")
    ] = False,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Rewrite a model under a configuration, check the result, and print the report.

    Without -o nothing is saved; with it the folder is loaded once and compared before it takes its
    place. With --work a run that was killed goes on from where it was. Without -c the configuration
    is what 'fxshare init' finds in the model. Without --calibration the weights alone decide (plain
    SVD).

    \b
    Examples:
      fxshare compile path/to/gpt2 --keep 0.8 --calibration wiki.txt -o out/
      fxshare compile path/to/gpt2 -c configs/gpt2.yaml \\
          --set group_size=2 --set compression_rate=0.8 \\
          --calibration wiki.txt --tokens 65536 -o out/
    """
    del as_json, debug, verbose, quiet
    from fxshare.capture.once import captures_kept
    from fxshare.loading.names import load_model
    from fxshare.models.traits import example_ids

    cfg = wanted.from_files()
    made = None if plan is None else read_plan(plan)
    check_free(output, force, work)
    loaded = load_model(model, allow_missing=allow_missing)
    batches = data.batches(loaded)
    example = None if batches else example_ids(loaded.model, seed=data.seed)
    with captures_kept():  # what is looked at for a configuration is what is compiled
        if cfg is None:
            cfg = wanted.from_model(loaded, model, captured_with(loaded, batches, example))
        note(f"compiling {model} ({type(loaded.model).__name__})")
        if output is not None:
            _check_room(output, loaded, cfg)
        gm = fxshare.compile(
            loaded.model,
            cfg,
            calibration=batches,
            example=example,
            plan=made,
            capture=None if capture is None else capture.value,
            seed=data.seed,
            work=work,
        )
    if not is_first():
        return Result(None, "")
    report = gm.fxshare.report
    found: dict[str, Any] = {**report.to_dict(), "saved_to": None}
    text = str(report)
    if output is not None:
        save_checked(gm, loaded, batches[0] if batches else example, output, force)
        found["saved_to"] = str(output)
        text += f"\nsaved to {output}"
    return Result(found, text)


def check_free(output: Path | None, force: bool, work: Path | None) -> None:
    """Refuse before hours of work what saving would refuse after them."""
    from fxshare.base.files import check_place
    from fxshare.loading.names import is_saved

    if output is None:
        return
    if work is not None and work.resolve().is_relative_to(output.resolve()):
        raise fxshare.errors.ConfigError(
            f"--work {work}: expected a folder outside of -o {output}, which is written anew at "
            "the end; give another, such as DIR.work beside it"
        )
    check_place(output)
    ours = is_saved(str(output))
    if not output.exists():
        return
    if not output.is_dir():
        raise fxshare.errors.StoreError(f"{output}: expected a folder to save to, found a file")
    if not force:
        raise fxshare.errors.StoreError(
            f"{output} exists; choose another folder, or replace it with --force"
        )
    if any(output.iterdir()) and not ours:
        raise fxshare.errors.StoreError(
            f"{output} has files and was not written by fxshare; --force replaces only folders "
            "that were. Choose another"
        )


def _check_room(output: Path, loaded: LoadedModel, cfg: ShareConfig) -> None:
    """Refuse a disk that what is to be saved cannot fit on: what is kept of the model at least."""
    from fxshare.estimating.disk import check_room
    from fxshare.planning.options import bytes_of

    budget, kept = cfg.budget, cfg.compression_rate
    if budget is not None:
        # numbers of few bits take fewer bytes than their share
        kept = budget.params_kept if cfg.planner.bits == (16,) else budget.bytes_kept
    check_room(
        output,
        int(min(kept or 0.0, 1.0) * bytes_of(loaded.model)),
        "the result",
        "give -o a folder on a larger disk",
    )


def save_checked(gm: Any, loaded: LoadedModel, example: object, output: Path, force: bool) -> None:
    """Save, and load what was saved before it takes its place."""
    from fxshare.compiling.given import named_passes
    from fxshare.loading.saved import check_saved
    from fxshare.store.save import save

    def written(folder: Path) -> None:
        passes = named_passes(gm.fxshare.config)
        check_saved(folder, gm, loaded.model, example=example, passes=passes)

    # the files as they are; the demo's tokenizer comes with this package
    tokenizer = loaded.folder if loaded.tokenizer is not None else None
    save(gm, output, force=force, tokenizer=tokenizer, written=written)
