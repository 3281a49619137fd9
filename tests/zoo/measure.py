"""Everything that is claimed about a family, measured on its random model."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxshare
from fxshare import FxShareError, FxShareWarning
from fxshare.base.numerics import tolerance, worst
from fxshare.calibration.calibrate import calibrate
from fxshare.calibration.statistics import Statistics
from fxshare.capture import Captured, capture
from fxshare.config import load_config
from fxshare.plans.plan import Plan
from fxshare.result.products import dense_sites, site_bias
from fxshare.sites.match import match
from fxshare.sites.tensors import site_tensors
from fxshare.sites.visible import unstacked, visible_sites
from passes import is_linear, linear_calls

KEPT = 0.7
SHARING = {"group_size": 2, "compression_rate": KEPT}


@dataclass(frozen=True)
class Subject:
    """A model, its configuration without a mode, a call beside the one to capture with, and data.

    ``prompt`` is token ids to generate from, None where the model does not generate.
    """

    name: str
    model: nn.Module
    config: Mapping[str, Any]
    example: Mapping[str, Any]
    other: Mapping[str, Any]
    batches: list[Mapping[str, Any]]
    prompt: Tensor | None = None
    strategy: str = "layers"


@dataclass(frozen=True)
class Row:
    """What was found. Texts that are empty mean that it works; others say why it does not."""

    name: str
    front_end: str
    seconds: float
    matched: int
    missed: Mapping[str, str]
    ulps: float
    limit: float
    generate: str
    compiles: str
    exports: str
    sharing_error: float
    planned_error: float
    notes: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """Whether exact mode is within what rounding explains."""
        return self.ulps <= self.limit


def compiled(subject: Subject, **changes: Any) -> Any:
    """The subject's model under its configuration, calibrated where a mode asks for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        return fxshare.compile(
            subject.model,
            [dict(subject.config), changes] if changes else dict(subject.config),
            example=subject.example,
            calibration=subject.batches if changes else None,
        )


def measure(subject: Subject, *, everything: bool = True) -> Row:
    """Measure one subject; ``everything`` takes in torch.compile and export, which are slow."""
    exact = compiled(subject)
    report, plan = exact.fxshare.report, exact.fxshare.plan
    start = time.process_time()
    captured = capture(subject.model, subject.example)
    seconds = time.process_time() - start
    graph = unstacked(captured, plan.sites).graph
    statistics = gathered(subject)
    sharing, planned = (loss(subject.model, gm, statistics) for gm in both(subject))
    return Row(
        name=subject.name,
        front_end=report.front_end,
        seconds=seconds,
        matched=len(plan.sites),
        missed=missed(subject.model, plan, graph),
        ulps=ulps(subject, exact),
        limit=tolerance(torch.float32, 2 * len(plan.sites) + 1) / torch.finfo(torch.float32).eps,
        generate=generates(subject, exact),
        compiles=reason(lambda: _compiles(subject, exact)) if everything else "not tried",
        exports=reason(lambda: _exports(exact)) if everything else "not tried",
        sharing_error=sharing,
        planned_error=planned,
        notes=report.notes,
    )


def inputs_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """What a captured graph takes of a call: its constants are in the graph."""
    return {name: value for name, value in call.items() if isinstance(value, Tensor)}


def ulps(subject: Subject, gm: Any) -> float:
    """The largest difference from the original on a call that was not captured, in units of the
    last place of the largest value of its tensor."""
    with torch.no_grad():
        expected = subject.model(**subject.other)
        found = gm(**inputs_of(subject.other))
    return worst(expected, found).relative / torch.finfo(torch.float32).eps


def missed(model: nn.Module, plan: Plan, graph: fx.GraphModule) -> dict[str, str]:
    """The linears that stay as they are, and why: modules, and parameters that the captured graph
    multiplies by."""
    known = {call for site in plan.sites for call in site.calls}
    known |= {s.name for s in plan.skipped}
    found = {s.name: s.reason for s in plan.skipped}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():
        if is_linear(module) and name not in known:
            tied = id(module.weight) in embeddings
            found[name] = (
                "tied to the embedding, off by default" if tied else "no pattern asks for it"
            )
    for call in linear_calls(graph):
        if call.name not in known and call.name not in found:
            found[call.name] = "no pattern asks for it"
    return found


NEW_TOKENS = 64


def generates(subject: Subject, gm: Any, tokens: int = NEW_TOKENS) -> str:
    """Empty where greedy generation, on graphs, gives the original's tokens; ``–`` where there is
    none."""
    given = _prompt(subject)
    if given is None or not hasattr(gm, "generate"):
        return "–"
    # models with learned positions have so many
    longest = getattr(subject.model.config, "max_position_embeddings", None)
    longest = longest or getattr(subject.model.config, "max_target_positions", None)
    if longest is not None and not subject.model.config.is_encoder_decoder:
        tokens = min(tokens, longest - given["input_ids"].shape[1])
    elif longest is not None:
        tokens = min(tokens, longest - 1)
    options: dict[str, Any] = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }

    def try_it() -> None:
        model: Any = subject.model
        with torch.no_grad():
            expected = model.generate(**given, **options)
            found = gm.generate(**given, **options)
        assert torch.equal(expected, found), "other tokens"
        for note in gm.fxshare.report.notes:
            assert not note.startswith("generate:"), note

    return reason(try_it)


def _prompt(subject: Subject) -> dict[str, Tensor] | None:
    """What to generate from: the prompt, or the encoder's part of the example."""
    if subject.prompt is not None:
        return {"input_ids": subject.prompt, "attention_mask": torch.ones_like(subject.prompt)}
    if getattr(getattr(subject.model, "config", None), "is_encoder_decoder", False):
        example = inputs_of(subject.example)
        return {name: t for name, t in example.items() if not name.startswith("decoder_")}
    return None


def _compiles(subject: Subject, gm: Any) -> None:
    """One graph without breaks; ``aot_eager`` is all of torch.compile but the code generator."""
    torch._dynamo.reset()
    fast = torch.compile(gm, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for call in (subject.example, subject.other):
            distance = worst(gm(**inputs_of(call)), fast(**inputs_of(call)))
            assert distance.relative <= tolerance(torch.float32, 64), f"differs by {distance}"


def _exports(gm: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fxshare.export(gm, Path(folder) / "model.pt2", to="pt2")


def reason(attempt: Callable[[], None]) -> str:
    """Empty, or the first line of why the attempt failed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attempt()
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return f"{type(error).__name__}: {first}"[:160]
    return ""


def both(subject: Subject) -> tuple[Any, Any]:
    """The model compressed by Basis Sharing, and by the planner at the same stored numbers."""
    shared = compiled(subject, **SHARING)
    kept = shared.fxshare.plan.stored_numbers / shared.fxshare.plan.dense_numbers
    planner = {"search": "off", "strategy": subject.strategy}
    planned = compiled(subject, budget={"params_kept": kept}, planner=planner)
    assert planned.fxshare.plan.stored_numbers <= shared.fxshare.plan.stored_numbers
    return shared, planned


def gathered(subject: Subject) -> Statistics:
    """The statistics of the dense model on the subject's data."""
    matching = match(subject.model, load_config(dict(subject.config)))
    captured: Captured = capture(subject.model, subject.example)
    captured = unstacked(captured, matching.sites)
    sites, _ = visible_sites(captured, matching)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxShareWarning)
        return calibrate(captured, subject.batches, sites, gradients=True)


def loss(model: nn.Module, gm: Any, statistics: Statistics) -> float:
    """The second-order increase of the loss per token, of weights and biases as they came out:
    ``½ Σ E[δᵀ(ΔW x + Δb)]²`` over slices, the moments of ``x`` and ``δ`` taken as independent
    (K-FAC). Every result is weighed with the same statistics, those of the dense model."""
    plan = gm.fxshare.plan
    total = 0.0
    dense = dense_sites(gm, plan)
    for site in plan.sites:
        weight_OI, bias_O = site_tensors(model, site)
        found_O = site_bias(gm, site)
        gap_OI = dense[site.name].double() - weight_OI.detach().double()
        gap_O = torch.zeros(site.out_features, dtype=torch.float64)
        if bias_O is not None and found_O is not None:
            gap_O = found_O.detach().double() - bias_O.detach().double()
        mean_I, gram_II = statistics.mean(site.name), statistics.gram(site.name)
        cross_OO = torch.outer(gap_OI @ mean_I, gap_O)
        error_OO = gap_OI @ gram_II @ gap_OI.T + cross_OO + cross_OO.T + torch.outer(gap_O, gap_O)
        rows = statistics.tokens_of(site.name) / max(statistics.tokens, 1)
        for s in site.slices:
            try:
                moment_OO = statistics.moment(s.name, site.name)
            except FxShareError:  # the loss does not depend on it
                continue
            block = error_OO[s.start : s.stop, s.start : s.stop]
            total += 0.5 * rows * float((moment_OO * block).sum())
    return total


_QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 12288,
    "head_dim": 128,
}
_PYTHIA = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 16384,
}
_SEVEN_BILLION: Mapping[str, tuple[str, dict[str, int]]] = {
    "Llama-2-7B": ("Llama", {}),
    "Qwen3-8B with 32 of its 36 layers": ("Qwen3", {**_QWEN3, "num_hidden_layers": 32}),
    "Qwen3-8B": ("Qwen3", {**_QWEN3, "num_hidden_layers": 36}),
    "Gemma-7B": ("Gemma", {}),
    "Phi-3-mini": ("Phi3", {"pad_token_id": 0}),
    "GPT-NeoX of 6.9 B (Pythia)": ("GPTNeoX", _PYTHIA),
}


def capture_seconds() -> list[tuple[str, float, float]]:
    """Name, parameters and CPU seconds of capture for shapes of about 7 billion parameters."""
    import transformers

    found = []
    for name, (kind, sizes) in _SEVEN_BILLION.items():
        with torch.device("meta"):
            config = getattr(transformers, f"{kind}Config")(**sizes)
            model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
        start = time.process_time()
        capture(model, ids, mode="fx")
        seconds = time.process_time() - start
        found.append((name, float(sum(p.numel() for p in model.parameters())), seconds))
    return found
