"""The files of a folder, and the structure of the original, each by itself."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fxshare.errors import CheckFailed, StoreError
from fxshare.models.source import EMBEDDED, EMBEDDED_CLASS, TRANSFORMERS, USER, Source
from fxshare.store.folder import new_folder
from fxshare.store.manifest import (
    Manifest,
    SavedSource,
    file_entry,
    read_manifest,
    read_text,
    verify_files,
)
from fxshare.store.probe import take
from fxshare.store.skeleton import _offline, skeleton
from fxshare.store.tokenizer import write_tokenizer
from fxshare.store.transformers import write_hf_configs

# The manifest --------------------------------------------------------------------------------


def _seal(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "fxshare.json").write_text(json.dumps({**content, "sha256": digest}))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("k" * 80, "versions." + "k" * 80 + ": "),
        ("k" * 81, "versions.'kkk"),
        ("a\nb", r"versions.'a\nb': "),
    ],
)
def test_where_a_manifest_is_wrong_is_said_in_short(key: str, said: str, tmp_path: Path) -> None:
    _seal(tmp_path, {"format": "fxshare", "versions": {key: 3}})
    with pytest.raises(StoreError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'fxshare.json'}: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"format": "fxshare", "format_version": 3},
            "format version 3, this fxshare reads up to 2",
        ),
        ({"format": "other"}, "is not the manifest of an fxshare folder"),
        ([], "is not the manifest of an fxshare folder"),
        ({"format": "fxshare"}, "versions: Field required"),
    ],
)
def test_what_is_no_manifest(content: Any, reason: str, tmp_path: Path) -> None:
    if isinstance(content, dict):
        _seal(tmp_path, content)
    else:
        (tmp_path / "fxshare.json").write_text(json.dumps(content))
    with pytest.raises(StoreError, match=reason):
        read_manifest(tmp_path)


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff")
    (tmp_path / "y").write_bytes("é".encode())
    assert read_text(tmp_path, "y") == "é"
    with pytest.raises(StoreError, match=r"cannot read .*x: "):
        read_text(tmp_path, "x")
    with pytest.raises(StoreError, match="z is missing; copy the folder again"):
        read_text(tmp_path, "z")


def _files(folder: Path) -> dict[str, Any]:
    for name in ("config.yaml", "plan.json", "report.json", "README.md", "model.safetensors"):
        (folder / name).write_text(name)
    return {path.name: file_entry(path) for path in folder.iterdir()}


def test_a_file_has_its_size_and_hash(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "x").write_bytes(data)
    entry = file_entry(tmp_path / "x")
    assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_files_that_are_as_listed_pass(tmp_path: Path) -> None:
    manifest: Any = SimpleNamespace(files=_files(tmp_path))
    (tmp_path / "README.md").unlink()  # for people
    (tmp_path / "another").write_text("not listed")
    verify_files(tmp_path, manifest)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("plan.json", lambda path: path.unlink(), r"plan\.json is missing: fxshare\.json lists it"),
        ("plan.json", lambda path: path.write_text("plan.jso"), "expected 9 bytes, found 8"),
        ("plan.json", lambda path: path.write_text("plan.jsox"), r"plan\.json was altered: its"),
        ("model.safetensors", lambda path: path.write_text(""), "expected 17 bytes, found 0"),
    ],
)
def test_a_file_that_is_not_as_listed_is_named(
    name: str, change: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    manifest: Any = SimpleNamespace(files=_files(tmp_path))
    change(tmp_path / name)
    with pytest.raises(StoreError, match=reason):
        verify_files(tmp_path, manifest)


def test_what_loading_reads_is_listed_and_lies_in_the_folder(tmp_path: Path) -> None:
    files = _files(tmp_path)
    for name in ("config.yaml", "plan.json", "report.json"):
        rest: Any = SimpleNamespace(files={key: one for key, one in files.items() if key != name})
        with pytest.raises(StoreError, match=f"does not list {name}"):
            verify_files(tmp_path, rest)
    (tmp_path.parent / "outside").write_text("x")
    outside: Any = SimpleNamespace(
        files={**files, "../outside": file_entry(tmp_path.parent / "outside")}
    )
    with pytest.raises(StoreError, match="outside is missing"):
        verify_files(tmp_path, outside)


@pytest.mark.parametrize(
    ("steps", "legal"),
    [
        ((), True),
        (("memory", "readable", "speed"), True),
        (("memory",) * 64, True),
        (("memory",) * 65, False),
        (("readable",), False),
        (("speed", "readable", "readable"), False),
    ],
)
def test_steps_of_lowering(steps: tuple[Any, ...], legal: bool) -> None:
    if legal:
        assert Manifest._is_legal(steps) == steps
        return
    with pytest.raises(ValueError, match=r"at most 64 steps; found 65|'readable' after 'memory'"):
        Manifest._is_legal(steps)


# The folder ----------------------------------------------------------------------------------


def _write(path: Path, *, force: bool = False, after: Callable[[], object] = lambda: None) -> None:
    with new_folder(path, force=force) as folder:
        (folder / "fxshare.json").write_text("new")
        after()


def test_a_new_folder_takes_its_place_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_folder(target, force=False) as folder:
        assert not target.exists()
        (folder / "x").write_text("x")
    assert [path.name for path in target.iterdir()] == ["x"]
    assert list(target.parent.iterdir()) == [target]


def test_what_gives_way_to_a_new_folder(tmp_path: Path) -> None:
    ours, empty, full, file = (tmp_path / name for name in ("ours", "empty", "full", "file"))
    for folder in (ours, empty, full):
        folder.mkdir()
    (ours / "fxshare.json").write_text("old")
    (full / "x").write_text("x")
    file.write_text("x")
    for path in (ours, empty, full, file):
        with pytest.raises(StoreError, match=f"{path.name} exists; choose another name"):
            _write(path)
    for path in (ours, empty):
        _write(path, force=True)
        assert (path / "fxshare.json").read_text() == "new"
    with pytest.raises(StoreError, match="file is a file; force=True replaces only folders"):
        _write(file, force=True)
    with pytest.raises(StoreError, match=r"full has files and no fxshare\.json, so fxshare did"):
        _write(full, force=True)
    with pytest.raises(StoreError, match="expected the name of a folder"):
        _write(Path("/"))
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "empty", "full", "file"}


def test_a_link_stays_one_and_what_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    _write(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "fxshare.json").read_text() == "new"
    with pytest.raises(ZeroDivisionError):
        _write(tmp_path / "real", force=True, after=lambda: 1 // 0)
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["fxshare.json"]


# Tokenizers, and the files of transformers ---------------------------------------------------


def test_the_files_of_a_tokenizer_are_copied_and_no_others(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "Mine", "x": 1}')
    for name in ("vocab.txt", "model.safetensors", "evil.py"):
        (source / name).write_text(name)
    write_tokenizer(source, folder)
    assert {path.name for path in folder.iterdir()} == {"tokenizer_config.json", "vocab.txt"}
    for path in folder.iterdir():
        assert path.read_bytes() == (source / path.name).read_bytes()
    write_tokenizer(str(folder), source)
    (tmp_path / "none").mkdir()
    write_tokenizer(tmp_path / "none", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "none"}
    with pytest.raises(StoreError, match="expected a folder with tokenizer files, found no"):
        write_tokenizer(tmp_path / "nowhere", folder)


@pytest.mark.parametrize("config", [None, {"x": 1}])
def test_the_class_of_a_tokenizer_is_written_down(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It follows from the model's type otherwise, and that is ours."""
    transformers = pytest.importorskip("transformers")
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    (source / "vocab.txt").write_text("a")
    if config is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    asked: list[object] = []

    def from_pretrained(path: Path, **options: Any) -> object:
        asked.append((path, options))
        return type("Theirs", (), {})()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    write_tokenizer(source, folder)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    assert written == {**(config or {}), "tokenizer_class": "Theirs"}
    assert asked == [(source, {"local_files_only": True, "trust_remote_code": False})]
    write_tokenizer(folder, source)  # it is known there
    (tmp_path / "none").mkdir()
    write_tokenizer(tmp_path / "none", tmp_path)
    assert len(asked) == 1


def test_a_tokenizer_writes_itself(tmp_path: Path) -> None:
    given: list[str] = []
    write_tokenizer(SimpleNamespace(save_pretrained=given.append), tmp_path)
    assert given == [str(tmp_path)]
    nothing: Any = 3
    with pytest.raises(StoreError, match="a tokenizer with save_pretrained, found a int"):
        write_tokenizer(nothing, tmp_path)


@pytest.mark.parametrize("several", [None, True])
def test_a_model_of_transformers_has_its_two_files(several: bool | None, tmp_path: Path) -> None:
    config = {"n": 1} if several is None else {"n": 1, "is_encoder_decoder": several}
    write_hf_configs(Source(TRANSFORMERS, "a:B", config, {"top_k": 5}), tmp_path, dtype="float16")
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_type": "fxshare",
        "architectures": ["FxShareModel"],
        "dtype": "float16",
        "is_encoder_decoder": bool(several),
        "original": config,
    }
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"top_k": 5}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (Source(TRANSFORMERS, "a:B", {"n": 1}, None), {"config.json"}),
        (Source(TRANSFORMERS, "a:B", None, {"top_k": 5}), set()),
        (Source(EMBEDDED, "a:B", {"n": 1}, {"top_k": 5}), set()),
        (Source(USER, "a:B", None, None), set()),
    ],
)
def test_what_has_no_configuration_of_transformers(
    source: Source, names: set[str], tmp_path: Path
) -> None:
    write_hf_configs(source, tmp_path, dtype="float32")
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_configuration_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"config\.json cannot be written as JSON"):
        write_hf_configs(Source(TRANSFORMERS, "a:B", {"n": {1}}, None), tmp_path, dtype="float32")


# The structure -------------------------------------------------------------------------------


def test_nothing_that_loads_from_elsewhere_stays_in_a_configuration() -> None:
    config = {
        "auto_map": {"AutoModel": "evil.Model"},
        "use_pretrained_backbone": True,
        "parts": [{"auto_map": 1, "n": 2}, {"use_pretrained_backbone": True}],
        "_attn_implementation": "sdpa",
        "experts_implementation": {"": "eager", "text": None},
        "attention": "someone/kernels",
    }
    assert _offline(config, "Net") == {
        "use_pretrained_backbone": False,
        "parts": [{"n": 2}, {"use_pretrained_backbone": False}],
        "_attn_implementation": "sdpa",
        "experts_implementation": {"": "eager", "text": None},
        "attention": "someone/kernels",
    }
    with pytest.raises(StoreError, match="Net was compiled with _attn_implementation 'a/b'"):
        _offline({"x": [{"_attn_implementation": "a/b"}]}, "Net")
    with pytest.raises(StoreError, match="may fetch"):
        _offline({"experts_implementation": {"": "eager", "text": "a/b"}}, "Net")


def _source(kind: str, class_name: str = "a:B", config: Any = None, generation: Any = None) -> Any:
    return SavedSource(
        kind=kind, class_name=class_name, config=config, generation_config=generation
    )


GPT2_CLASS = "transformers.models.gpt2.modeling_gpt2:GPT2LMHeadModel"
GPT2_SIZES = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 8}


def test_a_class_of_transformers_is_made_without_values() -> None:
    pytest.importorskip("transformers")
    made = skeleton(_source(TRANSFORMERS, GPT2_CLASS, GPT2_SIZES, {"top_k": 7}), None)
    assert type(made).__name__ == "GPT2LMHeadModel"
    assert {p.device.type for p in made.parameters()} == {"meta"}
    assert made.generation_config.top_k == 7


@pytest.mark.parametrize(
    ("class_name", "config", "reason"),
    [
        (GPT2_CLASS, {**GPT2_SIZES, "n_head": 3}, "cannot build .*GPT2LMHeadModel from the folder"),
        ("os:system", {}, "'os:system' is not a model class that transformers"),
        ("transformers.x:GPT2Config", {}, "is not a model class"),
        ("transformers.x:_LazyModule", {}, "is not a model class"),
        ("transformers.x:Nothing", {}, "is not a model class"),
        ("other.x:GPT2LMHeadModel", GPT2_SIZES, "is not a model class"),
    ],
)
def test_a_class_of_transformers_that_is_none(class_name: str, config: Any, reason: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(StoreError, match=reason):
        skeleton(_source(TRANSFORMERS, class_name, config), None)


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(StoreError, match="install transformers"):
        skeleton(_source(TRANSFORMERS, GPT2_CLASS, GPT2_SIZES), None)


def test_the_embedded_model_is_made_of_its_sizes_only() -> None:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "vocab_size": 11}
    made = skeleton(_source(EMBEDDED, EMBEDDED_CLASS, sizes), None)
    assert {p.device.type for p in made.parameters()} == {"meta"}
    for class_name, config, reason in (
        ("a:B", sizes, "expected the embedded class .*, found 'a:B'"),
        (EMBEDDED_CLASS, {**sizes, "colour": 1}, "cannot be built from the folder's configuration"),
    ):
        with pytest.raises(StoreError, match=reason):
            skeleton(_source(EMBEDDED, class_name, config), None)
    with pytest.raises(StoreError, match=r"cannot be built .*more than"):
        skeleton(_source(EMBEDDED, EMBEDDED_CLASS, sizes), None, most=3)


@pytest.mark.parametrize("kind", [USER, TRANSFORMERS, EMBEDDED])
def test_a_structure_that_no_folder_has_must_be_given(kind: str) -> None:
    config = {} if kind == USER else None
    with pytest.raises(StoreError, match="the folder holds a compiled a:B, whose structure only"):
        skeleton(_source(kind, config=config), None)


def _drawn() -> nn.Module:
    return nn.Linear(2, 2)


def test_a_given_structure_is_taken() -> None:
    source, one = _source(TRANSFORMERS, GPT2_CLASS, GPT2_SIZES), nn.Linear(2, 2)
    assert skeleton(source, one) is one
    assert skeleton(source, nn.Identity) is not None
    before = torch.random.get_rng_state()
    assert isinstance(skeleton(source, f"{__name__}:_drawn"), nn.Linear)
    assert torch.equal(torch.random.get_rng_state(), before)
    given: Any
    for given, reason in (
        (3, "found int"),
        (lambda: 3, "expected the function to make an nn.Module, found 3"),
        (f"{__name__}:nothing", "cannot import"),
        ("no_such_package:x", "cannot import"),
    ):
        with pytest.raises(StoreError, match=f"model: .*{reason}"):
            skeleton(source, given)


# Probes --------------------------------------------------------------------------------------


def _record(value: torch.Tensor, front_end: str = "fx") -> Any:
    """Of a module that was called with this."""
    calls = [{"input": value}]
    return SimpleNamespace(front_end=front_end, random_call=lambda at, **_: calls[at])


def test_a_probe_has_values_from_the_first_to_the_last() -> None:
    module, x = nn.Linear(3, 20), torch.randn(2, 3)
    found = take(module, _record(x), seed=3)
    flat = module(x).detach().double().flatten()
    assert (len(found.values), found.shape, found.seed) == (32, (2, 20), 3)
    assert (found.values[0], found.values[-1]) == (float(flat[0]).hex(), float(flat[-1]).hex())
    assert found.scale == float(flat.abs().max())
    few = take(nn.Linear(3, 1), _record(x), seed=3)
    assert len(few.values) == 2
    assert take(nn.Identity(), _record(torch.zeros(0)), seed=3).values == ()


def test_a_probe_has_the_largest_finite_magnitude() -> None:
    values = torch.tensor([1.0, -2.0, float("inf"), float("nan")])
    assert take(nn.Identity(), _record(values), seed=0).scale == 2.0
    assert take(nn.Identity(), _record(values[2:]), seed=0).scale == 0.0
    with pytest.raises(CheckFailed, match="Identity has no floating-point output"):
        take(nn.Identity(), _record(torch.tensor([1])), seed=0)


@pytest.mark.parametrize(
    ("front_end", "dtype", "expected"),
    [
        ("fx", torch.bfloat16, "float32"),
        ("modules", torch.float16, "float32"),
        ("export", torch.bfloat16, "bfloat16"),
        ("fx", torch.float64, "float64"),
    ],
)
def test_half_precision_is_probed_in_float32(
    front_end: str, dtype: torch.dtype, expected: str
) -> None:
    module = nn.Linear(3, 2).to(dtype)
    found = take(module, _record(torch.ones(2, 3, dtype=dtype), front_end), seed=0)
    assert found.dtype == expected
    assert module.weight.dtype is dtype
