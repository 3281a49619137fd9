"""Perplexity under both protocols, against hand-computed values."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxshare.bench.perplexity import PROTOCOLS, evaluate
from fxshare.errors import CheckFailed, DataError

V = 7


class Table(nn.Module):
    """A bigram model: logits of the next token are a row of a table."""

    def __init__(self, logits_VV: Tensor, wrap: str = "tensor") -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(logits_VV)
        self.dropout = nn.Dropout(0.5)
        self.wrap = wrap

    def forward(self, ids: Tensor) -> Any:
        logits = self.dropout(self.table(ids))
        return {
            "tensor": logits,
            "tuple": (logits, None),
            "object": SimpleNamespace(logits=logits),
            "mapping": {"logits": logits},
            "hidden": SimpleNamespace(last_hidden_state=logits),
            "flat": logits.flatten(),
        }[self.wrap]


def random_table(seed: int = 0) -> Tensor:
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed))


def random_ids(count: int, seed: int = 1) -> Tensor:
    return torch.randint(V, (count,), generator=torch.Generator().manual_seed(seed))


def reference(table: Tensor, window: list[int]) -> list[float]:
    """Negative log-likelihood of every token of a window but its first."""
    rows = torch.log_softmax(table.double(), dim=-1)
    return [-float(rows[a, b]) for a, b in pairwise(window)]


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(protocol: Any) -> None:
    found = evaluate(Table(torch.zeros(V, V)), random_ids(23), protocol=protocol, length=5)
    assert found.nll == pytest.approx(math.log(V), abs=1e-6)
    assert found.perplexity == pytest.approx(V, rel=1e-6)
    assert found.bits_per_byte is None
    assert (found.protocol, found.description) == (protocol, PROTOCOLS[protocol])


def test_a_hand_computed_case() -> None:
    # P(1 | 0) = 3/4, P(0 | 1) = 1/2 over two ids
    table = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    found = evaluate(Table(table), torch.tensor([0, 1, 0, 0]), length=4)
    expected = -(math.log(3 / 4) + math.log(1 / 2) + math.log(1 / 4)) / 3
    assert found.nll == pytest.approx(expected, abs=1e-6)
    assert found.tokens == 3


def test_protocol_a_drops_the_remainder_and_b_averages_over_windows_with_it() -> None:
    table, ids = random_table(), random_ids(13)
    windows = [ids[at : at + 5].tolist() for at in (0, 5, 10)]
    losses = [reference(table, window) for window in windows]
    a = evaluate(Table(table), ids, protocol="A", length=5)
    b = evaluate(Table(table), ids, protocol="B", length=5)
    assert a.nll == pytest.approx(sum(losses[0] + losses[1]) / 8, abs=1e-6)
    assert b.nll == pytest.approx(sum(sum(x) / len(x) for x in losses) / 3, abs=1e-6)
    assert (a.tokens, a.windows, b.tokens, b.windows) == (8, 2, 10, 3)
    assert abs(a.nll - b.nll) > 1e-3


def test_protocols_agree_where_the_windows_fit() -> None:
    a, b = (evaluate(Table(random_table()), random_ids(20), protocol=p, length=5) for p in "AB")
    assert a.nll == pytest.approx(b.nll, abs=1e-12)


def test_a_last_window_of_one_token_predicts_nothing() -> None:
    a, b = (evaluate(Table(random_table()), random_ids(11), protocol=p, length=5) for p in "AB")
    assert a.tokens == b.tokens == 8


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    model, ids = Table(random_table()), random_ids(40)
    one = evaluate(model, ids, protocol="B", length=6, batch_size=1)
    assert evaluate(model, ids, protocol="B", length=6, batch_size=batch_size).nll == pytest.approx(
        one.nll, abs=1e-12
    )


@pytest.mark.parametrize("wrap", ["tensor", "tuple", "object", "mapping"])
def test_every_form_of_output(wrap: str) -> None:
    found = evaluate(Table(random_table(), wrap), random_ids(20), length=5)
    assert found.nll == evaluate(Table(random_table()), random_ids(20), length=5).nll


@pytest.mark.parametrize("wrap", ["hidden", "flat"])
def test_a_model_without_logits_is_refused(wrap: str) -> None:
    with pytest.raises(DataError, match="only a language model"):
        evaluate(Table(random_table(), wrap), random_ids(20), length=5)


def test_windows_are_taken_as_they_are() -> None:
    ids = random_ids(20)
    whole = evaluate(Table(random_table()), ids, length=5)
    assert evaluate(Table(random_table()), ids.view(4, 5)).nll == whole.nll


def test_bits_per_byte_from_an_average_and_from_the_size_of_each_id() -> None:
    table, ids = random_table(), random_ids(20)
    windows = ids.view(4, 5)
    nats = sum(sum(reference(table, w.tolist())) for w in windows)
    sizes = torch.tensor([1, 2, 3, 4, 5, 6, 0])
    by_id = evaluate(Table(table), ids, length=5, bytes_per_token=sizes)
    expected = nats / math.log(2) / int(sizes[windows[:, 1:]].sum())
    assert by_id.bits_per_byte == pytest.approx(expected, rel=1e-6)
    average = evaluate(Table(table), ids, length=5, bytes_per_token=2.5)
    assert average.bits_per_byte == pytest.approx(nats / math.log(2) / (16 * 2.5), rel=1e-6)


def test_the_mode_of_every_module_is_restored() -> None:
    model = Table(random_table()).train()
    model.table.eval()
    first = evaluate(model, random_ids(20), length=5).nll
    assert first == evaluate(model, random_ids(20), length=5).nll, "dropout was not switched off"
    assert model.training
    assert model.dropout.training
    assert not model.table.training


def test_a_loss_that_is_not_finite_names_the_window() -> None:
    table = random_table()
    table[3] = float("nan")
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, 1])
    with pytest.raises(CheckFailed, match="not finite in window 2"):
        evaluate(Table(table), ids, length=3, batch_size=2)


def test_a_huge_loss_gives_an_infinite_perplexity() -> None:
    table = torch.zeros(2, 2)
    table[0, 1] = 5000.0
    found = evaluate(Table(table), torch.tensor([0, 0, 0]), length=3)
    assert found.nll == pytest.approx(5000)
    assert found.perplexity == math.inf


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.tensor([0, 1, V]), {"length": 3}, f"0 to {V - 1}, found {V} at position 2"),
        (torch.tensor([0, -1, 2]), {"length": 3}, "found -1 at position 1"),
        (torch.tensor([0, 1]), {"length": 3}, "at least 3, one window, found 2"),
        (torch.tensor([0, 1, 2]), {}, "needs a window length"),
        (torch.tensor([[0, 1, 2]]), {"length": 2}, "together with length 2"),
        (torch.tensor([[0], [1]]), {}, "window of two tokens"),
        (torch.tensor(3), {"length": 2}, r"\(T,\) or \(N, L\)"),
        (torch.tensor([0, 1, 2]), {"length": 3, "protocol": "C"}, "one of A, B, found 'C'"),
        (torch.tensor([0, 1, 2]), {"length": 3, "batch_size": 0}, "at least 1, found 0"),
    ],
)
def test_what_cannot_be_evaluated(tokens: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(Table(random_table()), tokens, **options)


def test_the_text_names_the_protocol() -> None:
    text = str(evaluate(Table(random_table()), random_ids(20), length=5, bytes_per_token=1.0))
    assert "protocol A, GPTQ" in text
    assert "bits per byte" in text
