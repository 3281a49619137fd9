"""Outputs as every runtime knows them: tensors in plain dictionaries, tuples and lists."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def plain(output: Any) -> Any:
    """The tensors of an output, in plain containers.

    A dictionary (such as transformers' ``ModelOutput``) keeps the entries that hold tensors; a
    tuple or list keeps its places, with None where there is no tensor. Anything else, such as a
    key-value cache, becomes None.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        kept = {str(key): plain(value) for key, value in output.items()}
        return {key: value for key, value in kept.items() if value is not None}
    if isinstance(output, (tuple, list)):
        values = [plain(value) for value in output]
        if all(value is None for value in values):
            return None
        return values if isinstance(output, list) else tuple(values)
    return None


def left_out(output: Any, at: str = "output") -> list[str]:
    """The parts of an output that :func:`plain` drops, each with its class."""
    if output is None or isinstance(output, Tensor):
        return []
    if isinstance(output, dict):
        items = [(f"{at}.{key}", value) for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        items = [(f"{at}[{i}]", value) for i, value in enumerate(output)]
    else:
        return [f"{at} ({type(output).__name__})"]
    return [name for path, value in items for name in left_out(value, path)]


def leaves(output: Any) -> list[Tensor]:
    """The tensors of a plain output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [t for value in output.values() for t in leaves(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in leaves(value)]
    return []


def refilled(output: Any, tensors: list[Any]) -> Any:
    """The same plain output with other tensors, which are taken from the front of the list."""
    if isinstance(output, Tensor):
        return tensors.pop(0)
    if isinstance(output, dict):
        return {key: refilled(value, tensors) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return type(output)(refilled(value, tensors) for value in output)
    return output
