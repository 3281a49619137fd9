"""What a compiled model keeps of the original beside its tensors: under which names, and how, the
original stores them. Only names; it comes back when a folder is loaded, from the structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from passes.errors import FxShareError
from passes.graph.graph import is_conv1d

_KEY = "original"


@dataclass(frozen=True)
class Original:
    """``state`` maps every name of the original's state dict to the first name of the same tensor,
    which is another one where weights are tied. ``transposed`` names the ``Conv1D`` modules, which
    store ``(in, out)``."""

    state: Mapping[str, str]
    transposed: frozenset[str]

    @staticmethod
    def of(model: nn.Module) -> Original:
        """Describe a model."""
        first: dict[int, str] = {}
        state = {
            name: first.setdefault(id(tensor), name)
            for name, tensor in model.state_dict(keep_vars=True).items()
        }
        modules = model.named_modules(remove_duplicate=False)
        return Original(state, frozenset(name for name, m in modules if is_conv1d(m)))


def keep_original(result: nn.Module, model: nn.Module) -> None:
    """Put the description of ``model`` where :func:`original_of` finds it."""
    result.__dict__.setdefault("meta", {})[_KEY] = Original.of(model)


def original_of(gm: nn.Module) -> Original:
    """The description of the model that ``gm`` was made from."""
    found = getattr(gm, "meta", {}).get(_KEY)
    if not isinstance(found, Original):
        raise FxShareError(
            f"{type(gm).__name__} does not say how the original stores its weights; compile it, or "
            "load it, with this version of fxshare"
        )
    return found
