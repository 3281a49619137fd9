"""ObserveInputs: one observer per distinct input, what it is given, and who saw what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from passes import ObserveInputs, RequiresError, equal_outputs, linear_calls, observed, run
from tests.passes.build import Three, captured, inputs, x_of
from tests.toys import IN_PLACE, LLAMA_LIKE, TIED_MLP


class Seen(nn.Module):
    """Keeps what it was given."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.calls: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        assert x.shape[-1] == self.features
        self.calls.append((x.clone(), mask))


def observing(
    gm: fx.GraphModule, *names: str, mask: str | None = None
) -> tuple[fx.GraphModule, int]:
    wanted = names or tuple(call.name for call in linear_calls(gm))
    result, (applied,) = run(gm, [ObserveInputs(sites=wanted, new_observer=Seen, mask=mask)])
    return result, applied.rewrites


def test_readers_of_one_activation_share_an_observer() -> None:
    gm = captured(LLAMA_LIKE)
    result, rewrites = observing(gm)
    # per layer: (q k v), o, (gate up), down; and the head
    assert rewrites == 3 * 4 + 1
    seen = observed(result)
    assert seen["layers.1.q_proj"] == seen["layers.1.k_proj"] == seen["layers.1.v_proj"]
    assert seen["layers.1.q_proj"] != seen["layers.2.q_proj"]
    assert seen["layers.1.gate_proj"] == seen["layers.1.up_proj"] != seen["layers.1.o_proj"]
    assert observed(gm) == {}


def test_the_observer_sees_the_input_and_the_result_is_the_same() -> None:
    gm = fx.symbolic_trace(Three())
    result, rewrites = observing(gm, "attn.q", "attn.v")
    assert rewrites == 1
    assert observed(result) == {"attn.q": ("observer_0",), "attn.v": ("observer_0",)}
    x = x_of(6)
    assert equal_outputs(gm, result, [x], tolerance=0.0)
    ((value, mask),) = result.observer_0.calls
    assert torch.equal(value, x)
    assert mask is None


def test_a_module_called_twice_has_two_observers() -> None:
    result, _ = observing(captured(TIED_MLP), "twice")
    assert observed(result) == {"twice": ("observer_0", "observer_1")}
    (x,) = inputs(TIED_MLP)
    result(x)
    first, second = (result.get_submodule(name).calls[0][0] for name in observed(result)["twice"])
    assert torch.equal(first, x)
    assert torch.equal(second, result.twice(x))


def test_an_input_that_is_written_is_seen_at_every_read() -> None:
    result, rewrites = observing(captured(IN_PLACE))
    assert rewrites == 4
    result(*inputs(IN_PLACE))
    values = [result.get_submodule(f"observer_{i}").calls[0][0] for i in range(4)]
    assert torch.equal(values[1], values[0] + 1)
    assert torch.equal(values[2], values[1] * 0.5)
    assert torch.equal(values[3], values[2].relu())


def test_the_mask_is_the_second_argument() -> None:
    class Masked(Three):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.attn.q(x) * attention_mask[..., None]

    gm = fx.symbolic_trace(Masked())
    result, _ = observing(gm, mask="attention_mask")
    x, mask = x_of(6), torch.ones(2, 3)
    result(x, mask)
    assert result.observer_0.calls[0][1] is mask


def test_a_mask_that_is_not_there() -> None:
    with pytest.raises(RequiresError, match="has no node 'attention_mask' to mask with"):
        observing(fx.symbolic_trace(Three()), mask="attention_mask")


def test_names_of_the_model_are_not_taken_over() -> None:
    class Named(Three):
        def __init__(self) -> None:
            super().__init__()
            self.observer_0 = nn.Linear(6, 6).double()

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return super().forward(self.observer_0(x))

    gm = fx.symbolic_trace(Named())
    result, rewrites = observing(gm)
    assert rewrites == 2
    assert isinstance(result.observer_0, nn.Linear)
    assert len(set(observed(result).values())) == 2
    twice, _ = observing(result)
    assert sum(isinstance(m, Seen) for m in twice.children()) == 4
    twice(x_of(6))
    assert all(len(m.calls) == 1 for m in twice.children() if isinstance(m, Seen))


def test_no_sites_no_observers() -> None:
    gm = fx.symbolic_trace(Three())
    result, rewrites = observing(gm, "not.there")
    assert rewrites == 0
    assert str(result.graph) == str(gm.graph)
