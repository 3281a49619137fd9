"""Models, data and shorthands for the tests that go through ``fxshare.compile``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fxshare
from fxshare import Plan
from tests.strategies import no_warnings_of_ours
from tests.toys import LLAMA_LIKE, VOCABULARY

LAYERS = r"layers\.(\d+)"


def types(*names: str) -> dict[str, Any]:
    """A configuration of Llama's projections by name."""
    kinds = {name: {"pattern": rf"layers\.\d+\.{name}_proj$"} for name in names}
    return {"weight_types": kinds, "block_pattern": LAYERS}


FEW = types("q", "o")
MANY = types("q", "k", "v", "down")


def batches(count: int = 4, rows: int = 4, length: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (rows, length), generator=generator) for _ in range(count)]


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    return LLAMA_LIKE.model(seed, dtype)


def compiled(
    model: nn.Module, cfg: Any, budget: Any = None, planner: Any = None, **keys: Any
) -> Any:
    """Compiled under a budget, in silence."""
    if budget is not None:
        cfg = {**cfg, "budget": budget, "planner": planner or {}}
    with no_warnings_of_ours():
        return fxshare.compile(model, cfg, **{"calibration": batches(), **keys})


def groups_of(plan: Plan) -> set[tuple[frozenset[str], int, str]]:
    return {(frozenset(g.slices), g.rank, g.storage) for g in plan.groups}


def stored_bytes(module: nn.Module) -> int:
    """Bytes of what a state dict holds, each tensor once."""
    found: Mapping[int, Tensor] = {id(t): t for t in module.state_dict(keep_vars=True).values()}
    return sum(t.numel() * t.element_size() for t in found.values())


class Plain(nn.Module):
    """No language model: two linears and a ReLU that writes in place."""

    def __init__(self, width: int = 8, hidden: int = 12, scale: float = 1.0) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Linear(hidden, width)
        with torch.no_grad():
            self.down.weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.relu(self.up(x)))


PLAIN = {"weight_types": {"up": {"pattern": "^up$"}, "down": {"pattern": "^down$"}}}


def plain_model(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Plain(**sizes).to(dtype).eval()


def features(count: int = 4, rows: int = 32, width: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator) for _ in range(count)]
