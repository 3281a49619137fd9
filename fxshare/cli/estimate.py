"""``fxshare estimate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fxshare.cli.option_groups import Wanted, refuse_compiled, spread
from fxshare.cli.options import AsJson, Debug, Length, Quiet, RowsOfABatch, Verbose
from fxshare.cli.output import Result, say, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fxshare.config import ShareConfig
    from fxshare.estimating.stages import Estimate

_ORIGINS = {
    "measured": "rates measured on this machine",
    "published": "an estimate from published peak rates, not measured",
    "assumed": "an estimate from assumed rates, not measured",
}


@spread
def estimate_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="As for compile; of a transformers folder config.json is enough. Or a shape: "
            "gpt2, gpt2-medium, tinyllama, llama-7b, llama-70b, llama-405b, or d,L,h,f,vocab for a "
            "Llama.",
        ),
    ],
    *,
    wanted: Wanted,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", help="Of the calibration data.")
    ] = 8192,
    length: Length = None,
    batch_size: RowsOfABatch = None,
    work: Annotated[bool, typer.Option("--work", help="With a work folder.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Of a shape: float32, bfloat16, float16 or float64. Default: bfloat16.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="cpu or cuda, whose rates are measured here; or from published peak rates a100, "
            "h100, h200, l4, t4, v100 or rtx4090.",
        ),
    ] = "cpu",
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Memory, disk and time of every stage of a compilation, before anything runs.

    Nothing of the model is computed and no weights are needed. Without -c the configuration is what
    'fxshare init' finds in the model.

    \b
    Examples:
      fxshare estimate path/to/gpt2 --keep 0.8 --tokens 65536
      fxshare estimate llama-7b --keep 0.8 --tokens 32768 --max-memory 40GB --work
      fxshare estimate llama-70b --keep 0.8 --tokens 32768 --device h100
    """
    del as_json, debug, verbose, quiet
    from fxshare.estimating.estimate import estimate
    from fxshare.loading.described import describe

    cfg = wanted.from_files()
    if cfg is None:
        refuse_compiled(model)
    made = describe(model, dtype=None if dtype is None else _dtype(dtype))
    found = estimate(
        made,
        _proposed(made, wanted) if cfg is None else cfg,
        tokens=tokens,
        length=length,
        batch_size=batch_size,
        work=work,
        device=device,
    )
    return Result(found.to_dict(), _text(model, found))


def _dtype(name: str) -> torch.dtype:
    from fxshare.estimating.pace import dtype_named

    return dtype_named(name)


def _proposed(model: nn.Module, wanted: Wanted) -> ShareConfig:
    from fxshare.proposing.propose import propose

    cfg = wanted.proposed(propose(model))
    smaller = "" if cfg.mode != "exact" else "; exact mode, --keep 0.8 makes it smaller"
    say(
        f"no -c: the configuration that 'fxshare init' finds in the model, "
        f"{len(cfg.weight_types)} weight types ({', '.join(cfg.weight_types)}){smaller}"
    )
    return cfg


def _text(name: str, found: Estimate) -> str:
    from fxshare.base.memory import shown

    total = found.seconds
    rows = [
        [one.name, _seconds(one.seconds), f"{one.seconds / max(total, 1e-9):.0%}"]
        for one in found.stages
    ]
    rows.append(["total", _seconds(total), ""])
    priced = f", {found.candidates:,} candidates priced" if found.candidates else ""
    disk = found.disk
    lines = [
        f"{name}: {found.parameters:,} parameters, {found.sites} weights matched, {found.mode} "
        f"mode, {found.tokens:,} tokens{priced}",
        table(["stage", "about", "share"], rows),
        f"memory: about {shown(found.memory)} of {shown(found.limit)}; "
        f"{_times(found.passes)} over the data for each round of statistics",
        f"disk: {shown(disk.output)} for the result, {shown(disk.work)} in the work folder, "
        f"{shown(disk.scratch)} of temporary files",
    ]
    if not found.fits:
        lines.append(
            f"does not fit: it takes at least {shown(found.least)} of memory, with many passes "
            "over the data; the other figures are those of a machine on which one pass does. Give "
            f"--max-memory {found.least / 1e9 + 0.1:.1f}GB or more there, smaller batches, or "
            "fewer weights"
        )
    lines.append(f"{found.device}: {_ORIGINS[found.origin]}; right to a factor of about 2")
    return "\n".join(lines)


def _times(passes: int) -> str:
    return "one pass" if passes == 1 else f"{passes} passes"


def _seconds(seconds: float) -> str:
    """Two digits, as seconds, minutes, hours or days."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
