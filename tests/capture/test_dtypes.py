"""Dtypes, casts after compiling, devices, copies, threads."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fxshare
from fxshare.base import placement
from fxshare.base.numerics import float_leaves, tolerance, worst
from fxshare.capture import capture
from fxshare.capture.products import WideProducts
from fxshare.capture.tracing.dtypes import DtypeSwitch
from fxshare.errors import GuardError
from tests.strategies import SHARING, gpt, gpt_config, no_warnings_of_ours, token_batches
from tests.toys import GPT2, LLAMA, LLAMA_LIKE, NANOGPT, VOCABULARY, WIDTH, Toy

DTYPES = [torch.float16, torch.bfloat16, torch.float64]
IDS = token_batches(1, rows=2, length=7, seed=5)[0]
HF = {
    "weight_types": {
        "attn": {"pattern": r".*(c_attn|[qkv]_proj)$"},
        "mlp": {"pattern": r".*(c_fc|gate_proj|up_proj)$"},
    },
    "block_pattern": r"(?:h|layers)\.(\d+)",
}


def compiled(model: nn.Module, cfg: Any, **keys: Any) -> Any:
    with no_warnings_of_ours():
        return fxshare.compile(model, cfg, **keys)


@functools.cache
def _shared() -> Any:
    return compiled(gpt(), gpt_config(**SHARING), calibration=token_batches(), copy=True)


def shared() -> Any:
    return copy.deepcopy(_shared())


def limit(gm: Any, dtype: torch.dtype) -> float:
    return tolerance(dtype, 2 * len(gm.fxshare.plan.sites) + 1)


def switches(gm: nn.Module) -> dict[str, DtypeSwitch]:
    return {n: m for n, m in gm.named_modules() if isinstance(m, DtypeSwitch)}


# Cast after compiling


def eager_gpt2() -> nn.Module:
    model: Any = GPT2.make().eval()
    model.set_attn_implementation("eager")
    return model


EAGER_GPT2 = Toy("gpt2-eager", eager_gpt2)
CASES = [NANOGPT, LLAMA_LIKE, GPT2, EAGER_GPT2, LLAMA]


@pytest.mark.parametrize("toy", CASES, ids=lambda toy: toy.name)
def test_a_result_that_is_cast_computes_what_the_cast_model_computes(toy: Toy) -> None:
    model = toy.model()
    gm = compiled(model, HF, example=toy.inputs(), copy=True)
    assert gm.fxshare.front_end == "fx"
    (ids,) = toy.inputs(3, 5)
    for dtype in DTYPES:
        cast, expected = copy.deepcopy(gm).to(dtype), copy.deepcopy(model).to(dtype)
        with torch.no_grad():
            found = cast(ids)
            assert {t.dtype for _, t in float_leaves(found)} == {dtype}
            assert worst(expected(ids), found).relative <= limit(gm, dtype)


def test_without_its_switches_the_cast_would_go_wrong() -> None:
    gm = compiled(LLAMA.model(), HF, example=LLAMA.inputs())
    assert switches(gm)
    for name, switch in switches(gm).items():
        for node in [n for n in gm.graph.nodes if n.target == name]:
            for user in list(node.users):
                user.args = tuple(switch.like.dtype if a is node else a for a in user.args)
    gm.recompile()
    with pytest.raises(RuntimeError):
        gm.half()(*LLAMA.inputs())


class Masked(nn.Module):
    """Fills with a limit of the dtype, half of it, and a dtype of its own choosing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y = y.masked_fill(y < 0, torch.finfo(y.dtype).min / 2)
        y = y.masked_fill(y > 1, torch.finfo(y.dtype).max)
        return y.to(torch.float32).softmax(-1).to(self.fc.weight.dtype)


def test_limits_of_a_dtype_follow_and_a_chosen_dtype_stays() -> None:
    model, x = Masked(), torch.randn(3, 4, WIDTH)
    gm = compiled(model, {"weight_types": {"fc": {"pattern": "fc"}}}, example=x, copy=True)
    found = {(s.field, s.scale) for s in switches(gm).values()}
    assert found == {(None, 1.0), ("max", -0.5), ("max", 1.0)}
    for dtype in DTYPES:
        cast, expected = copy.deepcopy(gm).to(dtype), copy.deepcopy(model).to(dtype)
        assert worst(expected(x.to(dtype)), cast(x.to(dtype))).relative == 0.0


class OwnWay(nn.Module):
    """Has a step for float16 only, as T5 has."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if y.dtype == torch.float16:
            y = y.clamp(-1.0, 1.0)
        return y


@pytest.mark.parametrize(("model", "mode"), [(OwnWay(), "fx"), (LLAMA.model(), "export")])
def test_a_graph_that_cannot_follow_refuses(model: nn.Module, mode: Any) -> None:
    own_way = isinstance(model, OwnWay)
    x = torch.randn(3, 4, WIDTH) if own_way else LLAMA.inputs()[0]
    more = {} if own_way else {"attention_mask": torch.ones_like(x)}
    cfg = {"weight_types": {"fc": {"pattern": r"fc|.*up_proj"}}}
    gm = compiled(model, cfg, example=x, capture=mode, copy=True)
    gm(x, **more)
    half = x.half() if x.is_floating_point() else x
    with pytest.raises(GuardError, match=r"captured in torch.float32 and cast to torch.float16"):
        copy.deepcopy(gm).half()(half, **more)
    gm.half().float()(x, **more)
    other = compiled(copy.deepcopy(model).half(), cfg, example=half, capture=mode)
    assert fxshare.verify(copy.deepcopy(model).half(), other).ok


def test_parameters_take_part_without_values() -> None:
    # the second trace must not copy a model that only just fits
    model = nn.Sequential(nn.Linear(8, 8)).to("meta")
    found = capture(model, torch.empty(2, 3, 8, device="meta"))
    assert found.front_end == "fx"


# Compiled in half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_those_of_float64_rounded(dtype: Any) -> None:
    low = gpt(dtype)
    high = copy.deepcopy(low).double()  # the same numbers
    data = token_batches()
    gm = compiled(low, gpt_config(**SHARING), calibration=data)
    reference = compiled(high, gpt_config(**SHARING), calibration=data)
    assert {p.dtype for p in gm.parameters()} == {dtype}
    # factors made in half precision would lose several units in the last place of the weight
    exact = reference.fxshare.slice_errors
    for name, error in gm.fxshare.slice_errors.items():
        assert abs(error - exact[name]) <= 4 * torch.finfo(dtype).eps
    assert fxshare.verify(low, gm).ok


# Moves, copies, calls


def test_casts_keep_one_owner_for_each_basis() -> None:
    gm = shared()
    basis = gm.fxshare.plan.groups[0].name
    for move in ("half", "bfloat16", "double", "float"):
        getattr(gm, move)()
        names = [n for n, _ in gm.named_parameters(remove_duplicate=False) if basis in n]
        assert names == [f"{basis}.weight"]
        assert gm.get_submodule(basis).weight.dtype == gm(IDS).dtype


@pytest.mark.parametrize("front_end", ["fx", "modules"])
def test_deepcopy_and_pickle(front_end: Any) -> None:
    gm = compiled(
        LLAMA.model(), {**HF, **SHARING}, calibration=[LLAMA.inputs()[0]], capture=front_end
    )
    for again in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(again(*LLAMA.inputs()).logits, gm(*LLAMA.inputs()).logits)
        assert again.fxshare.plan == gm.fxshare.plan
        assert not {id(p) for p in again.parameters()} & {id(p) for p in gm.parameters()}
        assert again.half()(*LLAMA.inputs()).logits.dtype == torch.float16
    assert gm(*LLAMA.inputs()).logits.dtype == torch.float32


def test_functional_call_takes_other_values() -> None:
    gm = shared()
    zeros = {name: torch.zeros_like(p) for name, p in gm.named_parameters()}
    state = {name: p.detach().clone() for name, p in gm.named_parameters()}
    assert torch.equal(torch.func.functional_call(gm, state, (IDS,)), gm(IDS))
    assert not torch.func.functional_call(gm, zeros, (IDS,)).any()

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(gm, values, (IDS,)).square().mean()

    by_func = torch.func.grad(loss)(state)
    gm(IDS).square().mean().backward()
    found = {name: p.grad for name, p in gm.named_parameters()}
    assert worst(found, by_func).relative <= limit(gm, torch.float32)


def _gradients(gm: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    gm.zero_grad(set_to_none=True)
    run().square().mean().backward()
    return {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}


def test_activation_checkpointing_around_the_result() -> None:
    gm = shared()
    plain = _gradients(gm, lambda: gm(IDS))
    again = _gradients(gm, lambda: checkpoint(gm, IDS, use_reentrant=False))
    assert worst(plain, again).relative == 0.0


def test_a_model_with_gradient_checkpointing_on() -> None:
    model: Any = LLAMA.model()
    model.gradient_checkpointing_enable()
    model.train()
    (ids,) = LLAMA.inputs()
    gm = compiled(model, HF, example=ids)
    assert model.is_gradient_checkpointing
    assert worst(model(ids).logits, gm.train()(ids).logits).relative <= limit(gm, torch.float32)
    expected = _gradients(model, lambda: model(ids).logits)
    found = _gradients(gm, lambda: gm(ids).logits)
    both = expected.keys() & found.keys()
    assert len(both) > 3
    pick = {name: expected[name] for name in both}, {name: found[name] for name in both}
    assert worst(*pick).relative <= limit(gm, torch.float32)


def test_one_result_called_from_several_threads() -> None:
    gm = shared()
    calls = [token_batches(1, rows=1 + n % 3, length=4 + n % 5, seed=n)[0] for n in range(24)]
    with torch.no_grad():
        expected = [gm(ids) for ids in calls]

    def call(ids: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = gm(ids)
        return found

    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, expected, pool.map(call, calls)))


def test_a_saved_cast_comes_back(tmp_path: Any) -> None:
    gm = compiled(LLAMA.model(), {**HF, **SHARING}, calibration=[LLAMA.inputs()[0]]).bfloat16()
    fxshare.save(gm, tmp_path / "out")
    after = fxshare.load(tmp_path / "out")
    assert after.fxshare.graph_sha256 == gm.fxshare.graph_sha256
    assert torch.equal(after(*LLAMA.inputs()).logits, gm(*LLAMA.inputs()).logits)
    stream = io.BytesIO()
    torch.save(gm.state_dict(), stream)
    stream.seek(0)
    gm.load_state_dict(torch.load(stream, weights_only=True))


def test_autocast() -> None:
    gm = compiled(LLAMA.model(), HF, example=LLAMA.inputs(), copy=True)
    (ids,) = LLAMA.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected, found = LLAMA.model()(ids).logits, gm(ids).logits
    assert expected.dtype == found.dtype
    assert worst(expected, found).relative <= limit(gm, torch.bfloat16)


# CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("toy", [GPT2, LLAMA], ids=lambda toy: toy.name)
def test_on_cuda(toy: Toy, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(VOCABULARY, (4, 8), generator=generator) for _ in range(2)]
    model = toy.model(dtype=dtype).cuda()
    gm = compiled(model, {**HF, **SHARING}, calibration=data)
    assert {(p.device.type, p.dtype) for p in gm.parameters()} == {("cuda", dtype)}
    assert fxshare.verify(model, gm).ok
    moved = compiled(toy.model(), {**HF, **SHARING}, calibration=data).to("cuda", dtype)
    ids = data[0].cuda()
    assert moved(ids).logits.dtype == dtype
    assert F.softmax(moved.cpu().float()(data[0]).logits, -1).isfinite().all()


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slow_half_precision_is_multiplied_in_float32(
    able: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set[torch.dtype]()

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.addmm.default and args[1].shape[0] >= 16:
                seen.add(args[1].dtype)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(placement, "multiplies_bfloat16", lambda device: able)
    with Seeing():
        captured = capture(NANOGPT.model(dtype=dtype), NANOGPT.inputs(batch=4))
    assert captured.front_end == "fx"
    assert seen == {dtype if able and dtype == torch.bfloat16 else torch.float32}


def test_wide_products_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 20, generator=generator).bfloat16() for n in (32, 24))
    for one in (x, w):
        one.requires_grad_()
    with WideProducts():
        y = F.linear(x, w)
        y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert torch.equal(y, (x.float() @ w.float().T).bfloat16())
    assert torch.equal(x.grad, w.float().sum(0).expand_as(x).bfloat16())  # type: ignore[arg-type]
    image, kernel = torch.randn(1, 3, 8, 8).bfloat16(), torch.randn(4, 3, 3, 3).bfloat16()
    with WideProducts():
        found = F.conv2d(image, kernel)
        mixed = torch.mm(x.float(), w.float().T)
    assert torch.equal(found, F.conv2d(image.float(), kernel.float()).bfloat16())
    assert mixed.dtype == torch.float32
