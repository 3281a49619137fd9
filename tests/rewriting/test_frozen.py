"""What a model holds frozen stays frozen when it is shared, lowered, saved and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare.result.module import record_of
from fxshare.result.products import slices_of
from passes.pipeline import Prefer
from tests.strategies import no_warnings_of_ours
from tests.toys import VOCABULARY, LlamaLike, NanoGPT

CONFIG: dict[str, Any] = {
    "weight_types": {"qkv": {"pattern": r".*\.(q|k|v)_proj$"}, "up": {"pattern": r".*\.up_proj$"}},
    "block_pattern": r"layers\.(\d+)",
    "group_size": 2,
    "compression_rate": 0.5,
}
QUERY = "layers.0.q_proj"


def _ids(seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(seed))


def _model(*frozen: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaLike(2).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    return model


def _compiled(model: nn.Module, capture: str = "fx", **more: Any) -> Any:
    with no_warnings_of_ours():
        return fxshare.compile(
            model, {**CONFIG, **more}, calibration=[_ids(1), _ids(2), _ids(3)], capture=capture
        )


def _trains(gm: nn.Module, slice_name: str) -> tuple[bool, bool | None]:
    """Whether the coefficient of a slice takes gradients, and its basis (None: it is dense)."""
    place = slices_of(gm)[slice_name]
    coefficient: Any = gm.get_submodule(place.module)
    basis: Any = None if place.basis is None else gm.get_submodule(place.basis)
    return coefficient.weight.requires_grad, None if basis is None else basis.weight.requires_grad


def _frozen(gm: nn.Module) -> set[str]:
    return {name for name, p in gm.named_parameters() if not p.requires_grad}


def _read_again(gm: nn.Module, folder: Path) -> Any:
    fxshare.save(gm, folder)
    return fxshare.load(folder, model=_model())  # all of it trainable


@pytest.mark.parametrize("prefer", [None, "memory", "speed"])
@pytest.mark.parametrize("capture", ["fx", "export", "modules"])
def test_a_frozen_member_of_a_group_keeps_a_frozen_coefficient(
    capture: str, prefer: Prefer | None
) -> None:
    gm = _compiled(_model("layers.0", "embed"), capture)
    if prefer is not None:
        gm = fxshare.lower(gm, prefer=prefer)
    for name in slices_of(gm):
        trains, basis = _trains(gm, name)
        assert trains is not name.startswith("layers.0"), name
        assert basis is not False, name  # its other member trains it
    assert any(_trains(gm, name)[1] for name in slices_of(gm))


@pytest.mark.parametrize("capture", ["fx", "modules"])
def test_a_group_of_frozen_weights_is_frozen_whole(capture: str) -> None:
    gm = _compiled(_model("layers.0.up_proj", "layers.1.up_proj"), capture)
    assert _trains(gm, "layers.0.up_proj") == _trains(gm, "layers.1.up_proj") == (False, False)
    assert _trains(gm, QUERY) == (True, True)


@pytest.mark.parametrize("pivoted", [False, True])
def test_a_frozen_layer_does_not_move(pivoted: bool) -> None:
    model = _model("layers.0")
    with no_warnings_of_ours():
        plan = fxshare.plan(model, CONFIG, example=_ids(1))
    if pivoted:
        groups = tuple(g.model_copy(update={"storage": "pivoted"}) for g in plan.groups)
        plan = plan.model_copy(update={"groups": groups})
    with no_warnings_of_ours():
        gm: Any = fxshare.compile(model, CONFIG, calibration=[_ids(1)], plan=plan)
    before = {name: p.detach().clone() for name, p in gm.named_parameters()}
    step = torch.optim.SGD(gm.parameters(), lr=0.1)
    gm(_ids(4)).square().mean().backward()
    step.step()
    moved = {name for name, p in gm.named_parameters() if not torch.equal(p, before[name])}
    assert not [name for name in moved if name.startswith("layers.0")]
    assert {n for n in before if n.startswith(("layers.1", "basis"))} <= moved


@pytest.mark.parametrize("prefer", [None, "memory", "speed"])
@pytest.mark.parametrize("capture", ["fx", "modules"])
def test_a_folder_of_a_partly_frozen_model_is_read_again(
    capture: str, prefer: Prefer | None, tmp_path: Path
) -> None:
    # one of three that were packed together: what is packed follows from what was frozen
    gm = _compiled(_model(QUERY, "layers.1.k_proj"), capture)
    gm = gm if prefer is None else fxshare.lower(gm, prefer=prefer)
    back = _read_again(gm, tmp_path / "out")
    assert _frozen(back) == _frozen(gm) != set()
    assert record_of(back).graph_sha256 == record_of(gm).graph_sha256
    assert not record_of(back).report.notes or "differs" not in record_of(back).report.notes[-1]
    again = _read_again(fxshare.readable(back), tmp_path / "again")
    assert _frozen(again) == _frozen(fxshare.readable(back))


def test_what_is_frozen_before_lowering_is_read_again(tmp_path: Path) -> None:
    gm = _compiled(_model(), fuse=False)
    gm.get_submodule(slices_of(gm)["layers.0.k_proj"].module).requires_grad_(False)
    lowered = fxshare.lower(gm)
    back = _read_again(lowered, tmp_path / "out")
    assert _frozen(back) == _frozen(lowered) != set()
    # and what is trainable again afterwards is still packed apart
    lowered.requires_grad_(True)
    back = _read_again(lowered, tmp_path / "trainable")
    assert not _frozen(back)
    assert record_of(back).graph_sha256 == record_of(lowered).graph_sha256


def test_gradients_are_off_around_a_compilation() -> None:
    with torch.no_grad():
        gm = _compiled(_model(QUERY))
    assert _trains(gm, QUERY) == (False, True)
    assert _trains(gm, "layers.0.k_proj") == (True, True)


@pytest.mark.parametrize("prefer", ["memory", "speed"])
def test_a_bias_is_packed_as_it_was(prefer: Prefer) -> None:
    biases = tuple(f"transformer.h.{n}.mlp.c_fc.bias" for n in range(2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NanoGPT().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in biases)
    config = {
        "weight_types": {"fc": {"pattern": r".*\.c_fc$"}, "proj": {"pattern": r".*mlp\.c_proj$"}},
        "block_pattern": r"h\.(\d+)",
        "group_size": 1,
        "compression_rate": 0.3,
    }
    with no_warnings_of_ours():
        plan = fxshare.plan(model, config, example=_ids(1))
        groups = tuple(g.model_copy(update={"storage": "pivoted"}) for g in plan.groups)
        plan = plan.model_copy(update={"groups": groups})
        gm = fxshare.compile(model, config, calibration=[_ids(1)], plan=plan)
    # its rows are put in the order in which the next basis reads them
    lowered = fxshare.lower(gm, prefer=prefer)
    assert _frozen(lowered) == _frozen(gm) == set(biases)
