"""``fxshare.refine``: nearer to the original, never worse, and nothing else touched."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxshare
from fxshare import FxShareError
from fxshare.base.numerics import tolerance, worst
from fxshare.errors import ConfigError, FxShareWarning, GuardError, RefineError
from fxshare.refining.parameters import trainable_of
from fxshare.result.products import slices_of
from fxshare.store.manifest import MANIFEST, REPORT, file_entry, read_manifest
from tests.refining.build import equal, everything, features, ids, refined, subject, usual


def logits(module: Any, batch: Tensor) -> Tensor:
    with torch.no_grad():
        output = module(batch)
    return getattr(output, "logits", output)


def divergence(model: Any, gm: Any, batches: list[Tensor]) -> float:
    """KL per token, by another way of computing it."""
    total = 0.0
    for batch in batches:
        p, q = (logits(m, batch).double().softmax(-1) for m in (model, gm))
        total += float((p * (p / q).log()).sum(-1).mean())
    return total / len(batches)


@pytest.mark.parametrize("how", ["shared", "planned"])
def test_it_comes_nearer_to_the_original_and_verifies(how: Any) -> None:
    model, gm = subject("llama", how)
    held_out = ids(3, seed=9)
    result = refined(gm, model, steps=20, heldout=held_out, learning_rate=4e-3)
    before, after = (divergence(model, m, held_out) for m in (gm, result))
    done = result.fxshare.refined[-1]
    assert after < 0.97 * before
    assert done.before.objective == pytest.approx(before, rel=1e-4)
    assert done.after.objective == pytest.approx(after, rel=1e-4)
    assert done.after.objective == min(p.loss for p in done.curve)
    assert (done.objective, done.steps, done.stopped, done.dropped) == ("kl", 20, "done", 0)
    assert (done.tokens, done.held_out) == (20 * 32, 3 * 32)
    for m in (gm, result):
        check = fxshare.verify(model, m)
        assert check.ok, str(check)
    # the record of the one does not hold for the other
    wrong = copy.deepcopy(result)
    wrong.meta["fxshare"] = gm.fxshare
    failed = [c.what for c in fxshare.verify(model, wrong).checks if not c.ok]
    assert failed == ["relative error of each slice's weight"]


def test_numbers_and_plan_stay_and_pivots_stay_pivots() -> None:
    model, gm = subject("llama", "planned")
    result = refined(gm, model)
    assert result.fxshare.plan == gm.fxshare.plan
    assert any(place.pivoted for place in slices_of(gm).values())
    assert slices_of(result) == slices_of(gm)
    old, new = everything(gm), everything(result)
    assert {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}
    places = [place for place in slices_of(gm).values() if place.basis]
    trained = {f"{name}.weight" for p in places for name in (p.basis, p.module)}
    assert {n for n in old if not torch.equal(old[n], new[n])} == trained
    # what was not trained is shared, and not only equal
    ours, theirs = dict(result.named_parameters()), dict(gm.named_parameters())
    assert all((ours[n] is theirs[n]) != (n in trained) for n in ours)


def test_what_is_given_stays_bit_for_bit() -> None:
    model, gm = subject("nanogpt", "shared")  # it has dropout, and another mode to lose
    model.train()
    gm.get_submodule("transformer.h.0").training = True
    other = copy.deepcopy(model).eval()
    modules = (gm, model, other)
    tensors = [everything(m) for m in modules]
    modes = [[(n, m.training) for n, m in each.named_modules()] for each in modules]
    flags = [[p.requires_grad for p in each.parameters()] for each in modules]
    record = gm.fxshare
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.no_grad():
        result = refined(gm, model, teacher=other)
        assert not torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())
    assert all(equal(old, everything(m)) for old, m in zip(tensors, modules, strict=True))
    assert modes == [[(n, m.training) for n, m in each.named_modules()] for each in modules]
    assert flags == [[p.requires_grad for p in each.parameters()] for each in modules]
    assert all(p.grad is None for each in modules for p in each.parameters())
    assert gm.fxshare is record
    assert not record.refined
    assert [m.training for m in result.modules()] == [m.training for m in gm.modules()]
    assert [p.requires_grad for p in result.parameters()] == flags[0]
    assert all(p.grad is None for p in result.parameters())


def test_a_frozen_model_is_refined_and_stays_frozen() -> None:
    model, _ = usual()
    model = copy.deepcopy(model).requires_grad_(False)
    gm = fxshare.compile(model, usual()[1].fxshare.config, calibration=ids(4))
    result = refined(gm, model)
    assert result.fxshare.refined[-1].kept > 0
    assert not any(p.requires_grad for p in result.parameters())


def test_in_inference_mode() -> None:
    model, gm = usual()
    with torch.inference_mode():
        result = refined(gm, model)
    assert not any(p.is_inference() for p in result.parameters())
    assert result.fxshare.refined[-1].kept > 0


def test_the_seed_decides_and_the_state_of_torch_does_not() -> None:
    model, gm = usual()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        found.append(everything(refined(gm, model, seed=seed)))
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_never_worse_where_the_rate_is_absurd() -> None:
    model, gm = usual()
    result = refined(gm, model, learning_rate=0.99, steps=20)
    done = result.fxshare.refined[-1]
    assert done.after.objective <= done.before.objective
    if done.kept == 0:
        assert equal(everything(gm), everything(result))


def test_the_first_state_comes_back_as_it_was_where_nothing_is_better() -> None:
    model, gm = usual()

    def loss(output: Any, batch: Any) -> Tensor:  # what is trained on is the opposite
        return output.logits.pow(2).sum() * (-1 if torch.is_grad_enabled() else 1)

    result = refined(gm, model, loss=loss, steps=40)
    done = result.fxshare.refined[-1]
    assert (done.kept, done.stopped, done.objective) == (0, "rising", "the loss given")
    assert done.before == done.after
    assert done.steps < 40
    assert equal(everything(gm), everything(result))  # balancing included
    assert "nothing was better" in str(done)


@pytest.mark.parametrize("objective", ["kl", "ce", "hidden"])
def test_every_objective_improves_on_its_own_terms(objective: Any) -> None:
    model, gm = usual()
    done = refined(gm, model, objective=objective, steps=20).fxshare.refined[-1]
    assert done.objective == objective
    assert done.after.objective < done.before.objective
    assert done.after.data_loss is not None
    if objective == "ce":
        assert done.after.data_loss == pytest.approx(done.after.objective)


def test_without_a_teacher_it_is_the_datas_own_loss() -> None:
    model, gm = usual()
    held_out = ids(2, seed=4)
    done = refined(gm, model, teacher=None, heldout=held_out).fxshare.refined[-1]
    assert done.objective == "ce"
    own = [
        F.cross_entropy(logits(gm, b)[:, :-1].flatten(0, 1), b[:, 1:].flatten()) for b in held_out
    ]
    assert done.before.objective == pytest.approx(float(torch.stack(own).mean()), rel=1e-5)


def test_temperature_and_a_mix_with_the_data() -> None:
    model, gm = usual()
    held_out = ids(1, seed=4)
    options = {"heldout": held_out, "steps": 1, "temperature": 2.0, "data_weight": 0.25}
    found = refined(gm, model, **options).fxshare.refined[-1].before.objective
    wanted, own = (logits(m, held_out[0]) / 2 for m in (model, gm))
    kl = F.kl_div(own.log_softmax(-1), wanted.softmax(-1), reduction="sum") / held_out[0].numel()
    data = F.cross_entropy(2 * own[:, :-1].flatten(0, 1), held_out[0][:, 1:].flatten())
    assert found == pytest.approx(float(0.75 * 4 * kl + 0.25 * data), rel=1e-5)


@pytest.mark.parametrize("how", ["shared", "planned"])
def test_an_encoder_learns_its_outputs(how: Any) -> None:
    model, gm = subject("encoder", how)
    result = refined(gm, model)
    done = result.fxshare.refined[-1]
    assert (done.objective, done.after.data_loss) == ("hidden", None)
    assert done.after.objective < done.before.objective
    assert fxshare.verify(model, result).ok


def test_masked_positions_do_not_count() -> None:
    model, gm = usual()
    batches = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in ids(4)]
    for batch in batches:
        batch["attention_mask"][0, 5:] = 0
    options = {"heldout": batches[:1], "steps": 2}
    found = []
    for filling in (0, 7):
        for batch in batches:
            batch["input_ids"][0, 5:] = filling
        found.append(refined(gm, model, batches[1:], **options).fxshare.refined[-1])
    assert found[0].before == found[1].before
    assert found[0].after == found[1].after
    assert (found[0].tokens, found[0].held_out) == (2 * 29, 29)


def test_a_second_corpus_is_measured_beside() -> None:
    model, gm = usual()
    second = ids(2, seed=77)
    result = refined(gm, model, second=second)
    done = result.fxshare.refined[-1]
    before, after = (divergence(model, m, second) for m in (gm, result))
    assert done.second_before is not None
    assert done.second_after is not None
    assert done.second_before.objective == pytest.approx(before, rel=1e-4)
    assert done.second_after.objective == pytest.approx(after, rel=1e-4)
    assert "second corpus" in str(done)


@pytest.mark.parametrize("how", ["shared", "planned"])
def test_norms_and_biases_on_request(how: Any, tmp_path: Path) -> None:
    model, gm = subject("nanogpt", how)
    plain = refined(gm, model)
    result = refined(gm, model, also=("norms", "biases"))
    old, new, kept = everything(gm), everything(result), everything(plain)
    norms = [n for n in old if ".ln_" in n]
    biases = [n for n in old if n.endswith("bias") and n not in norms]
    assert len(norms) > 4
    assert len(biases) > 4
    assert all(not torch.equal(old[n], new[n]) for n in (*norms, *biases))
    assert all(torch.equal(old[n], kept[n]) for n in (*norms, *biases))
    check = fxshare.verify(model, result)
    assert check.ok, str(check)
    fxshare.save(result, tmp_path / "out")
    loaded = fxshare.load(tmp_path / "out", model)
    assert fxshare.verify(model, loaded).ok
    assert loaded.fxshare.refined == result.fxshare.refined
    # a norm that is not the recorded one is found
    with torch.no_grad():
        loaded.get_parameter(norms[0]).mul_(1.001)
    failed = [c.what for c in fxshare.verify(model, loaded).checks if not c.ok]
    assert failed == ["shift of each other refined parameter"]


def test_codes_stay_where_norms_and_biases_are_trained() -> None:
    pytest.importorskip("torchao")
    planner = {"bits": [8], "search": "off", "kinds": ["basis", "units"]}
    model, gm = subject("gpt2", "exact", budget={"bytes_kept": 0.2}, planner=planner)
    assert any(group.bits == 8 for group in gm.fxshare.plan.groups)
    with pytest.raises(RefineError, match="codes of a quantised model cannot be trained"):
        refined(gm, model)
    result = refined(gm, model, also=("norms", "biases"), steps=30, learning_rate=1e-3)
    old, new = everything(gm), everything(result)
    trained = {name for name in old if not torch.equal(old[name], new[name])}
    assert {n for n in old if ".ln_" in n} <= trained
    assert all(n.endswith("bias") or ".ln_" in n for n in trained)
    assert result.fxshare.refined[-1].after.objective < result.fxshare.refined[-1].before.objective
    assert result.fxshare.refined[-1].trained == ("norms", "biases")
    check = fxshare.verify(model, result)
    assert check.ok, str(check)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("capture", ["auto", "export", "modules"])
def test_norms_and_biases_however_captured(capture: str, dtype: torch.dtype) -> None:
    model, gm = subject("nanogpt", "planned", capture=capture, dtype=dtype)
    result = refined(gm, model, also=("norms", "biases"))
    assert result.fxshare.refined[-1].kept > 0
    check = fxshare.verify(model, result, ids(1))
    assert check.ok, str(check)
    assert len(result.fxshare.other_shifts) > 4


def test_a_record_of_a_parameter_that_is_not_there_fails() -> None:
    model, gm = usual()
    wrong = copy.deepcopy(gm)
    wrong.meta["fxshare"] = replace(gm.fxshare, other_shifts={"no.such.norm": 0.0})
    failed = [c.what for c in fxshare.verify(model, wrong).checks if not c.ok]
    assert failed == ["shift of each other refined parameter"]


def test_a_folder_of_before_still_loads(tmp_path: Path) -> None:
    model, gm = usual()
    fxshare.save(gm, tmp_path / "old")
    report = json.loads((tmp_path / "old" / REPORT).read_text())
    for group in report["groups"]:
        del group["refined"]
    (tmp_path / "old" / REPORT).write_text(json.dumps(report))
    manifest = read_manifest(tmp_path / "old").model_dump()
    for key in ("refined", "other_shifts"):
        assert not manifest.pop(key)
    manifest["files"][REPORT] = file_entry(tmp_path / "old" / REPORT).model_dump()
    plain = json.loads(json.dumps(manifest))
    plain["sha256"] = hashlib.sha256(
        json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
    (tmp_path / "old" / MANIFEST).write_text(json.dumps(plain))
    loaded = fxshare.load(tmp_path / "old")
    assert loaded.fxshare.refined == ()
    assert refined(loaded, model).fxshare.refined[-1].kept > 0


def test_again_what_was_refined() -> None:
    model, gm = subject("nanogpt", "shared")
    once = refined(gm, model, also="norms")
    twice = refined(once, model, seed=3)
    assert len(twice.fxshare.refined) == 2
    assert twice.fxshare.refined[0] == once.fxshare.refined[0]
    assert fxshare.verify(model, twice).ok


@pytest.mark.parametrize(
    ("how", "prefer"),
    [
        ("shared", "memory"),
        ("planned", "speed"),
        pytest.param("shared", "speed", marks=pytest.mark.slow),
        pytest.param("planned", "memory", marks=pytest.mark.slow),
    ],
)
def test_what_was_lowered_is_lowered_again(how: Any, prefer: Any, tmp_path: Path) -> None:
    model, gm = subject("llama", how)
    lowered = fxshare.lower(gm, prefer=prefer)
    before = everything(lowered)
    result = refined(lowered, model)
    assert result.fxshare.lowered.prefer == prefer
    assert equal(before, everything(lowered))
    done = result.fxshare.refined[-1]
    assert done.after.objective < done.before.objective
    assert divergence(model, result, ids()) < divergence(model, lowered, ids())
    check = fxshare.verify(model, result)
    assert check.ok, str(check)
    fxshare.save(result, tmp_path / "out")
    batch = ids(1)[0]
    assert torch.equal(logits(fxshare.load(tmp_path / "out"), batch), logits(result, batch))


def test_at_module_granularity(tmp_path: Path) -> None:
    for how in ("shared", "planned"):
        model, gm = subject("llama", how, capture="modules")
        before = everything(gm)
        result = refined(gm, model)
        assert type(result) is type(gm)
        assert equal(before, everything(gm))
        done = result.fxshare.refined[-1]
        assert done.after.objective < done.before.objective
        assert fxshare.verify(model, result, ids(1)).ok
        fxshare.save(result, tmp_path / how)
        batch = ids(1)[0]
        assert torch.equal(logits(fxshare.load(tmp_path / how), batch), logits(result, batch))


def test_all_that_a_compiled_model_does(tmp_path: Path) -> None:
    model, gm = subject("llama", "planned")
    batch = ids(1)[0]
    gm.generate(batch[:1, :4], max_new_tokens=2, do_sample=False)  # its steps are not the result's
    result = refined(gm, model)
    assert "refined by kl: 12 steps" in str(result.fxshare.report)
    assert "moved by refining" in str(result.fxshare.report)
    assert "moved by refining" not in str(gm.fxshare.report)
    wanted = logits(result, batch)
    assert not torch.equal(wanted, logits(gm, batch))
    lowered = fxshare.lower(result)
    assert worst(wanted, logits(lowered, batch)).relative <= tolerance(torch.float32, 50)
    new = result.generate(batch[:1, :4], max_new_tokens=4, do_sample=False)
    own = model_with(model, result).generate(batch[:1, :4], max_new_tokens=4, do_sample=False)
    assert torch.equal(new, own)
    done = fxshare.export(result, tmp_path / "dense", to="dense", original=model)
    assert done.distance is not None
    assert done.distance.relative <= done.limit
    assert torch.equal(logits(copy.deepcopy(result), batch), wanted)


def model_with(model: nn.Module, gm: Any) -> Any:
    """The original with the weights that ``gm`` stands for."""
    from fxshare.verifying.multiplied import multiplied_out

    return multiplied_out(model, gm)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_a_model_alone_that_is_in_half_precision(dtype: torch.dtype) -> None:
    """A LayerNorm with weights in float16 refuses what autocast gives it."""
    model, gm = subject("gpt2", "shared", dtype=dtype)
    plain, cast = (refined(gm, model, steps=3, autocast=wanted) for wanted in (False, True))
    assert equal(everything(plain), everything(cast))
    assert cast.fxshare.refined[-1].dropped == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_the_models_dtype(dtype: torch.dtype) -> None:
    model, gm = subject("llama-like", "shared", dtype=dtype)
    result = refined(gm, model, steps=20)
    assert {p.dtype for p in result.parameters()} == {dtype}
    done = result.fxshare.refined[-1]
    assert done.after.objective < done.before.objective
    assert fxshare.verify(model, result).ok


def test_tied_and_looked_up_weights() -> None:
    """The head is tied to the embedding, and both read one coefficient."""
    model, gm = subject(
        "nanogpt",
        "shared",
        weight_types={"emb": {"pattern": r"transformer\.wte$", "embedding": True}},
    )
    place = slices_of(gm)["transformer.wte"]
    assert place.basis is not None
    result = refined(gm, model)
    name = f"{place.module}.weight"
    assert not torch.equal(everything(result)[name], everything(gm)[name])
    assert fxshare.verify(model, result).ok


def test_accumulated_batches_are_one_larger_batch() -> None:
    model, gm = subject("llama-like", "shared", dtype=torch.float64)
    four = ids(4)
    held_out = ids(1, seed=3)
    options = {"steps": 3, "heldout": held_out}
    whole = refined(gm, model, [torch.cat(four)], **options)
    parts = refined(gm, model, four, accumulate=4, **options)
    for name, tensor in everything(whole).items():
        other = everything(parts)[name]
        assert worst(tensor, other).relative <= tolerance(torch.float64, 200), name


def test_activations_in_a_file_change_nothing() -> None:
    model, gm = usual()
    assert equal(everything(refined(gm, model)), everything(refined(gm, model, offload=True)))


def test_a_compiled_step_is_the_same_step() -> None:
    model, gm = subject("branches", "shared")
    by_graph = functools.partial(torch.compile, backend="aot_eager")
    with mock.patch.object(torch, "compile", by_graph), warnings.catch_warnings():
        warnings.simplefilter("error", FxShareWarning)
        result = refined(gm, model, features(), steps=4, compile=True)
    for name, tensor in everything(refined(gm, model, features(), steps=4)).items():
        # Adam divides by the root of a square: what rounding makes of a gradient is amplified
        assert worst(tensor, everything(result)[name]).relative <= 1e-3, name
    assert result.fxshare.refined[-1].kept > 0


def test_a_step_that_cannot_be_compiled_runs_as_it_is() -> None:
    model, gm = usual()

    def broken(module: Any) -> Any:
        def run(**call: Any) -> Any:
            raise TypeError("no such kernel")

        return run

    with (
        mock.patch.object(torch, "compile", broken),
        pytest.warns(FxShareWarning, match=r"cannot be compiled \(TypeError: no such kernel\)"),
    ):
        result = refined(gm, model, compile=True)
    assert equal(everything(result), everything(refined(gm, model)))


# what is refused ------------------------------------------------------------------------------


def test_time_is_asked_for() -> None:
    model, gm = usual()
    with pytest.raises(ConfigError, match=r"minutes=\.\.\. or steps=\.\.\., found neither"):
        fxshare.refine(gm, model, ids())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"steps": 0}, "steps: expected a whole number of at least 1, found 0"),
        ({"steps": 2.5}, "steps: expected a whole number"),
        ({"steps": True}, "steps: expected a whole number"),
        ({"minutes": 0}, "minutes: expected a number above 0, found 0"),
        ({"minutes": float("nan")}, "minutes: expected a number above 0, found nan"),
        ({"minutes": float("inf")}, "minutes: expected a number above 0, found inf"),
        ({"temperature": -1.0}, "temperature: expected a number above 0"),
        ({"data_weight": 1.5}, "data_weight: expected 0 to 1, found 1.5"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0 and below 1"),
        ({"shard": True, "objective": "blocks"}, "shard=True and objective='blocks'"),
        ({"shard": True, "offload": True}, "offload=True, which would write gathered"),
        ({"objective": "mse"}, "objective: expected one of kl, ce, hidden, blocks, found 'mse'"),
        ({"also": ("norms", "heads")}, "also: expected some of norms, biases, found 'heads'"),
        ({"accumulate": 0}, "accumulate: expected a whole number of at least 1"),
        ({"accumulate": None}, "accumulate: expected a whole number of at least 1, found None"),
        ({"temperature": None}, "temperature: expected a number above 0, found None"),
        ({"seed": 1.5}, "seed: expected a whole number of at most .*, found 1.5"),
        ({"seed": None}, "seed: expected a whole number of at most .*, found None"),
        ({"seed": 1 << 43}, "seed: expected a whole number of at most"),
        ({"recompute": "never"}, "recompute: expected True or False, found 'never'"),
        ({"shard": None}, "shard: expected True or False, found None"),
        ({"also": None}, "also: expected some of norms, biases, found None"),
        ({"loss": "mse"}, r"loss: expected a function \(output, batch\) -> scalar, found 'mse'"),
        (
            {"teacher": "./gpt2"},
            r"teacher: expected an nn\.Module, .*found '\./gpt2'; load it first",
        ),
        ({"teacher": nn.Linear}, r"teacher: expected an nn\.Module, .*found <class"),
        ({"work": 5}, "work: expected the name of a folder, found 5"),
        ({"work": ""}, "work: expected the name of a folder, found ''"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], reason: str) -> None:
    model, gm = usual()
    with pytest.raises(ConfigError, match=reason):
        refined(gm, model, **options)


def test_nothing_to_train() -> None:
    model, gm = subject("llama", "exact")
    with pytest.raises(
        RefineError, match=r"no factors to train.*compile it with a budget.*--also norms,biases"
    ):
        refined(gm, model)


def test_a_model_that_is_not_ours_or_another_one() -> None:
    model, gm = usual()
    with pytest.raises(FxShareError, match=r"was not made by fxshare.compile"):
        refined(model, model)
    with pytest.raises(FxShareError, match="is not the model that was compiled"):
        refined(gm, subject("nanogpt", "shared")[0])
    with pytest.raises(FxShareError, match=r"expected the model that .*found the class LlamaFor"):
        refined(gm, type(model))  # type: ignore[arg-type]


def test_a_teacher_of_another_vocabulary_or_shape() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model, gm = usual()
    config = LlamaConfig.from_dict({**model.config.to_dict(), "vocab_size": 48})
    with pytest.raises(RefineError, match=r"teacher: expected logits .*\(\.\.\., 32\).*48"):
        refined(gm, model, teacher=LlamaForCausalLM(config))
    with pytest.raises(RefineError, match="teacher: expected outputs of the shapes"):
        refined(gm, model, teacher=LlamaForCausalLM(config), objective="hidden")


def test_an_objective_without_its_teacher() -> None:
    model, gm = usual()
    with pytest.raises(RefineError, match="objective='kl' is measured against a teacher"):
        refined(gm, model, teacher=None, objective="kl")
    with pytest.raises(RefineError, match="expected one of them, found both"):
        refined(gm, model, objective="kl", loss=lambda output, batch: output.logits.sum())
    with pytest.raises(RefineError, match="belong to objective='kl', found 'hidden'"):
        refined(gm, model, objective="hidden", temperature=2.0)


def test_an_objective_that_does_not_suit_the_model() -> None:
    model, gm = subject("tied-mlp", "shared")
    with pytest.raises(RefineError, match=r"predicts no next token.*objective='hidden'"):
        refined(gm, model, features(), objective="ce")
    model, gm = subject("branches", "shared")
    assert refined(gm, model, features()).fxshare.refined[-1].objective == "hidden"


def test_a_loss_that_reaches_nothing() -> None:
    model, gm = usual()
    with pytest.raises(RefineError, match="loss: expected a scalar tensor"):
        refined(gm, model, loss=lambda output, batch: output.logits)
    with pytest.raises(RefineError, match="reaches none of the trained parameters"):
        refined(gm, model, loss=lambda output, batch: output.logits.detach().sum())


def test_a_model_without_a_backward_pass() -> None:
    model, gm = subject("in-place", "shared")
    with pytest.raises(RefineError, match=r"cannot be trained: .*modified by an inplace operation"):
        refined(gm, model, features())


def test_data_that_is_empty_or_too_little() -> None:
    model, gm = usual()
    with pytest.raises(RefineError, match="batches: expected at least one batch, found none"):
        refined(gm, model, [])
    with pytest.raises(RefineError, match=r"one batch is given as \[batch\]"):
        refined(gm, model, ids()[0])
    with pytest.raises(RefineError, match="found 1 that cannot be divided"):
        refined(gm, model, [ids(1, rows=1)[0]])
    assert refined(gm, model, [ids(1)[0]]).fxshare.refined[-1].held_out == 8
    assert refined(gm, model, iter(ids(3))).fxshare.refined[-1].steps == 12


def test_a_batch_that_fails_in_the_model_is_named() -> None:
    model, gm = usual()
    unknown = torch.full((4, 8), 99)
    for data, held_out, reason in (
        ([*ids(2), unknown], ids(1), "batch 2 failed in the model: IndexError: index out of range"),
        ([unknown, *ids(2)], ids(1), "batch 0 failed in the model: IndexError"),
        (ids(2), [*ids(1), unknown], "held-out batch 1 failed in the model: IndexError"),
    ):
        with pytest.raises(RefineError, match=f"{reason}.*check its shapes and token ids"):
            refined(gm, model, data, heldout=held_out)
    with pytest.raises(RefineError, match="second corpus, batch 0 failed in the model"):
        refined(gm, model, second=[unknown])
    with pytest.raises(RefineError, match="batch failed in the model: IndexError"):
        refined(gm, model, [*ids(2), unknown], heldout=ids(1), objective="blocks")


def test_data_of_which_the_mask_leaves_nothing() -> None:
    model, gm = usual()
    (batch,) = ids(1)
    masked = [{"input_ids": batch, "attention_mask": torch.zeros_like(batch)}]
    with pytest.raises(RefineError, match="held-out data: expected tokens to measure on, found no"):
        refined(gm, model, heldout=masked)
    with pytest.raises(RefineError, match="second data: expected tokens to measure on"):
        refined(gm, model, second=masked)


@pytest.mark.slow
def test_a_quantised_model() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model, gm = subject("llama", "shared", compression_rate=0.9)
    torchao.quantize_(gm, torchao.Int8WeightOnlyConfig())
    with pytest.raises(RefineError, match="refine before quantising, and quantise the result"):
        refined(gm, model)


def test_a_graph_that_holds_shapes_refuses_another_one() -> None:
    model, gm = usual()
    with pytest.raises(GuardError, match="argument 'unknown': the model was captured without it"):
        refined(gm, model, [{"input_ids": b, "unknown": b} for b in ids()])


def test_what_is_trained_of_fused_and_shared_factors() -> None:
    model, gm = usual()
    found = trainable_of(gm, model, ())
    places = slices_of(gm).values()
    assert {g.basis for g in found.groups} == {f"{p.basis}.weight" for p in places if p.basis}
    assert len(found.names) == len(set(found.names))
