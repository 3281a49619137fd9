"""What torch says of fake tensors whose operations fail is kept off stderr, for one thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxshare
from fxshare.base.fakes import failures_unsaid

LOGGER = "torch._subclasses.fake_tensor"
CONFIG = {"weight_types": {"a": {"pattern": r"layers\.\d+$"}}}


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What torch's logger of fake tensors lets through."""
    lines = _Lines()
    log = logging.getLogger(LOGGER)
    log.addHandler(lines)
    yield lines.said
    log.removeHandler(lines)


def _fails() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError):
        torch.cat([torch.empty(2, 3), torch.empty(2, 4)], 0)


def test_in_this_thread_alone_and_not_afterwards(said: list[str]) -> None:
    log = logging.getLogger(LOGGER)
    before = (list(log.filters), log.disabled, log.level)
    with failures_unsaid():
        _fails()
        assert said == []
        other = threading.Thread(target=_fails)
        other.start()
        other.join()
        assert len(said) == 1
        log.error("something else")
    assert said[1:] == ["something else"]
    assert (log.filters, log.disabled, log.level) == before
    _fails()
    assert len(said) == 3


def _as_float32_alone(layer: nn.Module, y: Tensor) -> Tensor:
    return y if y.dtype is torch.float32 else torch.cat([y, y[:, :1, :1]], 0)


def _of_two_dtypes(layer: nn.Module, y: Tensor) -> Tensor:
    return torch.einsum("bti,ij->btj", y, torch.eye(8))


class Model(nn.Module):
    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.how(layer, layer(x))
        return x


@pytest.mark.parametrize("how", [_as_float32_alone, _of_two_dtypes])
def test_a_model_of_one_dtype_is_captured_without_a_traceback(
    how: Callable[[nn.Module, Tensor], Tensor], said: list[str]
) -> None:
    gm = fxshare.compile(Model(how).eval(), CONFIG, example=torch.randn(2, 3, 8), capture="fx")
    assert any("holds for torch.float32 alone" in note for note in gm.fxshare.report.notes)
    assert said == []
