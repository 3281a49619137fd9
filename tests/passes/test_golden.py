"""The text of rewritten graphs; rewritten by ``--update-golden``, and then read by a person."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from passes import SplitLinear, default_passes, run
from passes.sharing.split_linear import SplitSite
from tests.passes.build import captured, exact_factors, groups, site_of, sites
from tests.toys import GPT2, NANOGPT

Golden = Callable[[str, str], None]


class Attends(nn.Module):
    """Two layers, each with a fused projection and one that reads the same activation."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(
            nn.ModuleDict({"c_attn": nn.Linear(8, 24), "gate": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.h:
            q, k, v = layer["c_attn"](x).split(8, dim=-1)
            x = x + torch.softmax(q * k, -1) * v * torch.sigmoid(layer["gate"](x))
        return x


HEADS = [(f".{part}.{head}", 4) for part in "qkv" for head in range(2)]
PARTS = [(f".{part}", 8) for part in "qkv"]


def _sites(heights: list[tuple[str, int]]) -> list[SplitSite]:
    fused = [site_of([f"h.{i}.c_attn"], heights) for i in range(2)]
    return [*fused, *(site_of([f"h.{i}.gate"], [("", 8)]) for i in range(2))]


def _text(gm: fx.GraphModule) -> str:
    """The code without the ``= None`` that frees values, and the linears with their shapes."""
    lines = [line.partition(";  ")[0] for line in gm.code.splitlines()]
    code = "\n".join(lines).replace(" : _Tensor_", "").replace(" -> _Tensor_", "")
    linears = [
        f"# {name}: Linear({m.in_features}, {m.out_features}{'' if m.bias is None else ', bias'})"
        for name, m in gm.named_modules()
        if isinstance(m, nn.Linear)
    ]
    return code + "\n\n" + "\n".join(linears)


@pytest.mark.parametrize(("name", "heights"), [("exact_qkv", PARTS), ("exact_heads", HEADS)])
def test_exact(golden: Golden, name: str, heights: list[tuple[str, int]]) -> None:
    result, _ = run(fx.symbolic_trace(Attends()), default_passes(_sites(heights)))
    golden(name, _text(result))


@pytest.mark.parametrize(("name", "fuse"), [("shared_fused", True), ("shared_apart", False)])
def test_shared_between_two_layers(golden: Golden, name: str, fuse: bool) -> None:
    gm = fx.symbolic_trace(Attends())
    wanted = _sites(PARTS)
    first, _ = run(gm, [SplitLinear(sites=tuple(wanted))])
    weights = {s: first.get_submodule(s).weight for site in wanted for s in (site.rows[0].name,)}
    others = [row.name for site in wanted for row in site.rows[1:]]
    factors = (
        exact_factors(weights, "basis_q_gate_0_1"),
        exact_factors({s: first.get_submodule(s).weight for s in others}, "basis_kv_0_1"),
    )
    result, _ = run(gm, default_passes(wanted, factors, fuse=fuse))
    golden(name, _text(result))


def test_gpt2_conv1d(golden: Golden) -> None:
    gm = captured(GPT2)
    wanted = sites(GPT2, gm, "parts")
    first, _ = run(gm, [SplitLinear(sites=wanted)])
    result, _ = run(gm, default_passes(wanted, groups(first)))
    # masks, positions and the numbers of views belong to transformers and change with it
    lines = [re.sub(r"\b(view|add)_\d+", r"\1", line) for line in _text(result).splitlines()]
    ours = ("self.basis", "self.transformer.h", "torch.cat")
    golden("gpt2_conv1d", "\n".join(line for line in lines if any(o in line for o in ours)))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_export_dialect(golden: Golden) -> None:
    model = Attends()
    gm = torch.export.export(model, (torch.zeros(2, 8, dtype=torch.float64),)).module()
    result, _ = run(gm, default_passes(_sites(PARTS)))
    golden("export_dialect", _text(result))


def test_nanogpt_keeps_what_it_does_not_rewrite(golden: Golden) -> None:
    gm = captured(NANOGPT)
    only = [site for site in sites(NANOGPT, gm, "parts") if "h.0.attn.c_attn" in site.calls[0]]
    before = _text(gm).splitlines()
    after = _text(run(gm, default_passes(only))[0]).splitlines()
    changed = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ")]
    golden("nanogpt_one_site", "\n".join(changed))
