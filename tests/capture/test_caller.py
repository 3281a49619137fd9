"""A batch becomes a call in one way, whoever runs it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxshare.capture import Caller, capture
from fxshare.errors import CalibrationError

IDS = torch.arange(6).view(2, 3)


class Labelled(nn.Module):
    """Takes what a model of transformers takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        y = self.head(self.embed(input_ids))
        return y if labels is None else nn.functional.cross_entropy(y.mT, labels)


def test_labels_are_left_out_and_the_rest_is_filled_in() -> None:
    call = Caller(Labelled())({"labels": IDS, "input_ids": IDS})
    assert list(call) == ["input_ids", "attention_mask", "use_cache"]
    assert torch.equal(call["attention_mask"], torch.ones_like(IDS))
    assert call["use_cache"] is False


def test_labels_stay_where_they_are_named() -> None:
    call = Caller(Labelled(), keep=("labels",))((IDS, None, IDS))
    assert call["labels"] is IDS


def test_a_capture_keeps_what_its_example_had() -> None:
    batch = {"input_ids": IDS, "labels": IDS}
    model = Labelled()
    with_loss = capture(model, batch, mode="fx")
    assert "labels" in with_loss.caller(batch)
    assert "labels" not in capture(model, IDS, mode="fx").caller(batch)
    assert "labels" not in capture(model, IDS, mode="modules").caller(batch)


def test_what_is_filled_in_goes_to_the_device_too() -> None:
    caller = Caller(Labelled().to("meta"))
    assert {v.device.type for v in caller(IDS).values() if isinstance(v, Tensor)} == {"meta"}
    here = caller.where_it_is(IDS)
    assert {v.device.type for v in here.values() if isinstance(v, Tensor)} == {"cpu"}


def test_an_entry_that_forward_does_not_take_is_named() -> None:
    with pytest.raises(CalibrationError, match="has the entry 'pixels'"):
        Caller(Labelled())({"pixels": IDS})
