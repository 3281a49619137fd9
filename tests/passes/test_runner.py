"""The runner: broken passes that it must catch, counts that a caller expects, and its manners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

import passes
from passes import (
    Applied,
    CleanUp,
    EnsuresError,
    FxShareError,
    Pass,
    PassError,
    RequiresError,
    ReuseBasis,
    ShapeError,
    SplitLinear,
    default_passes,
    equal_outputs,
    run,
)
from tests.passes.build import (
    Three,
    captured,
    inputs,
    shared_on_one_basis,
    site_of,
    split,
    whole_sites,
    x_of,
)
from tests.toys import BRANCHES, NANOGPT, TIED_MLP, TOYS, same_tensors, tensors_of

Body = Callable[[fx.GraphModule], Any]


@dataclass(frozen=True)
class Broken(Pass):
    """Does what ``body`` says, instead of rewriting."""

    name: ClassVar[str] = "broken"
    body: Body = field(kw_only=True)

    def rewrite(self, gm: fx.GraphModule) -> Any:
        return self.body(gm)


def _find(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def _output(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.op == "output")


def _says_zero(gm: fx.GraphModule) -> int:
    with gm.graph.inserting_before(_output(gm)):
        gm.graph.call_function(torch.neg, (_find(gm, "x"),))
    return 0


def _writes(gm: fx.GraphModule) -> int:
    with torch.no_grad():
        gm.attn.q.weight.mul_(2)
    return 1


def _writes_buffer(gm: fx.GraphModule) -> int:
    gm.count.add_(1)
    return 1


def _drops_an_output(gm: fx.GraphModule) -> int:
    _output(gm).args = (_output(gm).args[0][:2],)
    return 1


def _wraps_the_output(gm: fx.GraphModule) -> int:
    _output(gm).args = ({"y": _output(gm).args[0]},)
    return 1


def _drops_a_placeholder(gm: fx.GraphModule) -> int:
    _find(gm, "x").replace_all_uses_with(_find(gm, "x"))
    for node in list(gm.graph.nodes):
        if node.name == "unused":
            gm.graph.erase_node(node)
    return 1


def _adds_a_placeholder(gm: fx.GraphModule) -> int:
    with gm.graph.inserting_after(_find(gm, "x")):
        gm.graph.placeholder("more")
    return 1


def _changes_a_default(gm: fx.GraphModule) -> int:
    _find(gm, "unused").args = (3,)
    return 1


def _shares_a_parameter(gm: fx.GraphModule) -> int:
    gm.add_module("second", nn.Linear(6, 4))
    gm.second.weight = gm.attn.q.weight
    return 1


def _uses_before_def(gm: fx.GraphModule) -> int:
    _find(gm, "attn_q").args = (_find(gm, "attn_k"),)
    return 1


def _calls_nothing(gm: fx.GraphModule) -> int:
    _find(gm, "attn_q").target = "attn.z"
    return 1


def _deletes_a_module(gm: fx.GraphModule) -> int:
    del gm.attn.q
    return 1


def _key_error(gm: fx.GraphModule) -> int:
    return len({}["missing"])


BROKEN: dict[str, tuple[Body, type[FxShareError], str]] = {
    "count of zero": (_says_zero, EnsuresError, "says 0 rewrites but changed the graph text"),
    "returns None": (lambda gm: None, EnsuresError, "returned None; expected the number"),
    "returns a bool": (lambda gm: True, EnsuresError, "returned True; expected the number"),
    "negative count": (lambda gm: -1, EnsuresError, "returned -1; expected the number"),
    "returns the graph": (lambda gm: gm, EnsuresError, "expected the number of rewrites, an int"),
    "wrote into a weight": (_writes, EnsuresError, "wrote into tensor 'attn.q.weight'"),
    "wrote into a buffer": (_writes_buffer, EnsuresError, "wrote into tensor 'count'"),
    "dropped an output": (_drops_an_output, EnsuresError, "changed the inputs or outputs"),
    "wrapped the output": (_wraps_the_output, EnsuresError, "changed the inputs or outputs"),
    "dropped a placeholder": (_drops_a_placeholder, EnsuresError, "changed the inputs or outputs"),
    "added a placeholder": (_adds_a_placeholder, EnsuresError, "changed the inputs or outputs"),
    "changed a default": (_changes_a_default, EnsuresError, "changed the inputs or outputs"),
    "second owner": (_shares_a_parameter, EnsuresError, r"two owners: \['attn.q.weight', 'second"),
    "use before def": (_uses_before_def, EnsuresError, "left an invalid graph: .* before it has"),
    "calls nothing": (_calls_nothing, EnsuresError, "left an invalid graph: .* nonexistent"),
    "deleted a module": (_deletes_a_module, EnsuresError, "left an invalid graph: .* nonexistent"),
    "KeyError": (_key_error, PassError, "failed with KeyError: 'missing'"),
}


def _source() -> fx.GraphModule:
    class Counted(Three):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor, unused: int = 2) -> tuple[torch.Tensor, ...]:
            q, k, v = super().forward(x)
            return q + self.count, k, v

    return fx.symbolic_trace(Counted())


@pytest.mark.parametrize("what", BROKEN)
def test_broken_passes_are_caught_and_named(what: str) -> None:
    body, kind, message = BROKEN[what]
    with pytest.raises(PassError, match=message) as caught:
        run(_source(), [Broken(body=body)])
    assert type(caught.value) is kind
    assert "'broken'" in str(caught.value)


def test_the_cause_of_a_failure_is_kept() -> None:
    with pytest.raises(PassError) as caught:
        run(_source(), [Broken(body=_key_error)])
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_pass_without_a_name_is_named_by_its_class() -> None:
    class Nameless(Pass):
        def rewrite(self, gm: fx.GraphModule) -> int:
            raise ValueError("no")

    with pytest.raises(PassError, match="pass 'Nameless' failed with ValueError: no"):
        run(_source(), [Nameless()])


@pytest.mark.parametrize("wrong", [CleanUp, "clean-up", None, lambda gm: 0])
def test_only_instances_of_pass(wrong: Any) -> None:
    with pytest.raises(PassError, match=r"expected an instance of passes\.Pass .* found"):
        run(_source(), [wrong])


def test_errors_raised_on_purpose_pass_through() -> None:
    def refuse(gm: fx.GraphModule) -> int:
        raise ShapeError("broken: a reason of its own")

    with pytest.raises(ShapeError, match=r"^broken: a reason of its own$"):
        run(_source(), [Broken(body=refuse)])


def test_requires_comes_before_and_ensures_after() -> None:
    seen: list[str] = []

    @dataclass(frozen=True)
    class Ordered(Pass):
        name: ClassVar[str] = "ordered"

        def requires(self, gm: fx.GraphModule) -> None:
            seen.append("requires")

        def rewrite(self, gm: fx.GraphModule) -> int:
            seen.append("rewrite")
            return 0

        def ensures(self, gm: fx.GraphModule) -> None:
            seen.append("ensures")
            raise EnsuresError("ordered: not what was promised")

    with pytest.raises(EnsuresError, match="not what was promised"):
        run(_source(), [Ordered()])
    assert seen == ["requires", "rewrite", "ensures"]


def test_requires_of_a_later_pass_sees_the_earlier_ones() -> None:
    gm = captured(TIED_MLP)
    wanted = site_of(["twice"], [(".a", 8), (".b", 8)])
    with pytest.raises(RequiresError, match="no linear node reads 'twice'"):
        run(gm, [SplitLinear(sites=(wanted,)), SplitLinear(sites=(wanted,))])


def test_the_source_survives_a_broken_pass() -> None:
    gm = captured(TIED_MLP)
    text, tensors = str(gm.graph), tensors_of(gm)
    with pytest.raises(PassError):
        run(gm, [SplitLinear(sites=whole_sites(gm)[:1]), Broken(body=_key_error)])
    assert str(gm.graph) == text
    assert same_tensors(tensors_of(gm), tensors)


def test_expected_counts() -> None:
    gm = captured(BRANCHES)
    one = SplitLinear(sites=(site_of(["shared"], [(".a", 8), (".b", 8)]),))
    _, applied = run(gm, [one, CleanUp()], expect={"split-linear": 2, "clean-up": 0})
    assert [a.rewrites for a in applied] == [2, 0]
    with pytest.raises(EnsuresError, match="split-linear: expected 1 rewrites, made 2"):
        run(gm, [one], expect={"split-linear": 1})
    with pytest.raises(EnsuresError, match="clean-up: expected 1 rewrites, made 0"):
        run(gm, [CleanUp()], expect={"clean-up": 1})


def test_watch_is_called_after_each_pass() -> None:
    gm = captured(BRANCHES)
    seen: list[tuple[str, bool]] = []
    one = SplitLinear(sites=(site_of(["shared"], [(".a", 8), (".b", 8)]),))
    run(gm, [one, CleanUp()], watch=lambda p, g: seen.append((p.name, "shared.a" in str(g.graph))))
    assert seen == [("split-linear", True), ("clean-up", True)]


def test_the_code_is_that_of_the_graph_wherever_it_is_looked_at() -> None:
    seen: list[bool] = []

    def look(gm: fx.GraphModule) -> int:
        same = equal_outputs(source, gm, inputs(BRANCHES), tolerance=1e-12)
        seen.append("shared_a" in gm.code and same)
        return 0

    source = captured(BRANCHES)
    code = source.code
    one = SplitLinear(sites=(site_of(["shared"], [(".a", 8), (".b", 8)]),))
    result, _ = run(source, [one, Broken(body=look), CleanUp()], watch=lambda _, g: look(g) or None)
    assert look(result) == 0
    assert seen == [True] * 5
    assert "shared_a" not in source.code == code


@pytest.mark.broken_graphs
def test_code_that_cannot_be_written_names_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(self: SplitLinear, gm: fx.GraphModule) -> int:
        with gm.graph.inserting_before(_output(gm)):
            gm.graph.call_function(torch.neg, (object(),))  # <object object at 0x7f..>
        return 1

    monkeypatch.setattr(SplitLinear, "rewrite", spoiled)
    with pytest.raises(EnsuresError, match="passes 'split-linear' left an invalid graph"):
        run(captured(TIED_MLP), [CleanUp(), SplitLinear(sites=())])


def test_what_is_reported() -> None:
    _, (applied,) = run(captured(BRANCHES), [CleanUp()])
    assert isinstance(applied, Applied)
    assert (applied.name, applied.rewrites, applied.exact) == ("clean-up", 0, True)
    assert 0 <= applied.seconds < 60


def test_no_passes_give_a_copy_with_the_same_parameters() -> None:
    gm = captured(NANOGPT)
    result, applied = run(gm, [])
    assert applied == ()
    assert result is not gm
    assert {id(p) for p in result.parameters()} == {id(p) for p in gm.parameters()}
    assert {id(b) for b in result.buffers()} == {id(b) for b in gm.buffers()}


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_graph_is_kept(training: bool) -> None:
    gm = fx.symbolic_trace(TIED_MLP.model().train(training))
    result, _ = run(gm, [SplitLinear(sites=(site_of(["up"], [(".a", 8), (".b", 8)]),))])
    assert {m.training for m in result.modules()} == {training}


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = TIED_MLP.model()
    gm = fx.symbolic_trace(model)
    wanted = SplitLinear(sites=(site_of(["up"], [(".a", 8), (".b", 8)]),))
    with torch.inference_mode():
        result, _ = run(gm, [wanted, CleanUp()])
        assert equal_outputs(gm, result, [torch.randn(2, 16)], tolerance=1e-6)


# --- equal_outputs and the default list ----------------------------------------------------------


def test_equal_outputs_tells_a_wrong_rewrite() -> None:
    gm = captured(BRANCHES)
    x = inputs(BRANCHES)

    def off_by(factor: float) -> fx.GraphModule:
        def body(g: fx.GraphModule) -> int:
            bias = g.gate.bias.detach() * factor
            g.gate.bias = nn.Parameter(bias)
            return 1

        return run(gm, [Broken(body=body)])[0]

    assert equal_outputs(gm, off_by(1.0), x, tolerance=0.0)
    assert not equal_outputs(gm, off_by(1 + 1e-8), x, tolerance=1e-12)
    assert equal_outputs(gm, off_by(1 + 1e-8), x, tolerance=1e-6)
    assert not equal_outputs(gm, off_by(float("nan")), x, tolerance=1.0)


def test_the_default_list() -> None:
    gm = fx.symbolic_trace(Three())
    wanted = whole_sites(gm)
    first = split(gm, *wanted)
    factors = shared_on_one_basis(first)
    names = [p.name for p in default_passes(wanted, factors)]
    assert names == ["split-linear", "share-basis", "reuse-basis", "fuse-coefficients", "clean-up"]
    assert [p.name for p in default_passes(wanted)] == ["split-linear", "clean-up"]
    apart = default_passes(wanted, factors, fuse=False, extra=[Broken(body=lambda gm: 0)])
    assert [p.name for p in apart][-3:] == ["reuse-basis", "broken", "clean-up"]
    assert [p.exact for p in default_passes(wanted, factors)] == [True, False, True, True, True]
    result, _ = run(gm, default_passes(wanted, factors))
    assert equal_outputs(gm, result, [x_of(6)], tolerance=1e-12)


def test_everything_public_is_documented_and_exported() -> None:
    assert sorted(passes.__all__) == passes.__all__
    for name in passes.__all__:
        assert getattr(passes, name).__doc__, name


@pytest.mark.parametrize("toy", TOYS, ids=lambda t: t.name)
def test_running_nothing_on_every_toy(toy: Any) -> None:
    result, applied = run(captured(toy), [CleanUp(), ReuseBasis()])
    assert [a.rewrites for a in applied][1] == 0
    assert equal_outputs(captured(toy), result, inputs(toy), tolerance=0.0)


def test_an_endless_word_in_a_message_is_shown_in_part() -> None:
    said = str(PassError(f"name {'x' * 10_000!r}: choose another"))
    assert len(said) < 200
    assert said.startswith("name 'xxx")
    assert said.endswith("(10003 characters) choose another")
    assert str(PassError("a path/" + "y" * 500)) == "a path/" + "y" * 500
