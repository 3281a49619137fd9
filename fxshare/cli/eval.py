"""``fxshare eval``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxshare
from fxshare.cli.options import (
    AllowMissing,
    AsJson,
    BatchSize,
    Debug,
    Length,
    Model,
    NoBos,
    Original,
    Protocol,
    Quiet,
    Seed,
    Tokens,
    Verbose,
    window_length,
)
from fxshare.cli.output import Result, table

if TYPE_CHECKING:
    from torch import nn

    from fxshare.bench.perplexity import Evaluation
    from fxshare.loading.names import LoadedModel


def evaluate_model(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help="FILE.txt, FILE.jsonl[:KEY], FILE.npy, FILE.safetensors[:NAME], stdlib or "
            "stdlib:held-out.",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="A second model, evaluated in the same run."),
    ] = None,
    protocol: Annotated[
        Protocol,
        typer.Option(
            help="A (GPTQ): windows without overlap, remainder dropped, mean over all tokens. "
            "B (Basis Sharing): short last window kept, mean of window means."
        ),
    ] = Protocol.A,
    length: Length = None,
    tokens: Tokens = None,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    no_bos: NoBos = False,
    original: Original = None,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Measure perplexity, and bits per byte where the text is known; the protocol is always named.

    \b
    Examples:
      fxshare eval path/to/gpt2 --data wiki.test.txt --length 1024
      fxshare eval out/ --against path/to/gpt2 --data wiki.test.txt --protocol B
    """
    del as_json, debug, verbose, quiet
    from fxshare.bench.perplexity import evaluate
    from fxshare.data.stream import read_stream
    from fxshare.models.traits import vocabulary_of

    if protocol is Protocol.B and tokens is not None:
        raise fxshare.errors.ConfigError(
            f"--tokens {tokens}: protocol B keeps the short last window of all the data, so a "
            "choice of windows is not it; leave --tokens out or take --protocol A"
        )
    models = _load(model, against, original, allow_missing)
    tokenizer = next((m.tokenizer for m in models if m.tokenizer is not None), None)
    vocabularies = [v for m in models if (v := vocabulary_of(m.model)) is not None]
    size = min(window_length(m, length) for m in models)
    stream = read_stream(
        data,
        tokenizer=tokenizer,
        vocabulary=min(vocabularies, default=None),
        bos=not no_bos,
        length=size,
    )
    ids = stream.ids
    if tokens is not None:
        ids = stream.windows(size, count=max(1, -(-tokens // size)), seed=seed)
    found = [
        evaluate(
            m.model,
            ids,
            protocol=protocol.value,
            length=size,
            bytes_per_token=stream.bytes_per_token,
            batch_size=batch_size,
            before=stream.before,
        )
        for m in models
    ]
    document = {
        "protocol": protocol.value,
        "description": found[0].description,
        "starts_with": list(stream.before),
        "data": data,
        "length": size,
        "results": [{"model": m.name, **_numbers(e)} for m, e in zip(models, found, strict=True)],
    }
    return Result(document, _text(models, found, data))


def _load(
    model: str, against: str | None, original: str | None, allow_missing: bool
) -> list[LoadedModel]:
    from fxshare.loading.names import is_saved
    from fxshare.loading.names import load_model as by_name

    load_model = functools.partial(by_name, allow_missing=allow_missing)
    structure = None if original is None else load_model(original).model
    if against is None:
        return [load_model(model, original=structure)]
    if is_saved(model):
        # a saved folder that cannot tell its class is probably compared with what it was made from
        other = load_model(against, original=structure)
        return [load_model(model, original=structure or _unless_saved(other)), other]
    first = load_model(model)
    return [first, load_model(against, original=structure or _unless_saved(first))]


def _unless_saved(loaded: LoadedModel) -> nn.Module | None:
    return None if loaded.kind == "saved" else loaded.model


def _numbers(found: Evaluation) -> dict[str, Any]:
    shared = ("protocol", "description", "length")
    return {key: value for key, value in found.to_dict().items() if key not in shared}


def _text(models: list[LoadedModel], found: list[Evaluation], data: str) -> str:
    first = found[0]
    header = ["model", "perplexity", "nats/token", "bits/byte", "tokens", "windows", "s"]
    rows = [
        [
            m.name,
            f"{e.perplexity:.4f}",
            f"{e.nll:.4f}",
            "–" if e.bits_per_byte is None else f"{e.bits_per_byte:.4f}",
            f"{e.tokens:,}",
            f"{e.windows:,}",
            f"{e.seconds:.1f}",
        ]
        for m, e in zip(models, found, strict=True)
    ]
    lines = [
        f"protocol {first.protocol} ({first.description})",
        f"data {data}, windows of {first.length} tokens",
        table(header, rows),
    ]
    if len(found) == 2:
        ratio = found[0].perplexity / found[1].perplexity
        lines.append(
            f"perplexity of {models[0].name} is {ratio:.4f} times that of {models[1].name} "
            f"({found[0].nll - found[1].nll:+.4f} nats per token)"
        )
    return "\n".join(lines)
