"""``fxshare init``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxshare.cli.options import AsJson, Debug, Model, Seed
from fxshare.cli.output import Result, note
from fxshare.errors import ConfigError

if TYPE_CHECKING:
    from fxshare.knowing import Proposal


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
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Write a configuration for a model from the model itself, with comments.

    Weight types are found by structure: what comes again in every layer, which weights are fused
    and how, the number of heads. The file is exact mode until a budget or a rate is added.

    \b
    Examples:
      fxshare init path/to/model -o model.yaml
      fxshare init mypackage.models:make --no-capture
    """
    del debug, as_json
    from fxshare.knowing import propose
    from fxshare.knowing.examples import made_up_call
    from fxshare.models import is_saved, load_model
    from fxshare.writing import write_text

    if force and output is None:
        raise ConfigError("--force: has no effect without -o FILE")
    if output is not None and output.exists() and not force:
        raise ConfigError(
            f"-o {output}: there is such a file; --force overwrites it, or give another name"
        )
    if is_saved(model):
        raise ConfigError(
            f"{model}: expected an original model, found one that fxshare compiled; 'fxshare "
            "inspect' shows its configuration"
        )
    loaded = load_model(model)
    note(f"looking at {model} ({type(loaded.model).__name__})")
    example = made_up_call(loaded.model, seed=seed) if capture else None
    found = propose(loaded.model, example=example)
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
