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


class Readers:
    """Linears that read one input: what one of them computes of it the others are given."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.held: tuple[Tensor, dict[str | None, Tensor]] | None = None

    def products(self, x: Tensor, place: int) -> dict[str | None, Tensor]:
        """The products of bases that are known of ``x``, to be added to by the linear that is at
        ``place`` among them; the first begins, and after the last nothing is held."""
        held = self.held
        if place == 0 or held is None or held[0] is not x:
            held = (x, {})
        self.held = held if place + 1 < self.number else None
        return held[1]


class SharedLinear(nn.Module):
    """A linear in parts, one below the other: each a coefficient that reads the product of a basis,
    or columns of it, or rows of a weight that read the input."""

    def __init__(
        self, spec: Mapping[str, Any], specs_of_bases: Mapping[str, Any], root: nn.Module | None
    ) -> None:
        super().__init__()
        self.names: list[str | None] = [part["basis"] for part in spec["parts"]]
        self.columns: list[list[int] | None] = [part.get("columns") for part in spec["parts"]]
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
        self.readers, self.place = Readers(1), 0
        self.parts = nn.ModuleList()
        for part, name, columns in zip(spec["parts"], self.names, self.columns):  # noqa: B905
            width = self.in_features if name is None else specs_of_bases[name]["rank"]
            if columns is not None:
                width = columns[1] - columns[0]
            self.parts.append(nn.Linear(width, part["rows"], bias=spec["bias"]))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., out_features)`` of ``x`` ``(..., in_features)``."""
        known = self.readers.products(x, self.place)
        if x.shape[-1] != self.in_features:
            # GPT-2 lets the heads and all before them be one dimension, and vLLM's attention has
            # no batch before its tokens
            x = x.reshape(-1, self.in_features)
        root = self.__dict__["root_of_bases"]
        known[None] = x
        rows = []
        for name, columns, part in zip(self.names, self.columns, self.parts):  # noqa: B905
            if name not in known:
                known[name] = getattr(root, str(name))(x)
            z = known[name] if columns is None else known[name][..., slice(*columns)]
            rows.append(part(z))
        return rows[0] if len(rows) == 1 else torch.cat(rows, -1)


def share_linears(model: nn.Module, config: Any) -> None:
    """Put the linears and bases of ``config.shared_linears`` into ``model``, without values."""
    table = config.shared_linears
    root = None
    if not table["untied"]:
        root = model.bases = nn.Module()
        for name, spec in table["bases"].items():
            root.add_module(name, basis_of(spec))
    made = {
        path: SharedLinear(spec, table["bases"], root) for path, spec in table["linears"].items()
    }
    for paths in table.get("same_input", ()):
        readers = Readers(len(paths))
        for place, path in enumerate(paths):
            made[path].readers, made[path].place = readers, place
    leaves: dict[str, list[str]] = {}
    for path, linear in made.items():
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, linear)
        leaves.setdefault(owner, []).append(leaf)
    for owner, names in leaves.items():
        module = model.get_submodule(owner)
        if not isinstance(module, nn.ModuleList):
            # vLLM looks once at all modules of one class whose children have the same names, and
            # would treat those whose linears are shared as those whose linears are not
            module.add_module("_".join(("sharing", *names)), nn.Identity())
