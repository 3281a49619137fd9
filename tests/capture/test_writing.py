"""Item assignment and operations in place: the same numbers, gradients and order of writes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.capture import Captured, capture
from fxshare.errors import CaptureError
from passes import CleanUp, run
from passes.graph.writes import AUGMENTED
from tests.toys import WIDTH

Body = Callable[[Any, Tensor], Any]


class Writes(nn.Module):
    """Two linears and a body that writes."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.body = body

    def a(self, x: Tensor) -> Any:
        return self.layers[0](x)

    def b(self, x: Tensor) -> Any:
        return self.layers[1](x)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def views(m: Any, x: Tensor) -> Any:
    y = m.a(x).clone()
    inner = y[:, 1:][..., 4:8]
    inner[:] = x[:, 1:, :4]
    inner += 1
    return m.b(y), inner.sum()


def augmented_items(m: Any, x: Tensor) -> Any:
    y = m.a(x) * 1
    y[..., ::2] += x[..., ::2]
    y[:, 0] *= 2
    return m.b(y)


def masked(m: Any, x: Tensor) -> Any:
    y = m.a(x).clone()
    y[y < 0] = 0.5
    y[..., torch.arange(WIDTH) % 3 == 0] = 1.0
    return m.b(y)


def masked_sums(m: Any, x: Tensor) -> Any:
    y = m.a(x).clone()
    y[x > 1] *= 2
    rows = x[..., 0] > 0
    y[rows] = m.b(y[rows]) + y[rows]
    return m.b(y)


def index_tensors(m: Any, x: Tensor) -> Any:
    y = m.a(x).clone()
    y[:, :, torch.tensor([0, 3, 5])] = x[:, :, :3]
    y[:, None, 0, [1, 2]] = 3.0
    y[-1] = x[0]
    return m.b(y)


def swapped(m: Any, x: Tensor) -> Any:
    y = m.a(x).clone()
    first = y[:, 0].clone()
    y[:, 0] = y[:, 1]
    y[:, 1] = first
    return m.b(y)


def shared_sum(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    residual = h
    h += m.b(x)
    return h * residual


def transposed(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    turned = h.transpose(1, 2)
    turned -= 1
    return m.b(h)


def after_a_method(m: Any, x: Tensor) -> Any:
    z = m.a(x) * 1
    w = z.add_(1)
    w += 2
    return m.b(z)


def of_numbers(m: Any, x: Tensor) -> Any:
    p = torch.zeros(WIDTH)
    early = p[:4]
    p[2] = x.sum()
    p += x.mean((0, 1))
    return m.b(x) + p + early.sum()


def step_by_step(m: Any, x: Tensor) -> Any:
    out = torch.zeros(x.shape)
    for step in range(4):
        out[:, step] = m.a(x[:, step]) + (out[:, step - 1] if step else 0)
    return m.b(out)


def narrower(m: Any, x: Tensor) -> Any:
    h = m.a(x).half()
    h += x  # stays half, h + x would not
    return m.b(h.float())


BODIES: tuple[Body, ...] = (
    views,
    augmented_items,
    masked,
    masked_sums,
    index_tensors,
    swapped,
    shared_sum,
    transposed,
    after_a_method,
    of_numbers,
    step_by_step,
    narrower,
)


def inputs(batch: int = 3, length: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=generator, requires_grad=True)


def by_fx(body: Body) -> tuple[Writes, Captured]:
    model = Writes(body).eval()
    return model, capture(model, inputs().detach(), mode="fx")


def gradients(model: nn.Module, of: nn.Module, x: Tensor) -> tuple[Any, list[Tensor]]:
    """The output of a graph that has the model's parameters, and gradients of a weighted sum."""
    output = of(x)
    leaves = output if isinstance(output, tuple) else (output,)
    weighted = [(y * torch.linspace(0, 1, y.numel()).view(y.shape)).sum() for y in leaves]
    read = [*model.parameters(), x]
    found = torch.autograd.grad(sum(weighted, torch.zeros(())), read, allow_unused=True)
    return output, [torch.zeros(()) if g is None else g for g in found]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_writes_are_recorded_in_order_with_their_gradients(body: Body) -> None:
    model, captured = by_fx(body)
    limit = tolerance(torch.float32, 4)
    for batch, length in ((3, 6), (2, 9)):
        x = inputs(batch, length, 1)
        expected, wanted = gradients(model, model, x)
        for _ in range(2):  # nothing is kept from one call to the next
            found, given = gradients(model, captured.graph, x)
            assert worst(expected, found).relative <= limit
            for a, b in zip(wanted, given, strict=True):
                assert worst(a, b).relative <= limit
    # it can fail: without its writes the graph is another function
    for node in list(captured.graph.graph.nodes):
        if node.target is operator.setitem:
            captured.graph.graph.erase_node(node)
        elif node.target in AUGMENTED:
            node.target = AUGMENTED[node.target]
    captured.graph.recompile()
    assert worst(model(x), captured.graph(x)).relative > limit


def test_a_sum_that_nothing_else_sees_is_no_write() -> None:
    def body(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        h += m.b(x)
        h *= 2
        return h

    _, captured = by_fx(body)
    targets = [n.target for n in captured.graph.graph.nodes]
    assert operator.add in targets
    assert operator.mul in targets
    _, shared = by_fx(shared_sum)
    assert operator.iadd in [n.target for n in shared.graph.graph.nodes]


def test_dead_code_elimination_keeps_what_is_written() -> None:
    model, captured = by_fx(views)
    cleaned, _ = run(captured.graph, [CleanUp()])
    x = inputs()
    assert worst(model(x), cleaned(x)).relative <= tolerance(torch.float32, 2)
    assert any(n.target is operator.setitem for n in cleaned.graph.nodes)


def test_a_buffer_that_is_written_into_is_kept_from_call_to_call() -> None:
    def body(m: Any, x: Tensor) -> Any:
        m.seen[:4] = m.seen[:4] + x[0, 0, :4]
        return m.b(x) + m.seen

    model, captured = by_fx(body)
    with torch.no_grad():
        for seed in range(3):
            x = inputs(seed=seed)
            assert torch.equal(model(x), captured.graph(x))


def test_a_tensor_that_the_model_keeps_aside_is_not_written_into() -> None:
    def body(m: Any, x: Tensor) -> Any:
        m.aside[0] = x.sum()
        return m.b(x) + m.aside

    model = Writes(body).eval()
    model.aside = torch.zeros(WIDTH)
    with pytest.raises(CaptureError, match=r"neither a buffer nor made by the call.*register_buff"):
        capture(model, inputs().detach(), mode="fx")


def test_a_buffer_that_forward_replaces_is_refused_and_one_that_it_moves_is_not() -> None:
    def replaces(m: Any, x: Tensor) -> Any:
        m.seen = 0.9 * m.seen + x.mean((0, 1))
        return m.b(x) + m.seen

    def moves(m: Any, x: Tensor) -> Any:
        m.seen = m.seen.to(device=x.device, dtype=x.dtype)
        return m.b(x) + m.seen

    with pytest.raises(CaptureError, match=r"forward replaces seen, .*copy_"):
        by_fx(replaces)
    model, captured = by_fx(moves)
    assert torch.equal(model(inputs()), captured.graph(inputs()))


def test_writes_between_reads_survive_sharing_and_lowering() -> None:
    def body(m: Any, x: Tensor) -> Any:
        y = x.clone()
        q = m.a(y)
        y[:, 0] = 0
        k = m.b(y)
        return q + k, m.a(y)

    model, x = Writes(body).eval(), inputs().detach()
    cfg = {
        "weight_types": {"w": {"pattern": r"layers\.\d"}},
        "block_pattern": r"layers\.(\d)",
        "group_size": 2,
        "compression_rate": 0.4,
    }
    gm = fxshare.compile(model, cfg, calibration=[x], example=x)
    assert gm.fxshare.front_end == "fx"
    lowered = fxshare.lower(gm)
    with torch.no_grad():
        assert worst(gm(x), lowered(x)).relative <= tolerance(torch.float32, 8)
        assert fxshare.verify(model, gm, [x]).ok
