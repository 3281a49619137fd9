"""What one rank of ``test_processes.py`` does: every check, one after the other, in one process
group; what became of each goes to a file.

::

    python -m tests.planning.ranks RANK SIZE FOLDER [CHECK ...]
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxshare
from fxshare.base import processes
from fxshare.base.numerics import worst
from fxshare.base.processes import here, in_step
from fxshare.calibration.calibrate import calibrate
from fxshare.calibration.keeping import Keeping
from fxshare.calibration.statistics import Statistics
from fxshare.capture import capture
from fxshare.config import load_config
from fxshare.errors import CalibrationError, CaptureError, FactoriseError, ProcessError
from fxshare.factors.factored import Factored
from fxshare.factors.metric import slice_statistics
from fxshare.factors.spectra import Spectra
from fxshare.planning.held_back import Judged
from fxshare.planning.judge import Judge
from fxshare.plans.plan import Plan
from fxshare.sites.match import match
from fxshare.sites.tensors import dense_weights
from tests.planning.ending import KILLED_AT, summed
from tests.planning.models import MANY, PLAIN, batches, features, llama, plain_model
from tests.strategies import no_warnings_of_ours
from tests.toys import NANOGPT, VOCABULARY

WHOLE = {**MANY, "budget": {"params_kept": 0.5}}
ONCE = {**WHOLE, "planner": {"remeasure": 0}}
BUDGET = {**WHOLE, "planner": {"search": "off"}}
EMBEDDED = {
    "weight_types": {
        "embed": {"pattern": r".*wte$", "embedding": True},
        "fc": {"pattern": r".*(fc|proj|attn)$"},
    }
}
COUNT = 7
"""Batches: not a multiple of 2 or 3."""
SOON = 30.0
"""Seconds in which everybody knows that a rank has failed."""
CHECKS: dict[str, Callable[[int, int, Path], None]] = {}


def check(function: Callable[[int, int, Path], None]) -> Callable[[int, int, Path], None]:
    CHECKS[function.__name__] = function
    return function


def same_everywhere(value: Any) -> None:
    """Fails unless all ranks have this value."""
    with in_step() as together:
        found = together.gather(value)
    assert all(one == found[0] for one in found), found


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in tensors.items()}


def refused(part: str, call: Callable[[], Any], kind: type[Exception] = ProcessError) -> None:
    """Fails unless the call raises, soon, what names ``part``."""
    start = time.monotonic()
    with pytest.raises(kind, match=re.escape(part)):
        call()
    assert time.monotonic() - start < SOON


# What one process has computed, before there is a group


EXPERTS = {"weight_types": {"all": {"pattern": ".*"}}}


class Experts(nn.Module):
    """One of two linears is called, for one batch alone."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.often, self.seldom = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.seldom(x) if bool((x > 0).any()) else self.often(x)
        return found


def gathered(name: str, **keys: Any) -> Statistics:
    """Statistics of several kinds of models and data."""
    mode: Any = "fx"
    data: list[Any] = batches(COUNT, rows=2, length=6)
    model, cfg = llama(), MANY
    if name == "looked up":
        model, cfg = NANOGPT.model(), EMBEDDED
    if name == "distance":
        model, cfg, data = plain_model(), PLAIN, features(COUNT)
    if name == "hooks":
        mode = "modules"
    if name == "experts":
        model, cfg, mode = Experts(), EXPERTS, "modules"
        data = [x.abs() if at == 2 else -x.abs() for at, x in enumerate(features(COUNT))]
    if name == "sampled":
        keys = {"labels": "sampled", "seed": 3, **keys}
    if name == "max_tokens":
        data = [ids[: 1 + at % 2] for at, ids in enumerate(data)]
        keys = {"max_tokens": 37, **keys}
    if name == "other sizes":
        cfg, model, data = (
            PLAIN,
            plain_model(),
            [x[: 3 + 5 * at] for at, x in enumerate(features(COUNT))],
        )
    if name == "fewer batches than ranks":
        data = data[:1]
    sites = match(model, load_config(cfg)).sites
    with no_warnings_of_ours():
        captured = capture(model, data[0], mode=mode)
        return calibrate(captured, data, sites, gradients=True, **keys)


KINDS = [
    "experts",
    "other sizes",
    "dense",
    "looked up",
    "distance",
    "hooks",
    "sampled",
    "max_tokens",
]
KINDS += ["fewer batches than ranks"]
FEW = ("experts", "looked up", "max_tokens", "fewer batches than ranks")
"""Of models and data that differ most."""


def compiled(**keys: Any) -> Any:
    given = {"calibration": batches(COUNT), "check": False, **keys}
    with no_warnings_of_ours():
        return fxshare.compile(
            given.pop("model", None) or llama(), given.pop("cfg", BUDGET), **given
        )


class Alone:
    """What the first rank has computed by itself, before there was a group."""

    compiled: Any
    once: Any
    """With a work folder, and without measuring again."""
    statistics: Mapping[str, Statistics]
    plan: Plan

    @classmethod
    def measure(cls, folder: Path, names: Sequence[str]) -> None:
        cls.compiled = compiled(cfg=WHOLE)
        if "work_folder_of_one_process" in names:
            cls.once = compiled(cfg=ONCE, work=folder / "of-one")
        kinds = KINDS if "statistics" in names else FEW
        cls.statistics = {name: gathered(name) for name in kinds}


# The checks


def numbers(statistics: Statistics) -> dict[str, Tensor]:
    found = {}
    for site in statistics.inputs:
        found[f"gram {site}"] = statistics.gram(site)
        names = [n for n in statistics.gradients if n.startswith(site)]
        for name in names:
            found[f"moment {name}"] = statistics.moment(name, site)
            found[f"trace {name}"] = torch.tensor(statistics.trace(name, site))
    return found


@check
def statistics(rank: int, size: int, folder: Path) -> None:
    _gathered_together(rank, KINDS)


@check
def few_statistics(rank: int, size: int, folder: Path) -> None:
    _gathered_together(rank, FEW)


def _gathered_together(rank: int, kinds: Sequence[str]) -> None:
    """Statistics that ranks have gathered are the same on all, and those of one process."""
    for name in kinds:
        with in_step():
            found = gathered(name)
        same_everywhere(bits(numbers(found)))
        if rank > 0:
            continue
        expected = Alone.statistics[name]
        assert found.batches == expected.batches, name
        assert found.tokens == expected.tokens, name
        assert repr(found.mean_loss) == repr(expected.mean_loss), name
        assert (found.loss, found.starts_with) == (expected.loss, expected.starts_with)
        for what, tensor in numbers(found).items():
            gap = worst(numbers(expected)[what], tensor).relative
            assert gap <= 1e-12, f"{name}: {what}: {gap}"


@check
def statistics_in_files(rank: int, size: int, folder: Path) -> None:
    """Block by block, each of them merged; in one folder, which the first rank writes."""
    with in_step():
        whole = gathered("dense")
        shared = folder / "shared"
        found = gathered("dense", keeping=Keeping(12000, shared))
        again = gathered("dense", keeping=Keeping(12000, shared))
        own = folder / f"own-{rank}"
        private = gathered("dense", keeping=Keeping(12000, own, owner=object()))
    assert len(list(shared.glob("part-*"))) > 1
    assert bits(numbers(found)) == bits(numbers(whole)) == bits(numbers(again))
    assert bits(numbers(private)) == bits(numbers(whole))


@check
def plan_and_weights(rank: int, size: int, folder: Path) -> None:
    """The same bits on every rank, and those of one process up to the rounding of statistics."""
    found = compiled(cfg=WHOLE)
    same_everywhere(bits(found.state_dict()))
    same_everywhere(found.fxshare.plan.to_json())
    if rank > 0:
        return
    expected = Alone.compiled
    one, other = found.fxshare.plan, expected.fxshare.plan
    assert [(g.slices, g.rank, g.storage) for g in one.groups] == [
        (g.slices, g.rank, g.storage) for g in other.groups
    ]
    assert one.outlook.trial == other.outlook.trial
    assert abs(one.outlook.measured - other.outlook.measured) <= 1e-4 * abs(other.outlook.measured)
    ids = batches(1, seed=9)[0]
    with torch.no_grad():
        assert worst(expected(ids), found(ids)).relative <= 1e-4


@check
def given_statistics_equal_bits(rank: int, size: int, folder: Path) -> None:
    """Curves, factors and judgings are what one process computes on the same statistics."""
    model, data = llama(), batches(COUNT)
    sites = match(model, load_config(MANY)).sites
    weights = dense_weights(model, sites)
    captured = capture(model, data[0])
    with no_warnings_of_ours():
        measured = calibrate(captured, data, sites, gradients=True)  # in no step: alone
    names = [s.name for site in sites for s in site.slices if site.in_features == 16]
    parts = [frozenset(names[at : at + 1 + at % 2]) for at in range(len(names))]
    groups = Alone.plan.groups

    def computed() -> tuple[Any, ...]:
        spectra = Spectra(slice_statistics(sites, weights, measured))
        spectra.share(parts)
        tails = [spectra.tails(part).tobytes() for part in parts]
        found = []
        for refit in (False, True):
            factors = Factored(groups, spectra, refit, True)
            factors.share()
            shared = here().size == 1 or all(
                (factors._key(g), refit) in spectra.made for g in groups
            )
            assert shared
            for group in groups:
                made = factors[group.name]
                found.append(made.basis_RI.numpy().tobytes())
                found += [made.product(name).numpy().tobytes() for name in group.slices]
                found += [t.numpy().tobytes() for t in made.bias_shift.values()]
                found.append(repr((made.lost, made.total)).encode())
        judged = Judged([(captured.caller(b), b) for b in data], 100, 3, 40)
        judge = Judge(captured, sites, judged)
        halved = {name: weight / 2 for name, weight in weights.items()}
        on = judge.substituted(halved, {})
        first = judge.first(on)
        return tails, found, judge.is_distance, first, judge.whole(on, first)

    alone = computed()
    with in_step():
        shared = computed()
    assert shared == alone


@check
def judged_by_distance(rank: int, size: int, folder: Path) -> None:
    """What the dense model computes is with the rank that has the call."""
    model, data = plain_model(), features(COUNT)
    sites = match(model, load_config(PLAIN)).sites
    captured = capture(model, data[0])
    halved = {name: weight / 2 for name, weight in dense_weights(model, sites).items()}

    def computed() -> object:
        judged = Judged([(captured.caller(b), b) for b in data], 100, 3, 40)
        judge = Judge(captured, sites, judged)
        on = judge.substituted(halved, {})
        first = judge.first(on)
        return judge.is_distance, first, judge.whole(on, first)

    alone = computed()
    with in_step():
        shared = computed()
    assert shared == alone
    assert shared[0] is True  # type: ignore[index]


@check
def work_folder(rank: int, size: int, folder: Path) -> None:
    """One writes, all read; a second run computes nothing that is there, nor does one process."""
    work = folder / "work"
    first = compiled(work=work, cfg=WHOLE)
    same_everywhere(bits(first.state_dict()))
    with in_step():
        before = {p: p.read_bytes() for p in sorted(work.rglob("*")) if p.is_file()}
    again = compiled(work=work, cfg=WHOLE)
    with in_step():
        after = {p: p.read_bytes() for p in sorted(work.rglob("*")) if p.is_file()}
    assert any("part.json" in str(p) for p in before)
    assert {p: c for p, c in after.items() if p.name != "lock"} == {
        p: c for p, c in before.items() if p.name != "lock"
    }
    assert bits(again.state_dict()) == bits(first.state_dict())


@check
def work_folder_of_one_process(rank: int, size: int, folder: Path) -> None:
    """On its statistics the same plan, the same judgings, the same weights, bit by bit."""
    work = folder / "of-one"
    with in_step():
        if rank == 0:
            shutil.rmtree(work / "spectra")
            shutil.rmtree(work / "plans")
    found = compiled(cfg=ONCE, work=work)
    same_everywhere(bits(found.state_dict()))
    if rank > 0:
        return
    assert bits(found.state_dict()) == bits(Alone.once.state_dict())
    one, other = found.fxshare.plan.outlook, Alone.once.fxshare.plan.outlook
    assert [(t.name, t.predicted, t.measured, t.tokens) for t in one.trials] == [
        (t.name, t.predicted, t.measured, t.tokens) for t in other.trials
    ]
    assert (one.slope, one.bound, one.priced) == (other.slope, other.bound, other.priced)
    # and what several have written serves one
    assert (work / "spectra").exists()


@check
def other_modes(rank: int, size: int, folder: Path) -> None:
    """Sharing and exact mode, and plans that are given."""
    sharing = {**MANY, "group_size": 2, "compression_rate": 0.6}
    for cfg in (MANY, sharing):
        same_everywhere(bits(compiled(cfg=cfg).state_dict()))
    made = compiled(plan=Alone.plan, check=True)
    same_everywhere(bits(made.state_dict()))
    with no_warnings_of_ours():
        found = fxshare.plan(llama(), BUDGET, calibration=iter(batches(COUNT)))
    same_everywhere(found.to_json())


@check
def different_arguments(rank: int, size: int, folder: Path) -> None:
    """Each is refused on every rank, which says who has what."""
    last = size - 1
    mine = rank == last
    refused(f"rank {last} has another seed", lambda: compiled(seed=int(mine)))
    refused(
        f"rank {last} has another number of batches than rank 0: {COUNT - 1}, not {COUNT}",
        lambda: compiled(calibration=batches(COUNT - mine)),
    )
    refused(
        f"rank {last} has another data",
        lambda: compiled(calibration=batches(COUNT, seed=int(mine))),
    )
    refused(f"rank {last} has another model", lambda: compiled(model=llama(seed=int(mine))))
    kept = {**BUDGET, "budget": {"params_kept": 0.6 if mine else 0.5}}
    refused(f"rank {last} has another configuration (budget)", lambda: compiled(cfg=kept))
    given = Alone.plan if mine else None
    refused(f"rank {last} has another plan", lambda: compiled(plan=given))


class Sharded(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.inner(ids)
        return out


@check
def sharded_models(rank: int, size: int, folder: Path) -> None:
    """Parameters in parts are refused with the reason; whole ones of FSDP2 as well."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    for placement in (Shard(0), Replicate()):
        model = llama()
        linear = model.layers[0].q_proj
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [placement]))
        refused(
            "'layers.0.q_proj.weight' is a DTensor", lambda m=model: compiled(model=m), CaptureError
        )
    model = llama()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    refused("sharded over processes", lambda: compiled(model=model), CaptureError)


@check
def an_error_of_all(rank: int, size: int, folder: Path) -> None:
    """What fails in the share of one rank is raised on all of them, the same, and can be caught."""
    with in_step() as together:

        def compute(number: int) -> int:
            if number in (3, 4):
                raise FactoriseError(f"item {number}")
            return number

        with pytest.raises(FactoriseError, match=r"^item 3$"):
            together.spread(range(6), compute)
        assert together.spread(range(5), str) == ["0", "1", "2", "3", "4"]
        assert together.total(torch.tensor([float(rank), 1.0])).tolist() == [
            size * (size - 1) / 2,
            size,
        ]


@check
def out_of_step(rank: int, size: int, folder: Path) -> None:
    def call() -> None:
        with in_step() as together:
            together.gather(1, "judging" if rank == 0 else "spectra")

    refused("is at ", call)


def failing(data: list[Tensor], at: int) -> Iterator[Tensor]:
    for number, batch in enumerate(data):
        if number == at:
            raise ValueError("the disk is gone")
        yield batch


@check
def a_rank_that_raises(rank: int, size: int, folder: Path) -> None:
    """In its data, in a batch of its own, in the loss: its error is everybody's."""
    last = size - 1
    data: Any = failing(batches(COUNT), 2) if rank == last else batches(COUNT)
    if rank == last:
        refused("the disk is gone", lambda: compiled(calibration=data), ValueError)
    else:
        refused(f"rank {last}: ValueError: the disk is gone", lambda: compiled(calibration=data))
    bad = batches(COUNT)
    bad[last] = torch.full_like(bad[last], VOCABULARY)  # out of range, for the rank that runs it
    said = f"calibration batch {last} failed in the model"
    if rank == last:
        refused(said, lambda: compiled(calibration=bad), CalibrationError)
    else:
        refused(f"rank {last}: CalibrationError: {said}", lambda: compiled(calibration=bad))


@check
def a_rank_that_is_killed(rank: int, size: int, folder: Path) -> None:
    """The others end soon, and say who it was."""
    last = size - 1
    KILLED_AT.append(6 if rank == last else 0)
    work = folder / "killed"
    refused(f"rank {last} (process ", lambda: compiled(loss=summed, work=work, cfg=WHOLE))
    # nor does it call the next time
    processes._MEETING = dt.timedelta(seconds=1)
    refused("not every rank of the process group has called within 1 s", compiled)
    assert here().size == 1


def main(rank: int, size: int, folder: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    processes._MEETING = dt.timedelta(seconds=60)
    plan = folder / "plan.json"
    if rank == 0:
        Alone.measure(folder, names or tuple(CHECKS))
        plan.write_text(Alone.compiled.fxshare.plan.to_json())
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=size
    )
    dist.barrier()
    Alone.plan = Plan.from_json(plan.read_text())
    results = {}
    for name in names or CHECKS:
        function = CHECKS[name]
        start = time.monotonic()
        try:
            function(rank, size, folder)
            results[name] = "", time.monotonic() - start
        except Exception:
            results[name] = traceback.format_exc(), time.monotonic() - start
        (folder / f"rank-{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # the group has lost a rank, which its end would wait for


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
