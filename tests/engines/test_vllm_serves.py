"""vLLM serves what ``to="vllm"`` writes: 16 greedy tokens after each of three prompts.

Needs an environment of its own, see :mod:`tests.engines.vllm_environment`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxshare
from fxshare.exporting.certifying.certificate import read_certificate
from fxshare.exporting.engines import matrix
from fxshare.plans.plan import Plan
from tests.engines.vllm_environment import VARIABLE
from tests.exporting import build
from tests.strategies import no_warnings_of_ours
from tests.zoo.families import family

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get(VARIABLE),
        reason=f"{VARIABLE} names no interpreter that has vLLM (tests/engines/vllm_environment.py)",
    ),
]
WORDS, WIDTH, HEADS, LAYERS, CONTEXT = 96, 128, 4, 4, 128
"""vLLM's attention on a processor takes heads of 32 numbers and more."""


def model(name: str) -> nn.Module:
    """A family of the zoo at sizes that vLLM takes."""
    made: Any = family(name).make()
    given = made.config.to_dict()
    for key in ("layer_types", "rope_parameters", "num_labels", "id2label", "label2id"):
        given.pop(key, None)
    sizes = {"vocab_size": WORDS}
    if name == "gpt2":
        sizes |= {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": CONTEXT}
    else:
        sizes |= {
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS // 2,
            "num_hidden_layers": LAYERS,
            "intermediate_size": 192,
            "max_position_embeddings": CONTEXT,
            "head_dim": WIDTH // HEADS,
        }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found: Any = type(made)(type(made.config)(**{**given, **sizes})).eval()
        for parameter in found.parameters():
            if parameter.ndim == 1:
                centre = 0.5 if float(parameter.detach().mean()) > 0.5 else 0.0
                nn.init.normal_(parameter, centre, 0.2)
            else:
                nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5)
    model: nn.Module = found
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, WORDS, (4, 16), generator=generator) for _ in range(3)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]


@pytest.mark.parametrize("mode", ["sharing", "pivoted", "refined"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_same_tokens(name: str, mode: str, tmp_path: Path) -> None:
    original = model(name)
    options = build.PIVOTED if mode == "pivoted" else build.SHARING
    with no_warnings_of_ours():
        cfg = {**family(name).config, **options}
        gm = fxshare.compile(original, cfg, calibration=batches())
        if mode == "refined":
            gm = fxshare.refine(gm, original, batches(), steps=20)
    fxshare.export(gm, tmp_path / "served", to="vllm", untie=mode == "refined")
    certificate = read_certificate(tmp_path / "served")
    assert [len(tokens) for tokens in certificate.expected] == [16, 16, 16]
    for engine in ("vllm", "vllm-plugin"):
        row = matrix.row_of(engine, tmp_path / "served", os.environ[VARIABLE])
        assert row.state == "equal", row
        assert row.gap is not None
        assert row.gap < 1e-3


def test_layers_that_are_dense_before_layers_that_share(tmp_path: Path) -> None:
    """vLLM puts q, k and v of a dense layer into one, by looking at the first of its class."""
    original, cfg = model("llama"), {**family("llama").config, **build.SHARING}
    with no_warnings_of_ours():
        plan = fxshare.plan(original, cfg, calibration=batches())
        late = [group.model_dump() for group in plan.groups if 0 not in group.layers]
        assert 0 < len(late) < len(plan.groups)
        mixed = Plan.model_validate({**plan.model_dump(), "groups": late})
        gm = fxshare.compile(original, cfg, plan=mixed, calibration=batches())
    fxshare.export(gm, tmp_path / "served", to="vllm")
    row = matrix.row_of("vllm-plugin", tmp_path / "served", os.environ[VARIABLE])
    assert row.state == "equal", row
