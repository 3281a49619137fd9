"""Whether a model is quantised, and how it is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def quantisation_of(config: Any) -> str | None:
    """The method by which a configuration (transformers' or its JSON) says that the weights are
    quantised; None where they are not."""
    if isinstance(config, Mapping):
        found = config.get("quantization_config")
    else:
        found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    content = found if isinstance(found, Mapping) else getattr(found, "__dict__", {})
    method = content.get("quant_method") or _bits(content)
    return str(getattr(method, "value", method) or type(found).__name__)


def _bits(content: Mapping[str, Any]) -> str | None:
    names: Iterable[str] = ("load_in_4bit", "load_in_8bit")
    named = any(content.get(name) or content.get(f"_{name}") for name in names)
    return "bitsandbytes" if named else None


def refusal_of_quantised(name: str, method: str) -> str:
    """Why a quantised model is not compiled, and what to do."""
    return (
        f"{name}: its weights are quantised ({method}), and codes cannot be factorised; compile "
        "the model in float16, bfloat16 or float32 and quantise the result "
        "(docs/how-to/quantise-and-tune.md)"
    )


__all__ = ["quantisation_of", "refusal_of_quantised"]
