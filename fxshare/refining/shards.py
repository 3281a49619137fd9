"""Trained parameters of which every process holds a part of the rows (FSDP2, after Rajbhandari et
al. 2020, "ZeRO"): values, gradients, moments and best values. A whole is there while the module
that has it runs, and for its gradient.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshare.base.processes import here
from fxshare.errors import RefineError
from passes.graph.graph import attribute
from passes.graph.writes import is_in_place, sharing_memory


class Shards:
    """Divides the rows of ``parameters`` of a module between the ranks, in place.

    Those that several modules have, that the graph reads by itself, and of modules whose output is
    written into stay whole on each rank.
    """

    def __init__(self, module: fx.GraphModule, parameters: Mapping[str, nn.Parameter]) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self.parameters: dict[str, nn.Parameter] = {}
        """The parts, in place of the parameters, by their names."""
        self._rows: dict[str, int] = {}
        device = next(iter(parameters.values())).device.type
        group = here().further("nccl" if device == "cuda" else "gloo")
        mesh = DeviceMesh.from_group(group, device)
        policy = MixedPrecisionPolicy(reduce_dtype=_reduced_in(parameters))
        for owner, own in owners_of(module, parameters).items():
            rest = {p for p in owner.parameters() if all(p is not parameters[n] for n in own)}
            fully_shard(
                owner,
                mesh=mesh,
                reshard_after_forward=True,
                mp_policy=policy,
                ignored_params=rest,
            )
            assert isinstance(owner, FSDPModule)
            owner.set_gradient_divide_factor(1.0)  # gradients are added up
            owner.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            for name, leaf in own.items():
                self.parameters[name] = getattr(owner, leaf)
                self._rows[name] = len(parameters[name])

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor like the parameter."""
        if name not in self._rows:
            return whole
        each = -(-self._rows[name] // here().size)
        return whole[each * here().rank : each * (here().rank + 1)]

    def whole(self, name: str, part: Tensor) -> Tensor:
        """All rows of a tensor like the parameter, from the parts of all ranks."""
        if name not in self._rows:
            return part
        together = here()
        rows = [
            together.sent([part] if rank == together.rank else None, rank)[0]
            for rank in range(together.size)
        ]
        return torch.cat([one.to(part.device) for one in rows])


def local(tensor: Any) -> Tensor:
    """What this rank holds of a tensor; the tensor itself where that is not divided."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def check_graph(gm: nn.Module) -> None:
    """Raise :class:`RefineError` for what is no graph."""
    if not isinstance(gm, fx.GraphModule):
        raise RefineError(
            "shard=True: the model was captured at module granularity, and only a graph says what "
            "reads a parameter; leave shard out, and each process keeps all of what is trained"
        )


@contextlib.contextmanager
def passing() -> Iterator[None]:
    """A pass of a module whose parameters are divided, which all ranks begin together."""
    with here().passing(), warnings.catch_warnings():
        # of outputs that are views: nothing writes into those
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        yield


def _reduced_in(parameters: Mapping[str, nn.Parameter]) -> torch.dtype | None:
    """The dtype in which gradients of several ranks are added up; None: their own."""
    half = any(parameter.itemsize <= 2 for parameter in parameters.values())
    return torch.float32 if half else None


def owners_of(
    gm: fx.GraphModule, parameters: Mapping[str, nn.Parameter]
) -> dict[nn.Module, dict[str, str]]:
    """The modules whose parameters can be divided, each with their names and what it calls
    them."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for owner in gm.modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in names:
                places.setdefault(names[id(parameter)], []).append((owner, leaf))
    by_hand = {id(tensor) for node in gm.graph.nodes for tensor in _by_hand(gm, node)}
    found: dict[nn.Module, dict[str, str]] = {}
    for name, those in places.items():
        if len(those) == 1 and id(parameters[name]) not in by_hand:
            owner, leaf = those[0]
            found.setdefault(owner, {})[name] = leaf
    return found


def _by_hand(gm: fx.GraphModule, node: fx.Node) -> list[Any]:
    """The parameters that a node reads without their module, or with one whose output is written
    into: that would undo what FSDP does at it."""
    if node.op == "get_attr":
        return [attribute(gm, str(node.target))]
    if node.op != "call_module":
        return []
    users = (user for one in sharing_memory(node) for user in one.users)
    return (
        list(gm.get_submodule(str(node.target)).parameters())
        if any(map(is_in_place, users))
        else []
    )


__all__ = ["Shards", "check_graph", "local", "owners_of", "passing"]
