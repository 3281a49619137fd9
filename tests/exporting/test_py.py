"""``to="py"``: a module that people read and Python imports, without us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.errors import ExportError
from fxshare.exporting import export
from tests.exporting import build

DEPTH = 2 * 8 + 1

_ALONE = """
import sys
sys.modules.update(dict.fromkeys(("fxshare", "passes", "transformers")))
sys.path.insert(0, sys.argv[1])
import torch, model
torch.set_num_threads(int(sys.argv[4]))
m = model.load()
torch.save(m(**torch.load(sys.argv[2])), sys.argv[3])
"""


def run_alone(folder: Path, scratch: Path, **inputs: Tensor) -> Any:
    """Import the module in a process that cannot import us, and call it.

    It gets this process's number of threads, with which alone its bits are the same.
    """
    torch.save(inputs, scratch / "given.pt")
    arguments = [folder, scratch / "given.pt", scratch / "out.pt", torch.get_num_threads()]
    command = [sys.executable, "-c", _ALONE, *arguments]
    done = subprocess.run(list(map(str, command)), cwd=scratch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(scratch / "out.pt")


def loaded(folder: Path) -> Any:
    """The exported module, imported here."""
    scope: dict[str, Any] = {"__file__": str(folder / "model.py"), "__name__": "model"}
    exec((folder / "model.py").read_text(), scope)
    return scope["load"]()


@pytest.mark.parametrize("mode", build.MODES)
def test_the_module_computes_what_the_model_does(mode: str, tmp_path: Path) -> None:
    gm = build.toy(mode)
    fxshare.export(gm, tmp_path / "m", to="py")
    names = sorted(p.name for p in (tmp_path / "m").iterdir())
    assert names == ["certificate.json", "model.py", "model.safetensors"]
    x = build.ids()
    found = loaded(tmp_path / "m")(x)
    if mode == "sharing":
        assert torch.equal(found, run_alone(tmp_path / "m", tmp_path, idx=x))
    assert worst(gm(x), found).relative <= tolerance(torch.float32, DEPTH)
    tensors = {id(t): t.nbytes for t in (*gm.parameters(), *gm.buffers())}
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert sum(tensors.values()) <= size <= sum(tensors.values()) + 8192  # the header
    code = (tmp_path / "m" / "model.py").read_text()
    assert str(tmp_path) not in code
    assert "import fxshare" not in code


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transformers(family: str, tmp_path: Path) -> None:
    gm = build.compiled_transformers(family, build.transformers_model(family))
    fxshare.export(gm, tmp_path / "m", to="py")
    x = build.ids()
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    limit = tolerance(torch.float32, DEPTH)
    for inputs in ({"input_ids": x}, {"input_ids": x, "attention_mask": mask}):
        found = loaded(tmp_path / "m")(**inputs)
        assert isinstance(found, dict)
        assert worst(gm(**inputs).logits, found["logits"]).relative <= limit


def test_ties_and_guards_are_kept(tmp_path: Path) -> None:
    fxshare.export(build.toy("sharing"), tmp_path / "m", to="py")
    model = loaded(tmp_path / "m")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.training
    with pytest.raises(ValueError, match=r"gave True when captured, now False"):
        model(build.ids(1, 17))
    loss = model(build.ids()).square().mean()
    loss.backward()
    basis = next(p for n, p in model.named_parameters() if n.startswith("basis_"))
    assert basis.grad is not None


def test_the_export_front_end(tmp_path: Path) -> None:
    gm = build.toy("sharing", "export")
    fxshare.export(gm, tmp_path / "m", to="py")
    x = build.ids()
    found = loaded(tmp_path / "m")(x)
    assert worst(gm(x), found).relative <= tolerance(torch.float32, DEPTH)


def test_module_granularity_has_no_single_graph(tmp_path: Path) -> None:
    gm = build.toy("sharing", "modules")
    with pytest.raises(ExportError, match=r"captured at module granularity.*capture='fx'"):
        fxshare.export(gm, tmp_path / "m", to="py", example=build.ids(2, 7))


@fx.wrap
def doubled(x: Tensor) -> Tensor:
    """A function of the user's own, which the trace does not enter."""
    return 2 * x


def test_a_function_that_is_not_torchs_is_named(tmp_path: Path) -> None:
    gm = fxshare.compile(
        nn.Sequential(nn.Linear(4, 4), nn.GELU()),
        {"weight_types": {"a": {"pattern": "0"}}},
        example=torch.randn(3, 4),
    )
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(doubled, (output.args[0],)),)
    gm.recompile()
    with pytest.raises(ExportError, match=r"calls tests\.exporting\.test_py\.doubled.*'pt2'"):
        export(gm, tmp_path / "m", to="py")
    assert fxshare.export(gm, tmp_path / "m.pt2", to="pt2").distance is not None
