"""``fxshare export``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

import fxshare
from fxshare.cli.options import AllowMissing, AsJson, Debug, Original, Quiet, Seed, Verbose
from fxshare.cli.output import Result, note


class To(str, Enum):
    """Values of ``--to``."""

    PT2 = "pt2"
    AOTI = "aoti"
    ONNX = "onnx"
    DENSE = "dense"
    PY = "py"
    VLLM = "vllm"
    ORT_GENAI = "ort-genai"


def export_model(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder that fxshare saved.")],
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="The file to make (.pt2, .onnx, .safetensors), or the folder (the others).",
        ),
    ],
    to: Annotated[
        To,
        typer.Option(
            help="pt2: torch.export. aoti: compiled by AOTInductor. onnx. dense: the original's "
            "weights, multiplied out. py: a Python module. vllm: a folder for vLLM and "
            "transformers. ort-genai: a folder for ONNX Runtime GenAI.",
            show_default=False,
        ),
    ],
    static: Annotated[
        bool, typer.Option("--static", help="Fix batch size and length at the example's.")
    ] = False,
    opset: Annotated[
        int | None, typer.Option(metavar="N", help="ONNX opset. Default: torch's.")
    ] = None,
    original: Original = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="vllm: a copy of its bases for every linear.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an older export.")] = False,
    seed: Seed = 0,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Hand a saved model to another runtime, checked against it at other sizes.

    Exit code 3 where the export computes something else; nothing is written then.

    \b
    Example:
      fxshare export out/ model.onnx --to onnx
    """
    del as_json, debug, verbose, quiet
    from fxshare.exporting import export
    from fxshare.loading.names import is_saved, load_model

    if not is_saved(folder):
        raise fxshare.errors.ConfigError(
            f"{folder}: expected a folder that 'fxshare compile -o' or fxshare.save wrote; an "
            "export is made from a compiled model"
        )
    source = None if original is None else load_model(original, allow_missing=allow_missing).model
    loaded = load_model(folder, original=source, allow_missing=allow_missing)
    note(f"exporting {folder} to {to.value}")
    done = export(
        loaded.model,
        path,
        to=to.value,
        dynamic=not static,
        opset=opset,
        original=source if to in (To.DENSE, To.VLLM) else None,
        untie=untie,
        tokenizer=folder if to in (To.VLLM, To.ORT_GENAI) else None,
        force=force,
        seed=seed,
    )
    return Result(done.to_dict(), str(done))
