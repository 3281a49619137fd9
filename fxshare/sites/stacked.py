"""Whether a stack of matrices is stored ``(experts, out, in)`` or ``(experts, in, out)``.

A captured graph tells it for certain (:mod:`fxshare.sites.visible`). Before there is one it is told
by the module, or by the widths of its stacks.
"""

from __future__ import annotations

from torch import nn

from fxshare.models.traits import WIDTHS, number_in, number_of


def stores_columns(model: nn.Module, module: nn.Module, field: str) -> bool:
    """Whether the matrices of the stack ``field`` of ``module`` are ``(in, out)``.

    transformers' own experts say so (``is_transposed``). Of others the first stack reads the hidden
    state and the last writes it, so its width stands where the inputs are, or the outputs.
    """
    stated = getattr(module, "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    shapes = {n: p.shape for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
    width = number_in(module, WIDTHS) or number_of(model, WIDTHS)
    first, last = next(iter(shapes)), next(reversed(shapes))
    rows, columns = shapes[field][1:]
    if width is None or first == last or (rows == width) is (columns == width):
        return False
    return (columns == width) is (field == last)
