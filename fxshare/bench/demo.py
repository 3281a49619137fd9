"""``fxshare demo``: the whole of fxshare on a really trained model, with nothing downloaded."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.base.files import write_text
from fxshare.base.machine import environment, interleaved, median_seconds
from fxshare.base.progress import stage
from fxshare.capture import quiet
from fxshare.compiling.compile import compile as compile_model
from fxshare.embedded import load_embedded, load_tokenizer
from fxshare.embedded.corpus import calibration, held_out, load_documents, pack, token_stream
from fxshare.embedded.evaluate import bits_per_byte, generate, predicted_bytes
from fxshare.refining.refine import refine as refine_model
from fxshare.result.module import record_of

_LOG = logging.getLogger(__name__)

CONFIG: dict[str, Any] = {
    "weight_types": {
        "attn_c_attn": {"pattern": r".*\.attn\.c_attn$", "split": "qkv"},
        "attn_c_proj": {"pattern": r".*\.attn\.c_proj$"},
        "mlp_c_fc": {"pattern": r".*\.mlp\.c_fc$"},
        "mlp_c_proj": {"pattern": r".*\.mlp\.c_proj$"},
    },
    "block_pattern": r"h\.(\d+)",
}
PROMPT = '    def read(self, size=-1):\n        """'
TEMPERATURE = 0.4
GROUP_SIZE = 2
# the shares of stored numbers kept that the demo shows
SIZES = (0.8, 0.65, 0.5)
# one plan a size, not a search for each: the demo is to take two minutes
PLANNER: dict[str, Any] = {"search": "off"}
REFINE_SECONDS = 60.0


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    bits_per_byte: float
    params_kept: float
    parameters: int
    bytes: int
    tokens_per_second: float
    sample: str


@dataclass(frozen=True)
class Demo:
    """What the demo measured, on which machine, in how many seconds."""

    environment: dict[str, object]
    calibration_tokens: int
    held_out_modules: int
    held_out_bytes: int
    rows: tuple[Row, ...]
    reports: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)


@stage("demo", _LOG)
def demo(
    *,
    quick: bool = False,
    refine: bool = False,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    seed: int = 0,
) -> Demo:
    """Compress the embedded model at three sizes, by Basis Sharing and by the planner at the same
    stored numbers, and measure each beside the dense model.

    ``quick`` takes a tenth of the data. ``refine`` adds a row: the smallest planned model, refined
    for a minute on the calibration text (six seconds if ``quick``). With ``out`` the reports are
    written there. ``say`` is handed a line as each stage begins.

    Protocol: bits per byte over non-overlapping windows of 256 tokens of standard library modules
    that were never trained on; see :func:`fxshare.embedded.evaluate.bits_per_byte`.
    """
    start = time.perf_counter()
    say("loading the embedded model and the source of this Python's standard library")
    model, tokenizer = load_embedded(), load_tokenizer()
    documents = load_documents()
    test = held_out(documents)
    windows = pack(token_stream(test, tokenizer))
    windows = windows[:: 40 if quick else 8]
    n_bytes = predicted_bytes(windows, tokenizer.token_bytes)
    text = calibration(documents, n_bytes=20_000 if quick else 60_000)
    batches = list(torch.split(pack(token_stream(text, tokenizer)), 8))
    prompt = tokenizer.encode(PROMPT)

    models: dict[str, nn.Module] = {"dense": model}
    say("rewriting every linear exactly: q, k and v apart, equal outputs")
    models["exact"] = compile_model(model, CONFIG, example=batches[0])
    for size in SIZES:
        say(f"{size:.0%} of the numbers kept: Basis Sharing, groups of {GROUP_SIZE} layers")
        cfg = {**CONFIG, "group_size": GROUP_SIZE, "compression_rate": size}
        models[f"basis sharing {size:.2f}"] = compile_model(model, cfg, calibration=batches)
        say(f"{size:.0%} of the numbers kept: planned in the model's own loss")
        cfg = {**CONFIG, "budget": {"params_kept": size}, "planner": PLANNER}
        models[f"planned {size:.2f}"] = compile_model(model, cfg, calibration=batches, seed=seed)
    if refine:
        name, seconds = f"planned {min(SIZES):.2f}", REFINE_SECONDS / (10 if quick else 1)
        say(f"refining {name} for {seconds:.0f} s on the calibration text")
        models[f"{name} refined"] = _refined(models[name], model, batches, seconds, seed)
    say(f"measuring on {len(test)} modules held out from training, {n_bytes:,} bytes")
    speeds = _tokens_per_second(models, windows[:8], repeats=3)
    rows = []
    for name, one in models.items():
        with quiet():
            bpb = bits_per_byte(_logits(one), windows, n_bytes)
            sample = generate(
                _logits(one), prompt, n=24 if quick else 40, temperature=TEMPERATURE, seed=seed
            )
        rows.append(_row(name, one, bpb, speeds[name], tokenizer.decode(sample)))
    result = Demo(
        environment=environment(),
        calibration_tokens=sum(b.numel() for b in batches),
        held_out_modules=len(test),
        held_out_bytes=n_bytes,
        rows=tuple(rows),
        reports={
            name: record_of(one).report.to_dict()
            for name, one in models.items()
            if one is not model
        },
        seconds=time.perf_counter() - start,
    )
    if out is not None:
        write_text(out / "demo.json", json.dumps(result.to_dict(), indent=1) + "\n")
        write_text(out / "demo.md", markdown(result))
    return result


def _refined(
    gm: nn.Module, model: nn.Module, batches: Sequence[Tensor], seconds: float, seed: int
) -> nn.Module:
    halves = [half for batch in batches for half in torch.split(batch, 4)]
    return refine_model(gm, model, halves, minutes=seconds / 60, seed=seed)


def _logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids)
        return logits

    return call


def _tokens_per_second(
    models: dict[str, nn.Module], ids: Tensor, *, repeats: int
) -> dict[str, float]:
    def one(model: nn.Module) -> Callable[[], object]:
        def call() -> object:
            with quiet():
                return model(ids)

        return call

    times = interleaved({name: one(m) for name, m in models.items()}, repeats=repeats)
    return {name: ids.numel() / median_seconds(seconds) for name, seconds in times.items()}


def _row(name: str, model: nn.Module, bpb: float, speed: float, sample: str) -> Row:
    parameters = list(model.parameters())
    kept = 1.0 if name == "dense" else record_of(model).report.params_kept
    return Row(
        name=name,
        bits_per_byte=bpb,
        params_kept=kept,
        parameters=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        tokens_per_second=speed,
        sample=sample,
    )


def table(result: Demo) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the demo's table."""
    header = ["model", "bits/byte", "params kept", "parameters", "bytes", "tokens/s", "× dense"]
    dense = result.rows[0].tokens_per_second
    return header, [
        [
            r.name,
            f"{r.bits_per_byte:.4f}",
            f"{r.params_kept:.3f}",
            f"{r.parameters:,}",
            f"{r.bytes:,}",
            f"{r.tokens_per_second:,.0f}",
            f"{r.tokens_per_second / dense:.2f}",
        ]
        for r in result.rows
    ]


def lines_below(result: Demo) -> Sequence[str]:
    """Protocol and machine, for below the table."""
    e = result.environment
    return (
        f"bits per byte over {result.held_out_bytes:,} bytes of {result.held_out_modules} standard "
        "library modules held out from training; windows of 256 tokens",
        f"calibrated on {result.calibration_tokens:,} tokens of training modules; params kept are "
        "those of the matched linears; tokens/s are eager prefill, medians of interleaved runs",
        f"{e['cpu']}, {e['threads']} threads, torch {e['torch']}, Python {e['python']}; "
        f"{result.seconds:.0f} s in all",
    )


def markdown(result: Demo) -> str:
    """The demo's result as a Markdown document."""
    header, rows = table(result)
    lines = ["# fxshare demo", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *(f"- {line}" for line in lines_below(result)), ""]
    for row in result.rows:
        lines += [f"## {row.name} writes", "", "```python", row.sample, "```", ""]
    return "\n".join(lines)
