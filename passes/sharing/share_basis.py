"""Replace the slices of a group by one shared basis and a coefficient each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from passes.base import Pass
from passes.errors import EnsuresError, NameFault, RequiresError, ShapeError
from passes.graph.graph import (
    calls_by_target,
    linear_at,
    linear_input,
    new_linear,
    put_module,
    read_instead,
)
from passes.graph.lookups import lookups
from passes.graph.names import shortened, unwritable
from passes.graph.slices import Slice, set_slices, slices


@dataclass(frozen=True, eq=False)
class SharedGroup:
    """The factors of one group: ``weight_i ≈ coefficients[i] @ basis_RI``.

    ``name`` is the basis' module name at the root of the graph module; ``coefficients`` maps slice
    names to ``(out_i, R)``.
    """

    name: str
    basis_RI: Tensor
    coefficients: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ShareBasis(Pass):
    """Basis Sharing (arXiv 2410.03765): slices of several layers read one basis.

    Before::

        q0 = getattr(self.h.0.c_attn, 'q')(x0)        # Linear(768, 768)
        q1 = getattr(self.h.1.c_attn, 'q')(x1)

    After::

        z0 = self.basis_q_0_1(x0)                     # Linear(768, R), one module, one owner
        q0 = getattr(self.h.0.c_attn, 'q')(z0)        # Linear(R, 768): the coefficient, old bias
        z1 = self.basis_q_0_1(x1)
        q1 = getattr(self.h.1.c_attn, 'q')(z1)

    A slice whose rows are looked up (:class:`passes.LookUpRows`) is multiplied afterwards::

        z = torch.nn.functional.embedding(ids, self.wte.weight)   # rows of the coefficient (V, R)
        e = torch.matmul(z, self.basis_wte.weight)

    Coefficients and biases are trainable or frozen as the weights and biases that they stand for
    were; a basis is frozen where all of its members were.
    """

    name: ClassVar[str] = "share-basis"
    exact: ClassVar[bool] = False

    groups: tuple[SharedGroup, ...] = ()

    def requires(self, gm: fx.GraphModule) -> None:
        known = slices(gm)
        seen: set[str] = set()
        names: set[str] = set()
        for group in self.groups:
            if "." in group.name or hasattr(gm, group.name) or group.name in names:
                raise RequiresError(
                    f"{self.name}: basis name {group.name!r} is taken or dotted; a basis is one "
                    "new submodule at the root"
                )
            reason = unwritable(group.name)
            if reason is not None:
                raise NameFault(
                    f"{self.name}: the basis name {shortened(group.name)} {reason}; choose one "
                    "that the graph's code can hold"
                )
            names.add(group.name)
            if group.basis_RI.ndim != 2:
                raise ShapeError(
                    f"{self.name}: the basis of group {group.name!r} needs shape (rank, in "
                    f"features), found {tuple(group.basis_RI.shape)}"
                )
            rank, in_features = group.basis_RI.shape
            for name, coefficient in group.coefficients.items():
                if name not in known or name in seen or known[name].basis is not None:
                    raise RequiresError(
                        f"{self.name}: {name!r} of group {group.name!r} is not a slice that is "
                        f"still whole; the graph has {sorted(known)[:6]}"
                    )
                seen.add(name)
                linear = linear_at(gm, known[name].module)
                found = (tuple(coefficient.shape), in_features)
                expected = ((linear.out_features, rank), linear.in_features)
                if found != expected:
                    raise ShapeError(
                        f"{self.name}: {name!r} needs a coefficient of shape {expected[0]} and a "
                        f"basis over {expected[1]} features, found {found[0]} and {found[1]}"
                    )

    def rewrite(self, gm: fx.GraphModule) -> int:
        calls = calls_by_target(gm, lambda module: isinstance(module, nn.Linear))
        reading: dict[str, list[fx.Node]] = {}
        for lookup in lookups(gm):
            reading.setdefault(lookup.name, []).append(lookup.node)
        count = 0
        for group in self.groups:
            # frozen where all members are; a coefficient is as its own member was
            trainable = any(linear_at(gm, name).weight.requires_grad for name in group.coefficients)
            # decompositions leave transposed memory behind, which safetensors refuses
            basis_RI = group.basis_RI.contiguous()
            gm.add_module(
                group.name,
                new_linear(basis_RI, None, requires_grad=trainable, training=gm.training),
            )
            for name, coefficient in group.coefficients.items():
                old = linear_at(gm, name)
                own = old.weight.requires_grad
                linear = new_linear(
                    coefficient.contiguous(), None, requires_grad=own, training=gm.training
                )
                linear.bias = old.bias
                if name in group.biases:
                    own = own if old.bias is None else old.bias.requires_grad
                    linear.bias = nn.Parameter(group.biases[name], requires_grad=own)
                put_module(gm, name, linear)
                set_slices(gm, {name: Slice(name, 0, linear.out_features, group.name)})
                for node in calls.get(name, []):
                    x = linear_input(node)
                    assert isinstance(x, fx.Node)
                    with gm.graph.inserting_before(node):
                        z = gm.graph.call_module(group.name, (x,))
                    z.meta.update(node.meta)
                    node.args, node.kwargs = (z,), {}
                    count += 1
                for node in reading.get(name, []):
                    with gm.graph.inserting_after(node):
                        basis = gm.graph.get_attr(f"{group.name}.weight")
                    with gm.graph.inserting_after(basis):
                        rows = gm.graph.call_function(torch.matmul, (node, basis))
                    rows.meta.update(node.meta)
                    read_instead(node, rows)
                    count += 1
        return count

    def ensures(self, gm: fx.GraphModule) -> None:
        owners: dict[int, str] = {}
        for name, parameter in gm.named_parameters(remove_duplicate=False):
            if name.split(".")[0] not in {group.name for group in self.groups}:
                continue
            first = owners.setdefault(id(parameter), name)
            if first != name:
                raise EnsuresError(f"{self.name}: basis {first!r} has a second owner {name!r}")
