"""``to="vllm"``: a folder that transformers loads without us and engines fill by names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.embedded import load_embedded
from fxshare.errors import CheckFailed, ExportError
from fxshare.exporting.options import Options
from fxshare.exporting.served import shared_linears
from fxshare.exporting.served.layout import check_layout
from fxshare.exporting.served.reading import own_modules, read_back
from fxshare.exporting.subject import subject_of
from fxshare.exporting.targets import vllm
from tests.exporting import build
from tests.strategies import no_warnings_of_ours
from tests.zoo.families import family

pytest.importorskip("transformers")
NEW, LENGTHS = 16, (2, 5, 8)
CAUSAL = "AutoModelForCausalLM"
HEADS = {"split": "heads", "qkv_order": "qkv"}
PIVOTED = build.PIVOTED

_ALONE = """
import json, sys
sys.modules.update(dict.fromkeys(("fxshare", "passes")))
import torch, transformers
torch.set_num_threads(int(sys.argv[1]))
found = {}
for folder, prompts in json.load(sys.stdin).items():
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        raise SystemExit("code of the folder ran unasked")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    made = transformers.AutoModelForCausalLM.from_pretrained
    model = made(folder, trust_remote_code=True, local_files_only=True).eval()
    assert model.config.use_cache
    found[folder] = [
        model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=None,
                       pad_token_id=0)[0, len(ids):].tolist()
        for ids in prompts
    ]
print(json.dumps(found))
"""


def greedy(gm: Any, ids: list[int]) -> list[int]:
    """What the compiled model says next, each time from the whole text before."""
    x = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(NEW):
            output = gm(input_ids=x, attention_mask=torch.ones_like(x))
            x = torch.cat([x, output.logits[:, -1].argmax(-1, keepdim=True)], 1)
    return x[0, len(ids) :].tolist()


def compiled(name: str, **options: Any) -> Any:
    """A family of the zoo, compiled."""
    found = family(name)
    cfg = {**found.config, **(options or build.SHARING)}
    with no_warnings_of_ours():
        return fxshare.compile(found.model(), cfg, calibration=found.batches(2))


@pytest.fixture(scope="module")
def llama() -> Any:
    """Tests must not change it."""
    return build.compiled_transformers("llama", build.transformers_model("llama", use_cache=True))


@pytest.fixture(scope="module")
def served(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Compiled models and their folders; the heads of GPT-2's fused projection in parts, pivoted,
    and a Qwen with biases of which every linear has its bases."""
    root = tmp_path_factory.mktemp("served")
    found = {}
    models = {"llama": llama, "gpt2": compiled("gpt2", **PIVOTED), "qwen2": compiled("qwen2")}
    for name, gm in models.items():
        fxshare.export(gm, root / name, to="vllm", untie=name == "qwen2")
        found[name] = (gm, root / name)
    return found


def test_the_same_tokens_without_us_and_no_code_unasked(
    served: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 32, (n,), generator=generator).tolist() for n in LENGTHS]
    given = {str(path): prompts for _, path in served.values()}
    command = [sys.executable, "-c", _ALONE, str(torch.get_num_threads())]
    done = subprocess.run(
        command,
        input=json.dumps(given),
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for gm, path in served.values():
        assert found[str(path)] == [greedy(gm, ids) for ids in prompts], path.name
        assert len({tuple(tokens) for tokens in found[str(path)]}) > 1


def test_what_is_in_the_folder(served: dict[str, tuple[Any, Path]]) -> None:
    gm, path = served["llama"]
    names = {"config.json", "generation_config.json", "model.safetensors", "modeling_fxshare.py"}
    assert names <= {file.name for file in path.iterdir()}
    tensors = load_file(path / "model.safetensors")
    assert all(name.startswith(("model.", "lm_head.")) for name in tensors)
    # q's and k's read one input, in every layer that reads either
    bases = {group.name for group in gm.fxshare.plan.groups} - {"basis_q_0_1", "basis_k_0_1"}
    bases.add("basis_q_0_1_basis_k_0_1")
    assert {n.split(".")[2] for n in tensors if n.startswith("model.bases.")} == bases
    # every number once: the shared bases too
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in gm.parameters())
    config = json.loads((path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_fxshare.SharedLlamaConfig",
        "AutoModel": "modeling_fxshare.SharedLlamaModel",
        CAUSAL: "modeling_fxshare.SharedLlamaForCausalLM",
    }
    # of a transformers model, and without anything of this machine or of us
    code = (path / "modeling_fxshare.py").read_text()
    assert not re.search(r"^(import|from) (fxshare|passes)", code, re.MULTILINE)
    assert str(path) not in code + json.dumps(config)
    _, gpt2 = served["gpt2"]
    in_files = load_file(gpt2 / "model.safetensors")
    assert "h.0.attn.c_attn.parts.0.weight" in in_files
    # each pivoted one reads the inputs in an order of its own
    pivoted = {name.split(".")[1] for name in in_files if name.endswith(".order")}
    assert pivoted
    assert pivoted <= {group.name for group in served["gpt2"][0].fxshare.plan.groups}
    _, untied = served["qwen2"]
    assert not any(n.startswith("model.bases.") for n in load_file(untied / "model.safetensors"))


def test_the_base_model_alone(served: dict[str, tuple[Any, Path]]) -> None:
    """What vLLM makes: ``AutoModel``, and every linear anew under its name."""
    for gm, path in served.values():
        model = _as_engines_do(path)
        x = build.ids(2, 7)
        hidden = model(input_ids=x, use_cache=False).last_hidden_state
        head = read_back_head(path)
        limit = tolerance(torch.float32, 2 * len(gm.fxshare.plan.sites) + 1)
        expected = gm(input_ids=x, attention_mask=torch.ones_like(x)).logits
        assert worst(expected, head(hidden)).relative <= limit, path.name


def read_back_head(path: Path) -> Any:
    """The head's product, which engines compute themselves."""
    import transformers

    with own_modules():
        made = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    return made.get_output_embeddings()


def _as_engines_do(path: Path) -> Any:
    """The base model as vLLM makes it: linears are replaced one by one, by name, and what stands
    in the files under a name goes there; nothing tells where a name has no weights."""
    import transformers

    with own_modules():
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
        model = transformers.AutoModel.from_config(config, trust_remote_code=True).eval()
    _replace(model)
    state = {n.removeprefix("model."): t for n, t in load_file(path / "model.safetensors").items()}
    model.load_state_dict(state, strict=False)
    return model


def _replace(module: nn.Module) -> None:
    for name, child in list(module._modules.items()):
        if isinstance(child, nn.Linear):
            fresh = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
            for parameter in fresh.parameters():
                nn.init.zeros_(parameter)
            setattr(module, name, fresh)
        elif child is not None:
            _replace(child)


def naively(text: str) -> str:
    """The folder's code with every basis registered in each linear that reads it."""
    changed = text.replace(
        'self.__dict__["root_of_bases"] = root',
        "self.own = nn.ModuleDict({n: getattr(root, n) for n in self.names if n})",
    ).replace('self.__dict__["root_of_bases"]', "self.own")
    changed = changed.replace("getattr(root, str(name))", "root[str(name)]")
    assert changed.count("self.own") == 2
    return changed


def test_a_naive_layout_is_told(llama: Any, tmp_path: Path) -> None:
    """Bases as submodules of every linear that reads them: right in transformers, zeros in an
    engine, and no error in either."""
    fxshare.export(llama, tmp_path / "m", to="vllm")
    right = (tmp_path / "m" / "modeling_fxshare.py").read_text()
    stored = set(load_file(tmp_path / "m" / "model.safetensors"))
    check_layout(read_back(tmp_path / "m", CAUSAL), stored, set())

    naive = naively(right)
    x = build.ids(2, 7)
    before = _as_engines_do(tmp_path / "m")(input_ids=x).last_hidden_state
    (tmp_path / "m" / "modeling_fxshare.py").write_text(naive)
    with own_modules():
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", trust_remote_code=True
        ).eval()
    assert torch.equal(model.model(input_ids=x).last_hidden_state, before)
    zeros = _as_engines_do(tmp_path / "m")(input_ids=x).last_hidden_state
    assert worst(before, zeros).relative > 0.1
    with pytest.raises(CheckFailed, match=r"own\.basis_.*leave it zero; let one module"):
        check_layout(model, stored, set())
    with pytest.raises(CheckFailed, match=r"Linear: 'weight' has no weights.*do not hold it"):
        check_layout(read_back_head(tmp_path / "m"), set(), set())


def test_a_naive_layout_is_not_written(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = vllm.modeling_text

    monkeypatch.setattr(vllm, "modeling_text", lambda family: naively(write(family)))
    with pytest.raises(CheckFailed, match="has no weights of its own"):
        fxshare.export(llama, tmp_path / "m", to="vllm")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "notes"),
    [
        ("qwen3", PIVOTED, 0),
        ("gemma3", {}, 0),
        ("mistral", {}, 0),
        ("bert", {}, 0),
        ("mixtral", {}, 2),  # the experts are stacks of matrices
    ],
)
def test_other_families(name: str, options: dict[str, Any], notes: int, tmp_path: Path) -> None:
    gm = compiled(name, **options)
    done = fxshare.export(gm, tmp_path / "m", to="vllm")
    assert done.distance is not None
    assert done.distance.relative <= done.limit
    assert len(done.notes) == notes
    assert notes == 0 or "it is no linear module of the original" in done.notes[0]


def test_exact_plans_are_plain_and_mixed_ones_partly(tmp_path: Path) -> None:
    found = family("gpt2")
    exact = fxshare.compile(found.model(), found.config, example=found.call())
    fxshare.export(exact, tmp_path / "exact", to="vllm")
    config = json.loads((tmp_path / "exact" / "config.json").read_text())
    plain = config["shared_linears"]["linears"].values()  # for every Conv1D
    assert len(plain) == 4 * 2
    assert all(part["basis"] is None for spec in plain for part in spec["parts"])
    plan = exact.fxshare.plan
    # q's first head and k's second read a basis each, the rest of the projection is its weight
    site = next(s for s in plan.sites if s.name.endswith("h.0.attn.c_attn"))
    chosen = [site.slices[0], site.slices[5]]
    groups = [
        {
            "name": f"basis_{number}",
            "type": site.type,
            "label": part.label,
            "layers": [0],
            "slices": [part.name],
            "in_features": site.in_features,
            "out_features": part.out_features,
            "rank": 4,
        }
        for number, part in enumerate(chosen)
    ]
    mixed_plan = type(plan).model_validate(
        {**plan.model_dump(), "mode": "sharing", "groups": groups}
    )
    with no_warnings_of_ours():
        gm = fxshare.compile(
            found.model(),
            {**found.config, **build.SHARING},
            plan=mixed_plan,
            calibration=found.batches(2),
        )
    done = fxshare.export(gm, tmp_path / "mixed", to="vllm")
    assert done.distance is not None
    assert done.distance.relative <= done.limit
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    spec = config["shared_linears"]["linears"]["h.0.attn.c_attn"]
    assert [part["basis"] for part in spec["parts"]] == ["basis_0", None, "basis_1", None]


def test_lowered_and_module_by_module(llama: Any, tmp_path: Path) -> None:
    original = build.transformers_model("llama", use_cache=True)
    with no_warnings_of_ours():
        modules = fxshare.compile(
            original,
            build.transformers_config("llama"),
            calibration=[{"input_ids": build.ids(3, 8)}],
            capture="modules",
        )
    for name, gm in (("lowered", fxshare.lower(llama)), ("modules", modules)):
        done = fxshare.export(gm, tmp_path / name, to="vllm")
        assert done.distance is not None
        assert done.distance.relative <= done.limit
        assert json.loads((tmp_path / name / "config.json").read_text())["shared_linears"]["bases"]


def test_a_factorised_head_and_embedding_are_multiplied_out(tmp_path: Path) -> None:
    for tied in (True, False):
        original = build.transformers_model("llama", tie_word_embeddings=tied)
        cfg = build.transformers_config("llama")
        name = "embed" if tied else "head"
        pattern = r".*embed_tokens$" if tied else r"lm_head$"
        chosen = {"pattern": pattern, "embedding": tied}
        cfg["weight_types"] = {**cfg["weight_types"], name: chosen}
        batches = [{"input_ids": build.ids(3, 8), "attention_mask": torch.ones(3, 8).long()}]
        with no_warnings_of_ours():
            gm = fxshare.compile(original, cfg, calibration=batches)
        done = fxshare.export(gm, tmp_path / name, to="vllm")
        assert done.distance is not None
        assert done.distance.relative <= done.limit
        reason = "rows of it are looked up" if tied else "engines make the head themselves"
        assert any(reason in note for note in done.notes), done.notes
        assert done.notes[-1] == f"what is multiplied out takes {32 * 16 * 4:,} bytes"
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert ("lm_head.weight" in tensors) is not tied


def test_weights_in_shards_and_a_tokenizer(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (source / "vocab.json").write_text("{}")
    (source / "notes.txt").write_text("private")
    gm = fxshare.readable(llama)
    options = Options(tokenizer=source)
    subject = subject_of(gm, None, dynamic=True, seed=0)
    written = vllm.write(subject, tmp_path / "m", options, max_shard_bytes=8_000)
    names = {file.name for file in (tmp_path / "m").iterdir()}
    assert "model.safetensors.index.json" in names
    assert sum(name.startswith("model-0000") for name in names) > 2
    assert {"tokenizer_config.json", "vocab.json"} <= names
    assert "notes.txt" not in names
    assert all(vllm.ours(name) for name in names)
    call = subject.shapes.base
    assert written.run is not None
    assert worst(subject.run(call), written.run(call)).relative < 1e-5


def test_an_export_is_nothing_to_compile(served: dict[str, tuple[Any, Path]]) -> None:
    from fxshare.loading.names import load_model

    with pytest.raises(
        fxshare.errors.DataError, match="an export of fxshare to 'vllm', whose code"
    ):
        load_model(str(served["llama"][1]))


# what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "falcon",
            "attention of FalconForCausalLM computes by itself.*_supports_attention_backend",
        ),
        ("t5", "has an encoder and a decoder"),
        ("nanogpt", "NanoGPT is of a class of its own, which no engine has"),
    ],
)
def test_models_that_no_engine_takes(name: str, message: str, tmp_path: Path) -> None:
    found = family(name)
    gm = fxshare.compile(found.model(), found.config, example=found.call())
    with pytest.raises(ExportError, match=message):
        fxshare.export(gm, tmp_path / "m", to="vllm")
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_model_is_of_its_own_class(tmp_path: Path) -> None:
    cfg = {"weight_types": {"fc": {"pattern": r".*\.h\.0\.mlp\.c_fc$"}}}
    gm = fxshare.compile(load_embedded(), cfg, example=build.ids(2, 5))
    with pytest.raises(ExportError, match="export it to 'pt2' or 'onnx'"):
        fxshare.export(gm, tmp_path / "m", to="vllm")


def test_weights_that_were_quantised_since(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    gm = build.compiled_transformers("llama", build.transformers_model("llama"))
    quantization.quantize_(gm, quantization.Int8WeightOnlyConfig())
    with pytest.raises(fxshare.errors.FxShareError, match="quantiz"):
        fxshare.export(gm, tmp_path / "m", to="vllm")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_number_is_noticed_and_an_older_folder_stays(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fxshare.export(llama, tmp_path / "m", to="vllm")
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    write = vllm.write_tensors

    def damaged(tensors: dict[str, tuple[Any, Tensor]], *rest: Any) -> Any:
        name = next(n for n in tensors if n.startswith("model.bases."))
        kind, tensor = tensors[name]
        return write({**tensors, name: (kind, tensor * 1.05)}, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(vllm, "write_tensors", damaged)
        with pytest.raises(CheckFailed, match="vllm export of LlamaForCausalLM differs"):
            fxshare.export(llama, tmp_path / "m", to="vllm", force=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(fxshare.errors.StoreError, match=r"holds 'thesis\.tex'"):
        fxshare.export(llama, tmp_path / "m", to="vllm", force=True)


def test_reading_back_leaves_no_trace(llama: Any, tmp_path: Path) -> None:
    path, modules = list(sys.path), set(sys.modules)
    fxshare.export(llama, tmp_path / "m", to="vllm")
    assert sys.path == path
    assert not {n for n in set(sys.modules) - modules if n.startswith("transformers_modules")}


def test_a_pivoted_basis_is_the_kept_inputs_and_a_table() -> None:
    basis = shared_linears.PivotedBasis(5, 2)
    basis.get_buffer("order").copy_(torch.tensor([1, 4, 0, 2, 3]))
    x = torch.randn(3, 5)
    expected = x[:, [1, 4]] + x[:, [0, 2, 3]] @ basis.table.weight.t()
    assert torch.allclose(basis(x), expected)


def test_what_vllm_flattens_before_a_linear() -> None:
    """GPT-2 makes one dimension of all before the head's width, and vLLM's attention has no
    batch."""
    spec = {"in_features": 6, "bias": True, "parts": [{"basis": None, "rows": 4}]}
    linear = shared_linears.SharedLinear(spec, {}, None)
    x = torch.randn(5, 6)
    assert torch.equal(linear(x.reshape(-1)), linear(x))
    assert torch.equal(linear(x.reshape(1, -1)), linear(x))


def test_an_interruption_leaves_nothing(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    for name in ("write_tensors", "write_json", "modeling_text", "read_back", "check_layout"):
        with monkeypatch.context() as patch:
            patch.setattr(vllm, name, stopped)
            with pytest.raises(KeyboardInterrupt):
                fxshare.export(llama, tmp_path / "m", to="vllm")
        assert list(tmp_path.iterdir()) == [], name
    assert not [name for name in sys.modules if name.startswith("transformers_modules")]
