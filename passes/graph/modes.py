"""Modes that steer what torch does and are no values: gradients on or off, autocast.

A graph holds them as calls: :func:`caller_modes` reads those of the caller, :func:`set_modes` sets
those of the nodes that follow, and the last one sets the caller's again. Nodes with the same modes
may be moved past one another. A linear reads what was computed in other modes through
:func:`crossing`, so that it never has an input in common with one under other modes: whatever
merges linears of one input keeps them apart by that alone.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import fx
from torch.fx.node import has_side_effect, map_aggregate

T = TypeVar("T")
Cast = tuple[str, bool, torch.dtype | None]
"""Autocast on a kind of device: whether it is on, and to which dtype; None for that of before."""
Modes = tuple[bool, tuple[Cast, ...]]
"""Whether gradients are on, and autocast on each of :data:`DEVICES`."""
DEVICES = ("cpu", "cuda")


def caller_modes() -> Modes:
    """The modes at the time of the call."""
    casts = tuple(
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in DEVICES
    )
    return torch.is_grad_enabled(), casts


@has_side_effect
def set_modes(caller: Modes, grad: bool | None = None, casts: tuple[Cast, ...] = ()) -> None:
    """Set the modes of ``caller``, but ``grad`` and ``casts`` where they are given."""
    wanted = caller[0] if grad is None else grad
    if torch.is_grad_enabled() != wanted:
        torch._C._set_grad_enabled(wanted)
    own = {cast[0]: cast for cast in casts}
    for device, enabled, dtype in caller[1]:
        _set_autocast(*own.get(device, (device, enabled, dtype)), keep_casts=enabled)


def _set_autocast(
    device: str, enabled: bool, dtype: torch.dtype | None, *, keep_casts: bool
) -> None:
    was = torch.is_autocast_enabled(device)
    if was == enabled and (not enabled or torch.get_autocast_dtype(device) == dtype):
        return
    torch.set_autocast_enabled(device, enabled)
    if dtype is not None:
        torch.set_autocast_dtype(device, dtype)
    if was and not enabled and not keep_casts:
        torch.clear_autocast_cache()  # else weights that are changed later would be cast no more


def crossing(value: T) -> T:
    """The value as it is, for a linear under other modes than it was computed in."""
    return value


def modes_of(graph: fx.Graph) -> dict[fx.Node, Any]:
    """What each node is computed under: the arguments of the :func:`set_modes` before it, None for
    the caller's modes."""
    found: dict[fx.Node, Any] = {}
    here: Any = None
    for node in graph.nodes:
        if node.target is set_modes:
            given = (node.args[1:], tuple(node.kwargs.items()))
            here = given if given != ((), ()) else None
        found[node] = here
    return found


def is_steered(graph: fx.Graph) -> bool:
    """Whether a graph sets modes."""
    return any(node.target is set_modes for node in graph.nodes)


def cast_dtypes(graph: fx.Graph) -> set[torch.dtype]:
    """The dtypes that regions under autocast compute in."""
    found: set[torch.dtype] = set()

    def collect(leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            found.add(leaf)
        return leaf

    for node in graph.nodes:
        if node.target is set_modes:
            map_aggregate((node.args, node.kwargs), collect)
    return found


__all__ = [
    "DEVICES",
    "Cast",
    "Modes",
    "caller_modes",
    "cast_dtypes",
    "crossing",
    "is_steered",
    "modes_of",
    "set_modes",
]
