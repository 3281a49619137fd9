"""What holds for one causal family: who captured it, how exact it is, what it generates."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxshare
from fxshare import FxShareWarning
from fxshare.base.numerics import tolerance, worst
from fxshare.plans.plan import Plan
from tests.zoo.causal.models import build
from tests.zoo.causal.sizes import IMPOSSIBLE, VOCABULARY

NEW_TOKENS = 16
_PROMPTS = (7, 4)


@dataclass(frozen=True)
class Row:
    """What was found of a family. ``not_built`` says why there is no model, and the rest is empty
    then; ``generate`` is ``same``, ``other tokens``, the error, or ``–`` and the error of a model
    that cannot generate itself; ``runs`` says what made the steps."""

    name: str
    not_built: str = ""
    front_end: str = ""
    reason: str = ""
    ulps: float = 0.0
    limit: float = 0.0
    generate: str = ""
    runs: str = ""
    in_sites: float = 0.0
    seconds: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether exact mode is within what rounding explains."""
        return self.ulps <= self.limit


def call_of(model: nn.Module, lengths: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """Token ids ``(B, T)`` of rows of these lengths, padded on the left, with their mask where the
    model takes one."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    call = {"input_ids": torch.where(mask.bool(), ids, 0)}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        call["attention_mask"] = mask
    return call


def measure(name: str) -> Row:
    """Build and measure one family."""
    try:
        model = build(name)
        example, other = call_of(model, (12, 12), 0), call_of(model, (9, 9, 6), 1)
        with torch.no_grad():
            model(**example)
    except Exception as error:
        return Row(name, not_built=IMPOSSIBLE.get(name) or _first_line(error))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FxShareWarning)
            gm = fxshare.compile(model, None, example=example)
    except Exception as error:
        return Row(name, front_end="none", reason=_first_line(error))
    report, plan = gm.fxshare.report, gm.fxshare.plan
    generate, runs = _generates(model, gm)
    ulps, said = _ulps(model, gm, other)
    why = "" if report.front_end == "fx" else _why(report.notes)
    return Row(
        name=name,
        front_end=report.front_end,
        reason="; ".join(text for text in (why, said) if text),
        ulps=ulps,
        limit=tolerance(torch.float32, 2 * len(plan.sites) + 1) / torch.finfo(torch.float32).eps,
        generate=generate,
        runs=runs,
        in_sites=round(share_in_sites(model, plan, example), 4),
    )


def share_in_sites(model: Any, plan: Plan, example: Mapping[str, Tensor]) -> float:
    """Of the numbers of parameters with two dimensions or more which the call reads, without those
    of embeddings and of the head, the share that is in sites."""
    outside = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    head = model.get_output_embeddings()
    if head is not None:
        outside |= {id(p) for p in head.parameters()}
    inside = dict.fromkeys(outside, 0)
    for name, parameter in model.named_parameters():
        stem = f"{name.removesuffix('.weight')}."
        found = sum(s.weights for s in plan.sites if f"{s.name}.".startswith(stem))
        if found and id(parameter) not in outside:
            inside[id(parameter)] = found
    there = (_read(model, example) | set(inside)) - outside
    numbers = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) in there)
    share: float = sum(inside.values()) / max(numbers, 1)
    return share


def _read(model: Any, example: Mapping[str, Tensor]) -> set[int]:
    """The parameters that the logits depend on; all of a model with code for inference alone."""
    try:
        torch.manual_seed(0)
        model(**example).logits.float().square().sum().backward()
        read = {id(p) for p in model.parameters() if p.grad is not None}
    except (RuntimeError, AssertionError):  # Reformer's refuses in eval mode
        read = {id(p) for p in model.parameters()}
    model.zero_grad(set_to_none=True)
    return read


def _ulps(model: Any, gm: Any, call: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference of the logits on a call that was not captured, where it is not
    padding, and what there is to say."""
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(**call).logits
        try:
            torch.manual_seed(0)
            found = gm(**call)
        except Exception as error:
            return float("inf"), f"another call fails: {_first_line(error)}"
    found = found["logits"] if isinstance(found, Mapping) else found
    there = call["attention_mask"].bool() if "attention_mask" in call else ...
    if expected.shape[:2] != call["input_ids"].shape:
        there = ...
    return worst(expected[there], found[there]).relative / torch.finfo(torch.float32).eps, ""


def _generates(model: Any, gm: Any) -> tuple[str, str]:
    prompt = call_of(model, _PROMPTS, 2)
    prompt.setdefault("attention_mask", (prompt["input_ids"] != 0).long())
    options: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
    }

    def tokens(of: Callable[..., Any]) -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Tensor = of(**prompt, **options)
        return found

    try:
        expected = tokens(model.generate)
    except Exception as error:
        return f"– {_first_line(error)}", ""
    try:
        found = tokens(gm.generate)
    except Exception as error:
        return _first_line(error), ""
    notes = [n for n in gm.fxshare.report.notes if n.startswith("generate:")]
    runs = " ".join(notes) or ("graphs" if gm.fxshare.report.front_end != "modules" else "modules")
    return "same" if torch.equal(expected, found) else "other tokens", runs


def _why(notes: tuple[str, ...]) -> str:
    return " ".join(note for note in notes if "fx" in note) or " ".join(notes)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:400]}"
