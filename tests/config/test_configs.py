"""Every file in ``configs/`` on a random small model of its family.

That the rewritten graphs of these families are right is tested with the zoo; here most models are
compiled at module granularity, which shows as well that a file means the right weights and cuts
them where its family does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxshare
from fxshare.config import load_config
from fxshare.errors import CheckFailed, MatchError
from fxshare.sites.match import match
from fxshare.sites.site import Site
from passes.graph.graph import is_linear
from tests import toys
from tests.zoo.families import family, transformers_model
from tests.zoo.written import LAYERS, LONGEST, VOCABULARY

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Case:
    """A file and its model. ``counts`` are sites per type, where not one for each layer;
    ``beside`` are the linears that stay: heads, poolers, and the gates of experts."""

    file: str
    family: str
    beside: tuple[str, ...] = ("lm_head",)
    counts: int | dict[str, int] = LAYERS
    graph: bool = False
    """Captured by tracing, because some weights are no modules."""
    make: Callable[[], nn.Module] | None = None
    like_init: bool = True
    """Cuts rows as ``fxshare init`` does, which knows the number of heads."""

    def model(self) -> nn.Module:
        return family(self.family).model() if self.make is None else self.make().eval()

    def call(self) -> dict[str, Any]:
        if self.file == "transformer-encoder":
            return {"ids": torch.randint(0, 32, (2, 7))}
        return family(self.family).call()

    @property
    def path(self) -> Path:
        return CONFIGS / f"{self.file}.yaml"


def _gpt2_of_12_heads() -> nn.Module:
    return transformers_model(
        "GPT2Config",
        "GPT2LMHeadModel",
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=LAYERS,
        n_head=12,
        n_positions=LONGEST,
    )


_GATES = tuple(f"model.layers.{n}.mlp.shared_expert_gate" for n in range(LAYERS))

CASES = (
    Case("gpt2", "gpt2", make=_gpt2_of_12_heads),
    Case("gpt2-basis-sharing", "gpt2", make=_gpt2_of_12_heads),
    Case("opt", "opt"),
    Case("llama", "llama"),
    Case("mistral", "mistral"),
    Case("qwen2", "qwen2"),
    Case("qwen3", "qwen3"),
    Case("gemma", "gemma"),
    Case("gemma", "gemma2"),
    Case("gemma", "gemma3"),
    Case("phi3", "phi3"),
    Case("gpt-neox", "gpt_neox"),
    Case("falcon", "falcon"),
    Case("falcon", "falcon_grouped"),
    Case("bloom", "bloom"),
    Case(
        "mixtral",
        "mixtral",
        counts={"gate_up_proj": 4 * LAYERS, "experts_down_proj": 4 * LAYERS},
        graph=True,
    ),
    Case(
        "qwen-moe",
        "qwen2_moe",
        beside=(*_GATES, "lm_head"),
        counts={"gate_up_proj": 5 * LAYERS, "experts_down_proj": 5 * LAYERS},
        graph=True,
    ),
    Case("bert", "bert", beside=("cls.predictions.transform.dense", "cls.predictions.decoder")),
    Case("vit", "vit", beside=("pooler.dense",)),
    Case("whisper", "whisper", beside=("proj_out",)),
    Case("t5", "t5"),
    Case("clip", "clip_text", beside=()),
    Case("nanogpt", "nanogpt", like_init=False),
    Case("timm-vit", "timm_vit", beside=("head",), like_init=False),
    Case("transformer", "nn_transformer", beside=("head",), counts=2, graph=True, like_init=False),
    Case(
        "transformer-encoder",
        "encoder",
        beside=("head",),
        graph=True,
        counts=toys.LAYERS,
        make=toys.ENCODER.model,
        like_init=False,
    ),
)
NAMED = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.file}-{c.family}")


def _exact(case: Case) -> fxshare.ShareConfig:
    more = {"group_size": None, "compression_rate": None, "private": []}
    return load_config([case.path, more])


def test_every_file_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {case.file for case in CASES}


@NAMED
def test_it_matches_what_is_in_the_layers_and_nothing_else(case: Case) -> None:
    model, cfg = case.model(), _exact(case)
    matching = match(model, cfg)
    found = {t: sum(s.type == t for s in matching.sites) for t in cfg.weight_types}
    each = case.counts if isinstance(case.counts, int) else LAYERS
    more = {} if isinstance(case.counts, int) else case.counts
    assert found == dict.fromkeys(cfg.weight_types, each) | more
    assert matching.skipped == ()
    matched = {call for site in matching.sites for call in site.calls}
    linears = {name for name, module in model.named_modules() if is_linear(module)}
    assert linears - matched == set(case.beside)
    assert all(site.layer is not None for site in matching.sites)


@NAMED
def test_exact_mode_equals_the_original(case: Case) -> None:
    model, call = case.model(), case.call()
    if case.graph:
        gm = fxshare.compile(model, _exact(case), example=call)
        assert gm.fxshare.front_end == "fx"
    else:
        gm = fxshare.compile(model, _exact(case), capture="modules")
    # cross attention reads one weight in two parts, each a site
    sites = {site.name.partition(".rows_")[0] for site in gm.fxshare.plan.sites}
    assert sites == {site.name for site in match(model, _exact(case)).sites}
    fxshare.verify(model, gm, call, strict=True)


def test_a_wrong_rewrite_is_noticed() -> None:
    case = CASES[3]
    model = case.model()
    gm = fxshare.compile(model, _exact(case), capture="modules", copy=True)
    slices = [m for m in gm.modules() if is_linear(m)]
    with torch.no_grad():
        slices[0].weight[0] *= 1.01
    with pytest.raises(CheckFailed):
        fxshare.verify(model, gm, case.call(), strict=True)


def _cut(sites: tuple[Site, ...]) -> dict[str, list[tuple[str, int, int]]]:
    return {s.name: [(x.label, x.start, x.stop) for x in s.slices] for s in sites}


@NAMED
def test_init_writes_what_matches_the_same(case: Case) -> None:
    model = case.model()
    by_file = _cut(match(model, _exact(case)).sites)
    by_init = _cut(match(model, fxshare.init(model)).sites)
    assert set(by_init) == set(by_file)
    if case.like_init:
        assert by_init == by_file


def test_a_file_for_another_family_is_refused() -> None:
    with pytest.raises(MatchError, match="matches no module"):
        match(family("llama").model(), load_config(CONFIGS / "gpt2.yaml"))
