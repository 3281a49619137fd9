"""Whether engines that make modules anew would fill every one of a served model."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from fxshare.errors import CheckFailed


def check_layout(model: nn.Module, stored: Container[str], tied: Container[str]) -> None:
    """Every parameter has weights of its own under every name that it has in ``model``.

    An engine goes through the modules by name and makes each linear anew, without values. One that
    is registered in two places becomes two, and the files have weights for the first: the other
    stays zero, without an error. ``stored`` are the names in the files, in the model's own names,
    and ``tied`` those that the engine ties itself.

    Raises :class:`CheckFailed` naming the module.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for same in names.values():
        for name in same:
            if name in stored or name in tied:
                continue
            other = next((each for each in same if each != name), None)
            why = (
                "the files do not hold it"
                if other is None
                else f"it is {other!r} too, and an engine that makes modules anew would leave it "
                "zero; let one module own it and the others look it up when they are called"
            )
            raise CheckFailed(f"{type(model).__name__}: {name!r} has no weights of its own: {why}")
