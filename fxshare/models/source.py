"""What a compiled model was made from, as plain data, so that a folder can say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from torch import nn

TRANSFORMERS = "transformers"
EMBEDDED = "embedded"
USER = "user"
EMBEDDED_CLASS = "fxshare.demo.model:GPT"
"""What folders call the class of the embedded model, whatever file it lives in: a name, never
imported, that stays as it is in the folders that people have."""
_EMBEDDED_HERE = "fxshare.embedded.model:GPT"


@dataclass(frozen=True)
class Source:
    """``kind`` is ``transformers`` (rebuilt from ``config``), ``embedded`` (the model in this
    package) or ``user`` (a class that only its owner can name again)."""

    kind: str
    class_name: str
    """``package.module:Class``."""
    config: Mapping[str, Any] | None = None
    """The model's own configuration, for the first two kinds."""
    generation_config: Mapping[str, Any] | None = None

    @staticmethod
    def of(model: nn.Module) -> Source:
        """Describe a model; transformers is recognised by the module of its class."""
        cls = type(model)
        name = f"{cls.__module__}:{cls.__qualname__}"
        config = getattr(model, "config", None)
        # with the modules of an adapter in it, it is not what its configuration describes
        adapted = getattr(model, "_hf_peft_config_loaded", False)
        if cls.__module__.startswith("transformers.") and config is not None and not adapted:
            generation = getattr(model, "generation_config", None)
            return Source(
                TRANSFORMERS,
                name,
                _config_of(config),
                None if generation is None else generation.to_dict(),
            )
        if name == _EMBEDDED_HERE and is_dataclass(config):
            assert not isinstance(config, type)
            return Source(EMBEDDED, EMBEDDED_CLASS, asdict(config))
        return Source(USER, name)


def _config_of(config: Any) -> dict[str, Any]:
    """A transformers configuration as plain data, with the choice of kernels, on which the graph
    depends and which ``to_dict`` leaves out."""
    plain: dict[str, Any] = config.to_dict()
    for key in ("attn_implementation", "experts_implementation"):
        chosen = {"": getattr(config, f"_{key}", None)}
        for name in getattr(config, "sub_configs", {}):
            chosen[name] = getattr(getattr(config, name, None), f"_{key}", None)
        if any(chosen.values()):
            plain[key] = chosen if len(set(chosen.values())) > 1 else chosen[""]
    return plain
