"""Written and read back equal; anything else is a configuration error and never another."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fxshare.config import (
    Budget,
    Calibration,
    Planner,
    ShareConfig,
    WeightType,
    dump_config,
    load_config,
)
from fxshare.errors import ConfigError
from tests.config.build import SHARED, written

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


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
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


fuzz = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


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
