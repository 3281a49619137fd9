"""``python -m tests.peak FOLDER OUT READING ...``: the memory that compiling a folder takes.

Prints JSON: per READING the bytes of anonymous memory at the peak, beyond those before, and of the
result. The pages of mapped files are not counted: they are a cache, which the kernel drops when
memory is short. READING ``mapped`` compiles the folder as the command line does. The others waste
memory, which the test must see: ``copied`` copies every weight first, and ``widened`` verifies on
float32 copies of half-precision weights.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import torch

import fxshare
from fxshare.capture.widening import widen
from fxshare.loading.names import load_model
from fxshare.store.save import save

CONFIG = {
    "weight_types": {
        "attention": {"pattern": r".*\.[qkv]_proj$"},
        "o": {"pattern": r".*\.o_proj$"},
        "up": {"pattern": r".*\.(gate|up)_proj$"},
        "down": {"pattern": r".*\.down_proj$"},
    },
    "block_pattern": r"layers\.(\d+)",
    "group_size": 2,
    "private": ["down"],
    "compression_rate": 0.5,
}


def anonymous() -> int:
    """Anonymous resident memory of this process in bytes (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


class Peak:
    """Looks at :func:`anonymous` every millisecond."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._stop.is_set():
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.001)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _copy_in_float32(module: torch.nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().float())


def _everything_once(folder: Path, dtype: torch.dtype) -> None:
    """What libraries load and set up at the first use is not the folder's: a small model first."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=16,
        dtype=dtype,
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder / "model")
    model = load_model(str(folder / "model")).model
    save(fxshare.compile(model, CONFIG, example=torch.arange(12).view(2, 6)), folder / "out")


def _peak(folder: str, out: str, reading: str) -> dict[str, int]:
    gc.collect()
    before = anonymous()
    with Peak() as peak:
        model = load_model(folder).model
        if reading == "copied":
            model.load_state_dict(
                {k: v.clone() for k, v in model.state_dict().items()}, assign=True
            )
        with mock.patch.object(
            fxshare.capture.widening,
            "widen",
            _copy_in_float32 if reading == "widened" else widen,
        ):
            example = torch.arange(12).view(2, 6)
            gm = fxshare.compile(model, CONFIG, example=example, check=reading != "copied")
        if reading == "mapped":
            save(gm, out)
    return {"peak": peak.bytes - before, "stored": sum(p.nbytes for p in gm.parameters())}


def main(folder: str, out: str, *readings: str) -> None:
    torch.set_num_threads(1)
    dtype = json.loads(Path(folder, "config.json").read_text())["dtype"]
    with tempfile.TemporaryDirectory() as small:
        _everything_once(Path(small), getattr(torch, dtype))
    print(json.dumps({reading: _peak(folder, out, reading) for reading in readings}))


if __name__ == "__main__":
    main(*sys.argv[1:])
