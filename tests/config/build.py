"""Configurations that the tests start from, and what a refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fxshare.config import load_config
from fxshare.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"

NOTEBOOK = r"""
weight_types:
    attn_c_attn: {pattern: '.*\.attn\.c_attn$', split: heads, qkv_order: qkv, n_head: 12}   # split: false | qkv | heads; true means qkv
    attn_c_proj: {pattern: '.*\.attn\.c_proj$'}
    mlp_c_fc:    {pattern: '.*\.mlp\.c_fc$'}
    mlp_c_proj:  {pattern: '.*\.mlp\.c_proj$'}
block_pattern: 'h\.(\d+)'            # group 1 is the layer number; `layer_pattern` is an alias
"""  # noqa: E501  (verbatim)

TYPES: dict[str, Any] = {"attn": {"pattern": r".*\.attn$"}, "mlp": {"pattern": r".*\.mlp$"}}
SHARED: dict[str, Any] = {"weight_types": TYPES, "group_size": 2, "compression_rate": 0.5}


def written(folder: Path, text: str, name: str = "model.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(source: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides=overrides)
    return str(caught.value)


def with_type(**keys: Any) -> dict[str, Any]:
    return {"weight_types": {"attn": {"pattern": "x", **keys}}}


PLANNED: dict[str, Any] = {"weight_types": TYPES, "budget": {"params_kept": 0.8}}
