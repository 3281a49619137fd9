"""The schema and the reference page name every key, and nothing heavy is imported."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import fxshare.config
from fxshare.config import (
    Budget,
    Calibration,
    Planner,
    ShareConfig,
    WeightType,
    json_schema,
    load_config,
)
from tests.config.build import CONFIGS, SHARED, TYPES, written


def test_schema_describes_every_field() -> None:
    schema = json_schema()
    sections: dict[type[BaseModel], dict[str, Any]] = {
        ShareConfig: schema["properties"],
        WeightType: schema["$defs"]["WeightType"]["properties"],
        Calibration: schema["$defs"]["Calibration"]["properties"],
        Budget: schema["$defs"]["Budget"]["properties"],
        Planner: schema["$defs"]["Planner"]["properties"],
    }
    for section, properties in sections.items():
        extra = {"layer_pattern"} if section is ShareConfig else set()
        assert set(properties) == set(section.model_fields) | extra
        for name, field in properties.items():
            assert field.get("description"), (section, name)
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["weight_types"]
    split = schema["$defs"]["WeightType"]["properties"]["split"]
    assert split["enum"] == [False, True, None, "none", "qkv", "heads", "gate_up"]


def test_reference_page_names_every_key() -> None:
    page = (CONFIGS.parent / "docs" / "reference" / "config.md").read_text(encoding="utf-8")
    for section in (ShareConfig, WeightType, Calibration, Budget, Planner):
        for name in section.model_fields:
            assert f"`{name}`" in page, name


def test_examples_of_the_reference_page_load(tmp_path: Path) -> None:
    page = (CONFIGS.parent / "docs" / "reference" / "config.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        base = {"weight_types": TYPES} if "budget:" in block else SHARED
        load_config([base, written(tmp_path, block)])


def test_the_package_imports_neither_torch_nor_transformers() -> None:
    files = sorted(Path(fxshare.config.__file__).parent.glob("*.py"))
    assert len(files) > 1
    imported = {
        name.partition(".")[0]
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "pydantic" in imported
    assert not imported & {"torch", "transformers", "passes", "numpy"}
