"""Statistics under a limit of memory: the same numbers, wherever they are kept."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare.base.memory import free, resident
from fxshare.calibration import room as rooms
from fxshare.calibration.activations import Activations, activation_bytes, at_most
from fxshare.calibration.blocks import blocks_of, bytes_needed, largest_block
from fxshare.calibration.calibrate import calibrate
from fxshare.calibration.keeping import Keeping, Scratch
from fxshare.calibration.room import Room, Space, divide, make_room
from fxshare.calibration.statistics import Statistics
from fxshare.calibration.stored import write_part
from fxshare.capture import Captured, capture
from fxshare.config import load_config
from fxshare.errors import CalibrationError, ConfigError, StoreError
from fxshare.sites.match import match
from fxshare.sites.site import Site
from fxshare.sites.tensors import dense_weights
from tests.planning.models import MANY, batches, llama
from tests.strategies import no_warnings_of_ours
from tests.toys import NANOGPT

EMBEDDED = {
    "weight_types": {
        "embed": {"pattern": r".*wte$", "embedding": True},
        "fc": {"pattern": r".*(fc|proj|attn)$"},
    }
}


def prepared(model: nn.Module, cfg: Any = MANY) -> tuple[Captured, tuple[Site, ...], list[Tensor]]:
    data = batches(4, rows=2, length=6)
    return _captured(model), match(model, load_config(cfg)).sites, data


@functools.cache
def _captured(model: nn.Module) -> Captured:
    return capture(model, batches(4, rows=2, length=6)[0])


@functools.cache
def usual() -> nn.Module:
    """Captured once for all tests that gather its statistics: not to be changed."""
    return llama(dtype=torch.float64)


def gathered(model: nn.Module, keeping: Keeping, cfg: Any = MANY, **keys: Any) -> Statistics:
    captured, sites, data = prepared(model, cfg)
    with no_warnings_of_ours():
        return calibrate(captured, data, sites, gradients=True, keeping=keeping, **keys)


def assert_equal(one: Statistics, other: Statistics) -> None:
    """Bit for bit."""
    assert list(one.inputs) == list(other.inputs)
    assert one.gradients.keys() == other.gradients.keys()
    assert (one.tokens, one.batches, one.loss) == (other.tokens, other.batches, other.loss)
    assert (one.mean_loss, one.starts_with) == (other.mean_loss, other.starts_with)
    assert one.notes == other.notes
    for site in one.inputs:
        assert one.key([site]) == other.key([site])
        assert one.tokens_of(site) == other.tokens_of(site)
        assert torch.equal(one.gram(site), other.gram(site)), site
        if site not in one.lookups:
            assert torch.equal(one.mean(site), other.mean(site)), site
        for name in (n for n in one.gradients if n.startswith(site)):
            assert torch.equal(one.moment(name, site), other.moment(name, site)), name
            assert one.trace(name, site) == other.trace(name, site), name
    assert one.bytes == other.bytes


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_blocks_and_files_change_nothing(blocks: int, on_disk: bool, tmp_path: Path) -> None:
    model = usual()
    whole = gathered(model, Keeping())
    captured, sites, _ = prepared(model)
    needed = bytes_needed(captured, sites, gradients=True)
    most = None if blocks == 1 else needed // 2
    made = blocks_of(captured, sites, gradients=True, most_bytes=most)
    assert len(made) == blocks
    assert sorted(s.name for b in made for s in b) == sorted(s.name for s in sites)
    folder = tmp_path / "kept" if on_disk else None
    assert_equal(whole, gathered(model, Keeping(most, folder)))
    assert len(list(tmp_path.glob("kept/part-*"))) == (blocks if on_disk else 0)


def test_what_is_looked_up_goes_with_the_first_block(tmp_path: Path) -> None:
    model = NANOGPT.model(dtype=torch.float64)
    captured, sites, _ = prepared(model, EMBEDDED)
    blocks = blocks_of(captured, sites, gradients=True, most_bytes=0)
    assert [s.name for s in blocks[0]] == ["transformer.wte"]
    assert len(blocks) > 2
    whole = gathered(model, Keeping(), EMBEDDED)
    assert whole.lookups
    assert_equal(whole, gathered(model, Keeping(0, tmp_path / "kept"), EMBEDDED))


def test_all_passes_see_the_same_tokens(tmp_path: Path) -> None:
    model = usual()
    limit = {"max_tokens": 20}
    whole = gathered(model, Keeping(), **limit)
    assert whole.batches == 2
    assert_equal(whole, gathered(model, Keeping(0, tmp_path / "kept"), **limit))
    # and of data that can be gone through only once
    captured, sites, data = prepared(model)
    with no_warnings_of_ours():
        once = calibrate(
            captured, iter(data), sites, gradients=True, keeping=Keeping(0), max_tokens=20
        )
    assert_equal(whole, once)


def test_what_is_written_is_not_gathered_again(tmp_path: Path) -> None:
    model = usual()
    keeping = Keeping(0, tmp_path / "kept")
    first = gathered(model, keeping)
    # of another seed every label and so every sum would be another
    assert_equal(first, gathered(llama(seed=1, dtype=torch.float64), keeping))


def test_a_run_goes_on_under_another_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = usual()
    whole = gathered(model, Keeping())

    def killed(folder: Path, part: Any) -> Any:
        if folder.name == "part-2":
            raise KeyboardInterrupt
        return write_part(folder, part)

    with monkeypatch.context() as patched:
        patched.setattr("fxshare.calibration.shards.write_part", killed)
        with pytest.raises(KeyboardInterrupt):
            gathered(model, Keeping(0, tmp_path / "kept"))
    assert_equal(whole, gathered(model, Keeping(None, tmp_path / "kept")))
    assert len(list(tmp_path.glob("kept/part-*"))) == 3


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What calibrating the usual model keeps in a folder."""
    folder = tmp_path_factory.mktemp("usual") / "kept"
    gathered(usual(), Keeping(None, folder))
    return folder


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "index", "elsewhere"])
def test_damaged_files_are_named(damage: str, kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "kept")
    keeping = Keeping(None, tmp_path / "kept")
    part = tmp_path / "kept" / "part-0"
    file = part / "0.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-8])
    elif damage == "gone":
        file.unlink()
    elif damage == "index":
        (part / "part.json").write_text("{")
    else:
        index = (part / "part.json").read_text()
        (part / "part.json").write_text(index.replace("0.safetensors", "../0.safetensors", 1))
    with pytest.raises(StoreError, match=str(part)):
        gathered(usual(), keeping)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxshare.calibration.stored.save_file", full)
    with pytest.raises(StoreError, match="No space left on device; nothing was written"):
        gathered(llama(), Keeping(None, tmp_path / "kept"))
    assert list(tmp_path.iterdir()) == []


def test_activations_in_a_file_change_nothing() -> None:
    model = usual()
    assert_equal(gathered(model, Keeping()), gathered(model, Keeping(offload=True)))


def test_every_saved_activation_passes_through_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxshare.calibration import offload

    monkeypatch.setattr(offload, "_SMALL", 1)
    model = usual()
    assert_equal(gathered(model, Keeping()), gathered(model, Keeping(offload=True)))


# How a limit is divided


def room(limit: int | None, **keys: Any) -> Room:
    model = llama()
    captured, sites, data = prepared(model)
    weights = dense_weights(model, sites)
    call = captured.caller(data[0])
    return make_room(captured, sites, weights, call, limit=limit, gradients=True, **keys)


def test_memory_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "resident", lambda: 10**9)
    found = room(8 * 10**9)
    assert found.keeping.folder is None
    assert found.keeping.most_bytes is None
    assert not found.keeping.offload
    assert "at most 8.00 GB, of which 1.00 GB are in use" in found.told()
    assert "in memory" in found.told()


def test_files_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "resident", lambda: 10**9)
    fits = room(13 * 10**8)  # no more than needed, so that activations are not guessed
    beside = 10**9 + fits.work + fits.activations + rooms._LEAST_KEPT
    # a round fits beside what is kept, two do not
    found = room(beside + fits.statistics, rounds=2)
    assert found.keeping.folder is not None
    assert found.keeping.folder.is_dir()
    assert found.keeping.most_bytes is None
    assert "in files" in found.told()
    folder = found.keeping.folder
    del found
    assert not folder.exists()


def space(**other: Any) -> Space:
    given: dict[str, Any] = {
        "resident": 2 << 30,
        "statistics": 3 << 30,
        "rounds": 2,
        "block": lambda: 1 << 28,
        "work": 2 << 30,
        "candidate": 2 << 30,
        "at_most": 4 << 30,
        "activations": lambda: Activations(1 << 30, 0),
        "offloads": True,
    }
    return Space(**(given | other))


def test_statistics_take_the_place_of_what_planning_holds_later() -> None:
    # 8.5 GiB: two for the model and two for a candidate, one for activations
    found = divide(space(), 17 << 29, asked=True)
    assert not found.fits
    assert not found.offload
    assert found.block == (7 << 29) - rooms._BESIDE_SUMS >= 3 << 30
    assert found.left == 3 << 29
    assert found.least <= found.limit


def test_what_planning_keeps_grows_with_the_statistics() -> None:
    few = divide(space(statistics=1 << 28), 32 << 30, asked=True)
    many, twice = (divide(space(statistics=n << 30), 32 << 30, asked=True) for n in (1, 2))
    assert few.kept == rooms._MOST_KEPT
    assert many.kept > 1 << 30
    assert twice.kept == 2 * many.kept


def test_activations_go_to_files_where_that_saves_a_pass() -> None:
    saves = divide(space(), 8 << 30, asked=True)
    assert saves.offload
    assert saves.block >= 3 << 30
    # the same number of passes either way
    not_so = divide(space(statistics=5 << 30), 8 << 30, asked=True)
    assert not not_so.offload
    assert not_so.block < 3 << 30
    assert not divide(space(offloads=False), 8 << 30, asked=True).offload
    # the logits stay in memory
    logits = space(activations=lambda: Activations(1 << 30, 1 << 28))
    assert divide(logits, 8 << 30, asked=True).activations == (1 << 28) + rooms._OFFLOADED
    most = space(activations=lambda: Activations(1 << 30, 3 << 28))
    assert not divide(most, 8 << 30, asked=True).offload


def test_a_limit_that_cannot_be_kept_names_one_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "resident", lambda: 10**9)
    with pytest.raises(
        CalibrationError, match=r"max_memory 1\.10 GB is too small: 1\.00 GB"
    ) as error:
        room(11 * 10**8)
    named = str(error.value).split("max_memory: ")[1].split("GB")[0]
    assert room(int(float(named) * 1e9)).limit <= float(named) * 1e9


def test_without_a_limit_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "resident", lambda: 2 * 10**9)
    monkeypatch.setattr(rooms, "free", lambda: 6 * 10**9)
    assert room(None).limit == 5 * 10**9
    monkeypatch.setattr(rooms, "free", lambda: 10**8)
    with pytest.raises(CalibrationError, match=r"2\.05 GB of memory is too small"):
        room(None)


def test_much_that_nobody_asked_to_have_in_memory_goes_to_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rooms, "_MOST_IN_MEMORY", 1000)
    assert room(None).keeping.folder is not None
    assert room(20 * 10**9).keeping.folder is None
    monkeypatch.setattr(rooms, "has_room", lambda needed: False)
    assert room(None).keeping.folder is None


def test_no_block_is_larger_than_what_reads_one_activation() -> None:
    captured, sites, _ = prepared(llama())
    one = max(
        bytes_needed(captured, block, gradients=True)
        for block in blocks_of(captured, sites, gradients=True, most_bytes=0)
    )
    assert largest_block(captured, sites, gradients=True) == one


def test_a_disk_that_is_too_small_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"set TMPDIR to a larger one, or raise max_memory"):
        Scratch(1 << 60)


def test_activations_are_bounded() -> None:
    captured, _, data = prepared(llama())
    call = captured.caller(data[0])
    forward = activation_bytes(captured, call, gradients=False)
    backward = activation_bytes(captured, call, gradients=True)
    assert 0 < forward.alive < backward.alive < 2 * at_most(captured, call)
    logits: Any = captured.run(call)
    assert forward.in_memory == 0
    assert 3 * logits.nbytes <= backward.in_memory < backward.alive


def test_memory_is_what_the_system_says() -> None:
    before = resident()
    held = torch.ones(50_000_000)
    assert resident() - before > 0.9 * held.numel() * 4
    assert free() > 0


@pytest.mark.parametrize("bad", ["lots", -1, 0, True, 1.5, "8QB"])
def test_sizes_that_are_none(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"calibration.max_memory: expected bytes, as a whole"):
        load_config([MANY, {"calibration": {"max_memory": bad}}])


def test_sizes() -> None:
    for given, found in (("8GB", 8 * 10**9), ("512MiB", 1 << 29), (1 << 30, 1 << 30), (None, None)):
        cfg = load_config([MANY, {"calibration": {"max_memory": given}}])
        assert cfg.calibration.max_memory == found


def test_compile_under_a_limit_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    data = batches(6, rows=2, length=8)
    cfg = [MANY, {"budget": {"params_kept": 0.6}}]
    with no_warnings_of_ours():
        expected = fxshare.compile(model, cfg, calibration=data)
        monkeypatch.setattr(rooms, "_LEAST_KEPT", 1 << 12)
        monkeypatch.setattr(rooms, "_BESIDE_SUMS", 1 << 12)
        monkeypatch.setattr(rooms, "resident", lambda: 0)
        captured, sites, _ = prepared(model)
        needed = bytes_needed(captured, sites, gradients=True)
        tight = room(1 << 40).work + (1 << 17) + needed
        limited = fxshare.compile(
            model, [*cfg, {"calibration": {"max_memory": tight}}], calibration=data
        )
    assert limited.fxshare.plan.groups == expected.fxshare.plan.groups
    for a, b in zip(limited.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


SCRIPT = """
import resource, sys, torch
from torch import nn
from fxshare.calibration.calibrate import calibrate
from fxshare.calibration.room import make_room
from fxshare.capture import capture
from fxshare.config import load_config
from fxshare.sites.match import match
from fxshare.sites.tensors import dense_weights
torch.set_num_threads(1)
class Many(nn.Module):
    # 40 inputs of 3072 features: 38 MB of sums each
    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(3072, 16, bias=False) for _ in range(40))
    def forward(self, x):
        return sum(linear(x * (at + 1)) for at, linear in enumerate(self.linears))
model = Many()
sites = match(model, load_config({"weight_types": {"w": {"pattern": "linears.*"}}})).sites
data = [torch.randn(64, 3072)]
captured = capture(model, data[0])
limit = int(sys.argv[1]) or None
room = make_room(captured, sites, {}, captured.caller(data[0]), limit=limit, gradients=False)
print(room.told(), room.keeping, file=sys.stderr)
calibrate(captured, data, sites, keeping=room.keeping)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, room.resident)
"""


@pytest.mark.slow
def test_the_limit_is_kept() -> None:
    def peak(limit: int) -> tuple[int, int]:
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        most, used = map(int, done.stdout.split())
        return most, used

    most, used = peak(0)
    limit = used + 950_000_000  # the least is 873 MB above what is used
    assert most > limit, "the run without a limit should exceed it"
    kept, _ = peak(limit)
    assert kept <= limit
