"""A tiny model and a tiny standard library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxshare.embedded.model import GPT, GPTConfig


@pytest.fixture
def tiny() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=300)
    return GPT(config).eval()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder laid out like a standard library: twelve files belong to the corpus."""
    kept = [f"module_{i}.py" for i in range(8)]
    kept += ["threading.py", "argparse.py", "encodings/idna.py", "json/scanner.py"]
    left_out = [
        "test/test_io.py",
        "site-packages/numpy/core.py",
        "unittest/test/case.py",
        "lib2to3/tests/data.py",
        "idlelib/idle_test/mock.py",
        "encodings/cp1252.py",
        "pydoc_data/topics.py",
        "html/entities.py",
        "_sysconfigdata__linux_.py",
        "config-3.11-linux/python-config.py",
        "README.txt",
    ]
    for name in kept + left_out:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def name():\n    return {name!r}\n", encoding="utf-8")
    (tmp_path / "empty.py").write_text("\n", encoding="utf-8")
    (tmp_path / "broken.py").write_bytes(b"# coding: utf-8\nx = '\xff'\n")
    return tmp_path
