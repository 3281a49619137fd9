"""Linears of a served model that read one input: their bases are one product, computed once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxshare
from fxshare.exporting.served.inputs import same_input, stacks
from fxshare.exporting.served.reading import own_modules
from fxshare.exporting.served.shared_linears import Readers, SharedLinear, share_linears
from fxshare.plans.plan import Plan
from fxshare.result.products import slices_of
from tests.exporting import build
from tests.strategies import no_warnings_of_ours

transformers = pytest.importorskip("transformers")
TYPES = {name: {"pattern": rf".*\.{name}_proj$"} for name in ("q", "k", "v", "o", "gate", "up")}
SAME = [[f"layers.{n}.self_attn.{p}_proj" for p in "qkv"] for n in (0, 1)] + [
    [f"layers.{n}.mlp.{p}_proj" for p in ("gate", "up")] for n in (0, 1)
]

SAME_V = "model.layers.0.self_attn.v_proj"


@pytest.fixture(scope="module")
def gm() -> Any:
    """All that q, k, v, gate and up read is shared over both layers; v's basis is layer 0's alone
    and layer 1 has v's weight as it was."""
    original = build.transformers_model("llama", use_cache=True)
    batches = [{"input_ids": build.ids(3, 8), "attention_mask": torch.ones(3, 8).long()}]
    cfg = {"weight_types": TYPES, "block_pattern": r"layers\.(\d+)", **build.SHARING}
    with no_warnings_of_ours():
        plan = fxshare.plan(original, cfg, calibration=batches)
        first = {"layers": (0,), "slices": (SAME_V,), "out_features": 8}
        groups = [g.model_dump() | (first if g.type == "v" else {}) for g in plan.groups]
        halved = Plan.model_validate({**plan.model_dump(), "groups": groups})
        return fxshare.compile(original, cfg, plan=halved, calibration=batches)


@pytest.fixture(scope="module")
def folder(gm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "m"
    fxshare.export(gm, path, to="vllm")
    return path


def loaded(folder: Path) -> Any:
    with own_modules():
        made = transformers.AutoModelForCausalLM.from_pretrained
        return made(folder, trust_remote_code=True).eval()


def test_bases_that_are_always_read_together_are_one_weight(gm: Any, folder: Path) -> None:
    table = json.loads((folder / "config.json").read_text())["shared_linears"]
    # v's basis is read in layer 0 only, so it lies by itself
    assert set(table["bases"]) == {
        "basis_q_0_1_basis_k_0_1",
        "basis_gate_0_1_basis_up_0_1",
        "basis_v_0_1",
        "basis_o_0_1",
    }
    ranks = {group.name: group.rank for group in gm.fxshare.plan.groups}
    q, k = ranks["basis_q_0_1"], ranks["basis_k_0_1"]
    assert table["bases"]["basis_q_0_1_basis_k_0_1"]["rank"] == q + k
    (part,) = table["linears"]["layers.1.self_attn.k_proj"]["parts"]
    assert part["columns"] == [q, q + k]
    # v's weight of layer 1 is no linear that shares
    assert table["same_input"] == [SAME[0], SAME[2], SAME[1][:2], SAME[3]]


def test_every_product_is_computed_once(gm: Any, folder: Path) -> None:
    model = loaded(folder)
    counted: Counter[str] = Counter()
    for name, basis in model.model.bases.named_children():
        basis.register_forward_hook(lambda *_, name=name: counted.update([name]))
    ids = build.ids(2, 7)
    logits = model(ids, use_cache=False).logits
    expected = gm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(logits, expected)
    assert counted == {
        "basis_q_0_1_basis_k_0_1": 2,
        "basis_gate_0_1_basis_up_0_1": 2,
        "basis_v_0_1": 1,
        "basis_o_0_1": 2,
    }
    # nothing of the text stays in the model
    assert all(m.readers.held is None for m in model.modules() if hasattr(m, "readers"))
    # and each by itself has the same product
    for module in model.modules():
        if hasattr(module, "readers"):
            module.readers = Readers(1)
            module.place = 0
    assert torch.equal(model(ids, use_cache=False).logits, logits)
    assert counted["basis_q_0_1_basis_k_0_1"] == 2 + 4


def test_gradients_are_those_of_products_apart(folder: Path) -> None:
    model, apart = loaded(folder), loaded(folder)
    for module in apart.modules():
        if hasattr(module, "readers"):
            module.readers = Readers(1)
            module.place = 0
    ids = build.ids(2, 7)
    for each in (model, apart):
        each(ids, labels=ids, use_cache=False).loss.backward()
    for mine, other in zip(model.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_modules_with_and_without_sharing_are_told_apart(folder: Path) -> None:
    """vLLM looks at one of all modules of a class whose children have the same names."""
    layers = loaded(folder).model.layers
    children = [[name for name, _ in layer.self_attn.named_children()] for layer in layers]
    assert children[0] != children[1]
    assert [sorted(each)[-1] for each in children] == ["v_proj", "v_proj"]
    assert "sharing_k_proj_o_proj_q_proj_v_proj" in children[0]
    assert "sharing_k_proj_o_proj_q_proj" in children[1]


def linears(**options: Any) -> nn.Module:
    """Two linears over one basis of rank 3, as ``a`` and ``b`` of a list and by themselves."""
    spec = {"in_features": 4, "bias": False, "parts": [{"basis": "z", "rows": 5}]}
    config = type("Config", (), {})
    config.shared_linears = {  # type: ignore[attr-defined]
        "untied": False,
        "bases": {"z": {"in_features": 4, "rank": 3, "pivoted": False}},
        "linears": {"inner.a": spec, "inner.b": spec, "several.0": spec},
        **options,
    }
    model = nn.Module()
    model.inner, model.several = nn.Module(), nn.ModuleList([nn.Identity()])
    share_linears(model, config)
    return model


def test_another_input_is_another_product() -> None:
    model = linears(same_input=[["inner.a", "inner.b"]])
    inner: Any = model.inner
    x, y = torch.randn(2, 4), torch.randn(2, 4)

    def alone(linear: Any, x: Tensor) -> Tensor:
        product: Tensor = linear.parts[0](model.bases.z(x))
        return product

    inner.a(x)
    assert torch.equal(inner.b(y), alone(inner.b, y))
    # the first begins anew, although the numbers in its input's place are others now
    inner.a(x)
    x.mul_(2)
    assert torch.equal(inner.a(x), alone(inner.a, x))
    assert torch.equal(inner.b(x), alone(inner.b, x))
    # what the first computed is what the second reads
    inner.a(x)
    with torch.no_grad():
        model.bases.z.weight.zero_()
    assert inner.b(x).abs().max() > 0
    assert inner.b(x).abs().max() == 0


def test_compiled_the_product_is_there_once() -> None:
    graphs = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for together, products in ([["inner.a", "inner.b"]], 3), ([], 4):
        model = linears(same_input=together)
        inner: Any = model.inner
        compiled = torch.compile(
            lambda x, m=inner: (m.a(x), m.b(x)), backend=backend, fullgraph=True
        )
        x = torch.randn(2, 4)
        for found, linear in zip(compiled(x), (inner.a, inner.b), strict=True):
            assert torch.equal(found, linear.parts[0](model.bases.z(x)))  # type: ignore[union-attr]
        found = [n for n in graphs.pop().graph.nodes if n.target is torch._C._nn.linear]
        assert len(found) == products
        assert inner.a.readers.held is None
    assert graphs == []


def test_folders_from_before_and_lists_of_modules() -> None:
    model = linears()
    inner: Any = model.inner
    assert [name for name, _ in inner.named_children()] == ["a", "b", "sharing_a_b"]
    assert inner.a.readers is not inner.b.readers
    assert [type(each) for each in model.several] == [SharedLinear]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("together", "bases_of", "expected"),
    [
        # the same everywhere
        (["ab", "cd"], {"a": "x", "b": "y", "c": "x", "d": "y"}, [("x", "y")]),
        # z is read in one place only
        (["abc", "de"], {"a": "x", "b": "y", "c": "z", "d": "x", "e": "y"}, [("x", "y")]),
        (["abc", "d"], {"a": "x", "b": "y", "c": "z", "d": "z"}, [("x", "y")]),
        # of one linear
        (["a"], {"a": "xyz"}, [("x", "y", "z")]),
        # nobody knows what f reads
        (["ab"], {"a": "x", "b": "y", "f": "y"}, []),
        (["ab"], {"a": "x", "b": "x"}, []),
    ],
)
def test_which_bases_are_one(
    together: list[str], bases_of: dict[str, str], expected: list[tuple[str, ...]]
) -> None:
    found = stacks(together, bases_of, {"x": 2, "y": 3, "z": 4})
    assert [tuple(stack.rows) for stack in found] == expected
    for stack in found:
        assert stack.rows["x"] == (0, 2)
        assert stack.rows["y"] == (2, 5)


def test_what_several_linears_read_is_seen_in_the_graph(gm: Any) -> None:
    places = slices_of(gm)
    of = {
        site.name.removeprefix("model."): [places[part.name] for part in site.slices]
        for site in gm.fxshare.plan.sites
    }
    assert set(map(tuple, SAME)) <= set(same_input(gm, of))
    assert same_input(nn.Module(), of) == ()
