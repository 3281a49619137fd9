"""Train the packaged model: ``python -m fxshare.embedded.train --out DIR``.

The data split, the tokenizer, the initial weights and the order of the batches follow from the
seed and the standard library's source. ``--minutes`` bounds the time: the learning rate then
follows whichever of steps and time is further along, so a run on a busy machine still ends with
its full decay (and is not reproducible to the bit). ``training.json`` states what a run was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fxshare.embedded.bpe import Tokenizer, train_bpe
from fxshare.embedded.corpus import WINDOW, held_out, load_documents, pack, token_stream, training
from fxshare.embedded.evaluate import bits_per_byte, predicted_bytes
from fxshare.embedded.model import GPT, GPTConfig, from_safetensors, to_safetensors
from fxshare.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hyperparameters of a run; the defaults are those of the packaged model."""

    steps: int = 6000
    minutes: float = math.inf
    batch_size: int = 8
    peak_lr: float = 2e-3
    final_lr_fraction: float = 0.1
    warmup_steps: int = 200
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0
    threads: int = 1
    compile: bool = True
    # Slower than float32 on CPUs without AMX, so it is off by default.
    autocast: bool = False
    eval_every: int = 500
    checkpoint_minutes: float = 10.0


def learning_rate(step: int, progress: float, options: Options) -> float:
    """Linear warmup over ``warmup_steps``, then a cosine in ``progress`` (0 to 1) to the floor."""
    if step < options.warmup_steps:
        return options.peak_lr * (step + 1) / options.warmup_steps
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    floor = options.final_lr_fraction
    return options.peak_lr * (floor + (1 - floor) * cosine)


def batches(ids: Tensor, *, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Endless batches, int64 (batch_size, WINDOW + 1), from batch number ``start`` on.

    ``ids`` is the token stream (L,). Every epoch cuts it into windows at a new random offset and
    visits each window once.
    """
    # One batch less than fits: the offset may cost a window.
    per_epoch = (len(ids) - 1) // WINDOW // batch_size - 1
    epoch, n = divmod(start, per_epoch)
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        offset = int(torch.randint(WINDOW, (1,), generator=generator))
        windows = ids[offset:].unfold(0, WINDOW + 1, WINDOW)
        order = torch.randperm(len(windows), generator=generator)
        for i in range(n, per_epoch):
            yield windows[order[i * batch_size : (i + 1) * batch_size]]
        epoch, n = epoch + 1, 0


def _write(path: Path, data: bytes) -> None:
    """Replace ``path`` as a whole: a reader, or a stop half-way, never sees a part of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _tokenizer(out: Path, *, vocab_size: int) -> Tokenizer:
    path = out / "bpe.json"
    if path.is_file():
        return Tokenizer.from_json(path.read_text(encoding="utf-8"))
    texts = (document.text for document in training(load_documents()))
    tokenizer = train_bpe(texts, vocab_size=vocab_size)
    tokenizer.save(path)
    return tokenizer


def _optimizer(model: GPT, options: Options) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only, as in GPT-2's training."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.peak_lr, betas=(0.9, 0.95), fused=True)


def _train(
    model: GPT, stream: Tensor, subset: tuple[Tensor, int], out: Path, options: Options
) -> tuple[int, float]:
    """Train in place; returns the number of steps and the seconds they took, resumed ones too."""
    optimizer = _optimizer(model, options)
    checkpoint = out / "checkpoint.pt"
    step, before = 0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["seconds"]
        print(f"resumed at step {step}", flush=True)

    started = saved = time.monotonic()
    seconds = before
    source = batches(stream, batch_size=options.batch_size, seed=options.seed, start=step)
    run = cast(Any, torch.compile(model) if options.compile else model)
    losses: list[float] = []
    model.train()
    while True:
        seconds = before + time.monotonic() - started
        progress = max(step / options.steps, seconds / (60 * options.minutes))
        if progress >= 1:
            return step, seconds
        lr = learning_rate(step, progress, options)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = next(source)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.autocast):
            _, loss = run(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1

        if step % 100 == 0:
            seconds = before + time.monotonic() - started
            print(
                f"step {step} loss {sum(losses) / len(losses):.4f} lr {lr:.2e}"
                f" progress {progress:.3f} seconds {seconds:.0f}",
                flush=True,
            )
            losses.clear()
        if step % options.eval_every == 0:
            model.eval()
            bits = bits_per_byte(model, *subset)
            model.train()
            print(f"step {step} held-out subset {bits:.4f} bits per byte", flush=True)
        if time.monotonic() - saved > 60 * options.checkpoint_minutes:
            saved = time.monotonic()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": before + saved - started,
            }
            torch.save(state, out / "checkpoint.pt.tmp")
            os.replace(out / "checkpoint.pt.tmp", checkpoint)


def _parse(argv: list[str]) -> tuple[Path, bool, Options]:
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m fxshare.embedded.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for what the run writes")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    for name, value in asdict(default).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(flag, type=type(value), default=value)
    arguments = vars(parser.parse_args(argv))
    return arguments.pop("out"), arguments.pop("resume"), Options(**arguments)


def main(argv: list[str] | None = None) -> None:
    """Train, measure, and write ``model.safetensors``, ``bpe.json`` and ``training.json``."""
    arguments = sys.argv[1:] if argv is None else argv
    out, resume, options = _parse(arguments)
    out.mkdir(parents=True, exist_ok=True)
    if not resume and (out / "checkpoint.pt").exists():
        raise DataError(
            f"demo training: expected no checkpoint in {out}, found one; add --resume to go on"
            " from it, or choose another folder"
        )
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    config = GPTConfig()
    tokenizer = _tokenizer(out, vocab_size=config.vocab_size)
    documents = load_documents()
    train_ids = torch.tensor(token_stream(training(documents), tokenizer), dtype=torch.int64)
    test = pack(token_stream(held_out(documents), tokenizer))
    n_bytes = predicted_bytes(test, tokenizer.token_bytes)
    subset = test[:: max(1, len(test) // 64)]
    print(f"{len(train_ids)} training tokens, {n_bytes} held-out bytes", flush=True)

    model = GPT(config)
    steps, seconds = _train(
        model,
        train_ids,
        (subset, predicted_bytes(subset, tokenizer.token_bytes)),
        out,
        options,
    )

    data = to_safetensors(model, metadata={"corpus": "Python standard library source"})
    bits = bits_per_byte(from_safetensors(data), test, n_bytes)
    tokens = steps * options.batch_size * WINDOW
    report = {
        "command": "python -m fxshare.embedded.train "
        + shlex.join(arguments).replace(str(out), "DIR"),
        "config": asdict(config),
        "options": {k: v for k, v in asdict(options).items() if v != math.inf},
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens_seen": tokens,
        "epochs": round(tokens / len(train_ids), 2),
        "seconds": round(seconds),
        "training_modules": len(training(documents)),
        "training_bytes": sum(len(d.text.encode("utf-8")) for d in training(documents)),
        "training_tokens": len(train_ids),
        "held_out_modules": [document.name for document in held_out(documents)],
        "held_out_predicted_bytes": n_bytes,
        "held_out_bits_per_byte": round(bits, 4),
        "held_out_protocol": "weights rounded to bfloat16, float32 arithmetic; non-overlapping"
        " windows of 256 tokens, the first token of each not predicted",
        "cpu": _cpu_name(),
        "threads": options.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    _write(out / "model.safetensors", data)
    _write(out / "training.json", (json.dumps(report, indent=2) + "\n").encode("utf-8"))
    print(f"done: {steps} steps, {bits:.4f} bits per byte on {n_bytes} held-out bytes", flush=True)


if __name__ == "__main__":
    main()


__all__ = ["Options", "batches", "learning_rate", "main"]
