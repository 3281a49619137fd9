"""Folders of compiled models: what is saved is loaded, and what is damaged is noticed."""

from __future__ import annotations

import copy
import errno
import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxshare
from fxshare.base import files as files_module
from fxshare.base.numerics import tolerance, worst
from fxshare.embedded.model import GPT, GPTConfig
from fxshare.errors import FxShareWarning, GuardError, StoreError
from fxshare.store import folder as folder_module
from fxshare.store import tensors as tensors_module
from fxshare.store.tensors import tensors_of
from passes import Pass
from passes.errors import FxShareError

VOCAB = 37
SHARING = {"group_size": 2, "compression_rate": 0.5}
CONFIG: dict[str, Any] = {
    "weight_types": {
        "attn": {"pattern": r".*\.c_attn$", "split": "heads", "qkv_order": "qkv", "n_head": 2},
        "fc": {"pattern": r".*\.c_fc$"},
    },
    "block_pattern": r"h\.(\d+)",
}


class Block(nn.Module):
    """Causal attention with a mask kept in a non-persistent buffer, and an MLP."""

    def __init__(self, width: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_fc = nn.Linear(width, 2 * width)
        self.c_proj = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)
        self.act = act
        self.register_buffer("mask", torch.ones(16, 16).tril().bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        q, k, v = self.c_attn(self.ln(x)).chunk(3, dim=-1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        x = x + scores.masked_fill(~self.mask[:t, :t], float("-inf")).softmax(-1) @ v
        return x + self.drop(self.c_proj(self.act(self.c_fc(x))))


class Toy(nn.Module):
    """A language model as a user would write it: tied head, buffers of both kinds."""

    def __init__(
        self,
        width: int = 16,
        layers: int = 2,
        act: Callable[[Tensor], Tensor] = F.gelu,
        on_cpu: bool = False,
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, width)
        self.wpe = nn.Embedding(16, width)
        self.h = nn.ModuleList(Block(width, act) for _ in range(layers))
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("scale", torch.tensor(1.5))
        self.shift = torch.full((VOCAB,), 0.25)
        self.on_cpu = on_cpu

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        x = x + torch.zeros((), dtype=x.dtype, device=x.device)  # a dtype in the graph
        if self.on_cpu:
            x = x + torch.linspace(0, 1, self.wte.embedding_dim)  # on the CPU, whatever x is on
        for block in self.h:
            x = block(x)
        return self.head(x) * self.scale + self.shift


def toy(**options: Any) -> Toy:
    """A :class:`Toy` with weights of its own, so that no two are alike."""
    return Toy(**options).eval()


def ids(batch: int = 3, length: int = 8) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, *, front_end: Any = "fx", **options: Any) -> Any:
    return fxshare.compile(model, CONFIG | options, calibration=[ids()], capture=front_end)


@pytest.fixture(scope="module")
def gm() -> Any:
    """A shared toy in sharing mode; tests must not change it."""
    return compiled(toy(), **SHARING)


@pytest.fixture
def saved(gm: Any, tmp_path: Path) -> Path:
    fxshare.save(gm, tmp_path / "out")
    return tmp_path / "out"


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as someone would who knows how: with a right hash."""
    path = folder / "fxshare.json"
    plain = json.loads(path.read_text())
    del plain["sha256"]
    change(plain)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    plain["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(plain))


# Round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("front_end", "options"),
    [("fx", {}), ("fx", SHARING), ("export", {}), ("modules", {}), ("modules", SHARING)],
)
def test_round_trip_is_bit_equal(front_end: str, options: dict[str, Any], tmp_path: Path) -> None:
    before = compiled(toy(), front_end=front_end, **options)
    fxshare.save(before, tmp_path / "out")
    after = fxshare.load(tmp_path / "out", toy())
    assert torch.equal(before(ids()), after(ids()))
    assert torch.equal(before(ids(2, 5)), after(ids(2, 5)))
    assert after.fxshare == before.fxshare
    assert str(after.fxshare.report) == str(before.fxshare.report)
    assert type(after).__name__ == type(before).__name__


def test_a_users_class_by_instance_factory_class_and_string(gm: Any, saved: Path) -> None:
    for given_model in (toy(), toy, Toy, f"{__name__}:toy"):
        assert torch.equal(fxshare.load(saved, given_model)(ids()), gm(ids()))


def test_the_given_instance_is_neither_used_nor_changed(gm: Any, saved: Path) -> None:
    model = toy().train()
    with torch.no_grad():
        model.wte.weight.fill_(float("nan"))
    before = {name: (t, t.clone()) for name, (_, t) in tensors_of(model).items()}
    loaded = fxshare.load(saved, model)
    assert torch.equal(loaded(ids()), gm(ids()))
    assert all(m.training for m in model.modules())
    for name, (_, tensor) in tensors_of(model).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor.nan_to_num(), before[name][1].nan_to_num())
    mine = {t.data_ptr() for _, t in tensors_of(model).values()}
    assert not mine & {t.data_ptr() for _, t in tensors_of(loaded).values()}


def test_a_users_class_must_be_given(saved: Path) -> None:
    with pytest.raises(StoreError, match=rf"{__name__}:Toy.*model="):
        fxshare.load(saved)


@pytest.mark.parametrize(
    ("given_model", "reason"),
    [
        (3, "found int"),
        (lambda: 3, "to make an nn.Module, found 3"),
        ("no_such_package:make", "cannot import 'no_such_package:make'"),
        (f"{__name__}:no_such_function", "cannot import"),
        ("", "cannot import ''"),
    ],
)
def test_a_model_that_is_none(given_model: Any, reason: str, saved: Path) -> None:
    with pytest.raises(StoreError, match=reason):
        fxshare.load(saved, given_model)


def test_the_embedded_class_needs_no_model(tmp_path: Path) -> None:
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=VOCAB)).eval()
    before = compiled(model, **SHARING)
    fxshare.save(before, tmp_path / "out")
    assert torch.equal(fxshare.load(tmp_path / "out")(ids()), before(ids()))


def transformers_models() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=VOCAB, bos_token_id=0,
        eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    llama = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16,
        intermediate_size=32, vocab_size=VOCAB, eos_token_id=0,
    )  # fmt: skip
    types = {
        "q": {"pattern": r".*\.q_proj$", "split": "heads"},
        "up": {"pattern": r".*\.up_proj$"},
    }
    of_llama = {"weight_types": types, "block_pattern": r"layers\.(\d+)"}
    return {
        "gpt2": (transformers.GPT2LMHeadModel(gpt2), CONFIG),
        "llama": (transformers.LlamaForCausalLM(llama), of_llama),
    }


_FRESH = """
import sys, torch, fxshare
from safetensors.torch import load_file, save_file
root, threads = sys.argv[1], int(sys.argv[2])
ids = load_file(f"{root}/ids.safetensors")["ids"]
for name in sys.argv[3:]:
    found = {}
    for number in (threads, threads + 1):
        torch.set_num_threads(number)
        found[str(number)] = fxshare.load(f"{root}/{name}")(ids).logits.detach().clone()
    save_file(found, f"{root}/{name}.safetensors")
"""


def test_transformers_models_in_a_fresh_process(tmp_path: Path) -> None:
    """Equal bits with this process's number of threads; another number adds in another order."""
    expected, limits = {}, {}
    for name, (model, config) in transformers_models().items():
        options = SHARING if name == "llama" else {}
        gm = fxshare.compile(model.eval(), config | options, calibration=[ids()], capture="fx")
        fxshare.save(gm, tmp_path / name)
        expected[name] = gm(ids()).logits.detach()
        limits[name] = tolerance(torch.float32, 2 * len(gm.fxshare.plan.sites) + 1)
    save_file({"ids": ids()}, tmp_path / "ids.safetensors")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    threads = torch.get_num_threads()
    subprocess.run(
        [sys.executable, "-c", _FRESH, str(tmp_path), str(threads), *expected],
        check=True, env=environment, timeout=300,
    )  # fmt: skip
    for name, logits in expected.items():
        found = load_file(tmp_path / f"{name}.safetensors")
        assert torch.equal(found[str(threads)], logits)
        assert worst(logits, found[str(threads + 1)]).relative <= limits[name]


def test_transposed_weights_are_multiplied_as_before(tmp_path: Path) -> None:
    """Slices of a Conv1D have the strides of a transposed matrix; one row shows it in its bits."""
    model, config = transformers_models()["gpt2"]
    before = fxshare.compile(model.eval(), config, capture="modules")
    fxshare.save(before, tmp_path / "out")
    after = fxshare.load(tmp_path / "out")
    assert torch.equal(before(ids(1, 1)).logits, after(ids(1, 1)).logits)


def test_a_transformers_class_keeps_what_it_generates(tmp_path: Path) -> None:
    model, config = transformers_models()["llama"]
    model.generation_config.max_new_tokens = 5
    before = fxshare.compile(model.eval(), config | SHARING, calibration=[ids()], capture="modules")
    fxshare.save(before, tmp_path / "out")
    after = fxshare.load(tmp_path / "out")
    assert type(after) is type(model)
    assert torch.equal(before.generate(ids()), after.generate(ids()))
    assert after.generation_config.max_new_tokens == 5


def test_training_goes_on_where_it_was(gm: Any, tmp_path: Path) -> None:
    before = copy.deepcopy(gm)
    optimizer = torch.optim.SGD(before.parameters(), lr=0.1)
    before(ids()).square().mean().backward()
    optimizer.step()
    before.h.get_submodule("0.ln").weight.requires_grad_(False)
    before.train()
    before.h.get_submodule("0.ln").eval()
    fxshare.save(before, tmp_path / "out")
    after = fxshare.load(tmp_path / "out", Toy)
    assert {n: m.training for n, m in after.named_modules()} == {
        n: m.training for n, m in before.named_modules()
    }
    assert {n: p.requires_grad for n, p in after.named_parameters()} == {
        n: p.requires_grad for n, p in before.named_parameters()
    }
    assert torch.equal(before.eval()(ids()), after.eval()(ids()))
    after(ids()).square().mean().backward()
    assert after.get_submodule(after.fxshare.plan.groups[0].name).weight.grad is not None


def test_a_model_that_can_only_be_traced_on_the_cpu(tmp_path: Path) -> None:
    before = compiled(toy(on_cpu=True), **SHARING)
    fxshare.save(before, tmp_path / "out")
    after = fxshare.load(tmp_path / "out", Toy(on_cpu=True))
    assert torch.equal(before(ids()), after(ids()))


@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_half_precision(front_end: str, tmp_path: Path) -> None:
    model = toy().to(torch.bfloat16)
    before = compiled(model, front_end=front_end, **SHARING)
    fxshare.save(before, tmp_path / "out")
    after = fxshare.load(tmp_path / "out", toy())
    assert {p.dtype for p in after.parameters()} == {torch.bfloat16}
    manifest = json.loads((tmp_path / "out" / "fxshare.json").read_text())
    assert manifest["probe"]["dtype"] == ("float32" if front_end == "fx" else "bfloat16")
    assert torch.equal(before(ids()), after(ids()))


def test_a_result_that_was_cast_afterwards(gm: Any, tmp_path: Path) -> None:
    before = copy.deepcopy(gm).double()
    fxshare.save(before, tmp_path / "out")
    after = fxshare.load(tmp_path / "out", Toy)
    assert after.fxshare.graph_sha256 == before.fxshare.graph_sha256
    assert torch.equal(before(ids()), after(ids()))


def test_what_was_loaded_can_be_saved_and_torch_compiled_ones_too(
    gm: Any, saved: Path, tmp_path: Path
) -> None:
    loaded = fxshare.load(saved, Toy)
    fxshare.save(torch.compile(loaded), tmp_path / "again")
    assert torch.equal(fxshare.load(tmp_path / "again", Toy)(ids()), gm(ids()))
    fxshare.save(loaded, saved, force=True)  # onto the folder that its tensors came from
    assert torch.equal(fxshare.load(saved, Toy)(ids()), gm(ids()))


def test_random_numbers_are_left_alone(gm: Any, saved: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    fxshare.save(gm, tmp_path / "again")
    fxshare.load(saved, toy)
    assert torch.equal(state, torch.get_rng_state())


class Mlp(nn.Module):
    """A stack of linears of random widths."""

    def __init__(self, widths: list[int], bias: bool) -> None:
        super().__init__()
        self.h = nn.ModuleList(
            nn.ModuleDict({"c_fc": nn.Linear(a, b, bias), "c_proj": nn.Linear(b, a, bias)})
            for a, b in zip([widths[0]] * len(widths), widths, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = x + block["c_proj"](block["c_fc"](x).relu())
        return x


@settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    widths=st.lists(st.integers(2, 12), min_size=1, max_size=4),
    bias=st.booleans(),
    rate=st.sampled_from([None, 0.3, 0.9]),
    fuse=st.booleans(),
    front_end=st.sampled_from(["fx", "modules"]),
    shard=st.integers(1, 4000),
)
def test_random_mlps(
    widths: list[int],
    bias: bool,
    rate: float | None,
    fuse: bool,
    front_end: str,
    shard: int,
    tmp_path: Path,
) -> None:
    types = {"fc": {"pattern": r".*c_fc$"}, "proj": {"pattern": r".*c_proj$"}}
    config: dict[str, Any] = {"weight_types": types, "block_pattern": r"h\.(\d+)", "fuse": fuse}
    if rate is not None:
        config |= {"group_size": 1, "compression_rate": rate}
    x = torch.randn(16, widths[0], generator=torch.Generator().manual_seed(0))
    try:
        before = fxshare.compile(Mlp(widths, bias), config, calibration=[x], capture=front_end)
    except FxShareError:
        return  # a rate that leaves no rank for so small a matrix
    fxshare.save(before, tmp_path / "out", force=True, max_shard_bytes=shard)
    after = fxshare.load(tmp_path / "out", Mlp(widths, bias))
    assert torch.equal(before(x), after(x))
    assert after.fxshare == before.fxshare


# What is in the files ------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def test_the_files_of_a_folder(gm: Any, saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {
        "README.md", "config.yaml", "fxshare.json", "model.safetensors", "plan.json",
        "report.json", "report.md",
    }  # fmt: skip
    assert fxshare.load_config(saved / "config.yaml") == gm.fxshare.config
    assert fxshare.Plan.from_json((saved / "plan.json").read_text()) == gm.fxshare.plan
    card = (saved / "README.md").read_text()
    for text in ("licence of the original", "params_kept", f"{__name__}:Toy", "fxshare.load("):
        assert text in card
    (saved.parent / "plain").mkdir()
    assert saved.stat().st_mode == (saved.parent / "plain").stat().st_mode


def test_each_number_is_stored_once(gm: Any, saved: Path) -> None:
    tensors = stored(saved)
    parameters = sum(p.numel() for p in gm.parameters())
    buffers = sum(b.numel() for b in gm.buffers())
    assert sum(t.numel() for t in tensors.values()) == parameters + buffers
    plan = gm.fxshare.plan
    matched = {name for group in plan.groups for name in (group.name,)}
    coefficients = {p.module for p in fxshare.result.products.slices_of(gm).values()}
    numbers = sum(tensors[f"{name}.weight"].numel() for name in matched | coefficients)
    assert numbers == plan.stored_numbers
    assert sum(name.startswith("basis_") for name in tensors) == len(plan.groups)


def test_a_slice_is_stored_as_its_own_rows(tmp_path: Path) -> None:
    model = toy()
    before = compiled(model)
    fxshare.save(before, tmp_path / "out")
    numbers = sum(p.numel() for p in model.parameters())
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    masks = sum(b.numel() for b in model.buffers() if b.dtype is torch.bool)
    assert 4 * numbers < size - masks < 4 * numbers + 16_384
    assert stored(tmp_path / "out")["h.0.c_attn.q.0.weight"].shape == (8, 16)


def test_ties_and_buffers(gm: Any, saved: Path) -> None:
    tensors = stored(saved)
    assert ("head.weight" in tensors) != ("wte.weight" in tensors)
    assert {"h.0.mask", "h.1.mask", "scale", "shift"} <= set(tensors)
    loaded = fxshare.load(saved, Toy)
    assert loaded.head.weight is loaded.wte.weight
    assert torch.equal(loaded.h.get_submodule("0").mask, gm.h.get_submodule("0").mask)
    untied = fxshare.load(saved, Toy)
    untied.head.weight = nn.Parameter(untied.head.weight.detach() + 1)
    fxshare.save(untied, saved, force=True)
    again = fxshare.load(saved, Toy)
    assert again.head.weight is not again.wte.weight
    assert torch.equal(again(ids()), untied(ids()))


def test_plain_tensor_attributes_survive_at_module_granularity(tmp_path: Path) -> None:
    model = toy()
    model.shift = torch.linspace(0, 1, VOCAB)
    before = compiled(model, front_end="modules", **SHARING)
    fxshare.save(before, tmp_path / "out")
    after = fxshare.load(tmp_path / "out", Toy)
    assert torch.equal(after.shift, model.shift)
    assert torch.equal(before(ids()), after(ids()))


def test_shards(gm: Any, tmp_path: Path) -> None:
    fxshare.save(gm, tmp_path / "out", max_shard_bytes=4096)
    files = sorted(path.name for path in (tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert set(index["weight_map"]) == set(stored(tmp_path / "out"))
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in stored(tmp_path / "out").values()
    )
    assert torch.equal(fxshare.load(tmp_path / "out", Toy)(ids()), gm(ids()))
    (tmp_path / "out" / files[1]).unlink()
    with pytest.raises(StoreError, match=f"{files[1]} is missing"):
        fxshare.load(tmp_path / "out", Toy)


# Damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "config.yaml", "report.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_file_is_named(name: str, damage: str, saved: Path) -> None:
    path = saved / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-7])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(StoreError, match=rf"{name} (is|was) .*{damage}"):
        fxshare.load(saved, Toy)


def test_what_people_read_may_be_edited(gm: Any, saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    (saved / "report.md").unlink()
    (saved / "tokenizer.json").write_text("{}")
    assert torch.equal(fxshare.load(saved, Toy)(ids()), gm(ids()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(training=True), "was altered"),
        (lambda m: m.update(format_version=3), "format version 3, .* upgrade fxshare"),
        (lambda m: m.update(format="other"), "not the manifest of an fxshare folder"),
        (lambda m: m.pop("sha256"), "was altered"),
    ],
)
def test_an_altered_manifest(
    change: Callable[[dict[str, Any]], None], reason: str, saved: Path
) -> None:
    path = saved / "fxshare.json"
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    with pytest.raises(StoreError, match=reason):
        fxshare.load(saved, Toy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "[" * 100_000])
def test_a_manifest_that_is_none(text: str, saved: Path) -> None:
    (saved / "fxshare.json").write_text(text)
    with pytest.raises(StoreError, match=r"fxshare\.json is (truncated|not the manifest)"):
        fxshare.load(saved, Toy)


def test_folders_that_are_not_ours(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is not an fxshare folder: it has no fxshare\.json"):
        fxshare.load(tmp_path)
    with pytest.raises(StoreError, match="is not an fxshare folder: it does not exist"):
        fxshare.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m["tensors"].pop("scale"), "1 only in the module"),
        (lambda m: m["tensors"]["scale"].update(dtype="float16"), "expected float16"),
        (lambda m: m["tensors"]["scale"].update(dtype="os"), "expected one of float64"),
        (lambda m: m["tensors"]["scale"].update(shape=[2]), r"shape \(2,\) in the folder"),
        (lambda m: m["tensors"]["scale"].update(same_as="nothing"), "stored as 'nothing'"),
        (lambda m: m["files"].pop("plan.json"), "does not list plan.json"),
        (
            lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}}),
            "name of a file in",
        ),
        (lambda m: m.update(relaxed=[99]), "guards"),
        (lambda m: m.update(front_end="os"), "front_end"),
        (lambda m: m.pop("probe"), "probe"),
        (lambda m: m["inputs"][0].update(ids={"tensor": {"dtype": "os"}}), "example calls"),
        (lambda m: m["inputs"][0].update(ids={"call": "os:system"}), "example calls"),
        (lambda m: m["probe"].update(values=[(0.0).hex()] * 32), "rounding explains"),
        (lambda m: m["probe"].update(shape=[1]), "rounding explains"),
    ],
)
def test_a_manifest_that_contradicts_its_folder(
    change: Callable[[dict[str, Any]], None], reason: str, saved: Path
) -> None:
    rewrite_manifest(saved, change)
    with pytest.raises(FxShareError, match=reason):
        fxshare.load(saved, Toy)


def test_another_structure(gm: Any, saved: Path) -> None:
    with pytest.raises(StoreError, match=r"could not be built again|other tensors"):
        fxshare.load(saved, Toy(layers=3))
    with pytest.raises(StoreError, match=r"shape|could not be built again"):
        fxshare.load(saved, Toy(width=8))
    with pytest.raises(StoreError, match=r"could not be built again: .*torch"):
        fxshare.load(saved, nn.Linear(2, 2))


def test_another_function_of_the_same_tensors_is_noticed(saved: Path) -> None:
    with pytest.raises(StoreError, match=r"rounding explains .*saved with .*torch"):
        fxshare.load(saved, Toy(act=F.relu))
    with pytest.warns(FxShareWarning, match="graph text differs"):
        fxshare.load(saved, Toy(act=F.relu), check=False)


def test_another_text_of_the_same_function_is_a_note(gm: Any, saved: Path) -> None:
    rewrite_manifest(saved, lambda m: m.update(graph_sha256="0" * 64))
    loaded = fxshare.load(saved, Toy)
    assert "graph text differs" in loaded.fxshare.report.notes[-1]
    assert torch.equal(loaded(ids()), gm(ids()))


# Nothing in a folder is executed -------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "class_name"),
    [
        ("transformers", "os:system"),
        ("transformers", "transformers.models.gpt2:os.system"),
        ("transformers", "transformers_modules.evil:Evil"),
        ("transformers", "transformers.utils:logging"),
        ("transformers", "transformers.x:pipeline"),
        ("transformers", "transformers.x:AutoModel"),
        ("transformers", "transformers.x:__loader__"),
        ("embedded", "os:system"),
        ("user", "antigravity:Class"),
        ("other", "antigravity:Class"),
    ],
)
def test_names_in_a_folder_import_nothing(
    kind: str, class_name: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    source = {"kind": kind, "class_name": class_name, "config": {}, "generation_config": None}
    rewrite_manifest(saved, lambda m: m.update(source=source))
    asked: list[str] = []
    real = importlib.import_module

    def watched(name: str, package: str | None = None) -> Any:
        asked.append(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", watched)
    ran: list[str] = []
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises(StoreError):
        fxshare.load(saved)
    outside = [
        name for name in asked if not name.lstrip(".").startswith(("transformers", "models"))
    ]
    assert not [name for name in outside if "evil" in name or "antigravity" in name or name == "os"]
    assert not ran
    assert not {"antigravity", "transformers_modules"} & set(sys.modules)


@pytest.mark.parametrize(
    "extra",
    [
        {"attn_implementation": "someone/kernels"},
        {"text_config": {"_attn_implementation": "someone/kernels"}},
        {"attn_implementation": {"": "sdpa", "text_config": "flash_attention_2"}},
        {"experts_implementation": "someone/kernels"},
    ],
)
def test_kernels_are_not_fetched(extra: dict[str, Any], tmp_path: Path) -> None:
    model, config = transformers_models()["llama"]
    before = fxshare.compile(model, config, capture="modules")
    fxshare.save(before, tmp_path / "out")
    rewrite_manifest(tmp_path / "out", lambda m: m["source"]["config"].update(extra))
    with pytest.raises(StoreError, match="from the network"):
        fxshare.load(tmp_path / "out")


@dataclass(frozen=True)
class Doubled(Pass):
    """An output times two."""

    name: ClassVar[str] = "doubled"
    exact: ClassVar[bool] = False

    def rewrite(self, gm: fx.GraphModule) -> int:
        (output,) = (node for node in gm.graph.nodes if node.op == "output")
        with gm.graph.inserting_before(output):
            output.args = (gm.graph.call_function(torch.mul, (output.args[0], 2)),)
        return 1


def test_passes_come_from_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = compiled(toy(), passes=[f"{__name__}:Doubled"], **SHARING)
    config = CONFIG | SHARING
    handed = fxshare.compile(toy(), config, calibration=[ids()], capture="fx", passes=[Doubled()])
    for number, before in enumerate((named, handed)):
        fxshare.save(before, tmp_path / str(number))
        with monkeypatch.context() as patch:
            patch.setattr(importlib, "import_module", lambda *_: pytest.fail("imported"))
            with pytest.raises(StoreError, match=r"\['doubled'\].*only named in the folder"):
                fxshare.load(tmp_path / str(number), Toy)
        after = fxshare.load(tmp_path / str(number), Toy, passes=[Doubled()])
        assert torch.equal(before(ids()), after(ids()))
        assert after.fxshare.extra_passes == ("doubled",)
    assert "passes=[...]" in (tmp_path / "0" / "README.md").read_text()


# Writing -------------------------------------------------------------------------------------


def test_an_existing_target(gm: Any, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="exists"):
        fxshare.save(gm, saved)
    fxshare.save(gm, saved, force=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    fxshare.save(gm, foreign, force=True)  # an empty one is nobody's
    (foreign / "fxshare.json").unlink()
    with pytest.raises(StoreError, match=r"no fxshare\.json, so fxshare did not make it"):
        fxshare.save(gm, foreign, force=True)
    assert (foreign / "plan.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        fxshare.save(gm, tmp_path / "file", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "foreign", "out"]


@pytest.mark.parametrize("where", ["tensors", "text", "rename"])
@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_nothing_behind(
    where: str, force: bool, gm: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    target = saved if force else saved.parent / "deep" / "er" / "new"
    if where == "tensors":
        monkeypatch.setattr(tensors_module, "save_file", full)
    elif where == "text":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(Path, "rename", full)
        monkeypatch.setattr(files_module, "exchange", full)
    with pytest.raises(StoreError, match=rf"cannot write {target}: No space left on device"):
        fxshare.save(gm, target, force=force)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_an_interruption_leaves_nothing_behind(
    gm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensors_module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxshare.save(gm, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_parent_that_is_a_file(gm: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*: Not a directory"):
        fxshare.save(gm, tmp_path / "file" / "out")


def test_the_mark_of_our_folders_is_the_manifest() -> None:
    assert folder_module._MARK == fxshare.store.manifest.MANIFEST


def test_what_cannot_be_saved(gm: Any, tmp_path: Path) -> None:
    with pytest.raises(FxShareError, match="Linear was not made by fxshare"):
        fxshare.save(nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(StoreError, match="expected at least 1"):
        fxshare.save(gm, tmp_path / "out", max_shard_bytes=0)
    changed = copy.deepcopy(gm)
    (output,) = (node for node in changed.graph.nodes if node.op == "output")
    with changed.graph.inserting_before(output):
        output.args = (changed.graph.call_function(torch.neg, output.args),)
    changed.recompile()
    with pytest.raises(StoreError, match=r"changed after it was compiled.*passes="):
        fxshare.save(changed, tmp_path / "out")
    odd = copy.deepcopy(gm)
    odd.scale = odd.scale.to_sparse()
    with pytest.raises(StoreError, match="'scale': expected a dense"):
        fxshare.save(odd, tmp_path / "out")
    with pytest.raises(StoreError, match="is on the meta device"):
        fxshare.save(copy.deepcopy(gm).to("meta"), tmp_path / "out")
    described = replace(gm.fxshare, inputs=({"ids": object()},))
    odd = copy.deepcopy(gm)
    odd.meta["fxshare"] = described
    with pytest.raises(StoreError, match="argument 'ids' of the example call is a object"):
        fxshare.save(odd, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_constants_of_the_example_call(tmp_path: Path) -> None:
    class Optional(Toy):
        def forward(self, ids: Tensor, double: bool = False, pair: Any = None) -> Tensor:
            y = super().forward(ids)
            return (y * 2 if double else y) + pair[0].sum() * pair[1]["by"]

    call = {"ids": ids(), "double": True, "pair": (torch.ones(3, 2), {"by": 2.5})}
    before = fxshare.compile(Optional().eval(), CONFIG | SHARING, calibration=[call], capture="fx")
    fxshare.save(before, tmp_path / "out")
    after = fxshare.load(tmp_path / "out", Optional)
    assert after.fxshare.inputs == before.fxshare.inputs
    pair = call["pair"]
    assert torch.equal(before(ids(), True, pair), after(ids(), True, pair))
    for gm in (before, after):  # the example's is not the default
        with pytest.raises(GuardError, match="without it Optional would take False"):
            gm(ids(), pair=pair)


def test_device(saved: Path) -> None:
    loaded = fxshare.load(saved, Toy, device="meta")
    assert {t.device.type for _, t in tensors_of(loaded).values()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("front_end", ["fx", "export", "modules"])
def test_from_one_device_to_the_other(front_end: str, tmp_path: Path) -> None:
    gm = compiled(toy(), front_end=front_end, **SHARING)
    fxshare.save(gm, tmp_path / "cpu")
    there = fxshare.load(tmp_path / "cpu", Toy, device="cuda")
    assert {t.device.type for _, t in tensors_of(there).values()} == {"cuda"}
    assert torch.allclose(there(ids().cuda()).cpu(), gm(ids()), atol=1e-4)
    fxshare.save(there, tmp_path / "cuda")
    back = fxshare.load(tmp_path / "cuda", Toy)
    assert torch.equal(back(ids()), gm(ids()))
