"""``to="dense"``: the original's code loads it, and computes what the compiled model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.errors import ExportError
from tests.cli.conftest import STORIES
from tests.exporting import build

DEPTH = 2 * 8 + 1


@pytest.mark.parametrize(
    ("front_end", "mode"),
    [("fx", "exact"), ("fx", "sharing"), ("fx", "pivoted"), ("modules", "sharing")],
)
def test_the_original_code_loads_it_strictly(front_end: str, mode: str, tmp_path: Path) -> None:
    gm = build.toy(mode, front_end)
    path = tmp_path / "m.safetensors"
    example = build.ids(2, 7)
    fxshare.export(gm, path, to="dense", example=example, original=build.model)
    fresh = build.model(seed=77)
    fresh.load_state_dict(load_file(path), strict=True)
    x = build.ids()
    assert worst(gm(x), fresh(x)).relative <= tolerance(torch.float32, DEPTH)
    if mode == "exact":
        same = build.model().state_dict()
        assert all(torch.equal(t, same[name]) for name, t in load_file(path).items())


def test_a_conv1d_is_stored_as_it_was(tmp_path: Path) -> None:
    original = build.model(conv1d=True)
    gm = build.compiled(original)  # exact; attn.c_proj is square, so no shape tells
    path = tmp_path / "m.safetensors"
    fxshare.export(gm, path, to="dense", original=original)
    found = load_file(path)
    assert all(torch.equal(t, found[name]) for name, t in original.state_dict().items())
    assert found["transformer.h.0.attn.c_attn.weight"].shape == (12, 36)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_transformers_folder(family: str, tmp_path: Path) -> None:
    import transformers

    original = build.transformers_model(family, tie_word_embeddings=family == "gpt2")
    gm = build.compiled_transformers(family, original)
    fxshare.export(gm, tmp_path / "m", to="dense")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert type(loaded) is type(original)
    x = build.ids()
    found = worst(gm(input_ids=x).logits, loaded(x).logits)
    assert found.relative <= tolerance(torch.float32, DEPTH)
    # the embedding is stored once where it is tied
    expected = sum(p.nbytes for p in original.parameters())
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert expected <= size <= expected + 8192
    for file in (tmp_path / "m").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_without_the_class_the_weights_alone_are_written_and_it_is_said(tmp_path: Path) -> None:
    gm = build.toy("sharing")
    done = fxshare.export(gm, tmp_path / "m", to="dense")
    assert done.distance is None
    assert "give original=" in done.notes[0]
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "certificate.json",
        "model.safetensors",
    ]
    assert (
        load_file(tmp_path / "m" / "model.safetensors").keys() == build.model().state_dict().keys()
    )


def test_the_dtype_is_the_models_and_products_are_rounded_once(tmp_path: Path) -> None:
    original = build.model(dtype=torch.bfloat16)
    gm = build.compiled(original, **build.SHARING)
    fxshare.export(gm, tmp_path / "m.safetensors", to="dense", original=original)
    found = load_file(tmp_path / "m.safetensors")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    from fxshare.result.products import dense_sites

    for name, product in dense_sites(gm, gm.fxshare.plan).items():
        assert torch.equal(found[f"{name}.weight"], product.to(torch.bfloat16))


class Spare(nn.Module):
    """A model with a parameter that inference has no use for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.spare = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, 6)`` to ``(…, 6)``."""
        return self.b(torch.relu(self.a(x)))


def test_what_the_graph_does_not_use_comes_from_the_original(tmp_path: Path) -> None:
    original = Spare()
    gm = fxshare.compile(
        original, {"weight_types": {"a": {"pattern": "a"}}}, example=torch.randn(4, 6)
    )
    with pytest.raises(ExportError, match=r"does not use 'spare\.weight' and 1 more.*original="):
        fxshare.export(gm, tmp_path / "m", to="dense")
    fxshare.export(gm, tmp_path / "m.safetensors", to="dense", original=original)
    Spare().load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the shared data")
def test_a_real_llama(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    cfg = build.transformers_config("llama")
    gm = fxshare.compile(original, cfg, example=build.ids(2, 12, vocabulary=512))
    done = fxshare.export(gm, tmp_path / "m", to="dense")
    assert done.distance is not None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    x = build.ids(2, 40, vocabulary=512)
    assert worst(gm(input_ids=x).logits, loaded(x).logits).relative <= done.limit
