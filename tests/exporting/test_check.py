"""What an export refuses, and that it notices what is wrong."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.errors import CheckFailed, ExportError, StoreError
from passes.errors import FxShareError
from tests.exporting import build

pt2 = importlib.import_module("fxshare.exporting.targets.pt2")
py = importlib.import_module("fxshare.exporting.targets.python")
dense = importlib.import_module("fxshare.exporting.targets.dense")


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return build.model()


@pytest.fixture(scope="module")
def gm(original: nn.Module) -> Any:
    """A shared toy in sharing mode; tests must not change it."""
    return build.toy("sharing")


def fingerprint(gm: nn.Module) -> list[tuple[int, int, Tensor]]:
    return [(id(t), t._version, t.clone()) for t in (*gm.parameters(), *gm.buffers())]


# broken exports ---------------------------------------------------------------------------------


def test_a_changed_coefficient_is_noticed(
    gm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = torch.export.save

    def damaged(program: Any, path: Any, **options: Any) -> None:
        name = next(n for n in program.state_dict if n.endswith("c_fc.weight"))
        weight = program.state_dict[name].clone()
        weight[0, 0] += 0.05 * weight.abs().max()
        program.state_dict[name] = nn.Parameter(weight)
        write(program, path, **options)

    monkeypatch.setattr(torch.export, "save", damaged)
    with pytest.raises(CheckFailed, match="pt2 export of GPT differs from the compiled model on"):
        fxshare.export(gm, tmp_path / "m.pt2", to="pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["py", "dense"])
def test_a_changed_number_in_a_file_is_noticed(
    to: str, gm: Any, original: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        name = next(n for n in tensors if n.endswith("mlp.c_fc.weight"))
        changed = tensors[name].clone()
        changed[0, 0] += 0.05 * changed.abs().max()
        save_file({**tensors, name: changed}, path, **options)

    monkeypatch.setattr({"py": py, "dense": dense}[to], "save_file", damaged)
    options = {"original": original} if to == "dense" else {}
    with pytest.raises(CheckFailed):
        fxshare.export(gm, tmp_path / "m", to=to, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_was_baked_in_is_noticed(
    gm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that works at the example's sizes alone says that it varies."""
    write = pt2.write

    def fixed(subject: Any, path: Path) -> Any:
        done = write(subject, path)
        expected = subject.shapes.base["idx"].shape

        def run(call: Any) -> Any:
            assert call["idx"].shape == expected, "fixed"
            return done.run(call)

        return type(done)(run, True, True)

    monkeypatch.setattr(pt2, "write", fixed)
    with pytest.raises(CheckFailed, match=r"fails on idx .*fixed.*dynamic=False"):
        fxshare.export(gm, tmp_path / "m.pt2", to="pt2")


# targets that exist -----------------------------------------------------------------------------


def test_an_older_file_stays_without_force_and_gives_way_with_it(gm: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_text("older")
    with pytest.raises(StoreError, match=r"m\.pt2 exists; .*force=True"):
        fxshare.export(gm, path, to="pt2")
    assert path.read_text() == "older"
    fxshare.export(gm, path, to="pt2", force=True)
    torch.export.load(path)
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "m.pt2.certificate.json"]


def test_a_failing_export_keeps_the_older_folder(
    gm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    fxshare.export(gm, path, to="py")
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(py, "save_file", full)
        with pytest.raises(StoreError, match="No space left on device; nothing was written"):
            fxshare.export(gm, path, to="py", force=True)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert list(tmp_path.iterdir()) == [path]
    fxshare.export(gm, path, to="py", force=True)


def test_a_folder_of_somebody_else_is_never_replaced(gm: Any, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"holds 'thesis\.tex'"):
        fxshare.export(gm, tmp_path / "m", to="py", force=True)
    (tmp_path / "m.pt2").mkdir()
    with pytest.raises(StoreError, match="is a folder and this export is a file"):
        fxshare.export(gm, tmp_path / "m.pt2", to="pt2", force=True)


# models and options -----------------------------------------------------------------------------


def test_a_model_that_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(FxShareError, match=r"Linear was not made by fxshare\.compile"):
        fxshare.export(nn.Linear(2, 2), tmp_path / "m.pt2", to="pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"to": "onyx"},
            r"expected one of pt2, aoti, onnx, dense, py, vllm, ort-genai, found 'onyx'.*'onnx'",
        ),
        ({"to": "onnx"}, r"ends in \.onnx, found 'm\.pt2'"),
        ({"to": "ort-genai", "opset": "18"}, r"opset: expected 18 .* found '18'"),
        ({"to": "pt2", "opset": 18}, r"opset: only to='onnx'"),
        ({"to": "pt2", "original": nn.Linear(1, 1)}, r"original: only to='dense'"),
    ],
)
def test_options_that_do_not_fit(
    options: dict[str, Any], message: str, gm: Any, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        fxshare.export(gm, tmp_path / "m.pt2", **options)


def test_a_python_object_cannot_be_carried(tmp_path: Path) -> None:
    import transformers

    original = build.transformers_model("llama")
    gm = build.compiled_transformers("llama", original)
    cache = transformers.DynamicCache()
    example = {"input_ids": build.ids(2, 5), "past_key_values": cache}
    message = "argument 'past_key_values' of LlamaForCausalLM is a DynamicCache"
    with pytest.raises(ExportError, match=message):
        fxshare.export(gm, tmp_path / "m.pt2", to="pt2", example=example)


def test_a_cache_in_the_output_is_left_out_and_noted(tmp_path: Path) -> None:
    original = build.transformers_model("llama", use_cache=True)
    gm = fxshare.compile(original, build.transformers_config("llama"), capture="modules")
    example = {"input_ids": build.ids(2, 5), "use_cache": True}
    done = fxshare.export(gm, tmp_path / "m", to="dense", example=example)
    assert done.notes == ("not in the export's output: output.past_key_values (DynamicCache)",)


def test_an_example_that_the_model_refuses(gm: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"does not accept the example call .*example="):
        fxshare.export(gm, tmp_path / "m.pt2", to="pt2", example=torch.randn(2, 4))
    with pytest.raises(FxShareError, match=r"has the entry 'ids'.*takes"):
        fxshare.export(gm, tmp_path / "m.pt2", to="pt2", example={"ids": build.ids()})


def test_nothing_says_how_a_model_is_called(tmp_path: Path) -> None:
    original = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    gm = fxshare.compile(original, {"weight_types": {"a": {"pattern": "0"}}})
    with pytest.raises(ExportError, match=r"captured without example inputs.*example="):
        fxshare.export(gm, tmp_path / "m.pt2", to="pt2")
    done = fxshare.export(gm, tmp_path / "m.pt2", to="pt2", example=torch.randn(4, 6))
    assert done.batch_varies


def test_an_output_without_tensors(tmp_path: Path) -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> str:
            return f"{len(self.a(x))} rows"

    gm = fxshare.compile(Silent(), {"weight_types": {"a": {"pattern": "a"}}})
    with pytest.raises(ExportError, match="returns a str without a tensor"):
        fxshare.export(gm, tmp_path / "m.pt2", to="pt2", example=torch.randn(3, 4))


def test_code_that_torch_export_cannot_follow(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else x

    gm = fxshare.compile(Branching(), {"weight_types": {"a": {"pattern": "a"}}})
    with pytest.raises(ExportError, match=r"torch\.export of .*Branching failed at .*test_check"):
        fxshare.export(gm, tmp_path / "m.pt2", to="pt2", example=torch.randn(3, 4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["pt2", "dense"])
def test_the_callers_model_and_state_are_left_alone(
    to: str, original: nn.Module, tmp_path: Path
) -> None:
    gm = build.compiled(original, **build.SHARING)
    gm.train()
    before, text = fingerprint(gm), gm.code
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    options = {"original": original} if to == "dense" else {}
    fxshare.export(gm, tmp_path / f"m{'.pt2' if to == 'pt2' else ''}", to=to, **options)
    after = fingerprint(gm)
    assert [b[:2] for b in before] == [a[:2] for a in after]
    assert all(torch.equal(b[2], a[2]) for b, a in zip(before, after, strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    assert gm.training
    assert gm.code == text
    assert torch.is_grad_enabled()


def _pt2(gm: Any, path: Path) -> dict[str, Tensor]:
    fxshare.export(gm, path / "m.pt2", to="pt2")
    return dict(torch.export.load(path / "m.pt2").state_dict)


def _py(gm: Any, path: Path) -> dict[str, Tensor]:
    fxshare.export(gm, path / "m", to="py")
    code = (path / "m" / "model.py").read_text()
    return {"code": torch.tensor(list(code.encode())), **load_file(path / "m/model.safetensors")}


@pytest.mark.parametrize("exported", [_pt2, _py])
def test_exporting_and_saving_commute(
    exported: Callable[[Any, Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    def model() -> nn.Module:
        return build.model(n_layer=1)

    gm = build.compiled(model(), **build.PIVOTED)
    fxshare.save(gm, tmp_path / "saved")
    first, second = tmp_path / "first", tmp_path / "second"
    left = exported(gm, first)
    right = exported(fxshare.load(tmp_path / "saved", model), second)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_lowering_first(gm: Any, original: nn.Module, tmp_path: Path) -> None:
    lowered = fxshare.lower(gm)
    x = build.ids()
    for to in ("pt2", "py"):
        done = fxshare.export(lowered, tmp_path / f"m.{to}", to=to)
        assert done.distance is not None
        assert done.distance.relative <= done.limit
    found = torch.export.load(tmp_path / "m.pt2").module()(idx=x)
    assert worst(gm(x), found).relative <= tolerance(torch.float32, 2 * 8 + 1)
    state = {}
    for name, model in (("a", gm), ("b", lowered)):
        path = tmp_path / f"{name}.safetensors"
        fxshare.export(model, path, to="dense", original=original)
        state[name] = load_file(path)
    # products of the same numbers, rounded once, whatever module they are in
    assert worst(state["a"], state["b"]).relative <= torch.finfo(torch.float32).eps


def test_half_precision_is_held_to_its_own_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm = build.compiled(build.model(dtype=torch.bfloat16), **build.SHARING)
    done = fxshare.export(gm, tmp_path / "m", to="py")
    assert done.limit < 0.1 < tolerance(torch.bfloat16, 17)  # which would pass everything

    def damaged(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        name = next(n for n in tensors if n.startswith("basis_fc"))
        save_file({**tensors, name: tensors[name] * 1.3}, path, **options)

    monkeypatch.setattr(py, "save_file", damaged)
    with pytest.raises(CheckFailed, match="py export of GPT differs"):
        fxshare.export(gm, tmp_path / "other", to="py")
