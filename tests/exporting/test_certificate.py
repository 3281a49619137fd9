"""Certificates: what they say, and that they tell what was changed since."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxshare
from fxshare.errors import CheckFailed, StoreError
from fxshare.exporting.certifying.certificate import (
    certificate_path,
    changes_since,
    read_certificate,
)
from fxshare.exporting.targets import vllm
from tests.exporting import build
from tests.zoo.families import family


@pytest.fixture(scope="module")
def llama() -> Any:
    """Tests must not change it."""
    return build.compiled_transformers("llama", build.transformers_model("llama", use_cache=True))


@pytest.fixture(scope="module")
def served(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certified") / "served"
    fxshare.export(llama, path, to="vllm", seed=5)
    return path


def test_tokens_of_three_prompts(llama: Any, served: Path) -> None:
    import transformers

    found = read_certificate(served)
    assert (found.kind, found.target, found.seed) == ("tokens", "vllm", 5)
    assert (found.engine, found.engine_version) == ("transformers", transformers.__version__)
    assert found.equal is True
    assert found.first_difference is None
    assert found.found == found.expected
    assert [len(prompt) for prompt in found.prompts] == [3, 11, 12]  # 24 positions in all
    assert found.gap is not None
    assert found.limit is not None
    assert found.gap <= found.limit
    for prompt, tokens, logits in zip(found.prompts, found.expected, found.logits, strict=True):
        x = torch.tensor([prompt])
        for token, logit in zip(tokens, logits, strict=True):
            (last,) = llama(input_ids=x, attention_mask=torch.ones_like(x)).logits[:, -1]
            assert int(last.argmax()) == token
            assert abs(float(last[int(token)].detach()) - logit) < 1e-4
            x = torch.cat([x, torch.tensor([[int(token)]])], 1)
    assert set(found.files) == {p.name for p in served.iterdir()} - {"certificate.json"}
    assert changes_since(served, found) == []


def test_beside_a_file_by_one_run_of_each_text(tmp_path: Path) -> None:
    gm = build.toy("sharing")
    done = fxshare.export(gm, tmp_path / "m.safetensors", to="dense", original=build.model)
    assert done.certificate == str(tmp_path / "m.safetensors.certificate.json")
    found = read_certificate(tmp_path / "m.safetensors")
    assert (found.kind, found.engine, found.equal) == ("tokens", "torch", True)
    assert list(found.files) == ["m.safetensors"]
    # the same seed: the same prompts
    fxshare.export(gm, tmp_path / "code", to="py")
    other = read_certificate(tmp_path / "code")
    assert (other.prompts, other.expected) == (found.prompts, found.expected)


def test_fixed_sizes(tmp_path: Path) -> None:
    gm = build.toy("sharing")
    fxshare.export(gm, tmp_path / "m", to="py", dynamic=False, example=build.ids(2, 7))
    found = read_certificate(tmp_path / "m")
    assert [len(p) for p in found.prompts] == [3, 4, 4]
    assert [len(p) for p in found.expected] == [3, 3, 3]


def test_models_without_tokens(tmp_path: Path) -> None:
    bert = family("bert")
    gm = fxshare.compile(bert.model(), bert.config, example=bert.call())
    fxshare.export(gm, tmp_path / "bert", to="vllm")
    found = read_certificate(tmp_path / "bert")
    assert (found.kind, found.equal) == ("outputs", True)
    assert found.expected == found.found
    assert len(found.expected[0]) == 8
    gm = build.toy("sharing")
    fxshare.export(gm, tmp_path / "w.safetensors", to="dense")  # of a class that it cannot name
    assert read_certificate(tmp_path / "w.safetensors").kind == "none"


def test_another_token_is_refused(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(model: Any) -> Callable[[list[int], int], list[int]]:
        right = vllm_generate(model)
        return lambda prompt, new: [*right(prompt, new)[:4], 31, 31, 31]

    vllm_generate = vllm._generate
    monkeypatch.setattr(vllm, "_generate", other)
    message = r"says token 31 where the compiled model says \d+, at 4 after prompt 0"
    with pytest.raises(CheckFailed, match=message):
        fxshare.export(llama, tmp_path / "m", to="vllm")
    assert list(tmp_path.iterdir()) == []


def test_a_tie_is_a_difference_within_rounding(tmp_path: Path) -> None:
    class Two(nn.Module):
        """Says the token after its own, and the next one with it."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 6)
            self.head = nn.Linear(6, 6, bias=False)
            nn.init.eye_(self.embed.weight)
            self.head.weight.data = torch.eye(6).roll(1, 0) + (1 - 1e-7) * torch.eye(6).roll(2, 0)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    gm = fxshare.compile(
        Two(), {"weight_types": {"h": {"pattern": "head"}}}, example=build.ids(2, 9, 6)
    )
    from fxshare.exporting.certifying.trial import trial_of
    from fxshare.exporting.subject import subject_of
    from fxshare.exporting.written import Written

    subject = subject_of(gm, None, dynamic=True, seed=0)
    trial = trial_of(subject, Written(subject.run, True, True), 0)
    assert trial is not None
    found = trial.expected()
    assert trial.difference(found, 1e-6) is None
    found[1][2] = (found[1][2] + 1) % 6
    first = trial.difference(found, 1e-6)
    assert first is not None
    assert (first.prompt, first.position, first.within_rounding) == (1, 2, True)
    found[1][2] = (found[1][2] + 2) % 6
    worse = trial.difference(found, 1e-6)
    assert worse is not None
    assert not worse.within_rounding


def test_what_was_changed_is_told(served: Path, tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "m"
    shutil.copytree(served, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").unlink()
    (path / "more.bin").write_text("")
    assert changes_since(path, read_certificate(path)) == [
        "model.safetensors was changed",
        "config.json is missing",
        "more.bin was added",
    ]


@pytest.mark.parametrize("field", ["equal", "gap", "engine_version", "files"])
def test_an_edited_certificate_is_told(field: str, served: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.mkdir()
    content = json.loads(certificate_path(served).read_text())
    content[field] = {"equal": False, "gap": 0.5, "engine_version": "9", "files": {}}[field]
    certificate_path(path).write_text(json.dumps(content))
    with pytest.raises(StoreError, match="was edited since it was written"):
        read_certificate(path)


def test_what_is_no_certificate(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="has no certificate"):
        read_certificate(tmp_path)
    for text, why in (
        ("{", "not a certificate"),
        ("[]", "not a certificate"),
        ("{}", "not a certificate of fxshare: it has no 'sha256'"),
        ('{"sha256": 3}', "was edited"),
    ):
        certificate_path(tmp_path).write_text(text)
        with pytest.raises(StoreError, match=why):
            read_certificate(tmp_path)
