"""Embeddings and what is tied to them: off by default, one basis for all readers when asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.calibration.calibrate import calibrate
from fxshare.calibration.lookups import Metric, RowCounter, metric
from fxshare.capture import capture
from fxshare.config import load_config
from fxshare.errors import ConfigError
from fxshare.plans.plan import Plan
from fxshare.result.products import dense_sites, slice_product
from fxshare.sites.match import match
from fxshare.sites.visible import visible_sites
from tests.toys import NANOGPT, VOCABULARY, WIDTH

pytestmark = pytest.mark.filterwarnings("ignore:.*store more than their dense weights")
DTYPE = torch.float64
TIED = {"emb": {"pattern": r"transformer\.wte$", "embedding": True}}
BOTH = {**TIED, "positions": {"pattern": r"transformer\.wpe$", "embedding": True}}
BLOCKS = {"fc": {"pattern": r".*\.c_fc$"}}
DEPTH = 14


class Untied(nn.Module):
    """An embedding and a head of their own; the embedding also feeds a skip to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + torch.tanh(self.mix(x)))


class Scaled(nn.Embedding):
    """As Gemma's: more than a weight, and more than a lookup."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH)
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale


class TiedToScaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = Scaled()
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def made(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make().eval().to(DTYPE)


def stored(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def nanogpt() -> nn.Module:
    return NANOGPT.model(dtype=DTYPE)


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (4, 10), generator=generator) for _ in range(count)]


def other() -> Tensor:
    return torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(9))


def types(make: Callable[[], nn.Module]) -> dict[str, Any]:
    if make is nanogpt:
        return BOTH
    return {"emb": {"pattern": "embed$", "embedding": True}}


MODELS = [nanogpt, lambda: made(Untied), lambda: made(TiedToScaled)]
NAMES = ["nanogpt", "untied", "scaled"]


def test_without_the_key_embeddings_and_what_is_tied_to_them_stay() -> None:
    model = nanogpt()
    cfg = load_config({"weight_types": {"all": {"pattern": r".*(wte|wpe|lm_head|c_fc)$"}}})
    matching = match(model, cfg)
    assert [s.name.rpartition(".")[2] for s in matching.sites] == ["c_fc"] * 3
    reasons = {s.name: s.reason for s in matching.skipped}
    assert set(reasons) == {"transformer.wte", "transformer.wpe", "lm_head"}
    assert all("`embedding: true`" in reason for reason in reasons.values())


@pytest.mark.parametrize("make", MODELS, ids=NAMES)
@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_exact_and_full_rank_are_the_original(
    make: Callable[[], nn.Module], front_end: Any
) -> None:
    model, found = make(), types(make)
    before = {name: p.clone() for name, p in model.named_parameters()}
    exact = fxshare.compile(
        model, {"weight_types": found}, calibration=batches(), capture=front_end
    )
    assert worst(model(other()), exact(other())).relative <= tolerance(DTYPE, DEPTH)
    assert stored(exact) == stored(model)
    full = fxshare.compile(
        model,
        {"weight_types": found, "group_size": 1, "compression_rate": 9.0},
        calibration=batches(),
        capture=front_end,
    )
    assert worst(model(other()), full(other())).relative <= tolerance(DTYPE, DEPTH)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("make", MODELS, ids=NAMES)
@pytest.mark.parametrize("front_end", ["fx", "export"])
def test_both_readers_read_one_product_and_it_is_stored_once(
    make: Callable[[], nn.Module], front_end: Any
) -> None:
    model = make()
    cfg = {"weight_types": types(make), "group_size": 1, "compression_rate": 0.5}
    gm = fxshare.compile(model, cfg, calibration=batches(), capture=front_end)
    plan = gm.fxshare.plan
    # the reference: the original with the product as its one weight
    products = dense_sites(gm, plan)
    copy = make()
    for site in plan.sites:
        copy.get_parameter(f"{site.name}.weight").data.copy_(products[site.name])
    assert worst(copy(other()), gm(other())).relative <= tolerance(DTYPE, DEPTH)
    assert worst(model(other()), gm(other())).relative > 1e-3
    saved = plan.dense_numbers - plan.stored_numbers
    assert saved > 0
    assert stored(model) - stored(gm) == saved


def test_a_wrong_weight_behind_the_lookup_is_caught() -> None:
    model = nanogpt()
    cfg = {"weight_types": TIED, "group_size": 1, "compression_rate": 0.5}
    gm = fxshare.compile(model, cfg, calibration=batches())
    (read,) = [n for n in gm.graph.nodes if n.op == "get_attr" and "basis" in str(n.target)]
    with gm.graph.inserting_after(read):
        turned = gm.graph.call_method("flip", (read, 0))
    read.replace_all_uses_with(turned, delete_user_cb=lambda user: user is not turned)
    gm.recompile()
    assert not fxshare.verify(model, gm, [batches()[0]]).ok


def test_planned_spends_on_embeddings_by_the_loss() -> None:
    model = nanogpt()
    cfg = {
        "weight_types": BOTH,
        "budget": {"params_kept": 0.7},
        "planner": {"search": "off"},
    }
    gm = fxshare.compile(model, cfg, calibration=batches())
    plan = gm.fxshare.plan
    assert plan.params_kept <= 0.7
    looked_up = {s.name for site in plan.sites if site.lookups for s in site.slices}
    groups = [g for g in plan.groups if set(g.slices) & looked_up]
    assert groups
    assert all(g.storage == "plain" and g.loss is not None for g in groups)


def test_the_layer_of_a_weight_alone_in_its_type_is_not_asked_for() -> None:
    model = nanogpt()
    cfg = {
        "weight_types": {**TIED, **BLOCKS},
        "block_pattern": r"transformer\.h\.(\d+)",
        "group_size": 3,
        "compression_rate": 0.5,
    }
    gm = fxshare.compile(model, cfg, calibration=batches())
    assert [(g.type, len(g.slices)) for g in gm.fxshare.plan.groups] == [("emb", 1), ("fc", 3)]


def test_statistics_of_an_embedding_are_counts_and_gradients() -> None:
    model = made(Untied)
    cfg = load_config({"weight_types": {"emb": {"pattern": "embed$", "embedding": True}}})
    captured = capture(model, batches()[0], mode="fx")
    sites, _ = visible_sites(captured, match(model, cfg))
    found = calibrate(
        captured,
        batches(),
        sites,
        gradients=True,
        loss=lambda output, batch: output.square().sum() / 2,
    )
    counts = torch.zeros(VOCABULARY, dtype=DTYPE)
    moment = torch.zeros(WIDTH, WIDTH, dtype=DTYPE)
    for ids in batches():
        x = model.embed(ids).detach().requires_grad_()
        output = model.head(x + torch.tanh(model.mix(x)))
        (gradient,) = torch.autograd.grad(output.square().sum() / 2, x)
        rows = gradient.reshape(-1, WIDTH)
        moment += rows.T @ rows
        counts += torch.bincount(ids.flatten(), minlength=VOCABULARY)
    tokens = int(counts.sum())
    close = {"rtol": 1e-9, "atol": 0.0}
    assert found.tokens == tokens
    torch.testing.assert_close(found.gram("embed"), moment / tokens, rtol=1e-9, atol=1e-9)
    share = (counts + 1) / (tokens + VOCABULARY)
    torch.testing.assert_close(found.moment("embed", "embed"), share, **close)


def test_a_metric_of_two_readers_keeps_the_trace_and_either_one_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, 4, generator=generator, dtype=DTYPE) for _ in range(2))
    one = Metric(torch.rand(6, generator=generator, dtype=DTYPE), x.T @ x)
    two = Metric(torch.rand(6, generator=generator, dtype=DTYPE), y.T @ y)
    counter = RowCounter(6)
    assert metric([], 1, one) is one

    class Part:
        tokens = 1
        gradient = type("Given", (), {"gram": lambda self: two.columns_II})()

        def share_V(self) -> Tensor:
            return two.rows_V

    both = metric([Part()], 1, one)  # type: ignore[list-item]
    trace = sum(float(m.rows_V.sum() * m.columns_II.trace()) for m in (one, two))
    assert float(both.rows_V.sum() * both.columns_II.trace()) == pytest.approx(trace, rel=1e-12)
    counter(torch.tensor([[1, 1, 2]]), torch.tensor([[1, 1, 0]]))
    assert counter.counts_V.tolist() == [0, 2, 0, 0, 0, 0]


def test_saved_lowered_and_trained(tmp_path: Any) -> None:
    model = nanogpt()
    cfg = {
        "weight_types": {**BOTH, **BLOCKS},
        "block_pattern": r"transformer\.h\.(\d+)",
        "group_size": 1,
        "compression_rate": 0.5,
    }
    gm = fxshare.compile(model, cfg, calibration=batches())
    expected = gm(other())[0]
    fxshare.save(gm, tmp_path / "saved")
    again = fxshare.load(tmp_path / "saved", model=nanogpt())
    assert torch.equal(again(other())[0], expected)
    for prefer in ("memory", "speed"):
        lowered = fxshare.lower(gm, prefer=prefer)
        assert worst(expected, lowered(other())[0]).relative <= tolerance(DTYPE, DEPTH)
        assert torch.equal(fxshare.readable(lowered)(other())[0], expected)
    (name,) = [g.name for g in gm.fxshare.plan.groups if g.type == "emb"]
    basis, rows = gm.get_parameter(f"{name}.weight"), gm.get_parameter("transformer.wte.weight")
    gm(other())[0].square().mean().backward()
    # the same sum of both readers as autograd finds for the product as one weight
    product = (rows @ basis).detach().requires_grad_()
    copy = nanogpt()
    copy.load_state_dict(dense_state(gm, copy))
    tied = {"transformer.wte.weight": product, "lm_head.weight": product}
    torch.func.functional_call(copy, tied, (other(),))[0].square().mean().backward()
    assert product.grad is not None
    torch.testing.assert_close(basis.grad, rows.detach().T @ product.grad)
    torch.testing.assert_close(rows.grad, product.grad @ basis.detach().T)


def dense_state(gm: Any, copy: nn.Module) -> dict[str, Tensor]:
    """The state of a copy in which every site has its product."""
    state = copy.state_dict()
    for site in gm.fxshare.plan.sites:
        product = torch.cat([slice_product(gm, s.name) for s in site.slices])
        for reader in site.readers:
            state[f"{reader}.weight"] = product
    return state


@pytest.mark.parametrize(
    "to",
    ["dense", "py", "pt2", pytest.param("onnx", marks=pytest.mark.slow)],
)
def test_exported(to: str, tmp_path: Any) -> None:
    # in float32, as it leaves; the export is read back and compared with the compiled model
    model = NANOGPT.model()
    cfg = {"weight_types": BOTH, "group_size": 1, "compression_rate": 0.5}
    gm = fxshare.compile(model, cfg, calibration=batches())
    options = {"original": model} if to == "dense" else {}
    done = fxshare.export(gm, tmp_path / f"m.{to}", to=to, **options)
    assert done.distance is not None
    if to == "pt2":  # nothing of the product is in the file: V (R) and (R) I, of two weights
        found = torch.export.load(tmp_path / "m.pt2").state_dict
        assert sum(t.numel() for t in found.values()) == stored(gm)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"sparse": True}, "sparse"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
    ],
)
def test_embeddings_with_a_behaviour_of_their_own_are_refused(
    change: dict[str, Any], reason: str
) -> None:
    model = made(Untied)
    model.embed = nn.Embedding(VOCABULARY, WIDTH, dtype=DTYPE, **change)
    with pytest.raises(fxshare.FxShareError, match=reason):
        fxshare.compile(
            model,
            {"weight_types": {"emb": {"pattern": "embed$", "embedding": True}}},
            calibration=batches(),
        )


def test_the_backend_says_that_it_leaves_embeddings() -> None:
    cfg = {"weight_types": TIED, "group_size": 1, "compression_rate": 0.5}
    gm = fxshare.compile(nanogpt(), cfg, calibration=batches())
    with pytest.raises(fxshare.FxShareError, match=r"looks up: run the compiled module itself"):
        fxshare.backend(gm)


def test_rows_are_not_split() -> None:
    spec = {"pattern": "embed$", "embedding": True, "split": "heads", "n_head": 4}
    with pytest.raises(ConfigError, match="rows of an embedding are tokens"):
        load_config({"weight_types": {"emb": spec}})


def test_a_plan_that_stores_them_pivoted_is_refused() -> None:
    model = nanogpt()
    cfg = {"weight_types": TIED, "group_size": 1, "compression_rate": 0.5}
    plan = fxshare.plan(model, cfg)
    text = plan.to_json().replace('"storage": "plain"', '"storage": "pivoted"')
    with pytest.raises(fxshare.FxShareError, match="stored plain"):
        Plan.from_json(text)


def test_module_granularity_says_that_it_leaves_them() -> None:
    model = nanogpt()
    cfg = {"weight_types": {**BOTH, **BLOCKS}, "group_size": 1, "compression_rate": 0.5}
    gm = fxshare.compile(model, cfg, calibration=batches(), capture="modules")
    skipped = {s.name: s.reason for s in gm.fxshare.plan.skipped}
    assert set(skipped) == {"transformer.wte", "transformer.wpe"}
    assert all("capture: modules" in reason for reason in skipped.values())


def test_a_weight_that_something_else_reads_is_left_alone() -> None:
    class Odd(Untied):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.embed.weight.sum()

    model = made(Odd)
    with pytest.raises(fxshare.FxShareError, match="embed"):
        fxshare.compile(
            model,
            {"weight_types": {"emb": {"pattern": "embed$", "embedding": True}}},
            calibration=batches(),
        )


def test_half_precision_and_functional_embeddings() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, WIDTH)
            self.mix = nn.Linear(WIDTH, WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.mix(F.embedding(ids, self.table.weight)), self.table.weight)

    model = made(Functional)
    cfg = {
        "weight_types": {"emb": {"pattern": "table$", "embedding": True}},
        "group_size": 1,
        "compression_rate": 0.5,
    }
    gm = fxshare.compile(model, cfg, calibration=batches())
    (site,) = gm.fxshare.plan.sites
    assert site.lookups == ("table",)
    assert (
        stored(model) - stored(gm) == gm.fxshare.plan.dense_numbers - gm.fxshare.plan.stored_numbers
    )
    half = fxshare.compile(model.to(torch.bfloat16), cfg, calibration=batches())
    assert half(other()).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "mode",
    [
        {"group_size": 1, "compression_rate": 0.5},
        {"budget": {"params_kept": 0.7}, "planner": {"search": "off"}},
    ],
    ids=["sharing", "planned"],
)
def test_on_cuda(mode: dict[str, Any]) -> None:
    model = nanogpt().cuda()
    gm = fxshare.compile(model, {"weight_types": BOTH, **mode}, calibration=batches())
    assert {p.device.type for p in gm.parameters()} == {"cuda"}
    here = fxshare.compile(nanogpt(), {"weight_types": BOTH, **mode}, calibration=batches())
    ranks = [g.rank for g in here.fxshare.plan.groups]
    assert [g.rank for g in gm.fxshare.plan.groups] == ranks
    assert fxshare.verify(model, gm).ok


def test_a_plan_of_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = Untied()
    cfg = {"weight_types": {"emb": {"pattern": "embed$", "embedding": True}}}
    plan = fxshare.plan(model, {**cfg, "group_size": 1, "compression_rate": 0.5})
    (group,) = plan.groups
    assert (group.in_features, group.out_features) == (WIDTH, VOCABULARY)
    planned = fxshare.plan(model, {**cfg, "budget": {"params_kept": 0.5}})
    assert [g.storage for g in planned.groups] == ["plain"]
