"""Every command that asks which sites there are gets the answer that compiling gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

Run = Callable[..., Ran]

TOY = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.dt = nn.Linear(12, 12)
        self.dead = nn.Linear(12, 12)
        self.never = nn.Linear(12, 12)

    def forward(self, x):
        self.dead(x)
        return x + self.fc(x) * self.dt.weight.sum(0)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


class Wave(Odd):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Untraced(Odd):
    def forward(self, ids):
        raise RuntimeError("needs more than ids")


def odd():
    torch.manual_seed(0)
    return Odd()


def wave():
    return Wave()


def untraced():
    return Untraced()
"""
CONFIG = """
weight_types:
    all: {pattern: '.*blocks.*'}
block_pattern: 'blocks\\.(\\d+)'
"""
REASONS = {
    "dt": "reads its weight itself",
    "dead": "nothing depends on its result",
    "never": "is not called by",
}


@pytest.fixture(autouse=True)
def odd_toy(folder: Path) -> None:
    (folder / "odd_toy.py").write_text(TOY, encoding="utf-8")
    (folder / "odd.yaml").write_text(CONFIG, encoding="utf-8")


@pytest.mark.parametrize("capture", ["auto", "modules"])
def test_what_no_call_shows_is_listed_with_the_reason(fxshare: Run, capture: str) -> None:
    command = ("odd_toy:odd", "-c", "odd.yaml", "--set", f"capture={capture}")
    found = fxshare("validate", *command, "--json").json
    reasons = {s["name"]: s["reason"] for s in found["skipped"]}
    assert set(reasons) == {f"blocks.{n}.{name}" for n in range(2) for name in REASONS}
    for name, reason in reasons.items():
        assert REASONS[name.rpartition(".")[2]] in reason, name
    assert found["types"][0]["sites"] == 2
    assert found["by_names"] is None
    seen = fxshare("inspect", *command, "--json").json
    assert {s["name"]: s["reason"] for s in seen["skipped"]} == {
        s["name"]: s["reason"] for s in found["skipped"]
    }
    assert [x["module"] for x in seen["linears"] if x["type"]] == ["blocks.0.fc", "blocks.1.fc"]
    text = fxshare("inspect", *command).out
    why = fxshare("inspect", *command, "--why", "blocks.1.dead").out
    for line in (fxshare("validate", *command).out, text):
        assert f"not rewritten: blocks.1.dead (all): {reasons['blocks.1.dead']}" in line
    assert f"not rewritten: {reasons['blocks.1.dead']}" in why
    # and so it is where it is done
    plan = fxshare("plan", *command, "--json").json
    assert {s["name"]: s["reason"] for s in plan["skipped"]} == {
        s["name"]: s["reason"] for s in found["skipped"]
    }


@pytest.mark.parametrize(
    ("model", "reason"), [("wave", "are not token ids"), ("untraced", "needs more than ids")]
)
def test_names_alone_are_said_to_be_names_alone(fxshare: Run, model: str, reason: str) -> None:
    command = (f"odd_toy:{model}", "-c", "odd.yaml")
    found = fxshare("validate", *command, "--json").json
    assert reason in found["by_names"]
    assert found["types"][0]["sites"] == 8
    for name in ("validate", "inspect"):
        assert "told by names alone" in fxshare(name, *command).out


def test_a_type_of_which_nothing_is_called(fxshare: Run, folder: Path) -> None:
    (folder / "never.yaml").write_text(
        "weight_types: {never: {pattern: '.*never$'}}\nblock_pattern: 'blocks\\.(\\d+)'\n"
    )
    ran = fxshare("validate", "odd_toy:odd", "-c", "never.yaml")
    assert ran.code == 1
    assert "nothing to rewrite" in ran.err
    assert "blocks.0.never" in ran.err
