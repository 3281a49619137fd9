"""The plugin of vLLM: with fxshare beside it, served folders are run without their own code."""

from __future__ import annotations

import importlib
from typing import Any

from fxshare.exporting.served import classes
from fxshare.store.transformers import MODEL_TYPE


def register() -> None:
    """Make the types and architectures of served folders known to transformers and vLLM.

    The entry point of ``vllm.general_plugins``: vLLM calls it in each of its processes. Nothing of
    a family is imported before a folder of it is read.
    """
    library: Any = importlib.import_module("transformers")
    models: Any = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry
    known = models.get_supported_archs()
    for original_type, head in classes.causal_types().items():
        stand_in = _stand_in(library.PreTrainedConfig, original_type)
        library.AutoConfig.register(stand_in.model_type, stand_in, exist_ok=True)
        architecture = f"{classes.SHARED}{head}"
        if architecture not in known:
            models.register_model(architecture, f"{classes.__name__}:{classes.ENGINE}")


def _stand_in(base: type, original_type: str) -> Any:
    """A configuration class that reads a folder's as the one of its family."""

    def from_dict(cls: type[Any], /, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        made: Any = classes.classes_of(original_type)
        return made.config.from_dict(config_dict, **kwargs)

    own = {"model_type": f"{MODEL_TYPE}_{original_type}", "from_dict": classmethod(from_dict)}
    return type(base)("ServedConfig", (base,), own)
