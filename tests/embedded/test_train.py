from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from fxshare.embedded.corpus import WINDOW
from fxshare.embedded.train import Options, batches, learning_rate


def test_learning_rate_warms_up_and_decays_to_its_floor() -> None:
    options = Options(peak_lr=1.0, warmup_steps=10, final_lr_fraction=0.1)
    assert learning_rate(0, 0.0, options) == pytest.approx(0.1)
    assert learning_rate(9, 0.0, options) == pytest.approx(1.0)
    assert learning_rate(10, 0.5, options) == pytest.approx(0.55)
    assert learning_rate(10, 1.0, options) == pytest.approx(0.1)
    assert learning_rate(10, 1.5, options) == pytest.approx(0.1)


def test_an_epoch_visits_every_window_once() -> None:
    ids = torch.arange(WINDOW * 41 + 7)
    epoch = list(itertools.islice(batches(ids, batch_size=4, seed=0), 9))
    starts = torch.cat(epoch)[:, 0]
    assert len(set(starts.tolist())) == 36
    assert len(set((starts % WINDOW).tolist())) == 1
    for batch in epoch:
        assert batch.shape == (4, WINDOW + 1)
        assert torch.equal(batch - batch[:, :1], torch.arange(WINDOW + 1).expand(4, -1))


def test_resuming_gives_the_same_batches() -> None:
    ids = torch.arange(WINDOW * 41 + 7)
    whole = list(itertools.islice(batches(ids, batch_size=4, seed=1), 25))
    for start in (0, 5, 9, 20):
        rest = list(itertools.islice(batches(ids, batch_size=4, seed=1, start=start), 25 - start))
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))
    other = next(batches(ids, batch_size=4, seed=2))
    assert not torch.equal(whole[0], other)


def test_importing_the_demo_does_not_build_a_model() -> None:
    code = "import sys, fxshare.embedded; assert 'fxshare.embedded.model' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
