from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxshare.embedded.bpe import SEPARATOR, Tokenizer
from fxshare.embedded.evaluate import bits_per_byte, generate, predicted_bytes
from fxshare.embedded.model import GPT
from fxshare.errors import DataError

V = 300


def uniform(idx: Tensor) -> Tensor:
    return torch.zeros(*idx.shape, V)


def successor(idx: Tensor) -> Tensor:
    """Sure that the next id is one more."""
    return 100 * torch.nn.functional.one_hot((idx + 1) % V, V).float()


def test_a_uniform_model_needs_log2_v() -> None:
    windows = torch.randint(256, (37, 20))
    n_bytes = predicted_bytes(windows, Tokenizer([]).token_bytes)
    assert n_bytes == 37 * 19
    # float32 log-softmax: relative error of a few eps = 1.2e-7.
    assert bits_per_byte(uniform, windows, n_bytes) == pytest.approx(math.log2(V), rel=1e-6)


def test_a_sure_model_needs_nothing() -> None:
    windows = torch.arange(40).view(2, 20)
    assert bits_per_byte(successor, windows, 38) == pytest.approx(0, abs=1e-6)
    # The same model is wrong about every token of the reversed text.
    assert bits_per_byte(successor, windows.flip(1), 38) == pytest.approx(100 / math.log(2))


def test_the_batch_size_does_not_matter(tiny: GPT) -> None:
    windows = torch.randint(V, (5, 32))
    values = [bits_per_byte(tiny, windows, 100, batch_size=b) for b in (1, 2, 5)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_predicted_bytes() -> None:
    tokenizer = Tokenizer([(97, 98), (257, 99)])  # ab, abc
    windows = torch.tensor([[258, 257, SEPARATOR], [97, 98, 258]])
    assert predicted_bytes(windows, tokenizer.token_bytes) == 2 + 0 + 1 + 3


@pytest.mark.parametrize(("shape", "n_bytes"), [((0, 8), 5), ((3, 1), 5), ((3, 8), 0)])
def test_nothing_to_measure_is_refused(shape: tuple[int, int], n_bytes: int) -> None:
    with pytest.raises(DataError, match="bits_per_byte"):
        bits_per_byte(uniform, torch.zeros(shape, dtype=torch.int64), n_bytes)


def test_greedy_generation() -> None:
    assert generate(successor, [5], n=4, temperature=0) == [5, 6, 7, 8, 9]


def test_generation_is_seeded_and_leaves_the_global_state(tiny: GPT) -> None:
    state = torch.get_rng_state()
    first = generate(tiny, [1, 2], n=8, seed=3, block_size=32)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == generate(tiny, [1, 2], n=8, seed=3, block_size=32)
    assert first != generate(tiny, [1, 2], n=8, seed=4, block_size=32)
    assert len(first) == 10


def test_generation_reads_only_the_last_block() -> None:
    seen: list[int] = []

    def model(idx: Tensor) -> Tensor:
        seen.append(idx.size(1))
        return successor(idx)

    generate(model, list(range(6)), n=4, temperature=0, block_size=8)
    assert seen == [6, 7, 8, 8]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="start from the separator"):
        generate(uniform, [], n=1)
