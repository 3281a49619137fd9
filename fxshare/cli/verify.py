"""``fxshare verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

import fxshare
from fxshare.cli.options import (
    AllowMissing,
    AsJson,
    Debug,
    Length,
    Model,
    Quiet,
    Seed,
    Verbose,
    window_length,
)
from fxshare.cli.output import Result
from fxshare.cli.verify_on import verify_on

if TYPE_CHECKING:
    from torch import Tensor

    from fxshare.loading.names import LoadedModel

_FAILED = 3
_WINDOWS = 2


def verify_model(
    model: Model,
    out: Annotated[
        str | None,
        typer.Argument(metavar="[OUT]", help="The folder that was compiled from it."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINES",
            help="Compare a compiled folder, or an export, with itself in these engines, separated "
            "by commas: transformers, vllm, vllm-plugin, ort-genai, pt2, onnx.",
        ),
    ] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE=PATH", help="The interpreter of an environment that has the engine."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="Compare on two windows of this data as well (see 'eval --data')."
        ),
    ] = None,
    length: Length = None,
    seed: Seed = 0,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Compare a saved model numerically with the model it was made from.

    In exact mode the outputs must be equal up to rounding; in the other modes they must equal
    those of the original with every compressed weight multiplied out, and the error of each slice
    must be the recorded one. Exit code 3 where they are not.

    \b
    With --on, and of an export alone, it is run in engines instead, and its greedy tokens are
    compared with those of the compiled model, one row an engine; of an export it is also said
    which files are not as they were certified.

    \b
    Example:
      fxshare verify path/to/gpt2 out/
      fxshare verify out/ --on transformers,vllm,ort-genai,pt2,onnx
      fxshare verify served/
    """
    del as_json, debug, verbose, quiet
    if out is None or on is not None:
        for option, given in (("--data", data), ("--length", length)):
            if given is not None:
                raise fxshare.errors.ConfigError(
                    f"{option}: a model and OUT are compared on data, engines on the prompts of a "
                    "certificate; leave it out, or give both models without --on"
                )
        return verify_on(model, out, on, python or (), seed=seed)
    if python:
        raise fxshare.errors.ConfigError(
            f"--python {python[0]}: is of an engine; give it with --on ENGINES"
        )
    from fxshare.loading.names import load_model
    from fxshare.models.traits import example_ids
    from fxshare.result.module import record_of
    from fxshare.verifying.verify import verify

    original = load_model(model, allow_missing=allow_missing)
    compiled = load_model(out, original=original.model, allow_missing=allow_missing)
    record = record_of(compiled.model)
    inputs: list[Tensor] | None = None
    if data is not None:
        inputs = [_windows(original, data, length, seed)]
    elif not record.inputs:
        example = example_ids(original.model, seed=seed)
        inputs = None if example is None else [example]
    found = verify(original.model, compiled.model, inputs, seed=seed)
    return Result(found.to_dict(), str(found), code=0 if found.ok else _FAILED)


def _windows(loaded: LoadedModel, spec: str, length: int | None, seed: int) -> Tensor:
    from fxshare.data.stream import load_tokens
    from fxshare.models.traits import vocabulary_of

    return load_tokens(
        spec,
        tokenizer=loaded.tokenizer,
        length=window_length(loaded, length),
        count=_WINDOWS,
        seed=seed,
        vocabulary=vocabulary_of(loaded.model),
    )
