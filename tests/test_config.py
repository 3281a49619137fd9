"""What a user may write in a configuration, and what is said about everything else."""

from __future__ import annotations

import ast
import contextlib
import copy
import math
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

import fxshare.config
from fxshare.config import (
    Budget,
    Calibration,
    Planner,
    ShareConfig,
    WeightType,
    dump_config,
    json_schema,
    load_config,
)
from fxshare.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"

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


# What is accepted


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


# Composition and overrides


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


# What is refused: the message names the source, the key, the found, the expected


@pytest.mark.parametrize(
    ("source", "key", "said"),
    [
        ({}, "weight_types", ["required"]),
        ({"weight_types": {}}, "weight_types", ["at least one weight type", "{}"]),
        ({"weight_types": None}, "weight_types", ["a mapping of names", "null"]),
        ({"weight_types": ["a"]}, "weight_types", ["a mapping of names", "['a']"]),
        ({"weight_types": {"attn": "x"}}, "weight_types.attn", ["a mapping", "'x' (text)"]),
        ({"weight_types": {"attn": {}}}, "weight_types.attn.pattern", ["required", "expression"]),
        ({"weight_types": {"a b": {"pattern": "x"}}}, "weight_types.a b", ["spaces", "'a b'"]),
        ({"weight_types": {"a.b": {"pattern": "x"}}}, "weight_types.'a.b'", ["no dots"]),
        ({"weight_types": {"a/b": {"pattern": "x"}}}, "weight_types.a/b", ["slashes"]),
        ({"weight_types": {"": {"pattern": "x"}}}, "weight_types.''", ["a letter or '_'"]),
        ({"weight_types": {"a\n": {"pattern": "x"}}}, r"weight_types.'a\n'", ["a letter or '_'"]),
        (with_type(patern="x"), "weight_types.attn.patern", ["unknown", "'pattern'", "n_kv_head"]),
        (with_type(pattern="a(b"), "weight_types.attn.pattern", ["position 1", "'a(b'"]),
        (with_type(pattern="*.attn"), "weight_types.attn.pattern", ["position 0", "'.*'"]),
        (with_type(pattern=3), "weight_types.attn.pattern", ["expected text", "found 3"]),
        (with_type(split="head"), "weight_types.attn.split", ["'head'", "mean 'heads'"]),
        (with_type(split=1), "weight_types.attn.split", ["true means qkv", "found 1"]),
        (with_type(split=["qkv"]), "weight_types.attn.split", ["['qkv']"]),
        (
            with_type(split="qkv", qkv_order="qkq"),
            "weight_types.attn.qkv_order",
            ["permutation", "'qkq'", "q twice", "v missing"],
        ),
        (
            with_type(split="qkv", qkv_order="qkvx"),
            "weight_types.attn.qkv_order",
            ["'x' not among q, k, v"],
        ),
        (
            with_type(split="qkv", qkv_order="QKV"),
            "weight_types.attn.qkv_order",
            ["q missing, k missing, v missing"],
        ),
        (with_type(split="heads", qkv_order=True), "weight_types.attn.qkv_order", ["text", "true"]),
        (with_type(qkv_order="qkv"), "weight_types.attn.qkv_order", ["add `split: qkv`"]),
        (
            with_type(split="qkv", interleaved=True),
            "weight_types.attn.interleaved",
            ["use `split: heads`", "not one run"],
        ),
        (with_type(interleaved=True), "weight_types.attn.interleaved", ["add `split: heads`"]),
        (
            with_type(split="heads", interleaved=True),
            "weight_types.attn.interleaved",
            ["add `qkv_order: qkv`"],
        ),
        (with_type(interleaved="yes"), "weight_types.attn.interleaved", ["true or false"]),
        (with_type(n_head=0), "weight_types.attn.n_head", ["at least 1", "found 0"]),
        (with_type(n_head="12"), "weight_types.attn.n_head", ["whole number", "'12' (text)"]),
        (with_type(n_head=12.0), "weight_types.attn.n_head", ["whole number", "12.0"]),
        (with_type(n_kv_head=True), "weight_types.attn.n_kv_head", ["true (a boolean)"]),
        (with_type(basis="sites"), "weight_types.attn.basis", ["'slice', 'part' or 'site'"]),
        (
            {**SHARED, "compresion_rate": 1},
            "compresion_rate",
            ["unknown key", "mean 'compression_rate'", "Valid keys: version, weight_types"],
        ),
        ({**SHARED, "rate": 1}, "rate", ["mean 'compression_rate'"]),
        ({**SHARED, "Fuse": True}, "Fuse", ["mean 'fuse'"]),
        ({**SHARED, "version": 2}, "version", ["newer fxshare", "found 2"]),
        ({**SHARED, "version": 0}, "version", ["at least 1"]),
        ({**SHARED, "version": "1"}, "version", ["whole number"]),
        ({**SHARED, "block_pattern": r"h\.\d+"}, "block_pattern", ["layer number", "no group"]),
        ({**SHARED, "block_pattern": "(h"}, "block_pattern", ["position 0"]),
        ({**SHARED, "layer_pattern": "(h"}, "block_pattern", ["position 0"]),
        (
            {**SHARED, "block_pattern": "(a)", "layer_pattern": "(a)"},
            "layer_pattern",
            ["alias of block_pattern", "remove one"],
        ),
        ({**SHARED, "group_size": True}, "group_size", ["whole number", "true (a boolean)"]),
        ({**SHARED, "group_size": 2.5}, "group_size", ["whole number", "2.5"]),
        ({**SHARED, "group_size": 0}, "group_size", ["at least 1", "found 0"]),
        *[
            ({**SHARED, "compression_rate": bad}, "compression_rate", ["fraction", "kept", shown])
            for bad, shown in [
                (math.nan, "nan"),
                (math.inf, "inf"),
                (-math.inf, "-inf"),
                (-0.5, "-0.5"),
                (0, "found 0"),
                (0.0, "found 0.0"),
                (True, "true (a boolean)"),
                ("0.5", "'0.5' (text)"),
                ([0.5], "[0.5]"),
                (10**400, "not finite"),
                (10**5000, "not finite"),
            ]
        ],
        (
            {"weight_types": TYPES, "compression_rate": 0.5},
            "compression_rate",
            ["without group_size", "`group_size: 1` is one basis per matrix"],
        ),
        (
            {"weight_types": TYPES, "group_size": 2},
            "compression_rate",
            ["group_size is (2)", "add compression_rate", "fraction of parameters kept"],
        ),
        ({"weight_types": TYPES, "private": ["mlp"]}, "private", ["without group_size"]),
        (
            {**SHARED, "private": ["mpl"]},
            "private",
            ["'mpl' (text) is no weight type", "mean 'mlp'", "attn, mlp"],
        ),
        ({**SHARED, "private": "mlp"}, "private", ["expected a list", "'mlp' (text)"]),
        ({**SHARED, "private": {"mlp"}}, "private", ["expected a list", "{'mlp'}"]),
        ({**SHARED, "private": [1]}, "private.0", ["expected text", "found 1"]),
        ({**SHARED, "passes": ["a.b"]}, "passes.0", ["'package.module:Name'", "'a.b'"]),
        ({**SHARED, "passes": ["a:B", "a.b:"]}, "passes.1", ["'package.module:Name'"]),
        ({**SHARED, "passes": ["a..b:C"]}, "passes.0", ["'package.module:Name'"]),
        ({**SHARED, "passes": "a:B"}, "passes", ["expected a list"]),
        ({**SHARED, "fuse": 1}, "fuse", ["true or false", "found 1"]),
        ({**SHARED, "capture": "trace"}, "capture", ["'auto', 'fx', 'export' or 'modules'"]),
        ({**SHARED, "calibration": None}, "calibration", ["a mapping", "null"]),
        ({**SHARED, "calibration": {"tokens": 1}}, "calibration.tokens", ["mean 'max_tokens'"]),
        ({**SHARED, "calibration": {"max_tokens": 0}}, "calibration.max_tokens", ["at least 1"]),
        *[
            (
                {**SHARED, "calibration": {"relative_floor": bad}},
                "calibration.relative_floor",
                ["above 0 and below 1", shown],
            )
            for bad, shown in [(0, "found 0"), (1.0, "1.0"), (math.nan, "nan"), ("x", "'x'")]
        ],
    ],
)
def test_refusals(source: dict[str, Any], key: str, said: list[str]) -> None:
    text = refusal(source)
    assert text.startswith(f"the mapping given: {key}: ")
    assert "\n" not in text
    for part in said:
        assert part in text


def test_all_faults_of_a_file_one_a_line(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        r"""
        weight_types:
            attn: {pattern: 'a(', n_head: 0}
            mlp: {patern: 'b'}
        group_size: 2
        bock_pattern: 'h\.(\d+)'
        calibration: {relative_floor: 2}
        """,
    )
    lines = refusal(path).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    keys = [line.removeprefix(f"{path}: ").split(":")[0] for line in lines]
    assert sorted(keys) == [
        "bock_pattern",
        "calibration.relative_floor",
        "compression_rate",
        "weight_types.attn.n_head",
        "weight_types.attn.pattern",
        "weight_types.mlp.patern",
        "weight_types.mlp.pattern",
    ]


def test_the_fault_is_laid_to_the_source_that_has_it(tmp_path: Path) -> None:
    base = written(tmp_path, NOTEBOOK, "base.yaml")
    over = written(tmp_path, "weight_types: {mlp_c_fc: {split: haeds}}", "over.yaml")
    text = refusal([base, over, {"capture": "x"}], "group_size=true")
    assert sorted(text.splitlines()) == sorted(
        [
            f"{over}: weight_types.mlp_c_fc.split: expected false, qkv, heads or gate_up "
            "(true means qkv); found 'haeds' (text). Did you mean 'heads'?",
            "the mapping given as source 3: capture: expected one of 'auto', 'fx', 'export' or "
            "'modules'; found 'x' (text)",
            "--set group_size=true: group_size: expected a whole number; found true (a boolean)",
        ]
    )


def test_removing_what_is_not_there() -> None:
    text = refusal([SHARED, {"weight_types": {"mpl": None}}])
    assert text.startswith("the mapping given as source 2: weight_types.mpl: null removes")
    assert "Did you mean 'mlp'?" in text
    assert "null removes" in refusal({"weight_types": {"mlp": None}})


def test_private_type_that_was_removed() -> None:
    text = refusal([{**SHARED, "private": ["mlp"]}, {"weight_types": {"mlp": None}}])
    assert "private: 'mlp' (text) is no weight type. Weight types: attn" in text


def test_an_override_of_a_misspelt_type_suggests_it() -> None:
    text = refusal(SHARED, "weight_types.atn.n_head=12")
    assert text.startswith("--set weight_types.atn.n_head=12: weight_types.atn.pattern: required")
    assert text.endswith("Did you mean 'attn'?")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("group_size", "found no '='"),
        ("=2", "empty key"),
        ("calibration..max_tokens=2", "empty key"),
        (".group_size=2", "empty key"),
        ("group_size=", "group_size=null"),
        ("group_size=[", "not valid YAML at line 1, column 2"),
        ("block_pattern=*x", "needs quotes"),
        ("calibration={a: 1, a: 2}", "duplicate key 'a'"),
        ("weight_types={1: 2}", "expected text as a key; found 1"),
        ("grup_size=2", "Did you mean 'group_size'?"),
        ("group_size.x=2", "whole number"),
    ],
)
def test_malformed_overrides(override: str, said: str) -> None:
    text = refusal(SHARED, override)
    assert text.startswith(f"--set {override}: ")
    assert said in text


@pytest.mark.parametrize("overrides", ["group_size=2", None, 3, [3], [None]])
def test_overrides_of_the_wrong_type(overrides: Any) -> None:
    with pytest.raises(ConfigError, match=r"key\.sub=value"):
        load_config(SHARED, overrides=overrides)


@pytest.mark.parametrize("source", [None, 3, b"x.yaml", {1}, [[]], [None], [SHARED, 3]])
def test_sources_of_the_wrong_type(source: Any) -> None:
    assert "a path to a YAML file" in refusal(source)


def test_no_source() -> None:
    assert "the list of sources given is empty" in refusal([])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weight_types:\n  a: {pattern: x\nfuse: true", "not valid YAML at line 3, column 5"),
        ("weight_types:\n\ta: 1", "not valid YAML at line 2, column 1"),
        ("fuse: true\nfuse: false", "at line 2, column 1: duplicate key 'fuse', first given on"),
        ("fuse: true\n'fuse': false", "duplicate key 'fuse', first given on line 1"),
        ("weight_types:\n  a: {pattern: x}\n  a: {pattern: y}", "duplicate key 'a', first given"),
        ("a: \x00", "not valid YAML at line 1, column 4"),
        ("fuse: true\nb: \x07", "not valid YAML at line 2, column 4"),
        ("fuse: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("fuse: 2024-99-99", "a value cannot be read"),
        ("fuse: !!int x", "a value cannot be read"),
        ("fuse: !!bool x", "a value cannot be read"),
        ("fuse: !!timestamp x", "a value cannot be read"),
        ("[" * 3000, "nested too deeply"),
        ("fuse: *x", "undefined alias"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("? [a]\n: 1", "unhashable key"),
        ("", "empty; expected a mapping"),
        ("# nothing\n", "empty; expected a mapping"),
        ("- a\n- b", "expected a mapping with the key weight_types; found ['a', 'b']"),
        ("just text", "found 'just text'"),
        ("1: x", "expected text as a key; found 1"),
        ("on: x", "found true (a boolean) (in YAML, put it in quotes)"),
        ("weight_types: {no: {pattern: x}}", "weight_types: expected text as a key; found false"),
        ("weight_types: {a: {1: x}}", "weight_types.a: expected text as a key; found 1"),
        ("&a {weight_types: *a}", "weight_types"),
    ],
)
def test_yaml_files_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert said in message


def test_merge_keys_are_no_duplicates(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "weight_types:\n"
        "  a: &a {pattern: x, n_head: 4, split: heads}\n"
        "  b: &b {<<: *a, pattern: y}\n"
        "  c: {<<: *b, pattern: z}\n",
    )
    types = load_config(path).weight_types
    assert [t.pattern for t in types.values()] == ["x", "y", "z"]
    assert {t.n_head for t in types.values()} == {4}


def test_aliases_that_fan_out_cost_nothing(tmp_path: Path) -> None:
    lines = ["a0: &a0 {k: v}"]
    for i in range(1, 40):
        lines.append(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}")
    path = written(tmp_path, "\n".join(lines))
    text = refusal([path, path])
    assert "a39: unknown key" in text
    assert len(text) < 20_000


def test_unreadable_paths(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert refusal(missing).startswith(f"{missing}: cannot be read: No such file")
    assert refusal(str(tmp_path)).startswith(f"{tmp_path}: cannot be read")
    assert "cannot be read" in refusal("a\0b")
    assert "cannot be read" in refusal("\ud800.yaml")
    assert "pass YAML text as a mapping" in refusal("weight_types: {}\n")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"fuse: \xff")
    assert refusal(binary) == f"{binary}: expected UTF-8 text; byte 6 is not"


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + NOTEBOOK.encode())
    assert load_config(path).block_pattern == r"h\.(\d+)"


def test_constructors_raise_config_errors_with_all_faults() -> None:
    with pytest.raises(ConfigError) as caught:
        ShareConfig(weight_types={"a": {"pattern": "(", "x": 1}}, fuze=True)  # type: ignore
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines] == [
        " weight_types.a.pattern",
        " weight_types.a.x",
        " fuze",
    ]
    assert all(line.startswith("ShareConfig(...): ") for line in lines)
    with pytest.raises(ConfigError, match=r"WeightType\(\.\.\.\): patern: .* mean 'pattern'"):
        WeightType(pattern="x", patern="y")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"Calibration\(\.\.\.\): max_tokens: "):
        Calibration(max_tokens=0)


# Budget and planner

PLANNED: dict[str, Any] = {"weight_types": TYPES, "budget": {"params_kept": 0.8}}


def test_a_budget_plans() -> None:
    cfg = load_config(PLANNED)
    assert cfg.mode == "planned"
    assert cfg.planner == Planner()
    assert cfg.group_size_of("attn") == 1
    assert load_config(PLANNED, overrides=["budget.flops_kept=0.9"]).budget == Budget(
        params_kept=0.8, flops_kept=0.9
    )
    assert load_config(PLANNED, overrides=["budget=null"]).mode == "exact"


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({}, "budget: expected one limit of params_kept, max_bytes, max_loss_increase"),
        ({"params_kept": 0.8, "max_bytes": 9}, "found params_kept, max_bytes"),
        ({"max_loss_increase": 0.1, "max_bytes": 9}, "found max_bytes, max_loss_increase"),
        ({"params_kept": 0}, "budget.params_kept: expected the fraction of parameters kept"),
        ({"params_kept": True}, "found true (a boolean)"),
        ({"params_kept": math.nan}, "which is not finite"),
        ({"flops_kept": "0.5"}, "found '0.5' (text)"),
        ({"max_bytes": 0.5}, "budget.max_bytes: expected a whole number; found 0.5"),
        ({"max_bytes": 0}, "budget.max_bytes: expected a whole number of at least 1"),
        ({"max_loss_increase": 0}, "an increase of the loss per token in nats"),
        ({"parms_kept": 0.5}, "unknown key. Did you mean 'params_kept'? Valid keys: params_kept"),
        (3, "budget: expected a mapping of keys to values; found 3"),
    ],
)
def test_budgets_that_are_refused(budget: Any, said: str) -> None:
    assert said in refusal({"weight_types": TYPES, "budget": budget})


def test_a_budget_and_a_rate_contradict() -> None:
    assert "a budget plans the ranks, a rate fixes them" in refusal([SHARED, PLANNED])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("strategy", "layer", "expected one of 'auto', 'layers', 'pairs'"),
        ("strategy", "exhaustive", "expected one of 'auto', 'layers', 'pairs'"),
        ("storage", "dense", "expected one of 'auto', 'plain' or 'pivoted'"),
        ("storag", "plain", "unknown key. Did you mean 'storage'?"),
        ("max_group", 0, "a whole number of at least 1"),
        ("rank_multiple", 0, "a whole number of at least 1"),
        ("floor", 1.5, "a share of the dense cost, a number from 0 to 1; found 1.5"),
        ("ceiling", -1, "a share of the dense cost, a number from 0 to 1; found -1"),
        ("keep_dense", 3, "planner.keep_dense: expected a list"),
        ("keep_dense", ["1"], "planner.keep_dense.0: expected a whole number; found '1' (text)"),
        ("keep_dense", [True], "planner.keep_dense.0: expected a whole number; found true"),
        ("may_share", [["attn", "mpl"]], "'mpl' (text) is no weight type. Did you mean 'mlp'?"),
        ("may_share", ["attn"], "planner.may_share.0: expected a list of names, such as [a, b]"),
        ("tie", [[1]], "planner.tie.0.0: expected text; found 1"),
        ("search", "of", "planner.search: expected one of 'off', 'quick' or 'thorough'"),
        ("search", True, "planner.search: expected one of 'off', 'quick' or 'thorough'"),
        ("remeasure", -1, "a whole number of at least 0; found -1"),
        ("refit", 1, "planner.refit: expected true or false; found 1"),
        ("bias", "no", "planner.bias: expected true or false; found 'no' (text)"),
        ("labels", "model", "expected one of 'data' or 'sampled'"),
    ],
)
def test_planner_keys_that_are_refused(key: str, value: Any, said: str) -> None:
    assert said in refusal([PLANNED, {"planner": {key: value}}])


def test_keys_of_the_planner_that_contradict() -> None:
    assert "floor 0.5 is above ceiling 0.4" in refusal(
        PLANNED, "planner.floor=0.5", "planner.ceiling=0.4"
    )
    for cfg in ({"weight_types": TYPES}, SHARED):
        assert "found without budget, where it has no effect" in refusal(cfg, "planner.floor=0.5")


def test_a_bare_off_is_off(tmp_path: Path) -> None:
    """YAML 1.1 reads it as false."""
    path = written(tmp_path, "planner: {search: off}")
    assert load_config([PLANNED, path]).planner.search == "off"
    assert load_config(PLANNED, overrides=["planner.search=off"]).planner.search == "off"


shares = st.floats(0, 1, exclude_min=True)


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    flops = draw(st.none() | shares)
    limits: list[Budget] = [
        Budget(params_kept=draw(shares), flops_kept=flops),
        Budget(max_bytes=draw(st.integers(1)), flops_kept=flops),
        Budget(max_loss_increase=draw(shares), flops_kept=flops),
        Budget(flops_kept=draw(shares)),
    ]
    return draw(st.sampled_from(limits))


@st.composite
def planners(draw: st.DrawFn) -> Planner:
    floor, ceiling = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    names = st.lists(st.lists(st.sampled_from(["attn", "mlp"]), max_size=3), max_size=2)
    return Planner(
        strategy=draw(st.sampled_from(["auto", "layers", "pairs", "separate"])),
        storage=draw(st.sampled_from(["auto", "plain", "pivoted"])),
        max_group=draw(st.none() | st.integers(1, 9)),
        rank_multiple=draw(st.none() | st.integers(1, 9)),
        floor=floor,
        ceiling=ceiling,
        keep_dense=tuple(draw(st.lists(st.integers(), max_size=3))),
        may_share=tuple(map(tuple, draw(names))),
        tie=tuple(map(tuple, draw(names))),
        search=draw(st.sampled_from(["off", "quick", "thorough"])),
        remeasure=draw(st.integers(0, 3)),
        refit=draw(st.none() | st.booleans()),
        bias=draw(st.booleans()),
        labels=draw(st.sampled_from(["data", "sampled"])),
    )


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(budgets(), planners())
def test_dumped_plans_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, budget: Budget, planner: Planner
) -> None:
    cfg = ShareConfig(weight_types=TYPES, budget=budget, planner=planner)
    path = tmp_path_factory.getbasetemp() / "planned.yaml"
    path.write_text(dump_config(cfg), encoding="utf-8")
    assert load_config(path) == cfg


# Properties

patterns = st.text(max_size=8).filter(lambda text: _compiles(text))


def _compiles(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


heads = st.none() | st.integers(1, 64)


@st.composite
def weight_types(draw: st.DrawFn) -> WeightType:
    splits: list[Literal[False, "qkv", "heads"]] = [False, "qkv", "heads"]
    bases: list[Literal["slice", "part", "site"]] = ["slice", "part", "site"]
    split = draw(st.sampled_from(splits))
    order = draw(st.none() | st.permutations("qkv").map("".join)) if split else None
    return WeightType(
        pattern=draw(patterns),
        split=split,
        qkv_order=order,
        n_head=draw(heads),
        n_kv_head=draw(heads),
        interleaved=draw(st.booleans()) if split == "heads" and order else False,
        basis=draw(st.sampled_from(bases)),
    )


@st.composite
def configs(draw: st.DrawFn) -> ShareConfig:
    names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]*", fullmatch=True)
    types = draw(st.dictionaries(names, weight_types(), min_size=1, max_size=4))
    sharing = draw(st.booleans())
    rates = st.floats(0, exclude_min=True, allow_infinity=False)
    floors = st.floats(0, 1, exclude_min=True, exclude_max=True)
    return ShareConfig(
        weight_types=types,
        block_pattern=draw(st.none() | patterns.map(lambda p: f"({p})").filter(_compiles)),
        group_size=draw(st.integers(1, 99)) if sharing else None,
        compression_rate=draw(rates) if sharing else None,
        private=tuple(draw(st.lists(st.sampled_from(sorted(types))))) if sharing else (),
        fuse=draw(st.booleans()),
        passes=tuple(draw(st.lists(st.sampled_from(["a:B", "a.b:C"])))),
        calibration=Calibration(max_tokens=draw(heads), relative_floor=draw(floors)),
        capture=draw(st.sampled_from(["auto", "fx", "export", "modules"])),
    )


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(configs())
def test_dump_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, cfg: ShareConfig) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(cfg), encoding="utf-8")
    assert load_config(path) == cfg
    assert load_config([{"fuse": not cfg.fuse}, path]) == cfg


@pytest.mark.parametrize("text", ["1e-8", "null", "no", "12", "*a", " x ", "", "\ud800", "\x85\n"])
def test_dump_keeps_text_as_text(tmp_path: Path, text: str) -> None:
    # `*a` is no regular expression, but `\*a` is: escape what YAML, not `re`, must be asked about.
    cfg = ShareConfig(weight_types={"a": WeightType(pattern=re.escape(text).replace(r"\-", "-"))})
    assert load_config(written(tmp_path, dump_config(cfg))) == cfg


KEYS = [
    *ShareConfig.model_fields,
    *WeightType.model_fields,
    *Calibration.model_fields,
    *Budget.model_fields,
    *Planner.model_fields,
    "layer_pattern",
    "attn",
    "mlp",
]
KEYS_OF_A_TYPE = [key for key in WeightType.model_fields if key != "pattern"]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["qkv", "heads", "slice", r"h\.(\d+)", "attn", "a.b:C", "auto", 10**400])
)
keys = st.sampled_from(KEYS) | st.text(max_size=4) | st.integers() | st.none() | st.booleans()
values = st.recursive(
    scalars | st.binary(max_size=3) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=4)
        | st.lists(inner, max_size=2).map(tuple)
    ),
    max_leaves=12,
)
sections = st.dictionaries(st.sampled_from(KEYS), values, max_size=5)
near_valid = st.fixed_dictionaries(
    {
        "weight_types": st.dictionaries(
            st.sampled_from(["attn", "mlp"]),
            st.fixed_dictionaries(
                {"pattern": patterns}, optional=dict.fromkeys(KEYS_OF_A_TYPE, values)
            )
            | st.none(),
            max_size=2,
        )
    },
    optional=dict.fromkeys((k for k in KEYS if k != "weight_types"), values),
)
mappings = st.dictionaries(keys, values, max_size=4) | sections | near_valid


def check_outcome(source: Any, *overrides: str) -> None:
    """A configuration, or a ConfigError, and the source as it was."""
    before = copy.deepcopy(source)
    cfg: object = None
    with contextlib.suppress(ConfigError):
        cfg = load_config(source, overrides=overrides)
        assert isinstance(cfg, ShareConfig)
    if isinstance(cfg, ShareConfig):
        assert load_config(yaml.safe_load(dump_config(cfg))) == cfg
    assert source == before


fuzz = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


@fuzz
@given(mappings)
@example({"weight_types": {"a": {"pattern": "(" * 5000}}})
@example({"weight_types": {"a": {"pattern": "a{99999999999999999999}"}}})
@example({**SHARED, "compression_rate": 10**4000})
def test_any_mapping_is_a_config_or_a_config_error(source: dict[Any, Any]) -> None:
    check_outcome(source)


@fuzz
@given(st.lists(mappings, max_size=3))
def test_any_composition_is_a_config_or_a_config_error(sources: list[dict[Any, Any]]) -> None:
    check_outcome([SHARED, *sources])


@fuzz
@given(
    st.text(max_size=20)
    | st.tuples(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3), st.text(max_size=8)).map(
        lambda pair: f"{'.'.join(pair[0])}={pair[1]}"
    )
)
def test_any_override_is_a_config_or_a_config_error(override: str) -> None:
    check_outcome(SHARED, override)


@fuzz
@given(st.binary(max_size=40) | st.text(st.characters(codec="utf-8"), max_size=40).map(str.encode))
@example(b"\xff\xfe")
@example(b"{" * 1500)
@example(b"- ? ! &")
def test_any_file_is_a_config_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    check_outcome(path)
    check_outcome([SHARED, path])


@fuzz
@given(mappings.map(lambda source: {str(key): value for key, value in source.items()}))
def test_constructors_raise_nothing_but_config_errors(source: dict[str, Any]) -> None:
    for section in (ShareConfig, WeightType, Calibration, Budget, Planner):
        with contextlib.suppress(ConfigError):
            section(**source)


# Schema, imports


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


def test_the_module_imports_neither_torch_nor_transformers() -> None:
    tree = ast.parse(Path(fxshare.config.__file__).read_text(encoding="utf-8"))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & {"torch", "transformers", "passes", "numpy"}
