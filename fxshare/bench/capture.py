"""``fxshare bench capture``: seconds and memory to capture and rewrite a large model on meta.

The model has shapes and no weights, so what is measured is the compiler and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fxshare.base.machine import environment
from fxshare.base.progress import stage
from fxshare.base.spent import peak_bytes
from fxshare.capture import capture
from fxshare.config import load_config
from fxshare.errors import ConfigError
from fxshare.planning.rules import make_plan
from fxshare.plans.plan import Plan
from fxshare.proposing.propose import init
from fxshare.rewriting.assemble import assemble
from fxshare.rewriting.rewrite import rewrite
from fxshare.sites.match import match
from fxshare.sites.visible import seen
from passes import SharedGroup

_LOG = logging.getLogger(__name__)

SHARING = {"group_size": 2, "compression_rate": 0.5}
FAMILIES: Mapping[str, tuple[str, Mapping[str, int]]] = MappingProxyType(
    {
        "llama": ("Llama", {}),
        "qwen3": (
            "Qwen3",
            {
                "num_hidden_layers": 36,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
            },
        ),
        "gemma": ("Gemma", {}),
        "phi3": ("Phi3", {}),
        "neox": (
            "GPTNeoX",
            {
                "num_hidden_layers": 32,
                "hidden_size": 4096,
                "intermediate_size": 16384,
                "num_attention_heads": 32,
            },
        ),
    }
)
"""Names of transformers' classes, and where their defaults are not the published model of about 7B
parameters (Llama-7B, Qwen3-8B, Gemma-7B, Phi-3-mini, Pythia-6.9B), its sizes."""


@dataclass(frozen=True)
class CaptureBench:
    """One run. ``peak_bytes`` is the most memory that the process ever held, imports included;
    ``imported_bytes`` what it held when capture began."""

    environment: dict[str, object]
    model: str
    parameters: int
    sites: int
    groups: int
    build_seconds: float
    capture_seconds: float
    rewrite_seconds: float
    capture_cpu_seconds: float
    cpu_seconds: float
    """Processor time of both, which other work on the machine does not lengthen."""
    imported_bytes: int
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """Capture and rewriting."""
        return self.capture_seconds + self.rewrite_seconds

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {**asdict(self), "seconds": self.seconds}


def family(name: str = "llama", layers: int | None = None, **sizes: int) -> nn.Module:
    """A model of :data:`FAMILIES` on the meta device; needs the ``hf`` extra.

    ``layers`` and ``sizes`` (as the configuration's class names them) replace the family's own.
    Raises :class:`ConfigError` for a name that is none of them, and without transformers.
    """
    if name not in FAMILIES:
        raise ConfigError(f"--family: expected one of {', '.join(FAMILIES)}; found {name!r}")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "bench capture needs the transformers library: pip install 'fxshare[hf]'"
        ) from error
    kind, own = FAMILIES[name]
    wanted = {**own, **sizes}
    if layers is not None:
        wanted["num_hidden_layers"] = layers
    config = getattr(transformers, f"{kind}Config")(**wanted)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model.train(False)


@stage("bench capture", _LOG)
def bench_capture(make: Callable[[], nn.Module] = family) -> CaptureBench:
    """Capture a model on meta and rewrite it under Basis Sharing, all without weights."""
    start = time.perf_counter()
    model = make()
    built = time.perf_counter()
    before = peak_bytes()
    cfg = load_config([init(model), SHARING])
    began, busy = time.perf_counter(), time.process_time()
    matching = match(model, cfg)
    ids = torch.zeros((2, 16), dtype=torch.int64, device="meta")
    captured = capture(model, ids, mode="fx", needs=[n for s in matching.sites for n in s.calls])
    middle, captured_busy = time.perf_counter(), time.process_time() - busy
    shown = seen(captured, matching)
    captured, plan = shown.captured, make_plan(cfg, shown.sites, shown.skipped)
    rewritten, _ = rewrite(captured.graph, plan, empty_groups(plan), cfg.fuse)
    result = assemble(captured, rewritten, plan, copy=False)
    end, busy = time.perf_counter(), time.process_time() - busy
    del result
    return CaptureBench(
        environment=environment(),
        model=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        sites=len(plan.sites),
        groups=len(plan.groups),
        build_seconds=built - start,
        capture_seconds=middle - began,
        rewrite_seconds=end - middle,
        capture_cpu_seconds=captured_busy,
        cpu_seconds=busy,
        imported_bytes=before,
        peak_bytes=peak_bytes(),
    )


def empty_groups(plan: Plan) -> list[SharedGroup]:
    """The factors of a plan's groups without values, on meta."""
    heights = {s.name: s.out_features for site in plan.sites for s in site.slices}
    return [
        SharedGroup(
            group.name,
            torch.empty(group.rank, group.in_features, device="meta"),
            {name: torch.empty(heights[name], group.rank, device="meta") for name in group.slices},
        )
        for group in plan.groups
    ]


def lines(result: CaptureBench) -> list[str]:
    """The result for a terminal."""
    r = result
    return [
        f"{r.model}, {r.parameters / 1e9:.2f} G parameters on meta: {r.sites} sites, {r.groups} "
        "groups of 2 layers",
        f"capture {r.capture_seconds:6.2f} s, {r.capture_cpu_seconds:.2f} s of the processor",
        f"rewrite {r.rewrite_seconds:6.2f} s",
        f"both    {r.seconds:6.2f} s, {r.cpu_seconds:.2f} s of the processor",
        f"memory  {r.peak_bytes / 1e9:6.2f} GB at most, {r.imported_bytes / 1e9:.2f} GB before",
        f"machine: {r.environment}",
    ]
