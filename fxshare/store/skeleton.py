"""The structure of the original model, from what the folder says or the caller gives.

Strings of a folder are looked up in two places only: among the model classes that the
``transformers`` package itself exports, and as the embedded model's class.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxshare.base.building import TooMany, at_most
from fxshare.base.randomness import randomness_as_before
from fxshare.errors import StoreError
from fxshare.models.source import EMBEDDED, EMBEDDED_CLASS, TRANSFORMERS
from fxshare.models.structure import without_values
from fxshare.models.wrapped import unwrapped
from fxshare.store.manifest import SavedSource
from fxshare.store.tensors import tensors_of

ModelSource: TypeAlias = "nn.Module | Callable[[], nn.Module] | str"
# others are fetched from the network when they are not installed
_BUILT_IN = frozenset({None, "eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm"})


def skeleton(source: SavedSource, model: ModelSource | None, most: int | None = None) -> nn.Module:
    """A module of the original's structure; its weights do not matter. One that is made from the
    folder's configuration has at most ``most`` parameters and submodules.

    Raises :class:`StoreError` where it cannot be made, saying what to give.
    """
    if model is not None:
        return _given(model)
    if source.config is not None and source.kind in (TRANSFORMERS, EMBEDDED):
        make = _transformers_model if source.kind == TRANSFORMERS else _embedded_model
        with randomness_as_before(), at_most(most):
            return make(source, source.config)
    raise StoreError(
        f"the folder holds a compiled {source.class_name}, whose structure only its owner has; "
        "give it: load(path, model=...), with a module of that class, a function that makes one, "
        "or 'package.module:function'"
    )


def _given(model: ModelSource) -> nn.Module:
    if isinstance(model, str):
        model = _imported(model)
    if isinstance(model, nn.Module):
        return unwrapped(model)
    if not callable(model):
        raise StoreError(
            f"model: expected an nn.Module, a function that makes one or 'package.module:function'"
            f", found {type(model).__name__}"
        )
    with randomness_as_before():
        made = model()
    if not isinstance(made, nn.Module):
        raise StoreError(f"model: expected the function to make an nn.Module, found {made!r:.80}")
    return unwrapped(made)


def _imported(name: str) -> Callable[[], nn.Module]:
    """The function that the caller (and not the folder) named."""
    module, _, attribute = name.partition(":")
    try:
        found: Callable[[], nn.Module] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise StoreError(
            f"model: cannot import {name!r}: {error}; expected 'package.module:function'"
        ) from error
    return found


def _embedded_model(source: SavedSource, config: dict[str, Any]) -> nn.Module:
    from fxshare.embedded.model import GPT, GPTConfig

    if source.class_name != EMBEDDED_CLASS:
        raise StoreError(
            f"expected the embedded class {EMBEDDED_CLASS}, found {source.class_name!r}"
        )
    try:
        with torch.device("meta"):
            return GPT(GPTConfig(**config))
    except (TypeError, ValueError, ArithmeticError, RuntimeError, TooMany) as error:
        raise StoreError(
            f"{EMBEDDED_CLASS} cannot be built from the folder's configuration: {error}"
        ) from error


def _transformers_model(source: SavedSource, config: dict[str, Any]) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise StoreError(
            f"the folder holds a compiled {source.class_name}; install transformers "
            "(pip install fxshare[hf]) or give the structure as model=..."
        ) from error
    module, _, name = source.class_name.partition(":")
    known = module.startswith("transformers.") and name.isidentifier() and not name.startswith("_")
    found = getattr(transformers, name, None) if known else None
    if (
        not isinstance(found, type)
        or not issubclass(found, transformers.PreTrainedModel)
        or not found.__module__.startswith("transformers.")
    ):
        raise StoreError(
            f"{source.class_name!r} is not a model class that transformers "
            f"{transformers.__version__} exports; give the structure as model=..."
        )
    config = _offline(config, source.class_name)
    try:
        with torch.device("meta"):
            made: Any = found
            model: Any = made(made.config_class.from_dict(config))
        if source.generation_config is not None and hasattr(model, "generation_config"):
            model.generation_config = transformers.GenerationConfig.from_dict(
                dict(source.generation_config)
            )
    except Exception as error:
        raise StoreError(
            f"transformers {transformers.__version__} cannot build {source.class_name} from the "
            f"folder's configuration: {type(error).__name__}: {error}; give the structure as "
            "model=..."
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _offline(value: Any, class_name: str) -> Any:
    """The configuration without what could load code or weights from elsewhere."""
    if isinstance(value, list):
        return [_offline(item, class_name) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        if key == "auto_map":
            continue
        if key == "use_pretrained_backbone":
            item = False
        if key.strip("_").startswith(("attn_implementation", "experts_implementation")):
            chosen = set(item.values()) if isinstance(item, dict) else {item}
            if not chosen <= _BUILT_IN:
                raise StoreError(
                    f"{class_name} was compiled with {key} {item!r}, which transformers may fetch "
                    "from the network; load does not, give the structure as model=..."
                )
        kept[key] = _offline(item, class_name)
    return kept


def hollow(
    model: nn.Module,
    dtype_of: Callable[[str, Tensor], torch.dtype],
    device: torch.device,
) -> nn.Module:
    """A copy of the structure in which no tensor has values; ties stay ties.

    On the CPU the memory is reserved and never touched.
    """

    def empty(name: str, tensor: Tensor) -> Tensor:
        return torch.empty(tuple(tensor.shape), dtype=dtype_of(name, tensor), device=device)

    named = {name: tensor for name, (_, tensor) in tensors_of(model).items()}
    return without_values(model, named, empty)
