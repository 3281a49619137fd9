"""From a folder and a corpus to a folder, by the command line; and what is wrong with either."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fxshare
from fxshare import FxShareWarning
from fxshare.cli import main
from fxshare.data import batches as batching
from fxshare.data.batches import Sampling, sample_batches
from fxshare.errors import DataError, MatchError
from fxshare.loading.names import load_model
from fxshare.loading.weights import check_weights
from fxshare.models.quantised import quantisation_of
from passes.errors import FxShareError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "weight_types": {
        "q": {"pattern": r".*\.q_proj$"},
        "down": {"pattern": r".*\.down_proj$"},
    },
    "block_pattern": r"layers\.(\d+)",
    "group_size": 2,
    "compression_rate": 0.7,
}
TEXTS = [f"The {n}th of these texts says {n * n} and little else, déjà vu." for n in range(40)]


def byte_tokenizer() -> Any:
    """One id for each byte, and 256 for padding."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)} | {"<pad>": 256}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", model_max_length=64
    )


def llama(**options: Any) -> Any:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 260,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    return transformers.LlamaConfig(**{**sizes, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in several files, with a tokenizer and one corpus in every format."""
    path = tmp_path_factory.mktemp("in")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(llama())
    model.save_pretrained(path / "model", max_shard_size="20KB")
    assert (path / "model" / "model.safetensors.index.json").is_file()
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(path / "model")
    (path / "cfg.yaml").write_text(json.dumps(CONFIG))
    text = "\n\n".join(TEXTS)
    (path / "a.txt").write_text(text, encoding="utf-8")
    rows = [json.dumps({"body": t, "text": "another"}) for t in TEXTS]
    (path / "a.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text))
    np.save(path / "a.npy", ids.numpy().astype(np.uint16))
    save_file({"ids": ids.int()}, path / "a.safetensors")
    _parquet(path / "a.parquet", {"body": TEXTS, "number": list(range(len(TEXTS)))})
    return path


def _parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=7)


def compiled(folder: Path, out: Path, corpus: str, *options: str) -> dict[str, Any]:
    """The tensors that the command line saves for the folder with a corpus, and the tokens read."""
    command = ["compile", str(folder / "model"), "-c", str(folder / "cfg.yaml"), "-o", str(out)]
    data = ["--calibration", str(folder / corpus), "--length", "32"]
    assert main([*command, *data, *options]) == 0
    report = json.loads((out / "report.json").read_text())
    return {**load_file(out / "model.safetensors"), "tokens": report["calibration"]["tokens"]}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a
    )


# corpora ------------------------------------------------------------------------------------------


def test_every_format_is_the_same_corpus(folder: Path) -> None:
    pytest.importorskip("pyarrow")
    keys = {"a.txt": None, "a.npy": None, "a.safetensors": None, "a.jsonl": "body"}
    keys |= {"a.parquet": "body", "a.jsonl:body": None, "a.parquet:body": None}
    found = [
        torch.cat(
            sample_batches(
                str(folder / name), Sampling(length=32, count=20), tokenizer=byte_tokenizer(), key=k
            )
        )
        for name, k in keys.items()
    ]
    assert found[0].shape == (20, 32)
    assert all(torch.equal(found[0], windows) for windows in found)
    assert found[0].unique(dim=0).shape == found[0].shape


def test_the_corpus_decides(folder: Path, tmp_path: Path) -> None:
    key = ("--text-key", "body")
    first = compiled(folder, tmp_path / "txt", "a.txt", "--samples", "20")
    assert first["tokens"] == 20 * 32
    assert same(first, compiled(folder, tmp_path / "key", "a.jsonl", "--samples", "20", *key))
    assert not same(first, compiled(folder, tmp_path / "text", "a.jsonl", "--samples", "18"))
    seeded = compiled(folder, tmp_path / "seed", "a.txt", "--samples", "20", "--seed", "1")
    assert not same(first, seeded)


def test_the_folder_has_the_files_of_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    compiled(folder, tmp_path / "out", "a.txt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copied = (tmp_path / "out" / name).read_bytes()
        assert copied == (folder / "model" / name).read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 64
    assert tokenizer.encode("déjà") == byte_tokenizer().encode("déjà")


def test_a_tokenizer_that_does_not_name_its_class(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    _copy(folder / "model", source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    named = settings.pop("tokenizer_class")
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    gm = fxshare.compile(load_model(str(source)).model, CONFIG, example=torch.ones(2, 6).long())
    fxshare.save(gm, tmp_path / "out", tokenizer=source)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"]
    assert named
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode("a")


def test_padding_is_left_out(folder: Path, tmp_path: Path) -> None:
    lengths = [1 + 7 * n % 60 for n in range(24)]
    texts = ["x" + "yz é"[n % 4] * (n - 1) for n in lengths]
    _jsonl(tmp_path / "a.jsonl", texts)
    options = {"tokenizer": byte_tokenizer(), "vocabulary": 260}
    batches: Any = sample_batches(
        str(tmp_path / "a.jsonl"), Sampling(length=32, padded=True), **options
    )
    model = load_model(str(folder / "model")).model
    alone = [
        b["input_ids"][i : i + 1, : int(b["attention_mask"][i].sum())]
        for b in batches
        for i in range(len(b["input_ids"]))
    ]
    sizes = [min(len(byte_tokenizer().encode(t)), 32) for t in texts]
    assert sorted(row.shape[1] for row in alone) == sorted(n for n in sizes if n > 1)

    def errors(data: Any) -> dict[str, float]:
        report = fxshare.compile(model, CONFIG, calibration=data, check=False).fxshare.report
        assert report.calibration is not None
        found = {g.name: g.weighted_error for g in report.groups}
        return {**found, "tokens": report.calibration["tokens"]}

    expected = errors(alone)
    # statistics are sums of float32 products; the order of the sums is another
    assert errors(batches) == pytest.approx(expected, rel=1e-3)
    assert expected["tokens"] == sum(n for n in sizes if n > 1)
    unmasked = errors([b["input_ids"] for b in batches])
    assert unmasked != pytest.approx(expected, rel=1e-3)


def _jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")


def test_padded_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    gm = compiled(
        folder, tmp_path / "out", "a.jsonl", "--padded", "--samples", "9", "--text-key", "body"
    )
    assert gm["tokens"] == 9 * 32
    again = compiled(folder, tmp_path / "again", "a.txt", "--padded", "--samples", "9")
    assert same(gm, again)  # paragraphs are the documents of plain text


def test_padded_rows_of_a_token_file(tmp_path: Path) -> None:
    ids = torch.arange(24).view(4, 6)
    mask = torch.tensor([6, 3, 1, 4])[:, None] > torch.arange(6)
    save_file({"input_ids": ids, "attention_mask": mask.long()}, tmp_path / "a.safetensors")
    batches: Any = sample_batches(
        str(tmp_path / "a.safetensors"), Sampling(length=5, padded=True), tokenizer=None
    )
    (only,) = batches
    assert only["attention_mask"].sum(1).tolist() == [5, 3, 4]
    assert only["input_ids"][1].tolist() == [6, 7, 8, 0, 0]
    np.save(tmp_path / "a.npy", np.arange(9))
    with pytest.raises(DataError, match="expected a row of tokens for each document"):
        sample_batches(str(tmp_path / "a.npy"), Sampling(length=5, padded=True), tokenizer=None)


def test_padding_needs_a_mask(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compile", "embedded", "-c", str(folder / "cfg.yaml"), "--padded"]
    assert main([*command, "--calibration", str(folder / "a.txt")]) == 2
    assert "expected a model that takes input_ids and attention_mask" in capsys.readouterr().err


# corpora longer than memory -----------------------------------------------------------------------


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "LARGE", 1 << 12)


def _numbered(path: Path, lines: int) -> None:
    with path.open("w") as file:
        file.writelines(f"{n:08d}\n" for n in range(lines))


@pytest.mark.usefixtures("large")
def test_places_are_chosen_over_a_large_corpus(tmp_path: Path) -> None:
    _numbered(tmp_path / "a.txt", 60_000)
    options: dict[str, Any] = {"tokenizer": byte_tokenizer(), "vocabulary": 260}
    chosen = [
        torch.cat(
            sample_batches(
                str(tmp_path / "a.txt"), Sampling(length=27, count=40, seed=seed), **options
            )
        )
        for seed in (0, 0, 1)
    ]
    assert chosen[0].shape == (40, 27)
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])
    texts = byte_tokenizer().batch_decode(chosen[0])
    places = [int(next(p for p in t.split("\n")[1:] if len(p) == 8)) for t in texts]
    assert places == sorted(places)
    # the mean of 40 uniform places is within five standard deviations of the middle
    assert abs(float(np.mean(places)) / 60_000 - 0.5) < 5 * 0.289 / 40**0.5


@pytest.mark.usefixtures("large")
def test_the_number_of_samples_of_a_large_corpus_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "DEFAULT_SAMPLES", 12)
    _numbered(tmp_path / "a.txt", 4000)
    for padded in (False, True):
        # that one paragraph gives one sample is a second warning
        with pytest.warns(FxShareWarning) as warned:
            batches: Any = sample_batches(
                str(tmp_path / "a.txt"),
                Sampling(length=9, padded=padded),
                tokenizer=byte_tokenizer(),
            )
        said = [str(one.message) for one in warned]
        assert any("a random choice of 12 samples" in text for text in said)
        assert len(said) == 1 + padded
        rows = [b["input_ids"] if padded else b for b in batches]
        # one paragraph is one document
        assert sum(len(r) for r in rows) == (1 if padded else 12)


@pytest.mark.parametrize("padded", [False, True])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, padded: bool) -> None:
    """The process may have 24 MB beyond what it has without data; the corpus is 100 MB."""
    row = json.dumps({"text": "so it goes " * 40}) + "\n"
    with (tmp_path / "a.jsonl").open("w") as file:
        for _ in range(100):
            file.write(row * (10**6 // len(row)))
    code = (
        "import sys; from tests.peak import Peak, anonymous\n"
        "from fxshare.data.batches import Sampling, sample_batches\n"
        "class Words:\n    def encode(self, text): return [len(w) for w in text.split()]\n"
        f"batches = Sampling(length=64, count=64, padded={padded}); before = anonymous()\n"
        "with Peak() as peak:\n"
        "    found = sample_batches(sys.argv[1], batches, tokenizer=Words())\n"
        "print(len(found), peak.bytes - before)\n"
    )
    ran = _run("-c", code, str(tmp_path / "a.jsonl"))
    count, grown = map(int, ran.split())
    assert count == 16
    assert grown < 24 * 10**6


def _run(*arguments: str, **variables: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


# corpora that do not do ---------------------------------------------------------------------------


def refused(folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The error of compiling with a corpus; nothing may be written."""
    out = corpus.parent / "refused"
    command = ["compile", str(folder / "model"), "-c", str(folder / "cfg.yaml"), "-o", str(out)]
    capsys.readouterr()
    code = main([*command, "--calibration", str(corpus), "--length", "32", *more])
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert "Traceback" not in error
    assert "unexpected" not in error
    assert not [p for p in corpus.parent.iterdir() if "refused" in p.name]
    return error


@pytest.mark.parametrize("padded", [(), ("--padded",)])
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "expected text, found nothing"),
        ("a.txt", b" \n\n", "expected text, found only white space"),
        ("a.jsonl", b"", "found nothing"),
        ("a.jsonl", b"\n", "found only white space"),
        ("a.jsonl", b'{"text": " "}\n', "found only white space"),
        ("a.txt", "prix: 3 €".encode("utf-16"), "it begins like UTF-16"),
        ("a.txt", b"caf\xe9 au lait", r"byte 3 (0xe9)"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "expected UTF-8 text; byte 13 (0xe9)"),
        ("a.jsonl", b'{"text": "a"}\n{"text', "line 2: expected JSON"),
        ("a.jsonl", b'{"body": "a"}\n', "the keys body; name another key as a.jsonl:KEY"),
        ("a.jsonl", b"[" * 10**5, "expected JSON"),
        ("a.parquet", b"not parquet", "cannot be read as parquet"),
        ("a.csv", b"text\n", "expected a .txt, .jsonl, .parquet"),
        ("a.safetensors", b"not safetensors", "cannot be read as safetensors"),
    ],
)
def test_a_corpus_that_does_not_do(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    data: bytes,
    message: str,
    padded: tuple[str, ...],
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    assert message in refused(folder, tmp_path / name, capsys, *padded)


def test_an_error_far_into_a_file_says_where(tmp_path: Path) -> None:
    data = ("é" * 10 + "\n").encode() * 100_000
    at = 2_000_011  # the second byte of an é, so that the byte at fault is after it
    (tmp_path / "a.txt").write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    with pytest.raises(DataError, match=r"byte 20000(10|11|12) \(0x"):
        sample_batches(str(tmp_path / "a.txt"), Sampling(length=8), tokenizer=byte_tokenizer())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"number": [1]}, "expected a column 'text' with text, found the columns number"),
        ({"text": [1]}, "row 1: expected text under 'text', found int"),
        ({"text": [" ", " "]}, "found only white space"),
    ],
)
def test_a_table_that_does_not_do(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    columns: dict[str, list[Any]],
    message: str,
) -> None:
    _parquet(tmp_path / "a.parquet", columns)
    assert message in refused(folder, tmp_path / "a.parquet", capsys)


def test_parquet_needs_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'fxshare\[data\]'"):
        sample_batches(str(tmp_path / "a.parquet"), Sampling(length=8), tokenizer=byte_tokenizer())


@pytest.mark.parametrize("padded", [(), ("--padded",)])
def test_a_tokenizer_that_does_not_fit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], padded: tuple[str, ...]
) -> None:
    _copy(folder / "model", tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    ids = raw["model"]["vocab"]
    raw["model"]["vocab"] = {t: i + (100 if i < 256 else 300) for t, i in ids.items()}
    raw["added_tokens"] = []
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "cfg.yaml").write_text(json.dumps(CONFIG))
    (tmp_path / "b.txt").write_text("ÿÿ déjà vu " * 20)
    error = refused(tmp_path, tmp_path / "b.txt", capsys, *padded)
    assert "the tokenizer of 257 ids does not fit the model: expected ids of 0 to 259" in error


def test_options_that_contradict(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "a.txt"
    corpus.write_text("text " * 99)
    error = refused(folder, corpus, capsys, "--samples", "2", "--tokens", "64")
    assert "leave one out" in error
    command = ["compile", str(folder / "model"), "-c", str(folder / "cfg.yaml")]
    assert main([*command, "--padded"]) == 2
    assert "--padded: has no effect without data" in capsys.readouterr().err


# folders that do not do ---------------------------------------------------------------------------


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: [p.unlink() for p in folder.glob(name)] and None


def _cut(size: int) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = folder / "model-00002-of-00003.safetensors"
        path = path if path.is_file() else sorted(folder.glob("model-*.safetensors"))[1]
        path.write_bytes(path.read_bytes()[:size])

    return cut


def _pointer(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[0]
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _index(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(text)

    return write


def _quantised(method: dict[str, Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": method}))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("*.safetensors"), "expected weights"),
        (_without("model-00001-*"), r"1 of \d+ files of weights are missing"),
        (_cut(4), "which end in its header"),
        (_cut(60), "which end in its header"),
        (_cut(5000), "is cut off or altered: expected .* bytes, found 5,000"),
        (_pointer, "a pointer of git-lfs"),
        (_index("{"), "expected JSON with a weight_map"),
        (_index('{"weight_map": {"a": "../a.safetensors"}}'), "the names of files beside it"),
        (_quantised({"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\)"),
        (_quantised({"load_in_4bit": True}), r"quantised \(bitsandbytes\)"),
    ],
)
def test_a_folder_that_does_not_do(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    _copy(folder / "model", tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(DataError, match=message):
        load_model(str(tmp_path / "model"))


def test_a_whole_folder_passes(folder: Path) -> None:
    check_weights(folder / "model")


def test_a_quantised_model_is_refused() -> None:
    model = transformers.LlamaForCausalLM(llama())
    model.config.quantization_config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    assert quantisation_of(model.config) == "bitsandbytes"
    with pytest.raises(MatchError, match=r"quantised \(bitsandbytes\), and codes cannot be fact"):
        fxshare.compile(model, CONFIG)


def test_a_configuration_for_another_family() -> None:
    model = transformers.LlamaForCausalLM(llama())
    gpt2 = {
        "weight_types": {
            "attn": {"pattern": r".*\.attn\.c_attn$"},
            "proj": {"pattern": r".*\.c_proj$"},
        },
        "block_pattern": r"h\.(\d+)",
    }
    with pytest.raises(MatchError) as caught:
        fxshare.compile(model, gpt2)
    text = str(caught.value)
    for part in (r"\.attn\.c_attn$", r"\.c_proj$", "another family", "fxshare init MODEL"):
        assert part.replace("\\", "\\\\") in text or part in text
    half = {**gpt2, "weight_types": {**CONFIG["weight_types"], **gpt2["weight_types"]}}
    half["block_pattern"] = CONFIG["block_pattern"]
    with pytest.raises(MatchError) as caught:
        fxshare.compile(model, half)
    assert "another family" not in str(caught.value)
    assert "down_proj$" not in str(caught.value)


# the hub ------------------------------------------------------------------------------------------


def test_offline_the_error_says_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def offline(name: str, **_: Any) -> str:
        asked.append(name)
        raise OSError("Network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_model("nobody/nothing")
    for part in ("local folder", "cache", "hub", "Network is unreachable"):
        assert part in str(caught.value)
    assert asked == ["nobody/nothing"]
    # names that are no ids, and paths that were mistyped, go nowhere
    (tmp_path / "models").mkdir()
    for name in ("gpt2", "models/gpt2", "./nobody/nothing", "/nobody/nothing", "a/b/c", "a:b/c"):
        with pytest.raises(FxShareError):
            load_model(name)
    assert asked == ["nobody/nothing"]


def test_a_hub_id_is_loaded_like_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: str(folder / "model")
    )
    loaded = load_model("somebody/llama")
    assert loaded.kind == "transformers"
    assert loaded.tokenizer is not None


# memory -------------------------------------------------------------------------------------------


def _make_folder(path: Path, config: Any, shard: int) -> int:
    """A transformers folder of a model that is never in memory; returns its size in bytes."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(config.dtype)
    path.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(held, path / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, name))
        held.clear()

    for name, tensor in model.state_dict().items():
        values = torch.empty(tensor.shape, dtype=tensor.dtype)
        held[name] = values.normal_(0, 0.02, generator=generator) if values.ndim > 1 else values + 1
        if sum(t.nbytes for t in held.values()) > shard:
            write()
    if held:
        write()
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(t.nbytes for t in model.state_dict().values())


def _largest_group(config: Any) -> int:
    """Bytes that the largest group of :data:`tests.peak.CONFIG` takes while it is factorised: its
    weights, and in float64 the weights, the Gram, the vectors and work space of the eigenproblem,
    and the factors."""
    width, inner = config.hidden_size, config.intermediate_size
    rows = 2 * 2 * inner  # two layers of gate and up
    return 8 * (3 * rows * width + 5 * width**2) + config.dtype.itemsize * rows * width


def _peaks(
    tmp_path: Path, config: Any, shard: int, *readings: str
) -> tuple[int, dict[str, dict[str, int]]]:
    size = _make_folder(tmp_path / "model", config, shard)
    # memory that is given back must leave the process: one reading is measured after another
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    arguments = (str(tmp_path / "model"), str(tmp_path / "out"), *readings)
    out = _run("-m", "tests.peak", *arguments, **given_back)
    found: dict[str, dict[str, int]] = json.loads(out.splitlines()[-1])
    for path in tmp_path.iterdir():  # pytest keeps the folders of the last runs
        shutil.rmtree(path)
    return size, found


def _square(width: int, layers: int, dtype: torch.dtype, inner: int | None = None) -> Any:
    return llama(
        hidden_size=width,
        intermediate_size=inner or width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1000,
        dtype=dtype,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "layers", "wasteful"),
    [
        (torch.float32, 12, ()),
        # beside a way of reading that takes more than is allowed
        pytest.param(torch.float32, 12, ("copied",), marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 12, ("widened",), marks=pytest.mark.slow),
    ],
)
def test_memory_is_that_of_the_model_and_one_group(
    tmp_path: Path, dtype: torch.dtype, layers: int, wasteful: tuple[str, ...]
) -> None:
    config = _square(512, layers, dtype)
    size, found = _peaks(tmp_path, config, 15 * 10**6, "mapped", *wasteful)
    assert size > layers * 7 * 512**2 * dtype.itemsize
    assert found["mapped"]["stored"] < 0.6 * size
    bound = size + _largest_group(config)
    assert found["mapped"]["peak"] <= bound
    assert all(bound < found[reading]["peak"] for reading in wasteful)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "layers"), [(torch.float32, 40), (torch.bfloat16, 80)], ids=["float32", "bfloat16"]
)
def test_two_gigabytes(tmp_path: Path, dtype: torch.dtype, layers: int) -> None:
    config = _square(1024, layers, dtype, inner=2816)
    size, found = _peaks(tmp_path, config, 200 * 10**6, "mapped")
    peak = found["mapped"]["peak"]
    print(f"{size:,} bytes of {dtype}: {peak:,} bytes of memory at most")
    assert size > 2 * 10**9
    assert peak <= size + _largest_group(config)


def test_weights_are_mapped_and_equal(folder: Path) -> None:
    loaded = load_model(str(folder / "model")).model.state_dict()
    for path in (folder / "model").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize(("samples", "sizes"), [(4, [1] * 4), (25, [2] * 12 + [1]), (40, [4] * 10)])
@pytest.mark.parametrize("padded", [False, True])
def test_few_samples_make_small_batches(tmp_path, samples, sizes, padded):
    """A search holds every tenth batch back: four windows are four batches, not one."""
    (tmp_path / "a.txt").write_text("\n\n".join(["twelve bytes"] * 60))
    sampling = Sampling(length=12, count=samples, padded=padded, batch_size=None)
    found = sample_batches(str(tmp_path / "a.txt"), sampling, tokenizer=byte_tokenizer())
    assert [len(b["input_ids"] if padded else b) for b in found] == sizes
