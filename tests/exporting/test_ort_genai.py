"""``to="ort-genai"``: ONNX Runtime GenAI says what the compiled model does, with its own cache."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fxshare
from fxshare.errors import CheckFailed, ExportError
from fxshare.exporting.certifying.certificate import changes_since, read_certificate
from fxshare.exporting.engines import matrix, worker
from tests.engines import test_vllm_serves
from tests.exporting import build
from tests.strategies import no_warnings_of_ours
from tests.zoo.families import family

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
genai = pytest.importorskip("onnxruntime_genai")
target = importlib.import_module("fxshare.exporting.targets.ort_genai")
NEW = 12


def compiled(name: str = "llama", **options: Any) -> Any:
    original = build.transformers_model(name, use_cache=True)
    return build.compiled_transformers(name, original, **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model whose layers share bases, and its folder, with a tokenizer's file."""
    root = tmp_path_factory.mktemp("genai")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "X"}')
    gm = compiled()
    fxshare.export(gm, root / "m", to="ort-genai", tokenizer=root / "tokenizer")
    return gm, root / "m"


def say(path: Path, prompt: list[int], new: int) -> list[int]:
    """GenAI's loop, as its documents have it."""
    model = genai.Model(str(path))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + new, min_length=len(prompt) + new)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return list(map(int, generator.get_sequence(0)))[len(prompt) :]


def greedy(gm: Any, prompt: list[int], new: int) -> list[int]:
    x = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(new):
            logits = gm(input_ids=x, attention_mask=torch.ones_like(x)).logits
            x = torch.cat([x, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return x[0, len(prompt) :].tolist()


def test_the_same_tokens(exported: tuple[Any, Path]) -> None:
    gm, path = exported
    generator = torch.Generator().manual_seed(8)
    said = []
    for length in (1, 6, 12):
        prompt = torch.randint(3, 32, (length,), generator=generator).tolist()
        said.append(say(path, prompt, NEW))
        assert said[-1] == greedy(gm, prompt, NEW)
    assert len({tuple(tokens) for tokens in said}) > 1


def test_the_folder_and_its_certificate(exported: tuple[Any, Path]) -> None:
    gm, path = exported
    names = {"model.onnx", "genai_config.json", "tokenizer_config.json", "certificate.json"}
    assert {file.name for file in path.iterdir()} == names
    assert all(target.ours(name) for name in names)
    config = json.loads((path / "genai_config.json").read_text())["model"]
    assert config["type"] == "decoder"
    assert config["decoder"]["num_key_value_heads"] == 2
    assert config["decoder"]["head_size"] == 4
    graph = onnx.load(path / "model.onnx").graph
    given = [put.name for put in graph.input]
    assert given[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert given[3:] == [f"past_key_values.{n}.{w}" for n in range(2) for w in ("key", "value")]
    # batch, tokens and what is in the cache vary
    assert all(put.type.tensor_type.shape.dim[0].dim_param for put in graph.input)
    assert all(put.type.tensor_type.shape.dim[2].dim_param for put in graph.input[3:])
    # of bases that layers share there is one
    stored = sum(onnx.numpy_helper.to_array(t).nbytes for t in graph.initializer)
    assert stored <= sum(p.nbytes for p in {id(p): p for p in gm.parameters()}.values()) + 2048
    certificate = read_certificate(path)
    assert (certificate.engine, certificate.kind) == ("onnxruntime_genai", "tokens")
    assert certificate.engine_version == genai.__version__
    assert certificate.found == certificate.expected
    assert changes_since(path, certificate) == []


def test_what_is_padding_elsewhere_is_no_part_of_the_prompts(exported: tuple[Any, Path]) -> None:
    """GenAI masks the padding token wherever it is; with an end and no padding that is the end."""
    gm, path = exported
    assert gm.config.pad_token_id is None
    end = gm.config.eos_token_id
    assert all(end not in prompt for prompt in read_certificate(path).prompts)
    config = json.loads((path / "genai_config.json").read_text())
    assert config["model"]["pad_token_id"] == end


def test_the_models_own_end_is_said_like_any_other_token(
    exported: tuple[Any, Path], tmp_path: Path
) -> None:
    gm, path = exported
    certificate = read_certificate(path)
    prompt, expected = certificate.prompts[0], list(certificate.expected[0])
    for file in path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((path / "genai_config.json").read_text())
    said = next(token for token in expected if token not in prompt)
    config["model"]["eos_token_id"] = [said]
    (tmp_path / "genai_config.json").unlink()
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    # the other prompts leave no other token to end with
    rest = [token for token in range(gm.config.vocab_size) if token != said]
    prompts = [list(prompt), *(rest[at : at + 8] for at in range(0, len(rest), 8))]
    job = {"path": str(tmp_path), "prompts": prompts, "new": len(expected)}
    _, run = worker.ort_genai(job)
    tokens, logits = run()
    assert tokens[0] == expected
    assert {len(one) for one in (*tokens, *logits)} == {len(expected)}


def test_where_nothing_is_padding_nothing_is_masked(
    exported: tuple[Any, Path], tmp_path: Path
) -> None:
    gm, path = exported
    config = gm.config.__class__(**{**gm.config.to_dict(), "eos_token_id": None})
    sizes = target._Sizes(**dict.fromkeys(target._Sizes.__dataclass_fields__, 1))
    written = target._genai_config(config, sizes, True)["model"]
    assert (written["pad_token_id"], written["eos_token_id"]) == (-1, 0)
    # and GenAI runs it so
    for file in path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    other = json.loads((path / "genai_config.json").read_text())
    other["model"]["pad_token_id"] = -1
    (tmp_path / "genai_config.json").unlink()
    (tmp_path / "genai_config.json").write_text(json.dumps(other))
    prompt = [1, 2, gm.config.eos_token_id, 3, gm.config.eos_token_id]
    assert say(tmp_path, prompt, NEW) == greedy(gm, prompt, NEW)


def test_verify_runs_it(exported: tuple[Any, Path]) -> None:
    row = matrix.row_of("ort-genai", exported[1])
    assert (row.state, row.version) == ("equal", genai.__version__), row
    assert row.gap is not None
    assert row.gap < 1e-4


def test_without_the_engine_it_is_said(
    exported: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    (note,), generate = target._by_genai(exported[1])
    assert generate is None
    assert "pip install 'fxshare[ort-genai]'" in note


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mistral", "cache layers: DynamicSlidingWindowLayer.*such as a sliding window"),
        ("t5", "has an encoder"),
        ("bert", "BertForMaskedLM is none"),
        ("nanogpt", "a causal language model of transformers, and NanoGPT is none"),
    ],
)
def test_what_has_no_such_step(name: str, message: str, tmp_path: Path) -> None:
    found = family(name)
    gm = fxshare.compile(found.model(), found.config, example=found.call())
    with pytest.raises(ExportError, match=message):
        fxshare.export(gm, tmp_path / "m", to="ort-genai")
    assert list(tmp_path.iterdir()) == []


def test_modules_are_no_graph(tmp_path: Path) -> None:
    original = build.transformers_model("llama")
    gm = fxshare.compile(original, build.transformers_config("llama"), capture="modules")
    with pytest.raises(ExportError, match="was captured at module granularity"):
        fxshare.export(gm, tmp_path / "m", to="ort-genai", example={"input_ids": build.ids()})


def test_sizes_are_those_of_the_cache() -> None:
    import transformers

    config = transformers.BloomConfig(hidden_size=16, n_head=4, vocab_size=32)
    subject: Any = SimpleNamespace(name="Bloom", model=torch.nn.Linear(1, 1))

    def cache(*shapes: tuple[int, int]) -> Any:
        each = [torch.zeros(1, heads, 2, width) for heads, width in shapes]
        return SimpleNamespace(layers=[SimpleNamespace(keys=k, values=k) for k in each])

    sizes = target._Sizes.of(subject, config, cache((1, 4), (1, 4)))
    assert (sizes.layers, sizes.heads, sizes.key_heads, sizes.head_width) == (2, 4, 1, 4)
    assert (sizes.width, sizes.vocabulary, sizes.context) == (16, 32, 2048)  # it does not say
    with pytest.raises(ExportError, match="Bloom keeps 1 heads of 4 and 2 heads of 4"):
        target._Sizes.of(subject, config, cache((1, 4), (2, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_families_whose_configuration_does_not_tell_the_sizes_of_their_cache(
    name: str, tmp_path: Path
) -> None:
    found = family(name)
    gm = fxshare.compile(found.model(), found.config, example=found.call())
    fxshare.export(gm, tmp_path / "m", to="ort-genai")
    assert read_certificate(tmp_path / "m").equal is True


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sharing", "pivoted", "refined"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_sixteen_tokens_after_each_of_three_prompts(name: str, mode: str, tmp_path: Path) -> None:
    original = test_vllm_serves.model(name)
    options = build.PIVOTED if mode == "pivoted" else build.SHARING
    with no_warnings_of_ours():
        cfg = {**family(name).config, **options}
        gm = fxshare.compile(original, cfg, calibration=test_vllm_serves.batches())
        if mode == "refined":
            gm = fxshare.refine(gm, original, test_vllm_serves.batches(), steps=20)
    fxshare.export(gm, tmp_path / "m", to="ort-genai")
    certificate = read_certificate(tmp_path / "m")
    assert certificate.engine == "onnxruntime_genai"
    assert [len(tokens) for tokens in certificate.found] == [16, 16, 16]
    assert certificate.found == certificate.expected
    assert certificate.gap is not None
    assert certificate.limit is not None
    assert certificate.gap <= certificate.limit
    # the pivoted GPT-2, whose weights are random, says one token after any prompt: its logits tell
    assert len(set(certificate.found)) > 1 or (name, mode) == ("gpt2", "pivoted")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lowered_and_pivoted(name: str, tmp_path: Path) -> None:
    gm = fxshare.lower(compiled(name, **build.PIVOTED))
    fxshare.export(gm, tmp_path / "m", to="ort-genai")
    assert read_certificate(tmp_path / "m").equal is True
    prompt = list(range(3, 12))
    assert say(tmp_path / "m", prompt, NEW) == greedy(gm, prompt, NEW)


@pytest.mark.slow
def test_a_cache_that_forgets_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right on whole texts, wrong on the steps after them."""
    update = target.GivenCache.update

    def forgets(self: Any, key: Any, value: Any, layer: int, *rest: Any, **more: Any) -> Any:
        found = update(self, key, value, layer, *rest, **more)
        self.pasts[layer] = (found[0] * 0.0, found[1])
        return found

    monkeypatch.setattr(target.GivenCache, "update", forgets)
    with pytest.raises(CheckFailed, match="ort-genai export of LlamaForCausalLM says token"):
        fxshare.export(compiled(), tmp_path / "m", to="ort-genai")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("llama", 8), ("gpt2", 4)])
def test_an_embedding_and_a_head_in_few_bits_say_the_same_tokens(
    name: str, bits: int, tmp_path: Path
) -> None:
    from tests.compiling.test_embedding_bits import config, tables

    original = build.transformers_model(name, use_cache=True)
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 32, (2, 12), generator=generator) for _ in range(8)]
    cfg = [*config(original), {"planner": {"search": "off", "bits": [bits]}}]
    gm = fxshare.compile(original, cfg, calibration=ids)
    assert {weight.bits for weight in tables(gm)} == {bits}
    fxshare.export(gm, tmp_path / "m", to="ort-genai")
    graph = onnx.load(tmp_path / "m" / "model.onnx", load_external_data=False).graph
    read = {node.op_type for node in graph.node}
    assert ("MatMulNBits" if bits == 4 else "DequantizeLinear") in read
    said = []
    for prompt in ([5], [7, 3, 11, 2], [9, 30, 4, 4, 17, 21, 8]):
        said.append(say(tmp_path / "m", prompt, NEW))
        assert said[-1] == greedy(gm, prompt, NEW)
    # the random GPT-2 repeats one token whatever the prompt is
    assert len({tuple(tokens) for tokens in said}) > 1 or name == "gpt2"
