"""``fxshare.verify`` passes right rewrites and catches wrong ones.

Every wrong rewrite here is one that a plausible bug would make. Each is made on a compiled model,
in the graph or in its tensors, and the check that has to fail is named.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxshare
from fxshare import FxShareError
from fxshare.errors import CheckFailed
from fxshare.result.products import slice_product, slices_of
from fxshare.verifying import multiplied
from fxshare.verifying.verify import Verification
from passes.graph.slices import set_slices
from tests.strategies import Sizes, gpt, gpt_config, no_warnings_of_ours, token_batches
from tests.toys import GPT2, LLAMA, NANOGPT, VOCABULARY

SIZES = Sizes(n_layer=4, n_head=2, head_dim=6, n_kv_head=2, hidden=20)
HEADS = {"pattern": r".*\.attn\.c_attn$", "split": "heads", "qkv_order": "qkv", "n_head": 2}
PARTS = {"pattern": r".*\.attn\.c_attn$", "split": "qkv"}
ATTN = "transformer.h.1.attn.c_attn"


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = gpt(dtype, **vars(SIZES))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # a bias of zero could be dropped without harm
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def compiled(model: nn.Module, attn: dict[str, Any], **keys: Any) -> Any:
    cfg = gpt_config(SIZES, **keys)
    cfg["weight_types"]["attn"] = attn
    with no_warnings_of_ours():
        return fxshare.compile(model, cfg, calibration=token_batches(8))


@functools.cache
def _once(split: str, **keys: Any) -> Any:
    return compiled(model_of(), HEADS if split == "heads" else PARTS, **keys)


def exact(attn: dict[str, Any]) -> Any:
    """Compiled once; each test harms a copy."""
    return copy.deepcopy(_once(attn["split"]))


def shared(attn: dict[str, Any], fuse: bool = False) -> Any:
    return copy.deepcopy(_once(attn["split"], group_size=2, compression_rate=0.6, fuse=fuse))


def failing(gm: nn.Module) -> set[str]:
    """First words of the checks that fail: ``random`` for outputs, ``relative`` for weights."""
    result = fxshare.verify(model_of(), gm)
    failed = {check.what.split()[0] for check in result.checks if not check.ok}
    assert result.ok == (not failed)
    assert str(result).startswith("DIFFERENT" if failed else "equal")
    assert str(result).count("FAIL") == sum(not check.ok for check in result.checks)
    return failed


# Right ones


@pytest.mark.parametrize("attn", [HEADS, PARTS], ids=["heads", "parts"])
@pytest.mark.parametrize("fuse", [False, True])
def test_right_rewrites_pass(attn: dict[str, Any], fuse: bool) -> None:
    assert not failing(exact(attn))
    gm = shared(attn, fuse)
    assert not failing(gm)
    result = fxshare.verify(model_of(), gm, token_batches(2))
    assert result.ok
    whats = [c.what.split()[0] for c in result.checks]
    assert whats == ["given", "given", "random", "random", "random", "relative", "shift"]
    # lossy, and said so: far from the original, near its own weights multiplied out
    assert all(c.original > 1e-2 > 100 * c.limit for c in result.checks[:-2])


def test_random_inputs_are_a_function_of_the_seed() -> None:
    gm = shared(PARTS)
    first, again, other = (
        [c.original for c in fxshare.verify(model_of(), gm, seed=seed).checks] for seed in (0, 0, 1)
    )
    assert first == again != other


# Wrong ones


def swap_weights(gm: nn.Module, left: str, right: str) -> None:
    a, b = gm.get_submodule(left), gm.get_submodule(right)
    a.weight, b.weight = b.weight, a.weight


def swap_k_and_v(gm: nn.Module) -> None:
    swap_weights(gm, f"{ATTN}.k", f"{ATTN}.v")


def swap_bases_of_two_groups(gm: nn.Module) -> None:
    swap_weights(gm, "basis_attn_k_0_1", "basis_attn_k_2_3")


def call_the_basis_of_another_group(gm: fx.GraphModule) -> None:
    node = next(n for n in gm.graph.nodes if n.target == "basis_attn_k_0_1")
    node.target = "basis_attn_k_2_3"
    gm.recompile()


def drop_a_bias(gm: nn.Module) -> None:
    gm.get_submodule(f"{ATTN}.k").bias = None  # k's alone would not do: softmax takes it out
    gm.get_submodule(f"{ATTN}.v").bias = None


def reverse_the_heads(gm: fx.GraphModule) -> None:
    names = [f"{ATTN}.v.0", f"{ATTN}.v.1"]
    calls = {n.target: n for n in gm.graph.nodes if n.op == "call_module" and n.target in names}
    first, second = (calls[name] for name in names)
    (cat,) = first.users
    order = {first: second, second: first}
    cat.args = ([order.get(part, part) for part in cat.args[0]],)
    gm.graph.lint()
    gm.recompile()


def shift_rows_by_one(gm: nn.Module) -> None:
    linear = gm.get_submodule(f"{ATTN}.v")
    linear.weight = nn.Parameter(linear.weight.detach().roll(1, 0))


EXACT: list[tuple[Callable[[Any], None], dict[str, Any], set[str]]] = [
    (swap_k_and_v, PARTS, {"random", "relative"}),
    (drop_a_bias, PARTS, {"random", "shift"}),
    (shift_rows_by_one, PARTS, {"random", "relative"}),
    (reverse_the_heads, HEADS, {"random"}),
]


@pytest.mark.parametrize(("harm", "attn", "checks"), EXACT, ids=[h.__name__ for h, _, _ in EXACT])
def test_exact_mode_catches(
    harm: Callable[[Any], None], attn: dict[str, Any], checks: set[str]
) -> None:
    gm = exact(attn)
    harm(gm)
    assert failing(gm) == checks


SHARED: list[tuple[Callable[[Any], None], dict[str, Any], set[str]]] = [
    # the weights are not what was factorised, and what is stored is run faithfully
    (swap_k_and_v, PARTS, {"relative"}),
    (swap_bases_of_two_groups, PARTS, {"relative"}),
    (shift_rows_by_one, PARTS, {"relative"}),
    # what is stored is right, and run wrongly
    (call_the_basis_of_another_group, PARTS, {"random"}),
    (drop_a_bias, PARTS, {"random", "shift"}),
    (reverse_the_heads, HEADS, {"random"}),
]


@pytest.mark.parametrize(("harm", "attn", "checks"), SHARED, ids=[h.__name__ for h, _, _ in SHARED])
def test_sharing_mode_catches(
    harm: Callable[[Any], None], attn: dict[str, Any], checks: set[str]
) -> None:
    gm = shared(attn)
    harm(gm)
    assert failing(gm) == checks


def test_of_a_large_model_every_product_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = shared(HEADS)
    monkeypatch.setattr(multiplied, "LARGE", 0)
    made: list[str] = []

    def counted(gm: nn.Module, name: str) -> Tensor:
        made.append(name)
        return slice_product(gm, name)

    monkeypatch.setattr(multiplied, "slice_product", counted)
    assert fxshare.verify(model_of(), gm).ok
    assert sorted(made) == sorted(slices_of(gm))
    reverse_the_heads(gm)
    assert failing(gm) == {"random"}


def test_where_no_file_can_be_written_products_are_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(multiplied, "LARGE", 0)
    monkeypatch.setattr(multiplied.Filed, "keep", lambda self, rows: None)
    assert fxshare.verify(model_of(), shared(HEADS)).ok


def test_what_is_asked_for_once_goes_to_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Any, rows: Tensor) -> None:
        raise AssertionError("a file was written")

    monkeypatch.setattr(multiplied.Filed, "keep", refused)
    assert fxshare.verify(model_of(), shared(HEADS)).ok  # all products are held
    monkeypatch.setattr(multiplied, "LARGE", 0)
    assert fxshare.verify(model_of(), exact(HEADS)).ok
    monkeypatch.setattr(multiplied, "_MOST", 0)
    assert fxshare.verify(model_of(), shared(HEADS)).ok


def test_the_worst_slice_is_named() -> None:
    gm = shared(PARTS)
    swap_k_and_v(gm)
    check = next(c for c in fxshare.verify(model_of(), gm).checks if not c.ok)
    assert check.distance.where in (f"slice {ATTN}.k", f"slice {ATTN}.v")


def test_slices_recorded_one_row_off_are_caught() -> None:
    gm = shared(PARTS, fuse=True)
    place = slices_of(gm)[f"{ATTN}.q"]
    wide = gm.get_submodule(place.module).weight
    assert len(wide) >= place.stop
    # the record says rows 1:13 where they are 0:12: what is multiplied out is another weight
    rolled = nn.Linear(wide.shape[1], len(wide) + 1)
    rolled.weight = nn.Parameter(torch.cat([wide.detach(), wide.detach()[:1]]))
    gm.add_module("elsewhere", rolled)
    moved = type(place)("elsewhere", place.start + 1, place.stop + 1, place.basis)
    set_slices(gm, {f"{ATTN}.q": moved})
    assert failing(gm) >= {"random", "relative"}


def test_one_wrong_number_is_caught() -> None:
    gm = exact(PARTS)
    weight = gm.get_submodule(f"{ATTN}.v").weight
    gm.get_submodule(f"{ATTN}.v").weight = nn.Parameter(weight.detach().clone())
    with torch.no_grad():
        gm.get_submodule(f"{ATTN}.v").weight[3, 4] += 1e-3
    assert failing(gm) == {"random", "relative"}


# Strictness, dtypes, and what is left alone


def test_strict_raises_with_the_whole_story() -> None:
    gm = exact(PARTS)
    swap_k_and_v(gm)
    with pytest.raises(CheckFailed) as caught:
        fxshare.verify(model_of(), gm, strict=True)
    text = str(caught.value)
    assert text.startswith("DIFFERENT: exact mode, compared in float32 at depth 33")
    assert "FAIL random" in text
    assert "of the largest value, at output[" in text
    assert fxshare.verify(model_of(), exact(PARTS), strict=True).ok


HF = {
    "weight_types": {
        "attn": {"pattern": r".*(c_attn|[qkv]_proj)$", "basis": "site"},
        "mlp": {"pattern": r".*(c_fc|gate_proj|up_proj)$"},
    },
    "block_pattern": r"(?:h|layers)\.(\d+)",
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("toy", "capture"),
    [(GPT2, "fx"), (LLAMA, "fx"), (NANOGPT, "modules")],
    ids=["gpt2", "llama", "nanogpt"],
)
def test_half_precision_is_compared_in_float32(toy: Any, dtype: torch.dtype, capture: Any) -> None:
    model = toy.model(dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(VOCABULARY, (4, 8), generator=generator) for _ in range(2)]
    for cfg in (HF, {**HF, "group_size": 2, "compression_rate": 0.7}):
        with no_warnings_of_ours():
            gm = fxshare.compile(model, cfg, calibration=data, capture=capture)
        result: Verification = fxshare.verify(model, gm, data)
        assert result.ok, str(result)
        assert result.dtype == "float32"
        # one column of one weight by 5 %: a comparison in half precision would let it pass
        site = next(s for s in gm.fxshare.plan.sites if s.type == "mlp")
        linear = gm.get_submodule(slices_of(gm)[site.slices[0].name].module)
        linear.weight = nn.Parameter(linear.weight.detach().clone())
        with torch.no_grad():
            linear.weight[:, 0] *= 1.05
        assert not fxshare.verify(model, gm, data).ok


def test_a_model_cast_to_half_after_compiling_still_verifies() -> None:
    model, gm = model_of(), shared(PARTS)
    assert fxshare.verify(model.bfloat16(), gm.bfloat16()).ok


def test_exported_half_precision_is_compared_in_float32() -> None:
    model = LLAMA.model(dtype=torch.bfloat16)
    ids = torch.arange(12).view(2, 6)
    with no_warnings_of_ours():
        gm = fxshare.compile(model, HF, example=ids, capture="export")
    result = fxshare.verify(model, gm)
    assert result.ok
    assert result.dtype == "float32"


def test_nothing_to_verify_on_says_so() -> None:
    model = gpt()
    gm = fxshare.compile(model, gpt_config(), capture="modules")
    with pytest.raises(FxShareError, match="give inputs="):
        fxshare.verify(model, gm)
    assert fxshare.verify(model, gm, token_batches(1)).ok


def test_a_module_of_another_making_is_refused() -> None:
    with pytest.raises(FxShareError, match=r"GPT was not made by fxshare\.compile"):
        fxshare.verify(gpt(), gpt())


def test_a_model_that_takes_no_single_row_is_verified_on_others() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers[0](x)
            return y.scatter(1, torch.zeros(2, 1, 8, dtype=torch.long), y[:, :1])

    model = Pairs().eval()
    config = {"weight_types": {"a": {"pattern": r"layers\.0$"}}}
    gm = fxshare.compile(model, config, example=torch.randn(2, 3, 8), capture="fx")
    found = fxshare.verify(model, gm)
    assert found.ok
    assert [c.what for c in found.checks if c.what.startswith("random")] == [
        "random 2×4×8",
        "random 3×3×8",
    ]
