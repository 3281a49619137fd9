"""What a folder consists of, each part by itself: sizes, calls, tensors, values of a probe."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fxshare.errors import StoreError
from fxshare.models.source import EMBEDDED, TRANSFORMERS, USER
from fxshare.plans.plan import Group, Plan
from fxshare.result.inputs import InputSpec
from fxshare.sites.site import Site, SliceSpec
from fxshare.store.calls import decode_inputs, encode_inputs
from fxshare.store.card import card
from fxshare.store.manifest import SavedSource, TensorEntry
from fxshare.store.pretrained import save_pretrained
from fxshare.store.probe import Probe, distance
from fxshare.store.sizes import (
    check_embedded,
    check_inputs,
    check_plan_sizes,
    check_sizes,
    most_modules,
)
from fxshare.store.skeleton import skeleton
from fxshare.store.tensors import fill, is_tensor_file, tensors_of, write_tensors

HERE = Path("folder")
CPU = torch.device("cpu")


# Sizes ---------------------------------------------------------------------------------------


def _entry(*shape: int, dtype: str = "float32", **given: Any) -> TensorEntry:
    return TensorEntry(kind="parameter", dtype=dtype, shape=shape, **given)


def _manifest(
    config: Mapping[str, Any] | None = None,
    *,
    held: int = 24,
    tensors: Mapping[str, TensorEntry] | None = None,
) -> Any:
    """Of a folder with a tensor of six numbers, 24 bytes, and one more name for it."""
    known = {"a": _entry(2, 3), "b": _entry(2, 3, same_as="a"), "c": _entry(9, shares="a")}
    files = {"model.safetensors": SimpleNamespace(bytes=held), "x.json": SimpleNamespace(bytes=99)}
    return SimpleNamespace(
        tensors=known if tensors is None else tensors,
        files=files,
        source=SimpleNamespace(config=config),
    )


def test_tensors_are_held_to_the_bytes_of_their_files() -> None:
    check_sizes(HERE, _manifest())
    with pytest.raises(StoreError, match="need 24 bytes, and the files of tensors have 23"):
        check_sizes(HERE, _manifest(held=23))
    with pytest.raises(StoreError, match="need 48 bytes"):
        check_sizes(HERE, _manifest(tensors={"a": _entry(2, 3, dtype="float64")}))


@pytest.mark.parametrize("key", ["n_layer", "num_heads", "depth", "depths", "num_labels", "layers"])
def test_what_counts_modules_is_held_to_the_numbers(key: str) -> None:
    check_sizes(HERE, _manifest({key: 4096}))
    reason = rf"source\.config\.{key} is 4097, more than all numbers in the folder \(4,096\)"
    nested: list[dict[str, Any]] = [{key: 4097}, {key: [1, 4097]}, {"text": {key: 4097}}]
    for config in nested:
        with pytest.raises(StoreError, match=reason):
            check_sizes(HERE, _manifest(config))
    many = {"a": _entry(5000, dtype="int8")}
    check_sizes(HERE, _manifest({key: 5000}, held=5000, tensors=many))
    with pytest.raises(StoreError, match=key):
        check_sizes(HERE, _manifest({key: 5001}, held=5000, tensors=many))


def test_what_counts_no_modules_may_be_any_number() -> None:
    check_sizes(HERE, _manifest({"rope_theta": 1e6, "eos_token_id": 10**6, "text": {"seed": 9999}}))


def _plan(features: int = 2, out: int = 3) -> Plan:
    slices = (SliceSpec(name="w", start=0, stop=out),)
    sizes = {"in_features": features, "out_features": out}
    site = Site(name="w", calls=("w",), type="w", layer=None, bias=False, slices=slices, **sizes)
    group = Group(name="b", type="w", label="", layers=(), slices=("w",), rank=1, **sizes)
    return Plan(mode="planned", sites=(site,), groups=(group,))


def test_the_sizes_of_a_plan_are_held_to_the_numbers() -> None:
    check_plan_sizes(HERE, _manifest(), _plan(1, 6))
    with pytest.raises(StoreError, match=r"plan\.json: 'w' is 1 → 7, and the folder has 6 numbers"):
        check_plan_sizes(HERE, _manifest(), _plan(1, 7))
    with pytest.raises(StoreError, match=r"'w' is 7 → 1"):
        check_plan_sizes(HERE, _manifest(), _plan(7, 1))
    grown = _plan().groups[0].model_copy(update={"in_features": 0})
    with pytest.raises(StoreError, match=r"'b' is 0 → 3"):
        check_plan_sizes(HERE, _manifest(), _plan().model_copy(update={"groups": (grown,)}))


def _spec(*shape: int, low: float = 0.0, high: float = 1.0) -> InputSpec:
    return InputSpec(shape, "float32", low, high)


@pytest.mark.parametrize(
    "spec", [_spec(1024, 1024), _spec(*[1] * 16), _spec(0), _spec(), _spec(3, low=1.0)]
)
def test_example_calls_of_such_sizes_are_run(spec: InputSpec) -> None:
    check_inputs(HERE, _manifest(), ({"x": [spec, 3, None]},))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (_spec(1024, 1025), r"inputs\.x: .* has 1\.05e\+06 numbers; expected at most 1,048,576"),
        (_spec(*[1] * 17), "expected sizes of at least 0, 16 at most"),
        (_spec(2, -1), "expected sizes of at least 0"),
        (_spec(2, low=1.0, high=0.0), r"expected a finite range, found 1\.0 to 0\.0"),
        (_spec(2, low=-math.inf), "expected a finite range"),
        (_spec(2, high=math.inf), "expected a finite range"),
        (_spec(2, high=math.nan), "expected a finite range"),
    ],
)
def test_example_calls_of_other_sizes_are_not(spec: InputSpec, reason: str) -> None:
    with pytest.raises(StoreError, match=reason):
        check_inputs(HERE, _manifest(), ({"y": _spec(1)}, {"x": {"in": (spec,)}}))


def test_a_larger_model_may_have_larger_examples() -> None:
    tensors = {"a": _entry(1100, 1000, dtype="int8")}
    check_inputs(HERE, _manifest(tensors=tensors), ({"x": _spec(1100, 1000)},))
    with pytest.raises(StoreError, match="expected at most 1,100,000"):
        check_inputs(HERE, _manifest(tensors=tensors), ({"x": _spec(1101, 1000)},))


def test_modules_rise_with_the_tensors() -> None:
    assert [most_modules(tensors) for tensors in (0, 1, 100)] == [4096, 4112, 5696]


def test_the_embedded_model_is_counted_on_paper() -> None:
    sizes = {"n_layer": 1, "n_embd": 2, "vocab_size": 5, "block_size": 4}
    # a layer of 4 · 2² and 2 · 2 · 8, and rows of 2 for 5 words and 4 positions
    stored, plan = {"a": _entry(60)}, _plan(2, 3)
    check_embedded(HERE, _manifest(sizes, tensors=stored), plan)
    check_embedded(HERE, _manifest({**sizes, "n_ffn": 8}, tensors=stored), plan)
    check_embedded(HERE, _manifest({**sizes, "n_ffn": None}, tensors=stored), plan)
    for key, value in (("n_layer", 2), ("n_embd", 3), ("vocab_size", 7), ("block_size", 6)):
        with pytest.raises(StoreError, match="parameters, and the folder holds what 66 were made"):
            check_embedded(HERE, _manifest({**sizes, key: value}, tensors=stored), plan)
    with pytest.raises(StoreError, match="has 70 parameters"):
        check_embedded(HERE, _manifest({**sizes, "n_ffn": 9}, tensors=stored), plan)


@pytest.mark.parametrize("value", [-1, 1.0, "1", True])
@pytest.mark.parametrize("key", ["n_layer", "n_embd", "vocab_size", "block_size", "n_ffn"])
def test_sizes_of_the_embedded_model_are_whole_numbers(key: str, value: object) -> None:
    with pytest.raises(StoreError, match="expected sizes as whole numbers of at least 0"):
        check_embedded(HERE, _manifest({key: value}), _plan())


# Example calls -------------------------------------------------------------------------------


def test_calls_are_read_as_they_were_written() -> None:
    call = {
        "x": InputSpec((2, 3), "float16", -1.0, 1.0),
        "plain": [None, True, 3, 0.5, "text"],
        "dtype": torch.bfloat16,
        "nested": ([InputSpec((), "int64", 0.0, 9.0)], {"key": (1,), "other": {}}),
    }
    written = encode_inputs([call, {}])
    assert decode_inputs(json.loads(json.dumps(written))) == (call, {})
    assert written[0]["x"] == {
        "tensor": {"shape": [2, 3], "dtype": "float16", "low": -1.0, "high": 1.0}
    }


@pytest.mark.parametrize("value", [object(), {1: 2}, {3}, 1j, [slice(1)], ((b"",),)])
def test_a_call_that_no_folder_describes_names_the_argument(value: object) -> None:
    with pytest.raises(StoreError, match="argument 'x' of the example call is a"):
        encode_inputs([{"x": value}])


@pytest.mark.parametrize(
    "value",
    [
        {"call": "os:system"},
        {"dtype": "os"},
        {"dtype": 3},
        {"tuple": 3},
        {"tuple": [], "dict": {}},
        {},
        {"tensor": {"shape": [1], "dtype": "float32", "low": 0.0}},
    ],
)
def test_what_is_no_call_is_refused(value: object) -> None:
    with pytest.raises(StoreError, match="example calls cannot be read"):
        decode_inputs([{"x": value}])
    with pytest.raises(StoreError, match="example calls cannot be read"):
        decode_inputs([{"x": [{"tuple": [{"dict": {"key": value}}]}]}])


def test_a_dtype_that_is_none_is_told_which_there_are() -> None:
    for value in ("os", 3):
        with pytest.raises(StoreError, match=r"cannot be read: .*expected one of float64, .*found"):
            decode_inputs([{"x": {"dtype": value}}])


# Tensors -------------------------------------------------------------------------------------


def _module(*, blank: bool = False) -> nn.Module:
    """Parameters, of which two are one and two have one memory, a buffer and an attribute."""
    torch.manual_seed(1 if blank else 0)
    root = nn.Module()
    root.a = nn.Parameter(torch.randn(2, 3))
    root.b = root.a
    root.view = nn.Parameter(root.a.detach().view(2, 3), requires_grad=False)
    root.turned = nn.Parameter(torch.randn(4, 2).T)
    root.inner = nn.Module()
    root.inner.register_buffer("rows", torch.arange(4), persistent=False)
    root.inner.plain = torch.randn(5)[1:4]
    root.empty = nn.Parameter(torch.randn(0, 2))
    root.void = nn.Parameter(torch.randn(0, 2))
    return root


def _stored(folder: Path, files: list[str]) -> dict[str, Tensor]:
    found = {}
    for file in filter(is_tensor_file, files):
        with safe_open(folder / file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("limit", [10**9, 30, 1])
def test_tensors_come_back_as_they_were(limit: int, mapped: bool, tmp_path: Path) -> None:
    before, after = _module(), _module(blank=True)
    entries, files = write_tensors(tensors_of(before), tmp_path, limit)
    stored = _stored(tmp_path, files)
    assert set(stored) == {"a", "turned", "inner.rows", "inner.plain", "empty", "void"}
    assert entries["b"].same_as == "a"
    assert (entries["view"].same_as, entries["view"].shares) == (None, "a")
    assert entries["turned"].order == (1, 0)
    fill(after, entries, tmp_path, files, CPU, mapped=mapped)
    ours, theirs = tensors_of(after), tensors_of(before)
    assert list(ours) == list(theirs)
    for name, (kind, tensor) in ours.items():
        assert kind == theirs[name][0]
        assert torch.equal(tensor, theirs[name][1])
        assert type(tensor) is type(theirs[name][1])
        assert tensor.stride() == theirs[name][1].stride()
        assert tensor.requires_grad is theirs[name][1].requires_grad
    assert after.b is after.a is not after.view
    assert after.view.data_ptr() == after.a.data_ptr()
    assert _lie_in_file(tmp_path / files[0], ours) is mapped


def _lie_in_file(path: Path, tensors: Mapping[str, tuple[str, Tensor]]) -> bool:
    """Whether the contiguous tensors of a file lie in memory as they do in the file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    starts = {
        tensors[name][1].data_ptr() - entry["data_offsets"][0]
        for name, entry in header.items()
        if name in tensors and name != "turned" and tensors[name][1].numel()
    }
    return len(starts) == 1 and next(iter(starts)) % 4096 == (8 + size) % 4096


@pytest.mark.parametrize(
    ("limit", "sizes"), [(96, [4]), (95, [3, 1]), (48, [2, 2]), (47, [1, 1, 1, 1]), (1, [1] * 4)]
)
def test_a_shard_ends_before_what_does_not_fit(
    limit: int, sizes: list[int], tmp_path: Path
) -> None:
    tensors: Any = {f"w{n}": ("parameter", torch.zeros(2, 3)) for n in range(4)}
    _, files = write_tensors(tensors, tmp_path, limit)
    shards = [file for file in files if is_tensor_file(file)]
    assert [len(_stored(tmp_path, [file])) for file in shards] == sizes
    assert set(files) == {path.name for path in tmp_path.iterdir()}
    if len(sizes) == 1:
        assert files == ["model.safetensors"]
        return
    index = json.loads((tmp_path / files[-1]).read_text())
    assert index["metadata"] == {"total_size": 96}
    assert index["weight_map"] == {
        name: file for file in shards for name in _stored(tmp_path, [file])
    }
    assert shards[0] == f"model-00001-of-{len(sizes):05}.safetensors"


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2, 2).to_sparse(), "expected a dense torch.Tensor, found torch.sparse_coo"),
        (torch.zeros(2, dtype=torch.complex128), "torch.strided, torch.complex128"),
        (torch.zeros(2, device="meta"), "on the meta device"),
        (torch.zeros(2).as_subclass(type("Other", (Tensor,), {})), "found Other"),
    ],
)
def test_what_no_file_holds_is_named(tensor: Tensor, reason: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"tensor 'w'.*{reason}"):
        write_tensors({"w": ("attribute", tensor)}, tmp_path, 10**9)


def test_what_has_memory_of_its_own_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is saved in the memory that it has; a piece of something larger takes its own."""
    saved: dict[str, Tensor] = {}
    monkeypatch.setattr(
        "fxshare.store.tensors.save_file", lambda named, *_, **__: saved.update(named)
    )
    module = _module()
    write_tensors(tensors_of(module), tmp_path, 10**9)
    for name in ("a", "inner.rows"):
        assert saved[name].data_ptr() == tensors_of(module)[name][1].data_ptr()
    assert saved["inner.plain"].untyped_storage().nbytes() == 12


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    entries, files = write_tensors(tensors_of(_module()), tmp_path, 10**9)
    (tmp_path / files[0]).write_bytes((tmp_path / files[0]).read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"cannot read .*model\.safetensors: "):
        fill(_module(), entries, tmp_path, files, CPU)


# Probes --------------------------------------------------------------------------------------


def _probe(*values: float, scale: float = 4.0, **given: Any) -> Probe:
    hexed = tuple(float(value).hex() for value in values)
    fields = {"seed": 0, "dtype": "float32", "output": "", "shape": (len(values),)}
    return Probe(**{**fields, **given}, scale=scale, values=hexed)


@pytest.mark.parametrize(
    ("saved", "found", "expected"),
    [
        (_probe(1.0, 2.0), _probe(1.0, 2.0), 0.0),
        (_probe(1.0, 2.0), _probe(1.5, 1.0), 0.25),
        (_probe(1.0, 2.0), _probe(0.0, 2.0, scale=8.0), 0.25),
        (_probe(math.nan, 2.0), _probe(math.nan, 3.0), 0.25),
        (_probe(math.nan, 2.0), _probe(1.0, 2.0), math.inf),
        (_probe(1.0, 2.0), _probe(1.0, math.nan), math.inf),
        (_probe(math.inf, 2.0), _probe(math.inf, 2.0), 0.0),
        (_probe(1.0, scale=0.5), _probe(1.5), 1.0),
        (_probe(0.0, scale=0.0), _probe(1.0), math.inf),
        (_probe(0.0, scale=0.0), _probe(0.0), 0.0),
        (_probe(1.0), _probe(1.0, shape=(1, 1)), math.inf),
        (_probe(1.0), _probe(1.0, output="[0]"), math.inf),
    ],
)
def test_the_distance_of_probes(saved: Probe, found: Probe, expected: float) -> None:
    assert distance(saved, found) == expected


# save_pretrained -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (7, 7),
        ("7B", 7),
        ("5GB", 5 * 10**9),
        (" 1.5 kb", 1500),
        ("2KiB", 2048),
        ("3MiB", 3 * 2**20),
        ("1TB", 10**12),
    ],
)
def test_sizes_of_shards(size: int | str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "fxshare.store.save.save", lambda gm, path, **options: given.update(options)
    )
    save_pretrained(nn.Module(), "out", max_shard_size=size, token="t", push_to_hub=False)
    assert given == {"force": True, "max_shard_bytes": expected}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_shard_size": "5 apples"}, "expected a number of bytes or a size such as '5GB'"),
        ({"safe_serialization": False}, "would pickle the weights"),
        ({"push_to_hub": True}, "push_to_hub is not supported"),
        ({"state_dict": {}, "a": 1}, "a is not supported"),
    ],
)
def test_options_that_cannot_be_followed(
    options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxshare.store.save.save", lambda *_, **__: pytest.fail("it was saved"))
    with pytest.raises(StoreError, match=f"save_pretrained: .*{reason}"):
        save_pretrained(nn.Module(), "out", **options)


def test_another_process_than_the_main_one_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxshare.store.save.save", lambda *_, **__: pytest.fail("it was saved"))
    save_pretrained(nn.Module(), "out", is_main_process=False)


# The structure, and the card -----------------------------------------------------------------


@pytest.mark.parametrize("key", ["attn_implementation", "_experts_implementation"])
def test_what_is_fetched_is_found_wherever_it_stands(key: str) -> None:
    pytest.importorskip("transformers")
    configs: list[dict[str, Any]] = [
        {key: "kernels-community/evil"},
        {key: {"": "sdpa", "text": "kernels-community/evil"}},
        {"text_config": {key: "kernels-community/evil"}},
        {"parts": [{}, {key: "kernels-community/evil"}]},
    ]
    for config in configs:
        source = SavedSource(
            kind="transformers",
            class_name="transformers.models.gpt2.modeling_gpt2:GPT2LMHeadModel",
            config=config,
            generation_config=None,
        )
        with pytest.raises(StoreError, match=f"compiled with {key} .*may fetch from the network"):
            skeleton(source, None)


@pytest.mark.parametrize(
    ("kind", "passes", "call"),
    [
        (TRANSFORMERS, (), 'fxshare.load("path/to/this/folder")'),
        (USER, (), 'fxshare.load("path/to/this/folder", model=...)'),
        (EMBEDDED, ("p", "q"), 'fxshare.load("path/to/this/folder", passes=[...])'),
        (USER, ("p",), 'fxshare.load("path/to/this/folder", model=..., passes=[...])'),
    ],
)
def test_the_card_says_what_loading_takes(kind: str, passes: tuple[str, ...], call: str) -> None:
    numbers = {"params_kept": 0.5, "numbers_before": 1000, "numbers_after": 500}
    names = {"model": "Net", "mode": "sharing", "front_end": "fx", "dtype": "float32"}
    report = SimpleNamespace(**numbers, **names, to_markdown=lambda: "| a |")
    source = SimpleNamespace(kind=kind, class_name="here:Net")
    record: Any = SimpleNamespace(report=report, source=source, extra_passes=passes)
    text = card(record)
    assert f"model = {call}\n" in text
    assert ("`model` is a `here:Net` of the original sizes" in text) is (kind == USER)
    assert (f"`passes` are, in this order: {', '.join(passes)}." in text) is bool(passes)
    assert "1,000 weights became 500 stored numbers" in text
    assert text.endswith("## Report\n\n| a |")
