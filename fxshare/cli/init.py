"""``fxshare init``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxshare
from fxshare.cli.option_groups import propose_for, refuse_compiled
from fxshare.cli.options import AllowMissing, AsJson, Debug, Model, Quiet, Seed, Verbose
from fxshare.cli.output import Result

if TYPE_CHECKING:
    from fxshare.proposing.proposal import Proposal


def init_config(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the file here, not to stdout."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite FILE where there is one.")
    ] = False,
    capture: Annotated[
        bool,
        typer.Option(
            "--capture/--no-capture",
            help="Capture the model with made-up inputs to see which weights read the same "
            "activation. Without it names and shapes tell.",
        ),
    ] = True,
    seed: Seed = 0,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Write a configuration for a model from the model itself, with comments.

    Weight types are found by structure: what comes again in every layer, which weights are fused
    and how, the number of heads. The file is exact mode until a budget or a rate is added.

    \b
    Examples:
      fxshare init path/to/model -o model.yaml
      fxshare init mypackage.models:make --no-capture
    """
    del as_json, debug, verbose, quiet
    from fxshare.base.files import write_text
    from fxshare.loading.names import load_model

    if force and output is None:
        raise fxshare.errors.ConfigError("--force: has no effect without -o FILE")
    if output is not None and output.exists() and not force:
        raise fxshare.errors.ConfigError(
            f"-o {output}: there is such a file; --force overwrites it, or give another name"
        )
    refuse_compiled(model)
    loaded = load_model(model, allow_missing=allow_missing)
    found = propose_for(loaded, model, capture=capture, seed=seed)
    text = found.text
    if output is not None:
        write_text(output, text)
        matched = sum(t.sites for t in found.types)
        text = f"{len(found.types)} weight types with {matched} weights\nwritten to {output}"
    return Result(_data(found), text.rstrip("\n"))


def _data(found: Proposal) -> dict[str, Any]:
    return {
        "model": found.model,
        "parameters": found.parameters,
        "config": found.config.model_dump(mode="json", exclude_none=True),
        "types": [
            {
                "type": t.name,
                "sites": t.sites,
                "slices": t.slices,
                "layers": list(t.layers),
                "weights": t.numbers,
                "share": t.numbers / found.parameters,
            }
            for t in found.types
        ],
        "left_out": [
            {"name": w.name, "weights": w.numbers, "reason": w.reason} for w in found.left_out
        ],
        "same_input": [list(group) for group in found.same_input],
        "captured": found.seen,
        "not_captured": found.unseen or None,
    }
