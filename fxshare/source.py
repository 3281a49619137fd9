"""What a compiled model was made from, as plain data, so that a folder can say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from torch import nn

TRANSFORMERS = "transformers"
EMBEDDED = "embedded"
USER = "user"


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
        if cls.__module__.startswith("transformers.") and config is not None:
            generation = getattr(model, "generation_config", None)
            return Source(
                TRANSFORMERS,
                name,
                config.to_dict(),
                None if generation is None else generation.to_dict(),
            )
        if cls.__module__ == "fxshare.demo.model" and is_dataclass(config):
            assert not isinstance(config, type)
            return Source(EMBEDDED, name, asdict(config))
        return Source(USER, name)
