"""Several sources and overrides make one configuration."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from pydantic import ValidationError

from fxshare.config import load_config
from tests.config.build import NOTEBOOK, SHARED, TYPES, written


def test_sources_compose_by_deep_merge(tmp_path: Path) -> None:
    base = written(tmp_path, NOTEBOOK)
    over = {
        "weight_types": {"attn_c_attn": {"n_head": 16}, "mlp_c_fc": None},
        "group_size": 4,
        "compression_rate": 0.5,
    }
    cfg = load_config([base, over, {"compression_rate": 0.7, "private": ["mlp_c_proj"]}])
    assert cfg.weight_types["attn_c_attn"].n_head == 16
    assert cfg.weight_types["attn_c_attn"].split == "heads"
    assert "mlp_c_fc" not in cfg.weight_types
    assert (cfg.group_size, cfg.compression_rate, cfg.private) == (4, 0.7, ("mlp_c_proj",))


def test_lists_are_replaced_and_null_unsets() -> None:
    first = {**SHARED, "private": ["attn", "mlp"], "passes": ["a.b:C"]}
    assert load_config([first, {"private": ["mlp"]}]).private == ("mlp",)
    off = load_config([first, {"private": [], "group_size": None, "compression_rate": None}])
    assert off.mode == "exact"
    assert off.passes == ("a.b:C",)


def test_a_removed_type_can_come_back() -> None:
    again = {"weight_types": {"mlp": {"pattern": "new"}}}
    cfg = load_config([SHARED, {"weight_types": {"mlp": None}}, again])
    assert cfg.weight_types["mlp"].pattern == "new"


def test_a_share_config_passes_through_and_composes() -> None:
    cfg = load_config(SHARED)
    assert load_config(cfg) is cfg
    changed = load_config(cfg, overrides=["group_size=3"])
    assert (changed.group_size, cfg.group_size) == (3, 2)
    # Only what was given of it overrides what came before.
    assert load_config([{"fuse": False}, cfg]).fuse is False
    assert load_config({"weight_types": dict(cfg.weight_types)}).weight_types == cfg.weight_types


def test_overrides_are_yaml_and_the_last_one_wins() -> None:
    cfg = load_config(
        SHARED,
        overrides=[
            "weight_types.attn.split=heads",
            "weight_types.attn.n_head=12",
            "weight_types.attn.n_head = 16",
            r"block_pattern=h\.(\d+)",
            "private=[mlp]",
            "calibration.max_tokens=1000",
            "weight_types.new={pattern: 'a=b'}",
            "weight_types.more.pattern=a=b",
        ],
    )
    assert cfg.weight_types["attn"].n_head == 16
    assert cfg.block_pattern == r"h\.(\d+)"
    assert cfg.private == ("mlp",)
    assert cfg.calibration.max_tokens == 1000
    assert cfg.weight_types["new"].pattern == cfg.weight_types["more"].pattern == "a=b"


def test_an_override_removes_a_type() -> None:
    cfg = load_config({"weight_types": TYPES}, overrides=["weight_types.mlp=null"])
    assert list(cfg.weight_types) == ["attn"]


def test_nothing_given_is_changed() -> None:
    source = copy.deepcopy({**SHARED, "private": ["mlp"], "layer_pattern": "(a)"})
    before = copy.deepcopy(source)
    overrides = ["weight_types.mlp=null", "private=[]", "weight_types.attn.pattern=z"]
    cfg = load_config([source, {"weight_types": {"x": {"pattern": "y"}}}], overrides=overrides)
    assert source == before
    assert len(overrides) == 3
    source["weight_types"]["attn"]["pattern"] = "changed later"
    assert cfg.weight_types["attn"].pattern == "z"


def test_configurations_are_frozen() -> None:
    cfg = load_config(SHARED)
    with pytest.raises(ValidationError, match="frozen"):
        cfg.group_size = 3
    with pytest.raises(ValidationError, match="frozen"):
        cfg.weight_types["attn"].pattern = "x"
