"""What is kept of the teacher's outputs, and the means of samples that sentence embeddings are."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare.errors import ConfigError, RefineError
from fxshare.refining import measure
from fxshare.refining.objectives import ToOutputs
from tests.refining.build import equal, everything, features, ids, refined, subject, usual


def counted(model: nn.Module) -> tuple[nn.Module, list[int]]:
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(0))
    return model, seen


def test_the_teacher_runs_once_on_what_comes_again() -> None:
    model, gm = subject()
    model, seen = counted(model)
    plain = refined(gm, model, ids(5))
    assert len(seen) == 5  # four to train on, one held out
    found = [everything(plain)]
    for changed, calls in (
        ({"_KEPT_BYTES": 0}, 4),  # of measuring nothing is kept then
        ({"_KEPT_BYTES": 0, "_IN_FILES": 0}, 12),
        ({"_KEPT_BYTES": 0, "_FREE": 1 << 60}, 12),
    ):
        seen.clear()
        with mock.patch.multiple(measure, **changed):
            result = refined(gm, model, ids(5))
        measured = len(result.fxshare.refined[-1].curve) + 1
        assert len(seen) == calls + measured
        found.append(everything(result))
    assert all(equal(found[0], other) for other in found)


def test_a_full_disk_ends_nothing() -> None:
    model, gm = subject()
    full = mock.patch.object(torch, "save", side_effect=OSError(28, "No space left on device"))
    with full, mock.patch.object(measure, "_KEPT_BYTES", 0):
        result = refined(gm, model, ids(5))
    assert equal(everything(result), everything(refined(gm, model, ids(5))))


def test_means_of_samples_count_by_their_share() -> None:
    generator = torch.Generator().manual_seed(0)
    own, wanted = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64).unbind(0)
    mask = torch.arange(5)[None] < torch.tensor([[5], [3], [1]])
    call = {"attention_mask": mask}

    def loss(weight: float, call: Any = call) -> tuple[Tensor, int]:
        objective = ToOutputs(weight)
        found = objective.loss(own, objective.targets(wanted, call), call, None)
        return found.mean, found.count

    means = [torch.stack([x[b][mask[b]].mean(0) for b in range(3)]) for x in (own, wanted)]
    gap = (means[0] - means[1]) / means[1].norm(dim=-1, keepdim=True)
    of_means = gap.pow(2).sum() / 2 / 3
    torch.testing.assert_close(loss(1.0)[0], of_means)
    torch.testing.assert_close(loss(0.25)[0], 0.75 * loss(0.0)[0] + 0.25 * of_means)
    assert loss(0.25)[1] == loss(0.0)[1] == 9
    whole = loss(1.0, {})[0]
    gap = (own - wanted).mean(1) / wanted.mean(1).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(whole, gap.pow(2).sum() / 2 / 3)


def test_means_are_trained_on() -> None:
    model, gm = subject("branches")
    done = refined(gm, model, features(), pool_weight=0.5).fxshare.refined[-1]
    assert done.after.objective < done.before.objective
    plain = refined(gm, model, features(), steps=1).fxshare.refined[-1]
    assert done.before != plain.before


def test_means_where_there_are_none() -> None:
    model, gm = usual()
    with pytest.raises(ConfigError, match=r"pool_weight: expected 0 to 1, found 2"):
        refined(gm, model, pool_weight=2)
    for objective in ("kl", "ce"):
        with pytest.raises(RefineError, match="pool_weight belongs to objective='hidden'"):
            refined(gm, model, pool_weight=0.5, objective=objective)
    flat = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    cfg = {"weight_types": {"fc": {"pattern": r"\d"}}, "group_size": 1, "compression_rate": 0.5}
    rows = [batch[:, 0] for batch in features(4)]
    compiled = fxshare.compile(flat, cfg, calibration=rows)
    with pytest.raises(RefineError, match=r"expected an output \(batch, tokens, features\)"):
        refined(compiled, flat, rows, pool_weight=0.5)
