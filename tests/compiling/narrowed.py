"""What every kind that leaves parts of slices out (units, heads, keys, whole heads) is held to, and
the models that their plan files are carried out on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare import Plan
from fxshare.errors import PlanError
from fxshare.result.products import slices_of
from fxshare.verifying.multiplied import multiplied_out
from tests.strategies import no_warnings_of_ours
from tests.toys import VOCABULARY

FAMILIES = ("llama", "gpt2", "bert", "phi3")
GENERATING = ("llama", "gpt2", "phi3")


def model(family: str) -> nn.Module:
    """Two layers of a family, with biases that are not zero."""
    import transformers as tf

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": VOCABULARY}
    some = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module
        if family == "gpt2":
            small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}
            config = tf.GPT2Config(**small, **some, vocab_size=VOCABULARY)
            made = tf.GPT2LMHeadModel(config)
        elif family == "bert":
            made = tf.BertModel(tf.BertConfig(**sizes))
        elif family == "phi3":  # gate and up are one weight
            made = tf.Phi3ForCausalLM(tf.Phi3Config(**sizes, **some, num_key_value_heads=2))
        elif family == "mixtral":  # and the experts of a layer are one, too
            sizes |= {"num_key_value_heads": 1, "num_local_experts": 3}
            made = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, **some))
        elif family == "gpt_oss":  # whose gates and ups alternate, with biases
            sizes |= {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
            made = tf.GptOssForCausalLM(tf.GptOssConfig(**sizes, **some, head_dim=8))
        else:
            made = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **some, num_key_value_heads=1))
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
            elif parameter.ndim > 1:  # activations far from linear
                nn.init.normal_(parameter, std=0.4)
    return made.eval()


def batches() -> list[Tensor]:
    """Four of four times eight tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (4, 8), generator=generator) for _ in range(4)]


def outputs(module: nn.Module, ids: Tensor | None = None) -> Tensor:
    """Logits, or the last hidden state, of the first batch."""
    with torch.no_grad():
        found = module(batches()[0] if ids is None else ids)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def compiled(original: nn.Module, plan: Plan, front_end: str = "fx") -> Any:
    """A model compiled with a plan as its file says it."""
    with no_warnings_of_ours():
        return fxshare.compile(
            original,
            fxshare.init(original),
            calibration=batches(),
            plan=Plan.from_json(plan.to_json()),
            capture=front_end,
        )


def check_computed_and_counted(original: nn.Module, gm: Any) -> int:
    """The outputs are those of the weights multiplied out, and nothing is stored that the plan does
    not count; returns how many numbers of weights went."""
    assert fxshare.verify(original, gm, batches()[:1]).ok
    expected = outputs(multiplied_out(original, gm))
    torch.testing.assert_close(outputs(gm), expected, rtol=1e-5, atol=1e-5)
    assert (outputs(gm) - outputs(original)).abs().max() > 1e-3
    plan = gm.fxshare.plan
    assert gm.fxshare.report.numbers_after == plan.stored_numbers
    gone: int = plan.dense_numbers - plan.stored_numbers
    numbers = [sum(p.numel() for p in one.parameters()) for one in (original, gm)]
    assert numbers[0] - numbers[1] == gone + biases_of(original) - biases_of(gm)
    assert gone > 0
    return gone


def biases_of(module: nn.Module) -> int:
    """The numbers of all biases."""
    return sum(p.numel() for name, p in module.named_parameters() if name.endswith("bias"))


def check_lowered_saved_and_loaded(original: nn.Module, gm: Any, folder: Path) -> None:
    """Bit for bit what was saved, lowered and readable."""
    lowered = fxshare.lower(gm, prefer="speed")
    for number, one in enumerate((gm, lowered)):
        fxshare.save(one, folder / str(number))
        back = fxshare.load(folder / str(number))
        mine, theirs = one.state_dict(), back.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert torch.equal(outputs(back), outputs(one))
        assert slices_of(back) == slices_of(one)
        assert fxshare.verify(original, back).ok
    assert fxshare.verify(original, fxshare.readable(lowered)).ok
    torch.testing.assert_close(outputs(lowered), outputs(gm), rtol=1e-5, atol=1e-5)


def check_generated(original: nn.Module, gm: Any, cache: str) -> None:
    """The tokens of the multiplied-out model, and no step falls back to the model's own code."""
    ids = batches()[0][:2, :4]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    expected = multiplied_out(original, gm).generate(ids, **options)
    with no_warnings_of_ours():
        assert torch.equal(gm.generate(ids, **options), expected)
        assert torch.equal(fxshare.lower(gm).generate(ids, **options), expected)


def check_backend(original: nn.Module, gm: Any) -> None:
    """``torch.compile`` of the original with our backend computes what the graph does."""
    torch.compiler.reset()
    fast = torch.compile(original, backend=fxshare.backend(gm, inner="eager"))
    torch.testing.assert_close(outputs(fast), outputs(gm), rtol=1e-5, atol=1e-5)


def dense_folder(gm: Any, folder: Path) -> Any:
    """The exported dense model, which computes what the graph does."""
    import transformers as tf

    fxshare.export(gm, folder, to="dense")
    dense = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(outputs(dense), outputs(gm), rtol=1e-5, atol=1e-5)
    return dense


def program_of(gm: Any, file: Path) -> Any:
    """The exported program, read again."""
    fxshare.export(gm, file, to="pt2")
    return torch.export.load(file).module()


def with_other_kept(gm: Any, entry: str, kept: Callable[[Any], tuple[int, ...]]) -> None:
    """Change which parts of an entry's slices are said to stay."""
    moved = {}
    for name, place in slices_of(gm).items():
        for which in ("unit_rows", "unit_columns"):
            units = getattr(place, which)
            if units is not None and units.name == entry:
                place = replace(place, **{which: replace(units, kept=kept(units))})
        moved[name] = place
    gm.meta["slices"] = moved


def failed_checks(original: nn.Module, gm: Any) -> str:
    """What verify finds wrong, which is something."""
    found = fxshare.verify(original, gm, batches()[:1])
    assert not found.ok
    return " ".join(check.what for check in found.checks if not check.ok)


def refusal_of(text: str, change: Callable[[dict[str, Any]], object], name: str) -> str:
    """What reading a plan file says once its second entry was changed; the entry is named."""
    plain = json.loads(text)
    change(plain["units"][1])
    with pytest.raises(PlanError, match=rf"unit.*'{name}'.*") as caught:
        Plan.from_json(json.dumps(plain))
    return str(caught.value)


def sizes_of(plan: Plan) -> set[tuple[int, int]]:
    """The products ``(in, out)`` that the cost model sees at one token."""
    from fxshare.cost_model.forecast import linears_of
    from fxshare.cost_model.work import Matmul

    return {(one.inner, one.out) for one in linears_of(plan, 1) if isinstance(one, Matmul)}
