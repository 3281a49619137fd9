"""Padding is not computed: a batch in parts has the loss and the gradient of the whole."""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fxshare.refining import measure, parts, steps
from fxshare.refining.objectives import Objective, ToLogits, ToOutputs
from fxshare.refining.parts import _PASS, _ends, parts_of
from tests.refining.build import refined, subject
from tests.toys import VOCABULARY


def padded(*lengths: int, width: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Texts of these lengths, filled up on the right."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_parts_have_every_row_once_and_are_cut_to_their_longest() -> None:
    batch = padded(100, 5, 90, 6, width=128)
    parted: list[Any] = parts_of(batch)
    assert [tuple(part["input_ids"].shape) for part in parted] == [(2, 6), (2, 100)]
    rows = sorted(row[row > 0].tolist() for part in parted for row in part["input_ids"])
    assert rows == sorted(row[row > 0].tolist() for row in batch["input_ids"])


@pytest.mark.parametrize("seed", range(3))
def test_no_other_way_to_cut_costs_less(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = sorted(torch.randint(1, 60, (7,), generator=generator).tolist())

    def cost(ends: Any) -> int:
        starts = [0, *ends[:-1]]
        return sum((e - s) * lengths[e - 1] + _PASS for s, e in zip(starts, ends, strict=True))

    ways = [(*cuts, 7) for count in range(7) for cuts in itertools.combinations(range(1, 7), count)]
    assert cost(_ends(lengths)) == min(map(cost, ways))


@pytest.mark.parametrize(
    "batch",
    [
        padded(100, 5)["input_ids"],
        {**padded(100, 5), "labels": torch.zeros(2)},
        {**padded(100, 5), "attention_mask": padded(100, 5)["attention_mask"].flip(1)},
        {**padded(100, 5), "attention_mask": torch.zeros(2, 100).long()},
        padded(9, 9),
    ],
    ids=["no mask", "labels", "from the right", "nothing", "even"],
)
def test_what_cannot_be_parted_is_its_only_part(batch: Any) -> None:
    assert parts_of(batch)[0] is batch
    assert len(parts_of(batch)) == 1


@pytest.mark.parametrize("objective", [ToLogits(2.0), ToOutputs(), ToOutputs(0.7)], ids=str)
def test_losses_of_parts_add_up(objective: Objective) -> None:
    assert objective.adds_up
    batch = padded(70, 3, 64, 2, 5)
    parted: list[Any] = parts_of(batch)
    assert len(parted) > 1
    table = torch.randn(2, VOCABULARY, 6, dtype=torch.float64)

    def loss(call: Any) -> Any:
        own, wanted = (one[call["input_ids"]] for one in table)
        return objective.loss(own, objective.targets(wanted, call), call, call)

    whole, added = loss(batch), functools.reduce(operator.add, map(loss, parted))
    torch.testing.assert_close(added.mean, whole.mean)
    assert added.count == whole.count == 144


def test_what_mixes_in_the_data_does_not_add_up() -> None:
    assert not ToLogits(1.0, 0.5).adds_up


def test_refining_in_parts_is_refining_the_whole() -> None:
    model, gm = subject()
    batches = [padded(12, 3, 5, 4, seed=seed) for seed in range(4)]
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(0))
    found = []
    for how in (parts_of, lambda batch: [batch]):
        seen.clear()
        with (
            mock.patch.object(parts, "_PASS", 4),
            mock.patch.object(measure, "parts_of", how),
            mock.patch.object(steps, "parts_of", how),
        ):
            found.append((refined(gm, model, batches, steps=3), len(seen)))
    (one, in_parts), (other, whole) = found
    assert (in_parts, whole) == (8, 4)
    done, expected = one.fxshare.refined[-1], other.fxshare.refined[-1]
    assert done.tokens == expected.tokens == 3 * 24
    assert done.after.objective == pytest.approx(expected.after.objective, rel=1e-4)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-3, atol=1e-4)
