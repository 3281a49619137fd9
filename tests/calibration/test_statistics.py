"""Gradient statistics against gradients taken by hand, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxshare.base.numerics import worst
from fxshare.calibration.calibrate import calibrate
from fxshare.calibration.distance import DISTANCE, distance, output_rows
from fxshare.calibration.losses import default_loss
from fxshare.calibration.observed import GraphStage
from fxshare.calibration.statistics import Statistics
from fxshare.capture import capture
from fxshare.config import load_config
from fxshare.errors import CalibrationError
from fxshare.factors.metric import slice_statistics
from fxshare.sites.match import match
from fxshare.sites.tensors import dense_weights
from tests.planning.models import MANY, PLAIN, batches, features, llama, plain_model
from tests.strategies import no_warnings_of_ours
from tests.toys import GPT2, NANOGPT, TIED_MLP, VOCABULARY, WIDTH, same_tensors, tensors_of

FUSED = {
    "weight_types": {
        "attn": {"pattern": r".*\.attn\.c_attn$", "split": "qkv"},
        "fc": {"pattern": r".*\.mlp\.c_fc$"},
    },
    "block_pattern": r"h\.(\d+)",
}


def statistics(model: nn.Module, cfg: Any, data: Any, mode: Any = "fx", **keys: Any) -> Statistics:
    sites = match(model, load_config(cfg)).sites
    captured = capture(model, keys.pop("example", data[0]), mode=mode)
    with no_warnings_of_ours():
        return calibrate(captured, data, sites, gradients=True, **keys)


def moments(found: Statistics) -> dict[str, Tensor]:
    sites = {name: next(s for s in found.inputs if name.startswith(s)) for name in found.gradients}
    return {name: found.moment(name, site) for name, site in sites.items()}


def assert_same(left: Statistics, right: Statistics, limit: float) -> None:
    a, b = moments(left), moments(right)
    assert a.keys() == b.keys()
    for name in a:
        distance = worst(a[name], b[name])
        assert distance.relative <= limit, f"{name}: {distance}"
    assert left.mean_loss == pytest.approx(right.mean_loss, rel=limit)


def gradients_by_token(model: nn.Module, module: nn.Linear, ids: Tensor) -> Iterator[Tensor]:
    """The gradient at one token's output of a module, token by token."""
    for row in range(ids.shape[0]):
        for at in range(ids.shape[1]):
            push = torch.zeros(module.out_features, dtype=torch.float64, requires_grad=True)

            def nudge(m: Any, a: Any, y: Tensor, push: Tensor = push, at: Any = (row, at)) -> Any:
                moved = y.clone()
                moved[at] = moved[at] + push
                return moved

            handle = module.register_forward_hook(nudge)
            logits = model(ids)
            handle.remove()
            flat = logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(flat, ids[:, 1:].flatten(), reduction="sum")
            yield torch.autograd.grad(loss, push)[0]


def test_moments_are_those_of_each_tokens_gradient() -> None:
    model = llama(dtype=torch.float64)
    data = batches(2, rows=2, length=5)
    found = statistics(model, MANY, data)
    for name in ("layers.1.q_proj", "layers.2.down_proj"):
        module = model.get_submodule(name)
        rows = [g for ids in data for g in gradients_by_token(model, module, ids)]
        expected = torch.stack(rows).T @ torch.stack(rows) / len(rows)
        assert worst(expected, found.moment(name, name)).relative <= 1e-12
    assert found.loss == "next-token cross-entropy"
    with torch.no_grad():
        total = sum(float(default_loss(model(ids), {"ids": ids})[0]) for ids in data)
    assert found.mean_loss == pytest.approx(total / 20, rel=1e-12)


def test_the_slices_of_a_fused_linear_get_their_own_rows() -> None:
    model = NANOGPT.model(dtype=torch.float64)
    found = statistics(model, FUSED, batches(2), "modules")
    whole = {"weight_types": {"attn": {"pattern": r".*\.attn\.c_attn$"}}}
    fused = statistics(model, whole, batches(2), "modules")
    name = "transformer.h.1.attn.c_attn"
    all_rows = fused.moment(name, name)
    for at, part in enumerate("qkv"):
        rows = slice(at * WIDTH, (at + 1) * WIDTH)
        expected = all_rows[rows, rows]
        assert worst(expected, found.moment(f"{name}.{part}", name)).relative <= 1e-13


def test_order_and_batch_size_change_rounding_only() -> None:
    model = llama(dtype=torch.float64)
    data = batches(6, rows=2)

    def found(data: list[Tensor]) -> Statistics:
        return statistics(model, MANY, data, "modules")

    assert_same(found(data), found(data[::-1]), 1e-12)
    assert_same(found(data), found([torch.cat(data[:3]), torch.cat(data[3:])]), 1e-12)
    with pytest.raises(AssertionError):
        assert_same(found(data), found(data[:3]), 1e-3)


@pytest.mark.parametrize("mode", ["export", "modules"])
def test_front_ends_agree(mode: str) -> None:
    model = llama(dtype=torch.float64)
    assert_same(statistics(model, MANY, batches()), statistics(model, MANY, batches(), mode), 1e-12)


def padded_batches(garbage: int) -> list[dict[str, Tensor]]:
    """The same text, with different garbage in the padding at the end."""
    found = []
    for ids in batches(2, rows=3, length=7):
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        mask[2, 6:] = 0
        filled = torch.where(mask.bool(), ids, torch.full_like(ids, garbage))
        found.append({"input_ids": filled, "attention_mask": mask})
    return found


@pytest.mark.parametrize("mode", ["fx", "modules"])
def test_padding_counts_for_nothing(mode: str) -> None:
    model = GPT2.model(dtype=torch.float64)
    one, other = (statistics(model, FUSED, padded_batches(g), mode) for g in (1, 9))
    assert one.tokens == 2 * (4 + 7 + 6)
    assert_same(one, other, 1e-12)
    # row by row without any padding: the same tokens
    cut = [
        {"input_ids": batch["input_ids"][row : row + 1, :length]}
        for batch in padded_batches(1)
        for row, length in enumerate((4, 7, 6))
    ]
    assert_same(one, statistics(model, FUSED, cut, mode, example=padded_batches(1)[0]), 1e-10)


def test_a_mask_is_never_taken_for_the_tokens() -> None:
    logits = torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    ids = batches(1, rows=2, length=5)[0]
    mask = torch.ones_like(ids)
    first = default_loss(logits, {"attention_mask": mask, "input_ids": ids})[0]
    assert torch.equal(first, default_loss(logits, {"input_ids": ids})[0])


def test_nothing_is_predicted_from_padding_or_of_it() -> None:
    logits = torch.randn(1, 6, VOCABULARY, generator=torch.Generator().manual_seed(0))
    ids = batches(1, rows=1, length=6)[0]
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    found = default_loss(logits, {"ids": ids, "attention_mask": mask})[0]
    expected = default_loss(logits[:, 2:5], {"ids": ids[:, 2:5]})[0]
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("mode", ["fx", "export", "modules"])
def test_the_model_is_left_as_it_was(mode: str) -> None:
    model = llama()
    for at, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(at % 2 == 0)
        if at % 4 == 0:
            parameter.grad = torch.full_like(parameter, float(at))
    before, wanted = tensors_of(model), [p.requires_grad for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state, enabled = torch.random.get_rng_state(), torch.is_grad_enabled()
    statistics(model, MANY, batches(), mode, labels="sampled")
    assert same_tensors(before, tensors_of(model))
    assert [p.requires_grad for p in model.parameters()] == wanted
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (grad is None) == (parameter.grad is None)
        assert grad is None or torch.equal(grad, parameter.grad)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled() == enabled
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_model_has_the_same_statistics(frozen: bool) -> None:
    model = llama(dtype=torch.float64)
    model.requires_grad_(not frozen)
    with torch.no_grad():
        found = statistics(model, MANY, batches())
    assert_same(found, statistics(llama(dtype=torch.float64), MANY, batches()), 1e-14)


def test_sampled_labels_are_a_function_of_the_seed() -> None:
    model = llama(dtype=torch.float64)
    one, same, other = (
        moments(statistics(model, MANY, batches(), "modules", labels="sampled", seed=seed))
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    sampled = statistics(model, MANY, batches(), "modules", labels="sampled")
    assert sampled.loss.endswith("sampled labels")


def test_a_loss_of_ones_own_is_used() -> None:
    model = llama(dtype=torch.float64)
    seen: list[Tensor] = []

    def twice(output: Tensor, batch: Tensor) -> Tensor:
        seen.append(batch)
        return 2 * default_loss(output, {"ids": batch})[0]

    data = batches()
    found, plain = statistics(model, MANY, data, loss=twice), statistics(model, MANY, data)
    assert all(a is b for a, b in zip(seen, data, strict=True))
    assert found.loss == "the loss given"
    for name, moment in moments(plain).items():
        assert worst(4 * moment, moments(found)[name]).relative <= 1e-13


@pytest.mark.parametrize("mode", ["fx", "export", "modules"])
def test_without_tokens_the_distance_to_the_dense_output_is_the_loss(mode: str) -> None:
    model = plain_model(dtype=torch.float64)
    data = [x.double() for x in features()]
    found = statistics(model, PLAIN, data, mode)
    v = torch.cat(projections(model, data))
    assert found.loss == DISTANCE
    assert found.tokens == len(v)
    assert worst(v.T @ v / len(v), found.moment("down", "down")).relative <= 1e-12
    assert found.mean_loss == 0


def projections(model: nn.Module, data: list[Tensor]) -> list[Tensor]:
    """What the gradients at the output are: a standard normal vector over the norm of each row."""
    generator = torch.Generator().manual_seed(0)
    y = [model(x).detach() for x in data]
    v = [torch.randn(one.shape, generator=generator, dtype=one.dtype) for one in y]
    return [a / b.norm(dim=-1, keepdim=True) for a, b in zip(v, y, strict=True)]


def test_the_second_moment_is_the_gauss_newton_matrix_of_the_distance() -> None:
    model = plain_model(dtype=torch.float64)
    data = [x.double() for x in features()] * 40
    found = statistics(model, PLAIN, data).moment("down", "down")
    y = torch.cat([model(x) for x in data]).detach()
    expected = torch.eye(y.shape[1], dtype=torch.float64) * y.pow(2).sum(-1).reciprocal().mean()
    # the mean of n products of normal vectors: entries off by sqrt(2 / n) of the diagonal
    assert worst(expected, found).relative <= 5 * (2 / len(y)) ** 0.5


def test_rows_that_are_masked_do_not_count_in_the_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, other = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    pooled = torch.ones(2, 4)
    call = {"ids": torch.zeros(2, 3), "attention_mask": mask}
    rows = list(output_rows({"h": dense, "pooled": pooled}, call))
    assert [tuple(one.shape) for one in rows] == [(3, 4), (2, 4)]
    found = distance({"h": other, "pooled": 3 * pooled}, rows, call)
    kept = mask.bool()
    gaps = (other - dense)[kept].pow(2).sum(-1) / dense[kept].pow(2).sum(-1)
    assert found == pytest.approx(0.5 * (float(gaps.sum()) + 2 * 4), rel=1e-6)
    assert distance({"h": dense, "pooled": pooled}, rows, call) == 0


@pytest.mark.parametrize("mode", ["fx", "export", "modules"])
def test_activations_written_in_place_are_no_obstacle(mode: str) -> None:
    model = plain_model(dtype=torch.float64)
    data = [x.double() for x in features()]
    inside = [torch.relu(model.up(x)) for x in data]
    above = projections(model, data)
    delta = [(v @ model.down.weight) * (h > 0) for v, h in zip(above, inside, strict=True)]
    expected = torch.cat(delta).T @ torch.cat(delta) / 128
    found = statistics(model, PLAIN, data, mode).moment("up", "up")
    assert worst(expected.detach(), found).relative <= 1e-12


def test_losses_are_per_token_however_often_a_linear_is_called() -> None:
    model = TIED_MLP.model(dtype=torch.float64)
    cfg = {"weight_types": {"w": {"pattern": r"^(twice|down)$"}}}
    data = [TIED_MLP.inputs(seed=s, dtype=torch.float64)[0] for s in range(3)]
    found = statistics(model, cfg, data)
    sites = match(model, load_config(cfg)).sites
    weights = {site.name: model.get_submodule(site.name).weight.detach() for site in sites}
    slices = slice_statistics(sites, weights, found)
    assert found.tokens_of("twice") == 2 * found.tokens_of("down") == 2 * found.tokens
    assert torch.equal(slices["twice"].moment_OO, 2 * found.moment("twice", "twice"))
    assert torch.equal(slices["down"].moment_OO, found.moment("down", "down"))


# Refusals


class Odd(nn.Module):
    """A branch that the output does not depend on, and a root that has no slope at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.zeroed = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        aside = self.unused(x).detach()
        return self.used(x), aside + 0 * self.zeroed(x)


ODD = {"weight_types": {"w": {"pattern": "^(used|unused|zeroed)$"}}}


def only_the_first(output: Any, batch: Any) -> Tensor:
    return output[0].pow(2).sum()


@pytest.mark.parametrize("name", ["unused", "zeroed"])
def test_a_slice_without_gradient_is_named(name: str) -> None:
    loss = only_the_first if name == "unused" else None
    found = statistics(Odd().eval(), ODD, features(), loss=loss)
    assert found.moment("used", "used").shape == (8, 8)
    with pytest.raises(CalibrationError, match=f"'{name}' gets no gradient"):
        found.moment(name, name)


@pytest.mark.parametrize("mode", ["fx", "modules"])
def test_a_gradient_that_is_nan_is_named(mode: str) -> None:
    def rooted(output: Any, batch: Any) -> Tensor:
        # the root's slope at 0 is infinite, and infinity times 0 is NaN
        return (output * 0).sqrt().sum() + output.sum()

    with pytest.raises(CalibrationError, match=r"gradient at 'up' .* NaN or infinite"):
        statistics(plain_model(), PLAIN, features(), mode, loss=rooted)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda output, batch: output.sum(-1), r"expected a scalar tensor .* found Tensor \(32,\)"),
        (lambda output, batch: 1.5, "found float 1.5"),
        (lambda output, batch: output.detach().sum(), "depends on the model's output"),
        (lambda output, batch: output.sum() * math.inf, "calibration loss is"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, reason: str) -> None:
    with pytest.raises(CalibrationError, match=reason):
        statistics(plain_model(), PLAIN, features(), loss=loss)


def test_an_output_without_floats_needs_a_loss() -> None:
    with pytest.raises(CalibrationError, match="give loss="):
        default_loss({"ids": torch.ones(2, 3, dtype=torch.int64)}, {})


def test_inputs_of_linears_are_not_kept_for_gradients_of_weights() -> None:
    """They are most of what a batch has alive. The model's own weights stay as they are."""
    model = GPT2.model()
    sites = match(model, load_config(FUSED)).sites
    data = batches(1)
    captured = capture(model, data[0])
    weights = dense_weights(captured.model, sites)
    stage = GraphStage(captured, sites, weights, gradients=True)
    wide = 4 * WIDTH
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape[-1]) or t, _same):
        stage(captured.caller(data[0]))
    own = dict(captured.graph.named_parameters())
    ours = dict(stage.gm.named_parameters())
    assert all(one.requires_grad for one in own.values())
    assert all(ours[name].data_ptr() == one.data_ptr() for name, one in own.items())
    matrices = [name for name, one in own.items() if one.ndim == 2 and "wte" not in name]
    assert not any(ours[name].requires_grad for name in matrices if "wpe" not in name)
    frozen = kept.count(wide)
    kept.clear()
    for name in matrices:
        ours[name].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape[-1]) or t, _same):
        stage(captured.caller(data[0]))
    assert frozen < kept.count(wide)


def _same(one: Tensor) -> Tensor:
    return one
