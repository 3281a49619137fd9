"""Refining block by block: cuts, the dense graph beside the compiled one, losses that only fall."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.calibration.losses import default_loss
from fxshare.errors import RefineError
from fxshare.refining import blocks
from fxshare.refining.cuts import STUDENT, TEACHER, cuts_of, part_of
from fxshare.refining.dense_graph import dense_graph
from fxshare.refining.metric import InMetric, metrics_of
from fxshare.refining.objectives import ToOutputs
from fxshare.refining.parameters import trainable_of
from tests.refining.build import equal, everything, features, ids, refined, subject, usual

EXACT = torch.float64
BLOCKS: Any = {"objective": "blocks", "steps": 8}


@pytest.mark.parametrize(
    ("name", "how"), [("llama", "shared"), ("llama", "planned"), ("gpt2", "planned")]
)
def test_dense_blocks_one_after_the_other_are_the_model(name: str, how: Any) -> None:
    model, gm = subject(name, how, dtype=EXACT)
    dense = dense_graph(gm, model.eval()).eval()
    batch = ids(1)[0]
    with torch.no_grad():
        gap = worst(model(batch), dense(batch))
    assert gap.relative <= tolerance(EXACT, 40)
    assert {id(t) for t in dense.parameters()}.isdisjoint({id(t) for t in gm.parameters()})
    cuts = cuts_of(gm, trainable_of(gm, model, ()))
    # a module at a time, on what the one before it returned, as in the whole
    last = cuts.blocks[-1].outputs
    seen: dict[str, Any] = {}
    for whose, graph in ((TEACHER, dense), (STUDENT, gm.eval())):
        given: dict[str, Any] = {}
        call = gm.fxshare.caller(model)(batch)
        for block in cuts.blocks:
            with torch.no_grad():
                found = part_of(graph, cuts, block, whose)(**call, **given)
            given = {f"{whose}_{n}": v for n, v in zip(block.outputs, found, strict=True)}
        assert len(given) == 1  # the residual stream
        seen[whose] = given[f"{whose}_{last[0]}"]
        whole: dict[str, Tensor] = {}
        _values(graph, batch, last[0], whole)
        assert torch.equal(seen[whose], whole["value"])
    assert not torch.equal(*seen.values())


def _values(graph: Any, batch: Tensor, name: str, found: dict[str, Tensor]) -> None:
    class Watching(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            if n.name == name:
                found["value"] = result.clone()
            return result

    with torch.no_grad():
        Watching(graph).run(batch)


def test_layers_that_share_a_basis_are_one_block() -> None:
    model, gm = usual()
    trainable = trainable_of(gm, model, ())
    cuts = cuts_of(gm, trainable)
    assert [block.layers for block in cuts.blocks] == [(0, 1), (2,)]
    assert cuts.blocks[0].inputs == ()
    trained = [name for block in cuts.blocks for name in block.trainable.names]
    assert sorted(trained) == sorted(trainable.names)


def test_a_layer_alone_is_a_block() -> None:
    model, gm = subject("llama", "shared", group_size=1)
    cuts = cuts_of(gm, trainable_of(gm, model, ("norms",)))
    assert [block.layers for block in cuts.blocks] == [(0,), (1,), (2,)]
    norms = [name for block in cuts.blocks for name in block.trainable.others]
    assert len(norms) == 6  # the last norm stands after the blocks


@pytest.mark.parametrize(("name", "how"), [("llama", "shared"), ("encoder", "planned")])
def test_no_block_and_no_model_ends_worse(name: str, how: Any, tmp_path: Path) -> None:
    model, gm = subject(name, how)
    untouched = [everything(m) for m in (gm, model)]
    result = refined(gm, model, ids(), learning_rate=1e-3, **BLOCKS)
    done = result.fxshare.refined[-1]
    assert done.objective == "blocks"
    assert all(block.after <= block.before for block in done.blocks)
    assert any(block.after < block.before for block in done.blocks)
    assert done.after.objective <= done.before.objective
    assert done.steps == 8 * len(done.blocks) == sum(block.steps for block in done.blocks)
    assert all(equal(old, everything(m)) for old, m in zip(untouched, (gm, model), strict=True))
    assert fxshare.verify(model, result).ok
    fxshare.save(result, tmp_path / "out")
    assert fxshare.load(tmp_path / "out", model).fxshare.refined == result.fxshare.refined


def test_block_losses_of_the_kept_state_are_those_recorded() -> None:
    model, gm = subject("llama", "shared", dtype=EXACT)
    held_out = ids(2, seed=9)
    result = refined(gm, model, heldout=held_out, **BLOCKS)
    done = result.fxshare.refined[-1]
    assert done.kept == done.steps  # the state of the last block
    dense, cuts = dense_graph(gm, model.eval()).eval(), cuts_of(gm, trainable_of(gm, model, ()))
    roots = metrics_of(dense, cuts, ids(), gm.fxshare.caller(model), 0)
    for number, recorded in enumerate(done.blocks):
        name = cuts.blocks[number].outputs[0]
        total = rows = 0.0
        for batch in held_out:
            sides: list[dict[str, Tensor]] = [{}, {}]
            for graph, found in zip((dense, result.eval()), sides, strict=True):
                _values(graph, batch, name, found)
            wanted, own = (one["value"].flatten(0, -2) for one in sides)
            total += float(((own - wanted) @ roots[name]).pow(2).sum() / 2)
            rows += len(wanted)
        assert recorded.after == pytest.approx(total / rows, rel=1e-9)


class _Cut(fx.Interpreter):
    """Runs a graph with a value of it as a leaf, which goes to ``seen``."""

    def __init__(self, gm: fx.GraphModule, name: str, seen: list[Tensor]) -> None:
        super().__init__(gm)
        self.at, self.seen = name, seen

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node.name != self.at:
            return value
        self.seen.append(value.detach().requires_grad_())
        return self.seen[-1]


def test_metrics_are_moments_of_the_gradients_at_the_blocks_outputs() -> None:
    model, gm = subject("llama", "shared", dtype=EXACT)
    dense, cuts = dense_graph(gm, model.eval()).eval(), cuts_of(gm, trainable_of(gm, model, ()))
    text, (batch,) = dense.code, ids(1)
    own = nn.Identity()
    dense.add_module("metric_1", own)
    caller = gm.fxshare.caller(model)
    found = metrics_of(dense, cuts, [batch], caller, 0)
    assert dense.code == text  # and nothing is left in it
    left = [name for name, _ in dense.named_modules() if name.startswith("metric_")]
    assert left == ["metric_1"]
    assert dense.get_submodule("metric_1") is own
    assert set(found) == {name for block in cuts.blocks for name in block.outputs}
    for name, root_DD in found.items():
        seen: list[Tensor] = []

        call = caller(batch)
        given = [n for n in dense.graph.nodes if n.op == "placeholder"]
        cut = _Cut(dense, name, seen)
        defaults = [n.args[0] if n.args else None for n in given]
        values = [call.get(str(n.target), d) for n, d in zip(given, defaults, strict=True)]
        output = cut.run(*values)
        loss, _ = default_loss(output, call)
        (gradient,) = torch.autograd.grad(loss, seen[0])
        rows_ND = gradient.flatten(0, -2)
        moment_DD = rows_ND.mT @ rows_ND
        size = len(moment_DD)
        expected = 0.9 * moment_DD * size / moment_DD.trace() + 0.1 * torch.eye(size, dtype=EXACT)
        torch.testing.assert_close(root_DD @ root_DD.mT, expected, rtol=1e-9, atol=1e-9)


def test_outputs_that_the_loss_does_not_reach_are_compared_as_they_are() -> None:
    own, wanted = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    plain = InMetric(("a",), {}).loss((own,), [wanted], {}, None)
    expected = ToOutputs().loss((own,), [wanted], {}, None)
    assert (plain.total, plain.count) == (expected.total, expected.count)
    double = InMetric(("a", "b"), {"a": 2 * torch.eye(4)}).loss((own, own), [wanted] * 2, {}, None)
    assert double.count == 2 * expected.count
    by_metric = 2 * (own - wanted).pow(2).sum()
    torch.testing.assert_close(double.total, by_metric + expected.total)


def test_a_state_that_is_worse_for_the_whole_is_not_kept() -> None:
    model, gm = usual()
    plain = blocks.Measure.__call__

    def rising(self: Any, student: Any) -> Any:  # whatever the blocks gain
        found = plain(self, student)
        is_whole = len(student.trainable.groups) == len(trainable_of(gm, model, ()).groups)
        return type(found)(1.0 + calls.append(0) if is_whole else found.objective)  # type: ignore

    calls: Any = type("Calls", (), {"n": 0})()

    def append(_: int) -> float:
        calls.n += 1
        return float(calls.n)

    calls.append = append
    with mock.patch.object(blocks.Measure, "__call__", rising):
        result = refined(gm, model, **BLOCKS)
    assert result.fxshare.refined[-1].kept == 0
    assert equal(everything(gm), everything(result))


def test_a_limit_of_time_is_divided() -> None:
    model, gm = subject("llama", "shared", group_size=1)
    options = {"steps": None, "minutes": 0.04, "learning_rate": None}
    done = refined(gm, model, **{**BLOCKS, **options}).fxshare.refined[-1]
    assert len(done.blocks) >= 2  # on a busy machine the time may be over before the third
    assert done.seconds < 8.0  # of each block a step, a measurement come on top
    assert done.tokens > 0


class EndedError(Exception):
    """What ends a run."""


def test_resumed_after_a_block_is_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    model, gm = usual()
    whole = refined(gm, model, **BLOCKS)
    plain, seen = blocks._train_block, []

    def ending(*arguments: Any) -> None:
        seen.append(0)
        if len(seen) == 2:
            raise EndedError
        plain(*arguments)

    with mock.patch.object(blocks, "_train_block", ending), pytest.raises(EndedError):
        refined(gm, model, work=tmp_path / "w", **BLOCKS)
    for _ in range(2):  # goes on, then finds nothing to do
        again = refined(gm, model, work=tmp_path / "w", **BLOCKS)
        assert equal(everything(whole), everything(again))
        assert again.fxshare.refined[-1].blocks == whole.fxshare.refined[-1].blocks


def test_an_interruption_returns_the_best_so_far() -> None:
    model, gm = usual()
    plain, seen = blocks._passed_on, []

    def interrupted(*arguments: Any) -> Any:
        seen.append(0)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    with mock.patch.object(blocks, "_passed_on", interrupted):
        result = refined(gm, model, **{**BLOCKS, "steps": 30})
    done = result.fxshare.refined[-1]
    assert (done.stopped, done.kept, len(done.blocks)) == ("interrupted", 30, 1)
    assert done.after.objective < done.before.objective
    assert fxshare.verify(model, result).ok


def test_memory_holds_the_moments_of_one_block() -> None:
    model, gm = subject("llama", "shared", group_size=1)
    sizes = []
    plain = blocks.Stepper.__init__

    def counted(self: Any, student: Any, *rest: Any) -> None:
        sizes.append(sum(t.numel() for t in student.masters.values()))
        plain(self, student, *rest)

    with mock.patch.object(blocks.Stepper, "__init__", counted):
        refined(gm, model, **BLOCKS)
    every = sum(t.numel() for t in gm.parameters())
    trained = sum(dict(gm.named_parameters())[n].numel() for n in trainable_of(gm, model, ()).names)
    assert len(sizes) == 3
    assert sum(sizes) == trained < every
    assert max(sizes) < 0.4 * trained


class WritesIntoIt(nn.Module):
    """A residual stream that is added to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(32, 16)
        self.h = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids) * 1.0
        for layer in self.h:
            x += layer(x).tanh()
        return x @ self.emb.weight.T


def test_a_residual_stream_that_is_written_to_in_place() -> None:
    torch.manual_seed(0)
    model = WritesIntoIt()
    types = {"fc": {"pattern": r"h\.\d+"}}
    cfg = {"weight_types": types, "block_pattern": r"h\.(\d+)", "group_size": 1}
    gm = fxshare.compile(model, {**cfg, "compression_rate": 0.5}, calibration=ids(4))
    done = refined(gm, model, **BLOCKS).fxshare.refined[-1]
    assert len(done.blocks) == 3
    assert done.after.objective < done.before.objective


def test_what_has_no_blocks_is_refused_with_the_way_out() -> None:
    model, gm = subject("llama", "shared", capture="modules")
    with pytest.raises(RefineError, match="captured at module granularity; take objective='kl'"):
        refined(gm, model, **BLOCKS)
    planner = {"search": "off", "kinds": ["heads"]}
    model, gm = subject("llama", "exact", budget={"params_kept": 0.85}, planner=planner)
    with pytest.raises(RefineError, match=r"names the sizes .*heads or hidden units went.*'kl'"):
        refined(gm, model, **BLOCKS)
    model, gm = usual()
    with pytest.raises(RefineError, match="compares with the blocks of the model"):
        refined(gm, model, teacher=copy.deepcopy(model), **BLOCKS)
    with pytest.raises(RefineError, match="'blocks' is measured against a teacher"):
        refined(gm, model, teacher=None, **BLOCKS)
    with pytest.raises(RefineError, match="temperature and data_weight belong to objective='kl'"):
        refined(gm, model, temperature=2.0, **BLOCKS)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    cfg = {"weight_types": {"fc": {"pattern": r"\d"}}, "group_size": 1, "compression_rate": 0.5}
    alone = fxshare.compile(plain, cfg, calibration=features(4))
    with pytest.raises(RefineError, match="no factor is in a layer whose number is known"):
        refined(alone, plain, features(), **BLOCKS)
