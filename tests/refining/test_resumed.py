"""Work folders: what was ended goes on, bit for bit, whenever it was ended."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import fxshare
from fxshare.errors import FxShareWarning, StoreError
from fxshare.refining.steps import Stepper
from tests import stops
from tests.refining.build import equal, everything, features, ids, refined, subject, usual

FORKS = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.version.cuda is not None,
    reason="forks, which the backward pass of a build with CUDA does not survive",
)


def same(one: Any, other: Any) -> bool:
    """The tensors bit for bit, and the record but for its seconds."""
    left, right = (replace(m.fxshare.refined[-1], seconds=0.0, curve=()) for m in (one, other))
    curves = [[(p.step, p.loss) for p in m.fxshare.refined[-1].curve] for m in (one, other)]
    return equal(everything(one), everything(other)) and left == right and curves[0] == curves[1]


class EndedError(Exception):
    """What ends a run in these tests."""


def ended_at(step: int) -> Any:
    """A patch that ends the run before that step."""
    plain = Stepper.__call__

    def call(self: Any, optimiser: Any, number: int, rate: float) -> Any:
        if number == step:
            raise EndedError
        return plain(self, optimiser, number, rate)

    return mock.patch.object(Stepper, "__call__", call)


@pytest.mark.parametrize("how", [pytest.param("shared", marks=pytest.mark.slow), "planned"])
def test_resumed_is_uninterrupted_bit_for_bit(how: Any, tmp_path: Path) -> None:
    model, gm = subject("llama", how)
    options = {"steps": 16, "also": ("norms",), "accumulate": 2, "second": ids(1, seed=8)}
    whole = refined(gm, model, **options)
    for step in (0, 9, 15):
        work = tmp_path / str(step)
        for _ in range(1 + (step == 9)):  # it may end twice at one place
            with ended_at(step), pytest.raises(EndedError):
                refined(gm, model, work=work, **options)
        assert same(refined(gm, model, work=work, **options), whole), step
        again = refined(gm, model, work=work, **options)
        assert same(again, whole)  # nothing is left to do
        assert again.fxshare.refined[-1].seconds >= whole.fxshare.refined[-1].seconds / 100


def test_resumed_in_half_precision_and_after_a_range_test(tmp_path: Path) -> None:
    model, gm = subject("branches", "shared", dtype=torch.bfloat16)
    data = [x.bfloat16() for x in features()]
    options = {"batches": data, "steps": 200, "learning_rate": None}
    with ended_at(90), pytest.raises(EndedError):
        refined(gm, model, work=tmp_path / "w", **options)
    assert same(refined(gm, model, work=tmp_path / "w", **options), refined(gm, model, **options))


def large_loss(output: Any, batch: Any) -> Any:
    """What overflows in float16 until what it is multiplied by was halved a few times."""
    return 300.0 * output[0].float().pow(2).sum()


def test_resumed_in_float16_after_an_overflow(tmp_path: Path) -> None:
    model, gm = subject("branches", "shared", dtype=torch.float16)
    data = [x.half() for x in features()]
    options = {"batches": data, "steps": 16, "loss": large_loss}
    whole = refined(gm, model, **options)
    assert whole.fxshare.refined[-1].tokens < 16 * data[0][..., 0].numel()  # steps that overflowed
    with ended_at(9), pytest.raises(EndedError):
        refined(gm, model, work=tmp_path / "w", **options)
    assert same(refined(gm, model, work=tmp_path / "w", **options), whole)


@FORKS
def test_killed_before_any_operation_on_files(tmp_path: Path) -> None:
    model, gm = usual()
    options = {"steps": 4, "heldout": ids(1, seed=5)}
    whole = refined(gm, model, **options)
    folder, kept = tmp_path / "at", tmp_path / "kept"
    folder.mkdir()
    kept.mkdir()
    ended = stops.everywhere(lambda: refined(gm, model, work=folder / "w", **options), folder, kept)
    assert (ended.code, ended.error) == (0, "")
    left = sorted(kept.iterdir())
    assert len(left) > 10
    for each in left:
        result = refined(gm, model, work=each / "w", **options)
        assert same(result, whole), each.name
        names = {path.name for path in (each / "w").iterdir()}
        assert names == {"refine.json", "lock", "checkpoint"}, each.name


@FORKS
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_killed_at_random_moments(how: signal.Signals, tmp_path: Path) -> None:
    model, gm = usual()
    options = {"steps": 60}
    start = time.monotonic()
    whole = refined(gm, model, **options)
    took = time.monotonic() - start
    generator = random.Random(int(how))
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                refined(gm, model, work=tmp_path / "w", **options)
            finally:
                os._exit(0)
        time.sleep(took * generator.random())
        os.kill(pid, how)
        os.waitpid(pid, 0)
    assert same(refined(gm, model, work=tmp_path / "w", **options), whole)


def test_one_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    model, gm = usual()
    options = {"steps": 16}
    with mock.patch.object(EndedError, "__init__", side_effect=KeyboardInterrupt), ended_at(9):
        first = refined(gm, model, work=tmp_path / "w", **options)
    assert first.fxshare.refined[-1].stopped == "interrupted"
    assert same(refined(gm, model, work=tmp_path / "w", **options), refined(gm, model, **options))


def test_a_checkpoint_that_is_damaged_counts_as_none(tmp_path: Path) -> None:
    model, gm = usual()
    whole = refined(gm, model, work=tmp_path / "w")
    file = tmp_path / "w" / "checkpoint"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert same(refined(gm, model, work=tmp_path / "w"), whole)


def other_loss(output: Any, batch: Any) -> Any:
    return output.logits.pow(2).sum()


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    model, gm = usual()
    work = tmp_path / "w"
    refined(gm, model, work=work, second=ids(1))
    for options, reason in (
        ({"steps": 13}, "other options"),
        ({"seed": 1}, "other data"),
        ({"second": None}, "another second corpus"),
        ({"heldout": ids(1)}, "other data"),
        ({"batches": ids(7, seed=3)}, "other data"),
        ({"loss": other_loss}, "another loss"),
        ({"teacher": None}, "another teacher"),
    ):
        given = {"second": ids(1), **options}
        with pytest.raises(StoreError, match=f"was made with {reason}.*give another folder"):
            refined(gm, model, work=work, **given)
    nearer = refined(gm, model)
    with pytest.raises(StoreError, match="another compiled model, or other weights"):
        refined(nearer, model, work=work, second=ids(1))


def test_a_folder_that_is_none_or_cannot_be_written(tmp_path: Path) -> None:
    model, gm = usual()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="expected a folder, found a file"):
        refined(gm, model, work=tmp_path / "file")
    with pytest.raises(StoreError, match=r"cannot make .*file/w"):
        refined(gm, model, work=tmp_path / "file" / "w")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(StoreError, match=r"has files and no refine\.json"):
        refined(gm, model, work=tmp_path / "full")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "refine.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        refined(gm, model, work=tmp_path / "bad")


def test_a_read_only_folder(tmp_path: Path) -> None:
    model, gm = usual()
    tmp_path.chmod(0o555)
    try:
        if os.access(tmp_path, os.W_OK):  # root writes everywhere; the lock is what is opened first
            refusal = mock.patch.object(
                Path, "open", side_effect=PermissionError(13, "Permission denied")
            )
        else:
            refusal = mock.patch.object(Path, "__class_getitem__", create=True)
        with refusal, pytest.raises(StoreError, match=r"Permission denied|cannot make"):
            refined(gm, model, work=tmp_path / "w")
    finally:
        tmp_path.chmod(0o755)


def test_a_disk_that_fills_up_ends_no_training(tmp_path: Path) -> None:
    model, gm = usual()
    whole = refined(gm, model)
    full = mock.patch(
        "fxshare.base.cache.write_bytes", side_effect=StoreError("cannot write: No space left")
    )
    with full, pytest.warns(FxShareWarning, match="nothing is kept for the next time"):
        result = refined(gm, model, work=tmp_path / "w")
    assert same(result, whole)


def test_a_folder_is_one_process_at_a_time(tmp_path: Path) -> None:
    from fxshare.base.lock import only_here

    model, gm = usual()
    refined(gm, model, work=tmp_path / "w")
    shutil.copytree(tmp_path / "w", tmp_path / "copy")
    with only_here(tmp_path / "w"), pytest.raises(StoreError, match="in use by process"):
        refined(gm, model, work=tmp_path / "w")
    assert fxshare.verify(model, refined(gm, model, work=tmp_path / "copy")).ok
