"""What is refused: the message names the source, the key, the found, the expected."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fxshare.config import Calibration, ShareConfig, WeightType, load_config
from fxshare.errors import ConfigError
from tests.config.build import NOTEBOOK, SHARED, TYPES, refusal, with_type, written


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
