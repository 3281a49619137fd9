"""Folders, plans and configurations that were made to do harm: refused, and nothing runs.

The default run puts a few payloads into every kind of field; all payloads into every single field
are ``python -m pytest -m slow tests/store/test_hostile.py``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import fx, nn

import fxshare
from fxshare.base.building import TooMany, at_most
from fxshare.base.json_text import parse_json
from fxshare.capture.signature import method_taking
from fxshare.config import load_config
from fxshare.embedded.model import GPT, GPTConfig
from fxshare.errors import (
    CaptureError,
    ConfigError,
    DataError,
    FxShareError,
    MatchError,
    NameFault,
    PlanError,
    StoreError,
)
from fxshare.exporting.program import _Bare
from fxshare.loading.names import load_model
from fxshare.plans.plan import Plan
from fxshare.sites.patterns import Pattern, may_backtrack
from passes import ShareBasis, SharedGroup, put_module, run
from tests.strategies import no_warnings_of_ours

VOCAB, WIDTH = 19, 16
CONFIG: dict[str, Any] = {
    "weight_types": {"fc": {"pattern": r".*\.c_fc$"}, "proj": {"pattern": r".*mlp\.c_proj$"}},
    "block_pattern": r"h\.(\d+)",
    "group_size": 1,
    "compression_rate": 0.5,
}
SECONDS = 2.0


def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def gm() -> Any:
    """A shared model; tests must not change it."""
    sizes = GPTConfig(n_layer=1, n_head=2, n_embd=WIDTH, block_size=8, vocab_size=VOCAB)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(sizes).eval()
    with no_warnings_of_ours():  # ten tokens are few
        # the largest drawn id must be in the call's range: ids from 0 on
        return fxshare.lower(fxshare.compile(model, CONFIG, calibration=[ids()], capture="fx"))


@pytest.fixture(scope="module")
def original(gm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "out"
    fxshare.save(gm, path)
    return path


@pytest.fixture(scope="module")
def unlowered(gm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a folder that calls its bases by their own names."""
    path = tmp_path_factory.mktemp("unlowered") / "out"
    fxshare.save(fxshare.readable(gm), path)
    return path


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "saved"))


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with right hashes, as someone would who knows how."""
    for name, entry in manifest.get("files", {}).items():  # the key may be what was changed
        path = folder / name
        # of os.path, which takes a name that is too long for one that is not there
        if entry.get("sha256") and path.parent == folder and os.path.isfile(path):
            data = path.read_bytes()
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    plain = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    plain["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "fxshare.json").write_text(json.dumps(plain))


def read(folder: Path, name: str) -> Any:
    text = (folder / name).read_text()
    return yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)


def write(folder: Path, name: str, plain: Any) -> None:
    """Put a changed file in the folder, and make the hashes right again."""
    if name == "fxshare.json":
        seal(folder, plain)
        return
    dump = yaml.safe_dump if name.endswith(".yaml") else json.dumps
    (folder / name).write_text(dump(plain))
    seal(folder, read(folder, "fxshare.json"))


def change(folder: Path, name: str, by: Callable[[Any], Any]) -> None:
    plain = read(folder, name)
    by(plain)
    write(folder, name, plain)


@contextmanager
def quickly() -> Iterator[None]:
    start = time.process_time()  # other processes do not count
    yield
    assert time.process_time() - start < SECONDS


# Every string field --------------------------------------------------------------------------

FILES = ("fxshare.json", "plan.json", "report.json", "config.yaml")
Steps = tuple[str | int, ...]


def fields(value: Any, at: Steps = ()) -> Iterator[tuple[Steps, bool]]:
    """The place of every string: a value, or (True) the key of one."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*at, key), True
            yield from fields(inner, (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from fields(inner, (*at, number))
    elif isinstance(value, str):
        yield at, False


def put(plain: Any, at: Steps, is_key: bool, payload: str) -> None:
    for step in at[:-1]:
        plain = plain[step]
    if not is_key:
        plain[at[-1]] = payload
        return
    entries = list(plain.items())
    plain.clear()
    plain.update((payload if key == at[-1] else key, value) for key, value in entries)


def payloads(canary: Path) -> dict[str, str]:
    touch = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    call = f"open({str(canary)!r},'w')"
    escaped = touch.replace("'", "\\x27")
    return {
        "argument": f"x=({touch})",
        "double quote": f'x") or {touch} or getattr(self, "x',
        "single quote": f"x') or {call} or getattr(self, 'x",
        "newline": f"x):\n    {touch}\n    return (x",
        "docstring": f'x"""\n{touch}\n"""',
        "escape": f"x\\\n{escaped}",
        "keyword": "lambda",
        "dunder": "__class__",
        "look-alike": "ｃ_fc",
        "cyrillic": "idх",
        "dots": "../../x",
        "nothing": "",
        "null": "x\x00y",
        "long": "x" * 10_000,
        "import": "os:system",
    }


def kind_of(at: Steps, is_key: bool) -> tuple[object, ...]:
    """Fields that are read by one grammar: numbers, and the names that are keys, left out."""
    named = ("tensors", "slice_errors", "bias_shifts", "files", "weight_types", "site_dtypes")
    return (is_key, *("*" if i and at[i - 1] in named else s for i, s in enumerate(at)
                      if not isinstance(s, int)))  # fmt: skip


def cases(folder: Path, name: str, *, every: bool) -> list[tuple[Steps, bool]]:
    seen: set[object] = set()
    found = []
    for at, is_key in fields(read(folder, name)):
        if at == ("sha256",) or (name == "fxshare.json" and at[0] == "sha256"):
            continue
        kind = kind_of(at, is_key)
        if every or kind not in seen:
            seen.add(kind)
            found.append((at, is_key))
    return found if every else found[::2]


def outcome(folder: Path, gm: Any) -> str:
    """Load a folder: refused, or equal to what was saved."""
    state = set(vars(nn.Module)) | set(vars(fx.GraphModule))
    try:
        loaded = fxshare.load(folder)
    except FxShareError as error:
        return f"refused: {error}"
    finally:
        assert set(vars(nn.Module)) | set(vars(fx.GraphModule)) == state
    assert loaded.fxshare.graph_sha256 == gm.fxshare.graph_sha256
    before, after = gm.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(loaded(ids()), gm(ids()))
    return "equal"


def attack(original: Path, gm: Any, tmp_path: Path, name: str, chosen: Any, every: bool) -> int:
    canary = tmp_path / "canary"
    folder = Path(shutil.copytree(original, tmp_path / "attacked"))
    refused = 0
    plain = {file: read(original, file) for file in ("fxshare.json", name)}
    for number, (at, is_key) in enumerate(cases(original, name, every=every)):
        for label in chosen(number):
            changed = copy.deepcopy(plain[name])
            put(changed, at, is_key, payloads(canary)[label])
            seal(folder, copy.deepcopy(plain["fxshare.json"]))
            write(folder, name, changed)
            try:
                found = outcome(folder, gm)
            except Exception as error:
                raise AssertionError(f"{name}: {at}, key: {is_key}, payload: {label}") from error
            assert len(found) < 2_000, (name, at, is_key, label)
            refused += found != "equal"
            assert not canary.exists(), (name, at, is_key, label)
    return refused


@pytest.mark.parametrize("name", FILES)
def test_hostile_strings_are_refused_or_change_nothing(
    name: str, original: Path, gm: Any, tmp_path: Path
) -> None:
    """One payload a kind of field, in turn, so that every payload meets several fields."""
    labels = list(payloads(tmp_path))
    assert attack(original, gm, tmp_path, name, lambda n: [labels[n % len(labels)]], False) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_hostile_string_in_every_field(
    name: str, original: Path, gm: Any, tmp_path: Path
) -> None:
    labels = list(payloads(tmp_path))
    assert attack(original, gm, tmp_path, name, lambda n: labels, True) > 5


# The two ways in that were open --------------------------------------------------------------


# Both payloads ran before names had a grammar. One that is no valid source where the name stands
# would show nothing.


def test_an_argument_of_the_example_call_is_no_source(saved: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    # names stood once in a signature and twice, as NAME=NAME, in a call: the quotes open in the one
    # and close in the next, so that both are valid, and the default runs when the function is made
    touch = f'__import__("pathlib").Path("{canary}").touch()'
    opening, closing = f"w={touch}, s='''", "z=''', *a"

    def rename(manifest: dict[str, Any]) -> None:
        manifest["inputs"] = [
            {opening: call["idx"], closing: call["idx"], "idx": call["idx"]}
            for call in manifest["inputs"]
        ]

    change(saved, "fxshare.json", rename)
    with pytest.raises(StoreError, match="expected the name of an argument"):
        fxshare.load(saved)
    assert not canary.exists()


@pytest.mark.parametrize("tensors", [False, True])
def test_a_groups_name_is_no_source(unlowered: Path, tmp_path: Path, tensors: bool) -> None:
    """``tensors``: with the tensors renamed too, as it takes to be called when loading compares."""
    canary = tmp_path / "canary"
    # fx writes getattr(self, "NAME"); no dots, which would divide the name of the module
    code = f"open({str(canary)!r},'w')".encode().hex()
    evil = f'x" if eval(getattr(bytes, "fromhex")("{code}")) else "y'
    folder = Path(shutil.copytree(unlowered, tmp_path / "saved"))
    plan, manifest = read(folder, "plan.json"), read(folder, "fxshare.json")
    name = plan["groups"][0]["name"]
    plan["groups"][0]["name"] = evil
    (folder / "plan.json").write_text(json.dumps(plan))
    if tensors:
        (file,) = folder.glob("*.safetensors")
        held = {key.replace(name, evil): tensor for key, tensor in load_file(file).items()}
        save_file(held, file, metadata={"format": "pt"})
        renamed = {key.replace(name, evil): entry for key, entry in manifest["tensors"].items()}
        manifest["tensors"] = renamed
    seal(folder, manifest)
    reason = "dotted name of a module" if tensors else r"plan\.json: group .* the name of a group"
    with pytest.raises(StoreError if tensors else PlanError, match=reason):
        fxshare.load(folder)
    assert not canary.exists()


# Plans ---------------------------------------------------------------------------------------

EVIL = 'x") or print("here") or getattr(self, "x'


NAMES = (EVIL, "class", "__class__", "a.b", "ｘ", "", "x\ny", "x" * 10_000)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_with_such_a_group_is_none(name: str, original: Path) -> None:
    plain = read(original, "plan.json")
    plain["groups"][0]["name"] = name
    with pytest.raises(PlanError, match=r"^group .*expected the (dotted )?name of") as caught:
        Plan.from_json(json.dumps(plain))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("put_in", "reason"),
    [
        (lambda plan: plan["sites"][0].update(name=EVIL), "site .*dotted name of a module"),
        (lambda plan: plan["sites"][0].update(calls=[EVIL]), "calls.0: .*dotted name"),
        (lambda plan: plan["sites"][0].update(type=EVIL), "type: .*names of weight types"),
        (lambda plan: plan["sites"][0]["slices"][0].update(name=EVIL), "slices.0.name: .*dotted"),
        (lambda plan: plan["sites"][0]["slices"][0].update(part=EVIL), "part: .*label of slices"),
        (lambda plan: plan["groups"][0].update(slices=[EVIL]), "slices.0: .*dotted name"),
        (lambda plan: plan["groups"][0].update(label=EVIL), "label: .*label of slices"),
    ],
)
def test_every_name_of_a_plan_has_a_grammar(
    put_in: Callable[[Any], Any], reason: str, original: Path
) -> None:
    plain = read(original, "plan.json")
    put_in(plain)
    with pytest.raises(PlanError, match=reason):
        Plan.from_json(json.dumps(plain))


def test_compile_with_such_a_plan_names_the_file(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fxshare.cli import main

    plain = read(original, "plan.json")
    plain["groups"][0]["name"] = EVIL
    (tmp_path / "plan.json").write_text(json.dumps(plain))
    status = main(["compile", "embedded", "--plan", str(tmp_path / "plan.json")])
    shown = capsys.readouterr()
    assert status == 1
    assert "plan.json" in shown.err
    assert "expected the name of a group" in " ".join(shown.err.split())
    assert "\nhere" not in shown.out + shown.err


def test_a_plan_that_nobody_read_is_refused_by_the_passes() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4, bias=False)))
    group = SharedGroup(EVIL, torch.ones(2, 4), {"0": torch.ones(4, 2)})
    with pytest.raises(NameFault, match=r"share-basis: the basis name .* has other characters"):
        run(gm, [ShareBasis((group,))])
    for name in (EVIL, "a.class", "a..b", "__init__"):
        with pytest.raises(NameFault, match=r"the name .* of a submodule"):
            put_module(nn.Module(), name, nn.Identity())


# Models of the caller's own ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x=print('here')", "no|is not an identifier"),
        ("lambda", "keyword"),
        ("__class__", "Python's own"),
        ("self", "module itself"),
        ("ｘ", "not an identifier"),
        ("x" * 10_000, "10,000 characters"),
    ],
)
def test_arguments_are_names(name: str, reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        method_taking(["a", name], lambda self: None)
    with pytest.raises(CaptureError, match=reason):
        _Bare.around(nn.Linear(2, 2), [name], {})


def test_a_method_takes_its_arguments_by_name_and_order() -> None:
    made = method_taking(["b", "a"], lambda self, **given: (self, given))
    assert made(1, 2, a=3) == (1, {"b": 2, "a": 3})
    assert made.__code__.co_varnames[: made.__code__.co_argcount] == ("self", "b", "a")
    with pytest.raises(CaptureError, match="'a' is given twice"):
        method_taking(["a", "a"], lambda self: None)


def test_a_batch_with_such_a_key() -> None:
    class AnyKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, **given: Any) -> Any:
            return self.fc(next(iter(given.values())))

    types = {"weight_types": {"fc": {"pattern": "fc$"}}}
    with pytest.raises(CaptureError, match="is not an identifier"):
        fxshare.compile(AnyKeyword(), types, example={"x, y=print": torch.ones(2, 4)}, capture="fx")


@pytest.mark.parametrize("mode", ["fx", "export", "modules", "auto"])
@pytest.mark.parametrize("key", [EVIL, "x\ny", "x'y", "x\\"])
def test_modules_with_odd_names_are_refused(key: str, mode: Any) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = nn.ModuleDict({key: nn.Linear(4, 4)})
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.h[key](x))

    example = torch.ones(2, 4)
    for pattern, kind in ((r"h\.", MatchError), ("fc$", CaptureError)):
        types = {"weight_types": {"fc": {"pattern": pattern}}}
        with pytest.raises(kind, match="has other characters than ASCII letters"):
            fxshare.compile(Odd(), types, example=example, capture=mode)


def test_a_keyword_as_a_name_hinders_nothing_where_no_code_holds_it() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = nn.ModuleDict({"class": nn.Linear(4, 4)})
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.h["class"](x))

    types = {"weight_types": {"fc": {"pattern": "fc$"}}}
    gm = fxshare.compile(Odd(), types, example=torch.ones(2, 4), capture="modules")
    assert gm(torch.ones(2, 4)).shape == (2, 4)
    with pytest.raises(CaptureError, match="a keyword of Python"):
        fxshare.compile(Odd(), types, example=torch.ones(2, 4), capture="fx")
    with pytest.raises(MatchError, match="a keyword of Python"):
        fxshare.compile(Odd(), {"weight_types": {"fc": {"pattern": "h"}}}, capture="modules")


# What would never end ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "put_in", "reason"),
    [
        ("fxshare.json", lambda m: m["source"]["config"].update(n_layer=10**6), "n_layer"),
        ("fxshare.json", lambda m: m["source"]["config"].update(n_layer=4000), "parameters"),
        ("fxshare.json", lambda m: m["source"]["config"].update(n_embd=10**9), "n_embd"),
        ("fxshare.json", lambda m: m["source"]["config"].update(vocab_size=10**12), "parameters"),
        ("fxshare.json", lambda m: m["source"]["config"].update(n_layer=1e300), "n_layer|whole"),
        ("fxshare.json", lambda m: m["source"]["config"].update(n_ffn="x"), "whole numbers"),
        (
            "fxshare.json",
            lambda m: m["inputs"][0]["idx"]["tensor"].update(shape=[1000, 10**6]),
            r"has 1e\+09 numbers; expected at most 1,048,576",
        ),
        (
            "fxshare.json",
            lambda m: m["inputs"][0]["idx"]["tensor"].update(shape=[1] * 500),
            "expected at most 16 sizes|16 at most",
        ),
        ("fxshare.json", lambda m: m.update(lowering=["memory", "speed"] * 250), "64 steps"),
        ("fxshare.json", lambda m: m.update(lowering=["readable"]), "'readable' after"),
        (
            "fxshare.json",
            lambda m: m["tensors"][next(iter(m["tensors"]))].update(shape=[10**9, 10**9]),
            "the tensors need",
        ),
        ("plan.json", lambda p: p["sites"][0].update(out_features=10**12), "numbers in all|plan"),
    ],
)
def test_sizes_are_held_to_what_is_there(
    name: str, put_in: Callable[[Any], Any], reason: str, saved: Path
) -> None:
    change(saved, name, put_in)
    with quickly(), pytest.raises((StoreError, PlanError), match=reason):
        fxshare.load(saved)


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": WIDTH, "n_positions": 8, "vocab_size": VOCAB}
    path = tmp_path_factory.mktemp("transformers") / "gpt2"
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(path)
    return path


@pytest.mark.parametrize("layers", [10**6, 4000])
def test_layers_of_a_transformers_model(
    layers: int, transformers_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(transformers_folder, tmp_path / "gpt2"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    types = {"weight_types": {"fc": {"pattern": r".*\.c_fc$"}}}
    fxshare.save(fxshare.compile(model, types, capture="modules"), tmp_path / "out")
    change(tmp_path / "out", "fxshare.json", lambda m: m["source"]["config"].update(n_layer=layers))
    with quickly(), pytest.raises(StoreError, match=r"n_layer|more than .* parameters"):
        fxshare.load(tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": layers}))
    with quickly(), pytest.raises(DataError, match=r"more than .* parameters and submodules"):
        load_model(str(folder))


def test_modules_are_counted_while_they_are_made() -> None:
    with at_most(4):
        nn.Linear(2, 2)
    with pytest.raises(TooMany, match="more than 3 parameters"), at_most(3):
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))  # and not afterwards


@pytest.mark.parametrize("pattern", [r"(([\w.]+)+)+!()", r"(?:\w|\w)*!", r"(\w|\w\w)+(\w|!)+#"])
def test_patterns_that_backtrack(pattern: str) -> None:
    deep = nn.Sequential()
    deep.add_module("a" * 60, nn.Linear(2, 2))
    config = {"weight_types": {"fc": {"pattern": pattern}}}
    with quickly(), pytest.raises((ConfigError, MatchError), match="pattern"):
        fxshare.compile(deep, config, capture="modules")


def test_a_pattern_has_a_time_limit_and_its_error_names_it() -> None:
    pattern = Pattern(r"(a|aa)+(b|a)+c", seconds=0.1)
    with quickly(), pytest.raises(ConfigError, match=r"pattern '\(a\|aa.*takes too long"):
        pattern.match("a" * 60)


@pytest.mark.parametrize(
    ("pattern", "slow"),
    [
        (r".*\.attn\.c_attn$", False),
        (r"h\.(\d+)", False),
        (r"(?:^|.*\.)(?:q|k)_proj$", False),
        (r"(a+)+", True),
        (r"(a?){30}", True),
        (r"(a|ab)*", True),
        (r".*.*.*.*.*x", True),
        (r"(.)\1", True),
    ],
)
def test_which_patterns_have_a_time_limit(pattern: str, slow: bool) -> None:
    assert may_backtrack(pattern) is slow


# What is nested without end ------------------------------------------------------------------

DEEP = {"lists": "[" * 10**5 + "]" * 10**5, "objects": '{"a":' * 10**5 + "1" + "}" * 10**5}
DEEP["200 lists"] = "[" * 200 + "]" * 200


@pytest.mark.parametrize("kind", DEEP)
def test_deeply_nested_files(kind: str, saved: Path, tmp_path: Path) -> None:
    text = DEEP[kind]
    with pytest.raises(ValueError, match="nested too deeply: expected at most 100 levels"):
        parse_json(text)
    with pytest.raises(PlanError, match="not a plan: nested too deeply"):
        Plan.from_json(text)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "config.yaml")
    for name, error in (("plan.json", PlanError), ("report.json", StoreError)):
        before = (saved / name).read_text()
        (saved / name).write_text(text)
        seal(saved, read(saved, "fxshare.json"))
        with quickly(), pytest.raises(error, match=rf"{name}.*nested too deeply"):
            fxshare.load(saved)
        (saved / name).write_text(before)
    (saved / "fxshare.json").write_text(text)
    with quickly(), pytest.raises(StoreError, match="nested too deeply"):
        fxshare.load(saved)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(text)
    with quickly(), pytest.raises(DataError, match="nested too deeply"):
        load_model(str(model))
