"""Classes of served folders where fxshare is installed: made when they are asked for.

``SharedLlamaConfig`` and its like are those of the file that stands in a folder. Here an engine
finds them without running that file. Another process reads what this one has pickled, because they
are found by a name: that of the model type and the part, ``llama:config``, since types share the
names of classes.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from fxshare.exporting.served.shared_linears import share_linears
from fxshare.store.transformers import MODEL_TYPE

SHARED = "Shared"
"""What the names of classes in a served folder begin with."""
ENGINE = f"{SHARED}ForCausalLM"
"""What vLLM runs all of them as."""
_PARTS = ("config", "base", "head")


@dataclass(frozen=True)
class Classes:
    """The configuration, the base model and the causal language model of one family."""

    config: type
    base: type
    head: type


def causal_types() -> dict[str, str]:
    """The class of the causal language model of each type that transformers has, by name."""
    known: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    bases = known.MODEL_MAPPING_NAMES
    return {t: name for t, name in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if t in bases}


@functools.cache
def classes_of(original_type: str) -> Classes:
    """The classes for folders of a model type (``llama``), known to the auto classes afterwards."""
    library: Any = importlib.import_module("transformers")
    original = library.CONFIG_MAPPING[original_type]
    own: dict[str, Any] = {
        "model_type": f"{MODEL_TYPE}_{original_type}",
        # parts of a linear fit no plan that was made for the whole of it
        "base_model_tp_plan": None,
    }
    config = _class(original, own, f"{original_type}:config")
    base = library.AutoModel._model_mapping[original]
    base = base[0] if isinstance(base, tuple) else base
    head = library.AutoModelForCausalLM._model_mapping[original]
    made = Classes(
        config,
        _model(base, config, "", f"{original_type}:base"),
        _model(head, config, head.base_model_prefix, f"{original_type}:head"),
    )
    library.AutoConfig.register(made.config.model_type, made.config, exist_ok=True)  # type: ignore[attr-defined]
    library.AutoModel.register(made.config, made.base, exist_ok=True)
    library.AutoModelForCausalLM.register(made.config, made.head, exist_ok=True)
    return made


def _class(original: type, own: dict[str, Any], found_as: str) -> type:
    place = {"__module__": __name__, "__qualname__": found_as}
    return type(original)(f"{SHARED}{original.__name__}", (original,), {**own, **place})


def _model(original: Any, config: type, inside: str, found_as: str) -> type:
    def init(self: Any, given: Any, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, given, *args, **kwargs)
        share_linears(self.get_submodule(inside), given)

    init.__annotations__.clear()  # vLLM takes them for what its arguments have to be
    own = {"__init__": init, "config_class": config, "_keys_to_ignore_on_load_unexpected": None}
    return _class(original, own, found_as)


@functools.cache
def _engine() -> type:
    backend: Any = importlib.import_module("vllm.model_executor.models.transformers")

    def new(cls: Any, *, vllm_config: Any, prefix: str = "") -> Any:
        if vllm_config.model_config.is_moe:
            return backend.TransformersMoEForCausalLM(vllm_config=vllm_config, prefix=prefix)
        return object.__new__(cls)

    own = {"__new__": new, "__module__": __name__, "__qualname__": ENGINE}
    return type(ENGINE, (backend.TransformersForCausalLM,), own)


def __getattr__(name: str) -> type:
    if name == ENGINE:
        return _engine()
    original_type, colon, part = name.rpartition(":")
    if not colon or part not in _PARTS or original_type not in causal_types():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made: type = getattr(classes_of(original_type), part)
    return made
