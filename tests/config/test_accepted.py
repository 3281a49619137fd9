"""What a user may write in a configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fxshare.config import Calibration, ShareConfig, WeightType, load_config
from fxshare.errors import ConfigError
from tests.config.build import CONFIGS, NOTEBOOK, SHARED, TYPES, with_type, written


def test_the_notebook_file_verbatim(tmp_path: Path) -> None:
    cfg = load_config(written(tmp_path, NOTEBOOK))
    assert list(cfg.weight_types) == ["attn_c_attn", "attn_c_proj", "mlp_c_fc", "mlp_c_proj"]
    fused = cfg.weight_types["attn_c_attn"]
    assert fused == WeightType(
        pattern=r".*\.attn\.c_attn$", split="heads", qkv_order="qkv", n_head=12
    )
    assert cfg.weight_types["mlp_c_fc"].split is False
    assert cfg.block_pattern == r"h\.(\d+)"
    assert cfg.mode == "exact"
    assert cfg.group_size_of("mlp_c_fc") == 1


def test_defaults() -> None:
    cfg = load_config({"weight_types": TYPES})
    assert (cfg.version, cfg.block_pattern, cfg.private, cfg.passes) == (1, None, (), ())
    assert (cfg.fuse, cfg.capture, cfg.calibration) == (True, "auto", Calibration())
    assert cfg.calibration.relative_floor == 1e-8
    assert cfg.calibration.max_tokens is None
    assert cfg.weight_types["attn"].basis == "slice"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("true", "qkv"),
        ("yes", "qkv"),
        ("qkv", "qkv"),
        ("heads", "heads"),
        ("false", False),
        ("no", False),
        ("off", False),
        ("null", False),
        ("none", False),
        ("~", False),
    ],
)
def test_split_spellings(tmp_path: Path, text: str, expected: object) -> None:
    cfg = load_config(written(tmp_path, f"weight_types: {{attn: {{pattern: x, split: {text}}}}}"))
    split = cfg.weight_types["attn"].split
    assert split == expected
    assert type(split) is type(expected)


def test_order_of_a_fused_projection() -> None:
    assert WeightType(pattern="x").order is None
    assert WeightType(pattern="x", split="qkv").order == "qkv"
    assert WeightType(pattern="x", split="qkv", qkv_order="kqv").order == "kqv"
    assert WeightType(pattern="x", split="heads").order is None
    assert WeightType(pattern="x", split="heads", qkv_order="vkq").order == "vkq"
    neox = WeightType(pattern="x", split="heads", qkv_order="qkv", interleaved=True)
    assert (neox.order, neox.interleaved) == ("qkv", True)


def test_grouped_query_attention() -> None:
    cfg = load_config(with_type(split="qkv", n_head=32, n_kv_head=8))
    assert (cfg.weight_types["attn"].n_head, cfg.weight_types["attn"].n_kv_head) == (32, 8)


def test_sharing_mode_and_private_types() -> None:
    cfg = load_config({**SHARED, "private": ["mlp"]})
    assert cfg.mode == "sharing"
    assert (cfg.group_size_of("attn"), cfg.group_size_of("mlp")) == (2, 1)
    with pytest.raises(
        ConfigError, match=r"'atn' \(text\) is no weight type\. Did you mean 'attn'"
    ):
        cfg.group_size_of("atn")


@pytest.mark.parametrize("rate", [1, 1.0, 1.5, 1e-9])
def test_rates_are_fractions_kept_and_may_exceed_one(rate: float) -> None:
    cfg = load_config({**SHARED, "compression_rate": rate})
    assert cfg.compression_rate == rate
    assert isinstance(cfg.compression_rate, float)


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-06", "1.e-6", ".1e-5", "0.000001"])
def test_exponents_are_numbers(tmp_path: Path, text: str) -> None:
    # PyYAML alone reads the first of these as text.
    base = {"weight_types": TYPES}
    path = written(tmp_path, f"calibration: {{relative_floor: {text}}}")
    assert load_config([base, path]).calibration.relative_floor == pytest.approx(1e-6)
    cfg = load_config(base, overrides=[f"calibration.relative_floor={text}"])
    assert cfg.calibration.relative_floor == pytest.approx(1e-6)


def test_layer_pattern_is_an_alias() -> None:
    cfg = load_config({"weight_types": TYPES, "layer_pattern": r"layers\.(\d+)"})
    assert cfg == load_config({"weight_types": TYPES, "block_pattern": r"layers\.(\d+)"})
    types = {"attn": WeightType(pattern="x")}
    assert ShareConfig(weight_types=types, layer_pattern="(a)").block_pattern == "(a)"  # type: ignore[call-arg]


def test_a_later_alias_overrides_an_earlier_name() -> None:
    base = {"weight_types": TYPES, "block_pattern": "(a)"}
    assert load_config([base, {"layer_pattern": "(b)"}]).block_pattern == "(b)"
    assert load_config(base, overrides=["layer_pattern=(b)"]).block_pattern == "(b)"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files_load(path: Path) -> None:
    cfg = load_config(path)
    assert cfg.block_pattern is not None
    assert cfg.mode == ("sharing" if "sharing" in path.name else "exact")
    # Each can be turned into the sharing mode as its comment says.
    assert load_config(path, overrides=["group_size=2", "compression_rate=0.8"]).mode == "sharing"


def test_shipped_files_are_the_families_promised() -> None:
    names = {path.name for path in CONFIGS.glob("*.yaml")}
    assert names >= {
        "gpt2.yaml",
        "gpt2-basis-sharing.yaml",
        "nanogpt.yaml",
        "llama.yaml",
        "transformer-encoder.yaml",
    }


def test_gpt2_file_is_the_notebooks(tmp_path: Path) -> None:
    gpt2 = load_config(CONFIGS / "gpt2.yaml")
    assert gpt2 == load_config(written(tmp_path, NOTEBOOK))
    sharing = load_config(CONFIGS / "gpt2-basis-sharing.yaml")
    assert sharing.weight_types == gpt2.weight_types
    assert (sharing.group_size, sharing.compression_rate) == (2, 0.8)
    assert sharing.private == ("attn_c_proj", "mlp_c_proj")


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("gpt2.yaml", ["transformer.h.3.attn.c_attn", "transformer.h.3.mlp.c_fc"]),
        ("gpt2.yaml", ["h.3.attn.c_proj", "h.3.mlp.c_proj"]),
        ("nanogpt.yaml", ["transformer.h.3.attn.c_attn", "transformer.h.3.attn.c_proj"]),
        ("nanogpt.yaml", ["transformer.h.3.mlp.c_fc", "h.3.mlp.c_proj"]),
        ("llama.yaml", [f"model.layers.3.self_attn.{kind}_proj" for kind in "qkvo"]),
        ("llama.yaml", [f"layers.3.mlp.{kind}_proj" for kind in ("gate", "up", "down")]),
        ("transformer-encoder.yaml", ["layers.3.linear1", "encoder.layers.3.linear2"]),
    ],
)
def test_shipped_patterns_match_one_type_and_the_layer(file: str, names: list[str]) -> None:
    cfg = load_config(CONFIGS / file)
    for name in names:
        assert sum(bool(re.match(t.pattern, name)) for t in cfg.weight_types.values()) == 1, name
        layer = re.search(cfg.block_pattern or "", name)
        assert layer is not None
        assert layer[1] == "3"
