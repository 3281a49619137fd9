"""``fxshare.lower`` and ``fxshare.readable`` on whole models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.errors import CheckFailed, ConfigError
from fxshare.result.face import verbs_of
from fxshare.result.module import attach, record_of
from fxshare.result.products import slices_of
from fxshare.rewriting.lowering import lower_module, with_lowered
from passes import linear_calls
from passes.pipeline import Prefer
from tests.strategies import (
    SHARING,
    Sizes,
    configurations,
    gpt,
    gpt_config,
    model_sizes,
    no_warnings_of_ours,
    sharing,
    token_batches,
)

Golden = Callable[[str, str], None]
PREFER: tuple[Prefer, ...] = ("memory", "speed")
FOUR = settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def _compiled(sizes: Sizes, cfg: dict[str, Any], *, pivoted: bool = False) -> Any:
    """A float64 model under a configuration; with ``pivoted`` its bases are stored pivoted."""
    model = gpt(torch.float64, **{n: getattr(sizes, n) for n in Sizes.__dataclass_fields__})
    plan = None
    with no_warnings_of_ours():
        if pivoted:
            plan = fxshare.plan(model, cfg, example=token_batches(1)[0])
            groups = [group.model_copy(update={"storage": "pivoted"}) for group in plan.groups]
            plan = plan.model_copy(update={"groups": tuple(groups)})
        return fxshare.compile(model, cfg, calibration=token_batches(2), plan=plan, check=False)


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _nodes(module: nn.Module) -> int:
    return sum(len(m.graph.nodes) for m in module.modules() if isinstance(m, fx.GraphModule))


def _tokens(rows: int, length: int) -> Tensor:
    return token_batches(1, rows, length, seed=rows)[0]


@torch.no_grad()
def _check_equal(left: nn.Module, right: nn.Module) -> None:
    """Equal up to rounding at two shapes, in eval mode and in training mode."""
    depth = 2 * len(record_of(left).plan.sites) + 1
    for training in (False, True):
        left.train(training)
        right.train(training)
        for rows, length in ((2, 9), (1, 5)):
            outputs = []
            for module in (left, right):
                torch.manual_seed(3)  # dropout draws the same numbers in both
                outputs.append(module(_tokens(rows, length)))
            distance = worst(*outputs)
            assert distance.relative <= tolerance(torch.float64, depth), distance
    left.eval()
    right.eval()


# Differential ------------------------------------------------------------------------------------


@given(data=st.data())
@FOUR
def test_lowered_and_readable_compute_the_same(data: st.DataObject) -> None:
    sizes = replace(data.draw(model_sizes()), dropout=0.3)
    cfg = data.draw(configurations(sizes))
    mode = data.draw(st.sampled_from(["exact", "sharing", "pivoted"]))
    if mode != "exact":
        cfg = data.draw(sharing(cfg))
    gm = _compiled(sizes, cfg, pivoted=mode == "pivoted")
    text, keys = str(gm.graph), list(gm.state_dict())
    for prefer in PREFER:
        lowered = fxshare.lower(gm, prefer=prefer)
        _check_equal(gm, lowered)
        assert prefer == "speed" or _numbers(lowered) <= _numbers(gm)
        assert list(slices_of(lowered)) == list(slices_of(gm))
        # once is enough
        again = fxshare.lower(lowered, prefer=prefer)
        assert str(again.graph) == str(lowered.graph)
        back = fxshare.readable(lowered)
        _check_equal(gm, back)
        made = lowered.fxshare.lowered
        if not made.dense and not made.written_out:
            assert str(back.graph) == text
            assert list(back.state_dict()) == keys
            assert back.fxshare.graph_sha256 == gm.fxshare.graph_sha256
    assert (str(gm.graph), list(gm.state_dict())) == (text, keys)


HEADS = {"split": "heads", "n_head": 2, "qkv_order": "qkv"}


def _cfg(sizes: Sizes, attn: dict[str, Any], **changes: Any) -> dict[str, Any]:
    cfg = gpt_config(sizes, **changes)
    cfg["weight_types"]["attn"] |= attn
    return cfg


@pytest.mark.parametrize(
    ("capture", "prefer", "conv1d"),
    [
        ("fx", "memory", False),
        ("fx", "speed", True),
        ("export", "memory", True),
        ("modules", "memory", False),
        ("modules", "speed", True),
    ],
)
def test_every_front_end(capture: str, prefer: Prefer, conv1d: bool) -> None:
    sizes = Sizes(conv1d=conv1d)
    exact = _compiled(sizes, _cfg(sizes, HEADS, capture=capture))
    lowered = fxshare.lower(exact, prefer=prefer, example=_tokens(2, 7))
    assert _nodes(lowered) < _nodes(exact)
    # one matmul for the heads again, over the memory that the model itself has
    assert len({p.untyped_storage()._cdata for p in lowered.parameters()}) <= len(
        {p.untyped_storage()._cdata for p in exact.parameters()}
    )
    assert _numbers(lowered) == _numbers(exact)
    back = fxshare.readable(lowered)
    assert back.fxshare.graph_sha256 == exact.fxshare.graph_sha256
    assert dict(slices_of(back)) == dict(slices_of(exact))
    shared = _compiled(sizes, _cfg(sizes, HEADS, capture=capture, **SHARING))
    packed = fxshare.lower(shared, prefer=prefer, example=_tokens(2, 7))
    x = _tokens(1, 4)
    depth = 2 * len(record_of(shared).plan.sites) + 1
    assert worst(shared(x), packed(x)).relative <= tolerance(torch.float64, depth)


def test_verify_holds_lowered_models_to_the_same() -> None:
    sizes = Sizes()
    model = gpt(torch.float64)
    with no_warnings_of_ours():
        gm = fxshare.compile(model, _cfg(sizes, HEADS, **SHARING), calibration=token_batches(2))
    for prefer in PREFER:
        lowered = fxshare.lower(gm, prefer=prefer)
        assert fxshare.verify(model, lowered).ok
        assert fxshare.verify(model, fxshare.readable(lowered)).ok


def _spoil(gm: fx.GraphModule, how: str) -> None:
    if how == "groups swapped":
        product = next(n for n in gm.graph.nodes if n.target is torch.einsum)
        with gm.graph.inserting_before(product):
            swapped = gm.graph.call_function(torch.flip, (product.args[1], (-2,)))
        product.update_arg(1, swapped)
        gm.recompile()
        return
    split = next(n for n in gm.graph.nodes if n.target is torch.split)
    first, second, *_ = split.users
    if how == "another basis' product":
        first.args, second.args = second.args, first.args
    else:
        readers = [n for n in gm.graph.nodes if n.op == "call_module" and "attn" in n.target]
        reader = next(n for n in readers if n.args[0] in split.users)
        other = next(n for n in readers if n.args[0] in split.users and n is not reader)
        reader.replace_all_uses_with(other)
        gm.graph.erase_node(reader)
    gm.graph.lint()
    gm.recompile()


@pytest.mark.parametrize("how", ["another basis' product", "a reader dropped", "groups swapped"])
def test_verify_catches_a_wrong_lowering(how: str) -> None:
    sizes = Sizes(n_layer=2)
    cfg = _cfg(sizes, HEADS if how == "groups swapped" else QKV, **SHARING)
    model = gpt(torch.float64, n_layer=2)
    with no_warnings_of_ours():
        gm = fxshare.compile(model, cfg, calibration=token_batches(2))
    lowered = fxshare.lower(gm)
    assert fxshare.verify(model, lowered).ok
    _spoil(lowered, how)
    with pytest.raises(CheckFailed, match="DIFFERENT"):
        fxshare.verify(model, lowered, strict=True)


# Save and load -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capture", "prefer"),
    [("fx", "speed"), ("export", "memory"), ("modules", "memory")],
)
def test_lowering_and_saving_commute(tmp_path: Path, prefer: Prefer, capture: str) -> None:
    sizes = Sizes(n_layer=2)
    gm = _compiled(sizes, _cfg(sizes, HEADS, capture=capture, **SHARING))
    lowered = fxshare.lower(gm, prefer=prefer)
    x = _tokens(2, 6)
    fxshare.save(lowered, tmp_path / "lowered")
    fxshare.save(gm, tmp_path / "readable")
    loaded = fxshare.load(tmp_path / "lowered", gpt())
    assert loaded.fxshare.graph_sha256 == lowered.fxshare.graph_sha256
    assert loaded.fxshare.lowering == (prefer,)
    assert torch.equal(loaded(x), lowered(x))
    later = fxshare.lower(fxshare.load(tmp_path / "readable", gpt()), prefer=prefer)
    assert later.fxshare.graph_sha256 == lowered.fxshare.graph_sha256
    assert torch.equal(later(x), lowered(x))
    # and back, from the folder of the lowered one
    back = fxshare.readable(loaded)
    fxshare.save(back, tmp_path / "back")
    again = fxshare.load(tmp_path / "back", gpt())
    assert torch.equal(again(x), back(x))
    assert again.fxshare.graph_sha256 == back.fxshare.graph_sha256


@pytest.mark.parametrize("prefer", PREFER)
def test_pivoted_bases_of_a_models_own_class_are_lowered(tmp_path: Path, prefer: Prefer) -> None:
    """Each piece reads a gather whose index the root of all pieces makes."""
    sizes = Sizes(n_layer=2)
    cfg = _cfg(sizes, QKV, capture="modules", **SHARING)
    gm = _compiled(sizes, cfg, pivoted=True)
    assert any(place.pivoted for place in slices_of(gm).values())
    x = _tokens(2, 7)
    lowered = fxshare.lower(gm, prefer=prefer, example=x)
    fxshare.save(lowered, tmp_path / "lowered")
    loaded = fxshare.load(tmp_path / "lowered", gpt())
    assert torch.equal(loaded(x), lowered(x))
    assert torch.equal(fxshare.readable(loaded)(x), gm(x))


@pytest.mark.parametrize("capture", ["fx", "modules"])
def test_what_lies_by_columns_is_stored_so_and_lies_by_rows_in_half_precision(
    tmp_path: Path, capture: str
) -> None:
    cfg = gpt_config(capture=capture, **SHARING)
    batch = token_batches(1)[0]
    with no_warnings_of_ours():
        gm = fxshare.compile(gpt(), cfg, calibration=[batch], check=False)
    lowered: Any = fxshare.lower(gm)

    def by_columns(module: nn.Module) -> set[str]:
        return {n for n, p in module.named_parameters() if not p.is_contiguous()}

    columns = by_columns(lowered)
    assert columns
    assert not by_columns(gm)
    fxshare.save(lowered, tmp_path / "out")
    loaded: Any = fxshare.load(tmp_path / "out", model=gpt())
    assert by_columns(loaded) == columns
    assert torch.equal(loaded(batch), lowered(batch))
    held = dict(loaded.named_parameters())
    loaded.bfloat16()
    assert not by_columns(loaded)
    assert all(p is held[name] for name, p in loaded.named_parameters())
    assert by_columns(lowered) == columns


def test_what_a_lowered_model_learned_is_in_the_readable_one() -> None:
    sizes = Sizes(n_layer=2)
    gm = _compiled(sizes, _cfg(sizes, HEADS, **SHARING))
    lowered = fxshare.lower(gm)
    before = gm(_tokens(1, 5))
    optimizer = torch.optim.SGD(lowered.parameters(), 0.1)
    lowered(_tokens(2, 7)).square().mean().backward()
    assert all(p.grad is not None for p in lowered.parameters())
    optimizer.step()
    back = fxshare.readable(lowered)
    _check_equal(lowered, back)
    assert worst(before, back(_tokens(1, 5))).relative > 1e-4


def test_a_basis_that_was_trained_apart_is_refused() -> None:
    sizes = Sizes(n_layer=2, fused=False, family="llama", bias=False)
    cfg = gpt_config(sizes, **SHARING, private=["v"])
    lowered = fxshare.lower(_compiled(sizes, cfg), prefer="speed")
    record = record_of(lowered).lowered
    assert record is not None
    copies = [o for o in record.graphs[""].origins.values() if o.copies]
    if not copies:
        pytest.skip("nothing was stored twice")
    with torch.no_grad():
        lowered.get_submodule(copies[0].module).weight.add_(1.0)
    with pytest.raises(fxshare.FxShareError, match="trained apart"):
        fxshare.readable(lowered)


# The interface -----------------------------------------------------------------------------------


def test_compile_lowers_where_the_configuration_says_so() -> None:
    sizes = Sizes(n_layer=2)
    cfg = _cfg(sizes, HEADS, **SHARING)
    gm = _compiled(sizes, {**cfg, "lower": {"prefer": "memory"}})
    assert gm.fxshare.lowering == ("memory",)
    apart = fxshare.lower(_compiled(sizes, cfg))
    assert gm.fxshare.graph_sha256 == apart.fxshare.graph_sha256
    # every basis and coefficient is still an nn.Linear that other tools can see
    called = {call.node.target for call in linear_calls(gm) if call.node.op == "call_module"}
    assert all(isinstance(gm.get_submodule(name), nn.Linear) for name in called)
    assert len({id(p) for p in gm.parameters()}) == len(list(gm.parameters()))


def test_what_is_multiplied_out_is_said() -> None:
    sizes = Sizes(n_layer=2, head_dim=4)
    gm = _compiled(sizes, _cfg(sizes, HEADS, group_size=2, compression_rate=0.95))
    lowered = fxshare.lower(gm, prefer="speed")
    dense = lowered.fxshare.lowered.dense
    assert dense
    assert any("multiplied out" in note for note in lowered.fxshare.report.notes)
    assert lowered.fxshare.report.parameters_after == _numbers(lowered)
    back = fxshare.readable(lowered)
    assert not any(hasattr(back, name) for name in dense)
    assert back.fxshare.lowering == ("speed", "readable")
    _check_equal(gm, back)


def test_pivoted_heads_are_written_out_for_speed_only(tmp_path: Path) -> None:
    sizes = Sizes(n_layer=2)
    gm = _compiled(sizes, _cfg(sizes, HEADS, **SHARING), pivoted=True)
    assert fxshare.lower(gm).fxshare.lowered.written_out == ()
    lowered = fxshare.lower(gm, prefer="speed", example=_tokens(2, 7))
    written = lowered.fxshare.lowered.written_out
    assert written
    heads = {p.basis for n, p in slices_of(gm).items() if ".c_attn." in n and p.pivoted}
    assert set(written) == heads - set(lowered.fxshare.lowered.dense)
    assert any("written out" in note for note in lowered.fxshare.report.notes)
    assert lowered.fxshare.report.parameters_after == _numbers(lowered)
    back = fxshare.readable(lowered)
    assert back.fxshare.lowering == ("speed", "readable")
    _check_equal(gm, back)
    assert not any(slices_of(back)[n].pivoted for n, p in slices_of(gm).items() if p.basis in heads)
    for name, one in {"lowered": lowered, "back": back}.items():
        fxshare.save(one, tmp_path / name)
        again = fxshare.load(tmp_path / name, gpt())
        assert torch.equal(again(_tokens(1, 6)), one(_tokens(1, 6)))


def _grouped() -> Any:
    """Heads that have a basis each, lowered: their coefficients are one product."""
    sizes = Sizes(n_layer=1)
    gm = fxshare.lower(_compiled(sizes, _cfg(sizes, HEADS, **SHARING)))
    assert sum(n.target is torch.einsum for n in gm.graph.nodes) == 1
    return gm.float()


@pytest.mark.parametrize("to", ["pt2", "dense", "py", pytest.param("onnx", marks=pytest.mark.slow)])
def test_grouped_coefficients_are_exported(tmp_path: Path, to: Any) -> None:
    if to == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    # compared with gm at other sizes before it is put in place
    fxshare.export(_grouped(), tmp_path / f"model.{to}", to=to)
    assert (tmp_path / f"model.{to}").exists()


def test_grouped_coefficients_are_compiled_without_a_break() -> None:
    gm = _grouped()
    fast = torch.compile(gm, fullgraph=True, dynamic=True, backend="eager")
    for rows, length in ((2, 7), (3, 5)):
        x = _tokens(rows, length)
        distance = worst(gm(x), fast(x))
        depth = 2 * len(record_of(gm).plan.sites) + 1
        assert distance.relative <= tolerance(torch.float32, depth), distance


def test_the_caller_s_model_mode_and_generator_stay() -> None:
    sizes = Sizes(n_layer=2)
    gm = _compiled(sizes, _cfg(sizes, HEADS))
    gm.train()
    state = torch.get_rng_state()
    lowered = fxshare.lower(gm, example=_tokens(1, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert gm.training
    assert lowered.training
    assert lowered.get_submodule("lm_head").weight is gm.get_submodule("lm_head").weight
    assert torch.is_grad_enabled()


def test_bad_input() -> None:
    with pytest.raises(fxshare.FxShareError, match=r"was not made by fxshare\.compile"):
        fxshare.lower(gpt())
    with pytest.raises(fxshare.FxShareError, match=r"was not made by fxshare\.compile"):
        fxshare.readable(gpt())
    gm = _compiled(Sizes(), gpt_config())
    with pytest.raises(ConfigError, match="prefer: expected 'memory' or 'speed', found 'size'"):
        fxshare.lower(gm, prefer="size")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"lower\.prefer: expected one of .*'speed'"):
        fxshare.load_config({**gpt_config(), "lower": {"prefer": "size"}})
    with pytest.raises(ConfigError, match=r"lower\.prefers: unknown key\. Did you mean 'prefer'"):
        fxshare.load_config({**gpt_config(), "lower": {"prefers": "speed"}})


def test_an_example_shows_a_wrong_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = _compiled(Sizes(), _cfg(Sizes(), {"split": "qkv", "qkv_order": "qkv"}, **SHARING))

    def wrong(module: nn.Module, prefer: Prefer) -> Any:
        result, lowered = lower_module(module, prefer)
        assert isinstance(result, fx.GraphModule)
        _spoil(result, "another basis' product")
        return result, lowered

    monkeypatch.setattr("fxshare.rewriting.lowering.lower_module", wrong)
    with pytest.raises(CheckFailed, match="differs from the readable one"):
        fxshare.lower(gm, example=_tokens(1, 5))


# Text --------------------------------------------------------------------------------------------


def _text(gm: fx.GraphModule) -> str:
    """The code without guards and without the ``= None`` that frees values, and its linears."""
    lines = [line.partition(";  ")[0] for line in gm.code.splitlines() if line.strip()]
    # guards name lines of the model's source
    first = [line for line in lines if "hold_" not in line]
    linears = [
        f"# {name}: Linear({m.in_features}, {m.out_features}{'' if m.bias is None else ', bias'})"
        for name, m in gm.named_modules()
        if isinstance(m, nn.Linear)
    ]
    return "\n".join([*first, "", *linears])


QKV = {"split": "qkv", "qkv_order": "qkv"}
LLAMA = Sizes(n_layer=1, fused=False, family="llama", bias=False)


@pytest.mark.parametrize(
    ("name", "sizes", "attn", "changes", "prefer"),
    [
        ("lowered_exact_heads", Sizes(n_layer=1), HEADS, {}, "memory"),
        ("lowered_qkv", Sizes(n_layer=1), QKV, SHARING, "memory"),
        ("lowered_conv1d", Sizes(n_layer=1, conv1d=True), QKV, SHARING, "memory"),
        (
            "lowered_heads_dense",
            Sizes(n_layer=2),
            HEADS,
            {"group_size": 2, "compression_rate": 0.95},
            "speed",
        ),
        ("lowered_llama", LLAMA, None, {"group_size": 1, "compression_rate": 0.5}, "memory"),
        ("lowered_heads_apart", Sizes(n_layer=1), HEADS, SHARING, "memory"),
        ("lowered_pivoted", Sizes(n_layer=1), QKV, SHARING, "memory"),
    ],
)
def test_golden(
    golden: Golden,
    name: str,
    sizes: Sizes,
    attn: dict[str, Any] | None,
    changes: dict[str, Any],
    prefer: Prefer,
) -> None:
    cfg = gpt_config(sizes, **changes) if attn is None else _cfg(sizes, attn, **changes)
    gm = _compiled(sizes, cfg, pivoted=name == "lowered_pivoted")
    golden(name, _text(fxshare.lower(gm, prefer=prefer)))


def test_lowering_keeps_a_record_of_its_own() -> None:
    gm = _compiled(Sizes(), _cfg(Sizes(), HEADS))
    result, lowered = lower_module(gm, "memory")
    attach(result, with_lowered(record_of(gm), lowered, result), verbs_of(gm))
    assert record_of(gm).lowered is None
    assert record_of(result).lowered is lowered
    assert all(t.device.type == "meta" for t in lowered.graphs[""].graph.parameters())
