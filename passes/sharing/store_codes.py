"""Put quantised tensors in the place of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, fx, nn

from passes.base import Pass
from passes.errors import RequiresError, ShapeError
from passes.graph.graph import linear_at, new_linear, put_module
from passes.graph.slices import slices


@dataclass(frozen=True, eq=False)
class StoreCodes(Pass):
    """Weights as codes and scales.

    Before::

        self.h.0.mlp.c_fc.weight                  # float32 (3072, 768)

    After::

        self.h.0.mlp.c_fc.weight                  # Quantised (3072, 768): int8 codes, a scale a row

    The text stays. A quantised weight is a tensor that moves by rows as its codes do, computes with
    its values, and takes no gradient: it is frozen. ``weights`` are of slices, or of bases by their
    names; ``biases`` are new ones of some of the slices.
    """

    name: ClassVar[str] = "store-codes"
    exact: ClassVar[bool] = False

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    def requires(self, gm: fx.GraphModule) -> None:
        for name, weight in self.weights.items():
            module = self._module(gm, name)
            found = module is not None and gm.get_submodule(module)
            if not isinstance(found, nn.Linear):
                raise RequiresError(
                    f"{self.name}: the graph has no slice and no basis {name!r} to store as codes"
                )
            if found.weight.shape != weight.shape:
                raise ShapeError(
                    f"{self.name}: {name!r} has a weight {tuple(found.weight.shape)}, found codes "
                    f"of shape {tuple(weight.shape)}"
                )

    def _module(self, gm: fx.GraphModule, name: str) -> str | None:
        place = slices(gm).get(name)
        if place is not None:
            return place.module
        return name if name in gm._modules else None

    def rewrite(self, gm: fx.GraphModule) -> int:
        for name, weight in self.weights.items():
            module = self._module(gm, name)
            assert module is not None
            old = linear_at(gm, module)
            new = new_linear(weight, None, requires_grad=False, training=old.training)
            new.bias = old.bias
            if name in self.biases:
                trainable = old.bias is not None and old.bias.requires_grad
                new.bias = nn.Parameter(self.biases[name], requires_grad=trainable)
            for leaf, buffer in old.named_buffers(recurse=False):
                new.register_buffer(leaf, buffer)
            put_module(gm, module, new)
        return len(self.weights)


__all__ = ["StoreCodes"]
