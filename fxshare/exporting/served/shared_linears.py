"""Linears that share bases, put into a model of transformers in place of its own.

The text of this file is written into every folder of the target ``vllm``; it knows torch only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class PivotedBasis(nn.Module):
    """A basis stored as kept inputs and a table: ``x[kept] + table(x[others])``."""

    def __init__(self, in_features: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.table = nn.Linear(in_features - rank, rank, bias=False)
        # the kept inputs, then the others
        self.register_buffer("order", torch.zeros(in_features, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """The basis product ``(..., rank)`` of ``x`` ``(..., in_features)``."""
        gathered = torch.index_select(x, -1, self.get_buffer("order"))
        kept, others = gathered[..., : self.rank], gathered[..., self.rank :]
        product: Tensor = kept + self.table(others)
        return product


def basis_of(spec: Mapping[str, Any]) -> nn.Module:
    """A basis as the configuration says it, without values."""
    if spec["pivoted"]:
        return PivotedBasis(spec["in_features"], spec["rank"])
    return nn.Linear(spec["in_features"], spec["rank"], bias=False)


class SharedLinear(nn.Module):
    """A linear in parts, one below the other: each a coefficient that reads the product of a basis,
    or rows of a weight that read the input."""

    def __init__(
        self, spec: Mapping[str, Any], specs_of_bases: Mapping[str, Any], root: nn.Module | None
    ) -> None:
        super().__init__()
        self.names: list[str | None] = [part["basis"] for part in spec["parts"]]
        self.in_features: int = spec["in_features"]
        self.out_features: int = sum(part["rows"] for part in spec["parts"])
        if root is None:
            root = self.bases = nn.Module()
            for name in dict.fromkeys(self.names):
                if name is not None:
                    root.add_module(name, basis_of(specs_of_bases[name]))
        # Not as a submodule: a basis that is registered in several linears has several names, and
        # weights under one of them. An engine that makes every linear anew, as vLLM does, fills one
        # of these and leaves the others zero. For the same reason it is looked up at the call.
        self.__dict__["root_of_bases"] = root
        self.parts = nn.ModuleList()
        for part in spec["parts"]:
            name = part["basis"]
            width = self.in_features if name is None else specs_of_bases[name]["rank"]
            self.parts.append(nn.Linear(width, part["rows"], bias=spec["bias"]))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., out_features)`` of ``x`` ``(..., in_features)``."""
        if x.shape[-1] != self.in_features:
            # GPT-2 lets the heads and all before them be one dimension, and vLLM's attention has
            # no batch before its tokens
            x = x.reshape(-1, self.in_features)
        root = self.__dict__["root_of_bases"]
        read: dict[str | None, Tensor] = {None: x}
        rows = []
        for name, part in zip(self.names, self.parts):  # noqa: B905 - of one length
            if name not in read:
                read[name] = getattr(root, str(name))(x)
            rows.append(part(read[name]))
        return rows[0] if len(rows) == 1 else torch.cat(rows, -1)


def share_linears(model: nn.Module, config: Any) -> None:
    """Put the linears and bases of ``config.shared_linears`` into ``model``, without values."""
    table = config.shared_linears
    root = None
    if not table["untied"]:
        root = model.bases = nn.Module()
        for name, spec in table["bases"].items():
            root.add_module(name, basis_of(spec))
    for path, spec in table["linears"].items():
        owner, _, leaf = path.rpartition(".")
        linear = SharedLinear(spec, table["bases"], root)
        setattr(model.get_submodule(owner), leaf, linear)
