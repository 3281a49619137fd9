"""Models that the command line can name: a module of factories and a transformers folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fxshare.cli import main

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared" / "data" / "stories260K"

TOY = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 24)
        self.proj = nn.Linear(24, 12)
        self.gate = nn.Bilinear(12, 12, 12)

    def forward(self, x):
        return x + self.proj(torch.relu(self.fc(x)))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(12, 40)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make():
    print("the factory talks")
    torch.manual_seed(0)
    return Toy()


def other():
    torch.manual_seed(1)
    return Toy()


def wide():
    return nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 40))


def nan():
    model = make()
    model.head.bias.data[0] = float("nan")
    return model


def broken():
    raise RuntimeError("no weights here")


def text():
    return "not a module"


ready = make()
"""

SHARING = """
weight_types:
    fc: {pattern: '.*\\.fc$'}
    proj: {pattern: '.*\\.proj$'}
block_pattern: 'blocks\\.(\\d+)'
group_size: 2
compression_rate: 0.8
"""


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``cli_toy.py``, two configurations and token files."""
    path = tmp_path_factory.mktemp("cli")
    (path / "cli_toy.py").write_text(TOY, encoding="utf-8")
    (path / "sharing.yaml").write_text(SHARING, encoding="utf-8")
    ids = np.random.default_rng(0).integers(0, 40, size=400)
    np.save(path / "ids.npy", ids)
    np.save(path / "large.npy", np.append(ids, 40))
    return path


@pytest.fixture
def fxshare(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Run a command line in this process, in ``folder``."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("FXSHARE_DEBUG", raising=False)

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def saved(folder: Path) -> Path:
    """The toy, compiled in the sharing mode and saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = ["compile", "cli_toy:make", "-c", "sharing.yaml", "--calibration", "ids.npy"]
        assert main([*command, "--length", "20", "-o", "saved"]) == 0
    return folder / "saved"


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random small GPT-2 as a transformers folder, without a tokenizer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=48, n_positions=32, bos_token_id=0
    )
    path = tmp_path_factory.mktemp("gpt2")
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path
