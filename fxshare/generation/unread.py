"""Parameters that the captured call never reads, in the model's own code.

The cross attention of a decoder alone has weights that no call of the decoder reads, and a pooler
computes what nobody takes. The graph does not have them, so in the model's own code they are NaN:
where one reaches the result after all, it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import FxShareError


def never_read(like: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor like ``like`` that is NaN everywhere, or where it holds whole numbers the least of
    them, which is no index; it takes no memory."""
    fill: float = torch.nan
    if not (like.is_floating_point() or like.is_complex()):
        dtype = like.dtype
        fill = 0 if dtype == torch.bool else torch.iinfo(dtype).min
    value = torch.full((), fill, dtype=dtype, device=device).expand(like.shape)
    return nn.Parameter(value, requires_grad=False) if isinstance(like, nn.Parameter) else value


def is_never_read(tensor: Tensor) -> bool:
    """Whether any of it is as :func:`never_read` made it."""
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    return tensor.dtype != torch.bool and bool((tensor == torch.iinfo(tensor.dtype).min).any())


def check_unread(output: Any, names: Sequence[str], call: str) -> None:
    """Raise :class:`FxShareError` where what the model's own code made of a call has NaN in it and
    the parameters ``names`` have no value."""
    if not names:
        return
    for name in ("logits", "last_hidden_state"):
        found = output.get(name) if hasattr(output, "get") else None
        if isinstance(found, Tensor) and bool(found.isnan().any()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise FxShareError(
                f"{call} gives NaN: it reads {names[0]!r}{more}, it seems, which the example that "
                "the model was captured with never does, so the graph does not have it; capture "
                "with an example like this call (example=...), or with capture='modules'"
            )


__all__ = ["check_unread", "is_never_read", "never_read"]
