"""``python -m tests.peak FOLDER OUT READING``: the memory that compiling a folder takes.

Prints JSON: bytes of anonymous memory before, and at the peak. The pages of mapped files are not
counted: they are a cache, which the kernel drops when memory is short. READING ``mapped`` compiles
the folder as the command line does; ``copied`` copies every weight first, which the test must see.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import threading
import time
from pathlib import Path

import torch

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


def main(folder: str, out: str, reading: str) -> None:
    import fxshare
    from fxshare.models import load_model
    from fxshare.store import save

    torch.set_num_threads(1)
    # what libraries set up once is not the folder's
    warm = torch.nn.Sequential(torch.nn.Linear(4, 4))
    fxshare.compile(
        warm, {"weight_types": {"a": {"pattern": "0"}}}, example=torch.zeros(2, 4), capture="fx"
    )
    importlib.import_module("transformers.models.llama.modeling_llama")
    before = anonymous()
    with Peak() as peak:
        model = load_model(folder).model
        if reading == "copied":
            model.load_state_dict(
                {k: v.clone() for k, v in model.state_dict().items()}, assign=True
            )
        example = torch.arange(12).view(2, 6)
        gm = fxshare.compile(model, CONFIG, example=example, check=reading == "mapped")
        if reading == "mapped":
            save(gm, out)
    stored = sum(p.nbytes for p in gm.parameters())
    print(json.dumps({"before": before, "peak": peak.bytes, "stored": stored}))


if __name__ == "__main__":
    main(*sys.argv[1:])
