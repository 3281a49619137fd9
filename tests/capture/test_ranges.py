"""Graphs that hold for some lengths only: said, probed and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.capture import capture
from fxshare.capture.call import Shapes
from fxshare.capture.check import Original
from fxshare.capture.ranges import export_notes
from fxshare.errors import CaptureError, GuardError
from tests.toys import WIDTH

CHUNK = 16


class Chunked(nn.Module):
    """Works in chunks of 16 positions, as Mamba-2 does; ``once``: one has its own way."""

    def __init__(self, *, once: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(WIDTH, WIDTH)
        self.once = once

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        padding = (CHUNK - length % CHUNK) % CHUNK
        if padding > 0:
            x = F.pad(x, (0, 0, 0, padding))
        if self.once and x.shape[1] <= CHUNK:
            return self.linear(x.cumsum(1))[:, :length] * 2
        chunks = self.linear(x).unflatten(1, (-1, CHUNK)).cumsum(2)
        return chunks.flatten(1, 2)[:, :length]


def inputs(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length))


def error(model: nn.Module, gm: nn.Module, length: int) -> float:
    with torch.no_grad():
        return worst(model(inputs(length)), gm(inputs(length))).relative


def test_an_export_of_one_chunk_says_so_and_refuses_others() -> None:
    model = Chunked(once=True).eval()
    cfg = {"weight_types": {"w": {"pattern": "linear"}}}
    gm = fxshare.compile(model, cfg, example=inputs(6), capture="export")
    notes = " ".join(gm.fxshare.report.notes)
    assert "holds for lengths 1 to 15 of those up to 4096, and refuses others" in notes
    for length in (1, 5, 15):
        assert error(model, gm, length) <= tolerance(torch.float32, 2)
    for length in (16, 17, 100):
        with pytest.raises(GuardError, match=r"torch.export made a graph that.*modules"):
            gm(inputs(length))


def test_a_traced_graph_refuses_the_other_way_and_takes_whole_chunks() -> None:
    captured = capture(Chunked(once=True).eval(), inputs(6), mode="fx")
    with pytest.raises(GuardError, match="test_ranges"):
        captured.graph(inputs(17))
    model = Chunked(once=False).eval()
    captured = capture(model, inputs(6), mode="fx")
    # whether there is padding at all makes no difference: a length that needs none was tried
    for length in (1, 16, 17, 64, 100):
        assert error(model, captured.graph, length) <= tolerance(torch.float32, 2)


def test_a_graph_is_captured_for_the_length_that_it_was_asked_for() -> None:
    # longer than what is traced and not a power of two
    model = Chunked(once=False).eval()
    captured = capture(model, inputs(3 * CHUNK), mode="fx")
    assert error(model, captured.graph, 3 * CHUNK) <= tolerance(torch.float32, 2)


def test_an_exported_graph_that_is_wrong_at_another_length_is_refused() -> None:
    class Cut(nn.Module):
        def forward(self, x: Any) -> Any:
            return x[:, :12].sum(1)

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1)

    shapes = Shapes.between({"x": inputs(6)}, {"x": inputs(5, 3)})
    run = Original(Whole())
    with pytest.raises(CaptureError, match="at length 64 the graph differs from the original"):
        export_notes(fx.symbolic_trace(Cut()), run, shapes, 1)
    assert export_notes(fx.symbolic_trace(Whole()), run, shapes, 1) == ()
