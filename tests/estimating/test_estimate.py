"""Estimates: held to what is counted of real runs, to the memory that is divided, and to sense."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxshare
from fxshare.calibration.blocks import bytes_needed
from fxshare.calibration.calibrate import calibrate
from fxshare.calibration.room import make_room
from fxshare.compiling.stages import Stages, prepare
from fxshare.config import load_config
from fxshare.cost_model.pace import Pace
from fxshare.errors import ConfigError, FxShareError, MatchError, StoreError
from fxshare.estimating import pricing, searching
from fxshare.estimating.calibrating import statistics_bytes
from fxshare.estimating.counted import count, count_captured
from fxshare.estimating.disk import check_room
from fxshare.estimating.estimate import estimate, estimate_captured
from fxshare.estimating.pace import measured, pace_at_hand, pace_for
from fxshare.estimating.stages import Data, Estimate, estimate_of
from fxshare.factors import spectra
from fxshare.models.shapes import ModelShape
from fxshare.proposing.propose import init
from fxshare.sites.tensors import dense_weights

pytest.importorskip("transformers")

TINY = "64,2,4,160,257"
BUDGET = {"budget": {"params_kept": 0.8}}
DEVICE = "h100"  # published rates: nothing is measured


@cache
def model(shape: str = TINY, *, meta: bool = False) -> nn.Module:
    with torch.device("meta" if meta else "cpu"):
        return ModelShape.parse(shape).model(torch.float32)


def batches(count: int, rows: int = 2, length: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 257, (rows, length), generator=generator) for _ in range(count)]


def estimated(shape: str = TINY, *mode: Mapping[str, Any], **options: Any) -> Estimate:
    one = model(shape, meta=True)
    given = {"tokens": 1024, "length": 64, "batch_size": 2, "device": DEVICE} | options
    return estimate(one, [init(one), *(mode or (BUDGET,))], **given)


def seconds(found: Estimate, *names: str) -> float:
    return sum(one.seconds for one in found.stages if one.name in names)


class Captured(NamedTuple):
    stages: Stages
    given: list[Tensor]


@pytest.fixture(scope="module")
def captured() -> Captured:
    given = batches(4)
    cfg = load_config([init(model()), BUDGET, {"planner": {"search": "off"}}])
    return Captured(prepare(model(), cfg, given, None, None), given)


def test_stages_are_those_that_a_compilation_records() -> None:
    planned = [one.name for one in estimated().stages]
    assert planned[:2] == ["capture", "calibrate"]
    assert {"spectra", "solve", "factorise groups", "judge", "slope", "verify"} <= set(planned)
    sharing = estimated(TINY, {"group_size": 2, "compression_rate": 0.8})
    assert [one.name for one in sharing.stages] == [
        *("capture", "calibrate", "factorise", "rewrite", "verify"),
    ]
    exact = estimated(TINY, {})
    assert [one.name for one in exact.stages] == ["capture", "rewrite", "verify"]
    alone = estimated(TINY, BUDGET, {"planner": {"search": "off"}})
    assert not {"slope", "search"} & {one.name for one in alone.stages}
    assert seconds(alone, "calibrate") < 0.7 * seconds(estimated(), "calibrate")


def test_a_limit_of_the_loss_is_found_between_more_plans() -> None:
    free, limited = estimated(), estimated(TINY, {"budget": {"max_loss_increase": 0.1}})
    # one batch is held back: 7 plans and the dense model, a refit of 4, and 7 and 4 again
    more = (23 + 6) / 23
    assert seconds(limited, "judge") == pytest.approx(more * seconds(free, "judge"))
    assert seconds(limited, "spectra") == seconds(free, "spectra")


def test_more_data_and_more_layers_take_longer() -> None:
    least = estimated()
    for more in (estimated(tokens=2048), estimated("64,4,4,160,257"), estimated("128,2,4,320,257")):
        assert more.seconds > least.seconds
        assert seconds(more, "calibrate") > seconds(least, "calibrate")
        assert more.memory >= least.memory
    assert seconds(estimated(tokens=2048), "spectra") == seconds(least, "spectra")
    deep = estimated("64,4,4,160,257")
    assert seconds(deep, "spectra") == pytest.approx(2 * seconds(least, "spectra"), rel=0.2)
    assert deep.candidates > least.candidates
    assert deep.disk.output > least.disk.output


@pytest.mark.parametrize("gradients", [False, True])
def test_statistics_take_the_bytes_that_a_capture_tells(
    captured: Captured, gradients: bool
) -> None:
    stages, given = captured
    needed = bytes_needed(stages.captured, stages.sites, gradients=gradients)
    counted = count(model(), stages.sites, given[0], gradients=gradients)
    quick = count_captured(stages.captured, stages.sites, given[0])
    assert statistics_bytes(counted, stages.sites, torch.float32, gradients=gradients).all == needed
    assert statistics_bytes(quick, stages.sites, torch.float32, gradients=gradients).all == needed
    # q, k and v read one tensor, gate and up another
    assert len(set(counted.reads.values())) == len(set(quick.reads.values())) == 2 * 4
    assert counted.rows == quick.rows == 128


def test_a_model_without_values_is_counted_like_one_with_them(captured: Captured) -> None:
    stages, given = captured
    here = count(model(), stages.sites, given[0], gradients=True)
    bare = count(model(meta=True), stages.sites, given[0].to("meta"), gradients=True)
    flops = [sum(one.flops for one in counted.step) for counted in (here, bare)]
    assert flops[1] == pytest.approx(flops[0], rel=0.1)
    assert bare.reads.keys() == here.reads.keys()
    assert len(set(bare.reads.values())) == len(set(here.reads.values()))
    assert here.alive is not None
    assert bare.alive is not None
    assert bare.alive == pytest.approx(here.alive, rel=0.5)


def test_calibration_does_the_arithmetic_that_was_estimated(captured: Captured) -> None:
    stages, given = captured
    weights = dense_weights(model(), stages.sites)
    with FlopCounterMode(display=False) as counter:
        calibrate(stages.captured, given, stages.sites, gradients=True, weights=weights)
    found = estimate(model(), stages.cfg, tokens=4 * 128, length=64, batch_size=2, device=DEVICE)
    (flops,) = (one.flops for one in found.stages if one.name == "calibrate")
    assert 0.5 < flops / counter.get_total_flops() < 2
    quick = estimate_captured(stages.captured, stages.sites, stages.cfg, given)
    (flops,) = (one.flops for one in quick.stages if one.name == "calibrate")
    assert 0.5 < flops / counter.get_total_flops() < 2


def test_memory_is_at_least_what_is_divided(captured: Captured) -> None:
    stages, given = captured
    weights = dense_weights(model(), stages.sites)
    call = stages.captured.caller(given[0])
    room = make_room(
        stages.captured, stages.sites, weights, call, limit=None, gradients=True, rounds=1
    )
    found = estimate_captured(stages.captured, stages.sites, stages.cfg, given)
    parts = room.activations + room.work + room.statistics
    # what the process itself holds moves between the two
    assert found.memory >= 0.95 * room.resident + parts
    assert found.memory <= found.limit
    assert found.fits


def test_a_limit_makes_passes_over_the_data_and_files() -> None:
    # so large that a limit that leaves planning its 250 MB does not hold all statistics
    shape = "1024,16,8,2816,257"
    free = estimated(shape, BUDGET, {"calibration": {"max_memory": "100GB"}})
    small = estimated(shape, BUDGET, {"calibration": {"max_memory": "50MB"}})
    assert not small.fits
    assert small.least > small.limit == 50_000_000
    limit = small.least + (20 << 20)
    tight = estimated(shape, BUDGET, {"calibration": {"max_memory": limit}})
    assert free.passes == 1
    assert tight.passes > 1
    assert tight.fits
    assert tight.disk.scratch > 0
    assert tight.memory <= 1.01 * tight.limit  # what this process holds moves
    assert seconds(tight, "calibrate") > 1.5 * seconds(free, "calibrate")
    worked = estimated(shape, work=True)
    # the factors of every rank are files in any case
    assert worked.disk.work > worked.disk.scratch == free.disk.scratch > 0


def test_candidates_are_slices_pairs_and_rows_whole() -> None:
    stages = prepare(
        model("64,4,4,160,257"), load_config([init(model(TINY)), BUDGET]), None, batches(1)[0], None
    )
    reads = count(stages.model, stages.sites, batches(1)[0], gradients=True).reads
    names = {
        strategy: pricing.candidates(stages.sites, reads, strategy=strategy, merged=False)
        for strategy in ("separate", "grown", "layers")
    }
    assert [len(found) for found in names.values()] == [7 * 4, 7 * (4 + 3 + 1), 7 * (4 + 3 + 2 + 1)]
    merged = pricing.candidates(stages.sites, reads, strategy="grown", merged=True)
    # of q, k, v three pairs, of gate and up one, in each of four layers
    assert len(merged) == len(names["grown"]) + 4 * (3 + 1)


def test_what_is_kept_is_divided_as_planning_does() -> None:
    here = searching.DECOMPOSED, searching.MADE, searching.POOLED
    assert here == (spectra._DECOMPOSED, spectra._MADE, spectra._POOLED)


def test_ranks_keep_the_share_that_is_wanted() -> None:
    for inputs, outputs in ((64, 64), (64, 256), (256, 64)):
        rank = pricing.rank_of(inputs, outputs, 0.8)
        kept = rank * (inputs + outputs) - rank * rank
        assert kept == pytest.approx(0.8 * inputs * outputs, rel=0.05)
        rank = pricing.rank_of(inputs, outputs, 0.8, pivoted=False)
        assert rank * (inputs + outputs) == pytest.approx(0.8 * inputs * outputs, rel=0.05)


def test_half_precision_is_calibrated_in_float32_where_a_cpu_lacks_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.device("meta"):
        half = ModelShape.parse(TINY).model(torch.bfloat16)
    sites = prepare(half, load_config([init(half), BUDGET]), None, None, "modules").sites
    counted = count(half, sites, torch.ones(2, 64, dtype=torch.long), gradients=True)
    pace = pace_at_hand("cpu", "bfloat16")
    slow = replace(pace, model=tuple((size, rate / 1000) for size, rate in pace.model))

    def of(able: bool, pace: Pace) -> Estimate:
        monkeypatch.setattr("fxshare.estimating.stages.multiplies", lambda device, dtype: able)
        cfg = load_config([init(half), BUDGET])
        return estimate_of(half, cfg, sites, counted, Data(8, 1024), pace)

    measured = "capture", "calibrate", "judge", "slope", "verify"
    assert seconds(of(False, slow), *measured) == seconds(of(False, pace), *measured)
    assert seconds(of(True, slow), *measured) > 2 * seconds(of(True, pace), *measured)


@pytest.mark.slow  # made on meta, and run once on fake tensors: 4 s
def test_llama_7b_in_seconds() -> None:
    start = time.process_time()
    with torch.device("meta"):
        large = ModelShape.parse("llama-7b").model(torch.bfloat16)
    found = estimate(large, [init(large), BUDGET], tokens=32768, device=DEVICE)
    assert time.process_time() - start < 30
    assert found.parameters == 6_738_415_616
    assert found.sites == 7 * 32
    # two rounds of half matrices in float64: 31 GB of inputs of down alone, were they not halved
    assert 50e9 < found.disk.scratch < 200e9


# what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tokens": 0}, "tokens: expected a number of at least 1, found 0"),
        ({"tokens": True}, "tokens: expected a number of at least 1, found True"),
        ({"tokens": 1.5}, "tokens: expected a number of at least 1, found 1.5"),
        ({"length": 1}, "length: expected at least 2 tokens a window, found 1"),
        ({"length": 4096}, "length 4096: LlamaForCausalLM was made for at most 2048 tokens"),
        ({"batch_size": 0}, "batch_size: expected at least 1, found 0"),
        ({"tokens": 128}, "128 tokens in batches of 128 are one, and a search needs at least 2"),
        ({"device": "h900"}, "--device: expected one of cpu, cuda, a100, h100"),
    ],
)
def test_bad_input(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        estimated(**options)


def test_what_is_no_model_or_says_too_little() -> None:
    with pytest.raises(ConfigError, match=r"expected an nn\.Module to estimate for, found dict"):
        estimate({}, tokens=10)  # type: ignore[arg-type]
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).to("meta")
    types = {"weight_types": {"all": {"pattern": r"\d"}}}
    with pytest.raises(ConfigError, match=r"give example=\.\.\., a batch of its inputs"):
        estimate(plain, types, tokens=10, device=DEVICE)
    with pytest.raises(MatchError, match=r"matches no|matched no|no linear"):
        estimate(plain, {"weight_types": {"all": {"pattern": "none"}}}, tokens=10, device=DEVICE)
    found = estimate(plain, types, tokens=10, device=DEVICE, example=torch.zeros(2, 4))
    assert found.sites == 2
    assert found.mode == "exact"


def test_what_cannot_be_run_without_values_is_counted_by_its_linears() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if float(x.sum()) > 0 else x

    cfg = {"weight_types": {"fc": {"pattern": "fc"}}}
    found = estimate(Decides(), cfg, tokens=64, device=DEVICE, example=torch.ones(16, 8))
    assert seconds(found, "capture") > 0


def test_models_of_images_are_counted_by_patches() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    with torch.device("meta"):
        images = ViTForImageClassification(config)
    cfg = [init(images), BUDGET]
    found = estimate(images, cfg, tokens=34 * 8, device=DEVICE)
    twice = estimate(images, cfg, tokens=34 * 16, device=DEVICE)
    # 16 patches and one more of each of two images: 8 batches, of which 7 are for statistics
    assert seconds(twice, "calibrate") == pytest.approx(15 / 7 * seconds(found, "calibrate"))


# in a compilation -----------------------------------------------------------------------------


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    caplog.set_level(logging.INFO, logger="fxshare")
    monkeypatch.setattr("fxshare.compiling.foretold._LONG", 0.0)
    return lambda: [one.getMessage() for one in caplog.records]


SHARING = {"group_size": 2, "compression_rate": 0.8}


def test_a_compilation_says_what_it_takes(lines: Any) -> None:
    cfg = [init(model()), SHARING]
    fxshare.compile(model(), cfg, calibration=batches(2), check=False)
    said = [line for line in lines() if line.startswith("estimated: about ")]
    assert len(said) == 1
    assert lines().index(said[0]) < lines().index("calibrate: started")


def test_nothing_is_said_of_data_of_unknown_size(lines: Any) -> None:
    fxshare.compile(model(), [init(model()), SHARING], calibration=iter(batches(2)), check=False)
    assert not [line for line in lines() if line.startswith("estimated")]


def test_what_is_over_in_a_moment_is_no_news(lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxshare.compiling.foretold._LONG", 1e6)
    fxshare.compile(model(), [init(model()), SHARING], calibration=batches(2), check=False)
    assert not [line for line in lines() if line.startswith("estimated")]


def test_an_estimate_of_a_capture_takes_little_beside_it(captured: Captured) -> None:
    stages, given = captured

    def seconds(run: Callable[[], object]) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    def once() -> object:
        return estimate_captured(stages.captured, stages.sites, stages.cfg, given)

    def again() -> object:
        return prepare(model(), stages.cfg, given, None, None)

    # 0.05 s of 0.5 s
    assert min(seconds(once) for _ in range(3)) < seconds(again) / 3


def test_a_disk_without_room_is_refused_before_anything_runs(
    tmp_path: Path, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StoreError, match=r"go there, and 0 MB are free; give a work folder on a"):
        fxshare.compile(
            model(), [init(model()), BUDGET], calibration=batches(10), work=tmp_path / "w"
        )
    assert "calibrate: started" not in lines()
    assert not (tmp_path / "w" / "work.json").exists()


def test_what_is_there_already_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part").write_bytes(bytes(5000))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    check_room(tmp_path, 6000, "things", "go")
    with pytest.raises(FxShareError, match="of things go there"):
        check_room(tmp_path, 6001, "things", "go")
    with pytest.raises(FxShareError, match="of things go there"):
        check_room(tmp_path / "a" / "b", 1001, "things", "go")


# rates ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_rates_are_measured_once_and_found_by_compilations(folder: Path) -> None:
    assert pace_at_hand("cpu", "float32").origin == "assumed"
    start = time.process_time()
    found = measured.__wrapped__("cpu", "float32", torch.get_num_threads())
    assert time.process_time() - start < 20
    assert found.origin == "measured"
    assert found.eigenvectors(512).seconds > found.eigenvalues(512).seconds
    assert found.product(512, 512, 512, "single").seconds < 1
    (path,) = folder.rglob("pace-*.json")
    assert pace_at_hand("cpu", "float32") == found
    other = path.read_text().replace('"version": 1', '"version": 2')
    for text in ("{", "[]", '{"version": 1}', other):
        path.write_text(text)
        assert pace_at_hand("cpu", "float32").origin == "assumed"


def test_of_the_last_day_the_faster_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = replace(pace_at_hand("cpu", "float32"), origin="measured")
    rounds: list[Pace] = []
    monkeypatch.setattr("fxshare.estimating.pace._measured", lambda *_: rounds.pop())

    def found(*paces: Pace) -> Pace:
        rounds.extend(paces)
        return measured.__wrapped__("cpu", "float32", 1)  # type: ignore[no-any-return]

    def of(rate: float) -> Pace:
        return replace(plain, eigh=((64, 1.0), (256, rate)), call=1 / rate)

    assert found(of(10.0), of(30.0)) == found(of(30.0), of(20.0)) == of(30.0)  # in turn
    assert found(of(10.0), of(20.0)) == of(30.0)  # before
    (path,) = folder.rglob("pace-*.json")
    hours = time.time() - 3600
    os.utime(path, (hours, hours))
    assert found(of(10.0), of(20.0)) == of(30.0)
    assert path.stat().st_mtime == pytest.approx(hours)  # or it would count for ever
    os.utime(path, (0, 0))
    assert found(of(10.0), of(20.0)) == of(20.0)
    path.write_text("{")
    assert found(of(10.0), of(10.0)) == of(10.0)


def test_published_rates_say_so() -> None:
    slow, fast = (estimated(device=device) for device in ("t4", "h100"))
    assert (slow.origin, fast.origin) == ("published", "published")
    assert seconds(slow, "calibrate") > seconds(fast, "calibrate")
    assert "rates published" in fast.told()
    if not torch.cuda.is_available():
        assert pace_for("cuda", "bfloat16").origin == "published"
