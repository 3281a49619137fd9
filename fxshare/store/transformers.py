"""What makes a saved folder one of transformers' as well: its two JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fxshare.errors import StoreError
from fxshare.models.source import TRANSFORMERS, Source

MODEL_TYPE = "fxshare"
HF_CONFIG = "config.json"
HF_GENERATION = "generation_config.json"
# not the original's class, whose weights these are not: whoever reads the name must not make one
_ARCHITECTURE = "FxShareModel"


def write_hf_configs(source: Source, folder: Path, *, dtype: str) -> None:
    """Write both files for a model of transformers; nothing for another.

    They are for transformers: :func:`fxshare.load` reads neither.
    """
    if source.kind != TRANSFORMERS or source.config is None:
        return
    config = {
        "model_type": MODEL_TYPE,
        "architectures": [_ARCHITECTURE],
        "dtype": dtype,
        "is_encoder_decoder": bool(source.config.get("is_encoder_decoder", False)),
        "original": dict(source.config),
    }
    write_json(folder / HF_CONFIG, config)
    if source.generation_config is not None:
        write_json(folder / HF_GENERATION, dict(source.generation_config))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file of transformers; :class:`StoreError` for what JSON does not hold."""
    try:
        text = json.dumps(content, indent=2, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{path.name} cannot be written as JSON: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")


__all__ = ["HF_CONFIG", "HF_GENERATION", "MODEL_TYPE", "write_hf_configs", "write_json"]
