"""What is measured: a dense model, the plan for it, and the model compiled under the plan."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fxshare.bench.speed.codes import CODES, with_codes
from fxshare.bench.speed.only import types_of_only
from fxshare.bench.speed.separate import PARTS, separated
from fxshare.bench.speed.units import UNITS, with_fewer_units
from fxshare.compiling.compile import compile as compile_model
from fxshare.config import load_config
from fxshare.embedded.model import GPT, GPTConfig
from fxshare.errors import ConfigError
from fxshare.loading.names import LoadedModel, load_model
from fxshare.models.source import USER
from fxshare.models.traits import context_of, example_ids, vocabulary_of
from fxshare.plans.plan import Group, Plan
from fxshare.plans.storage import PLAIN, Storage, StorageName, storage_named
from fxshare.result.module import record_of
from fxshare.result.products import dense_sites, site_bias

Split = Literal["heads", "qkv", "false"]
BLOCK = r"(?:.*\.)?h\.\d+\."


@dataclass(frozen=True)
class Settings:
    """How the measured model is compressed: every matrix at the same share of its numbers.

    ``basis`` says which slices of a split linear pool into one basis (the configuration's key), and
    ``group_size`` how many layers share it. ``only`` is a pattern that the names of the compressed
    linears match from their start; the others stay dense.
    """

    kept: float = 0.5
    storage: StorageName | Literal["units", "int8", "int4"] = PLAIN.name
    """Of bases; or hidden units of MLPs go, and all else stays dense; or all weights stay dense, in
    few bits, whatever ``kept`` says."""
    split: Split = "heads"
    basis: Literal["slice", "part", "site"] = "site"
    group_size: int = 1
    only: str = ""
    separate: bool = False
    """Of a shape: q, k and v are linears of their own."""

    def __post_init__(self) -> None:
        if not 0 < self.kept < 1:
            raise ConfigError(
                f"--kept: expected a share of the numbers above 0 and below 1; found {self.kept:g}"
            )
        for option, value, choices in (
            ("--storage", self.storage, (*get_args(StorageName), UNITS, *CODES)),
            ("--split", self.split, get_args(Split)),
            ("--basis", self.basis, ("slice", "part", "site")),
        ):
            if value not in choices:
                raise ConfigError(f"{option}: expected {' or '.join(choices)}; found {value!r}")
        if self.group_size < 1:
            raise ConfigError(f"--group-size: expected at least 1; found {self.group_size}")
        try:
            re.compile(self.only)
        except re.error as error:
            raise ConfigError(f"--only: {self.only!r} is not a pattern: {error}") from None


@dataclass(frozen=True, eq=False)
class Subject:
    """``compiled`` realises ``plan``; ``make_exact`` makes the same slices over the original
    weights, None for a saved folder. ``kv_cache`` says that decoding reads a cache."""

    name: str
    dense: nn.Module
    compiled: nn.Module
    make_exact: Callable[[], nn.Module] | None
    plan: Plan
    vocabulary: int
    context: int | None
    kv_cache: bool


@dataclass(frozen=True)
class GPTShape:
    """Width, layers, heads and hidden width of a GPT with random weights."""

    width: int
    layers: int
    heads: int
    ffn: int

    @staticmethod
    def parse(text: str) -> GPTShape:
        """From ``d,layers,heads,ffn``; :class:`ConfigError` where it is something else."""
        try:
            sizes = [int(part) for part in text.split(",")]
        except ValueError:
            sizes = []
        if len(sizes) != 4 or min(sizes) < 1 or sizes[0] % sizes[2]:
            raise ConfigError(
                "--shape: expected d,layers,heads,ffn with d a multiple of heads, such as "
                f"1024,4,16,4096; found {text!r}"
            )
        return GPTShape(*sizes)


def random_gpt(shape: GPTShape, *, context: int, vocabulary: int, seed: int) -> GPT:
    """A GPT of this shape; the global random state is left as it was."""
    config = GPTConfig(
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        n_ffn=shape.ffn,
        block_size=context,
        vocab_size=vocabulary,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT(config).eval()


def gpt_types(heads: int, settings: Settings) -> dict[str, Any]:
    """Weight types of :class:`GPT`: all linears of its blocks, the fused one split."""
    attention: dict[str, Any] = {"pattern": BLOCK + r"attn\.c_attn$"}
    if settings.split != "false":
        attention |= {"split": settings.split, "qkv_order": "qkv", "basis": settings.basis}
    if settings.split == "heads":
        attention["n_head"] = heads
    fused: dict[str, Any] = {"attn_c_attn": attention}
    if settings.separate:
        fused = {f"attn_{part}": {"pattern": BLOCK + rf"attn\.{part}$"} for part in PARTS}
    others = {
        "attn_c_proj": {"pattern": BLOCK + r"attn\.c_proj$"},
        "mlp_c_fc": {"pattern": BLOCK + r"mlp\.c_fc$"},
        "mlp_c_proj": {"pattern": BLOCK + r"mlp\.c_proj$"},
    }
    return {
        "weight_types": {**fused, **others},
        "block_pattern": r"h\.(\d+)\.",
    }


def shape_subject(
    shape: GPTShape,
    settings: Settings,
    *,
    dtype: torch.dtype,
    device: torch.device,
    context: int,
    vocabulary: int,
    seed: int,
) -> Subject:
    """A GPT with random weights."""
    model = random_gpt(shape, context=context, vocabulary=vocabulary, seed=seed)
    name = f"GPT {shape.width},{shape.layers},{shape.heads},{shape.ffn}"
    if settings.separate:
        model, name = separated(model), f"{name}, q, k and v apart"
    types = gpt_types(shape.heads, settings)
    return _compiled(name, model.to(device, dtype), types, settings, seed=seed)


def named_subject(
    name: str,
    settings: Settings | None,
    *,
    configs: Sequence[Path] = (),
    original: str | None = None,
    allow_missing: bool = False,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Subject:
    """The embedded model, a saved folder, or another model with its weight types in ``configs``.

    Raises :class:`ConfigError` for settings of a folder, which is compressed already, and for a
    model without weight types.
    """
    if original is not None and not Path(name).is_dir():
        raise ConfigError("--original: names the model that a saved folder was made from")
    by_name = partial(load_model, allow_missing=allow_missing)
    source = None if original is None else by_name(original).model
    loaded = by_name(name, original=source)
    if loaded.kind == "saved":
        if settings is not None or configs:
            raise ConfigError(
                f"{name}: is compressed already; --kept, --storage, --split, --basis, "
                "--group-size, --only and -c are for a model that is not. Leave them out"
            )
        return _saved(loaded, source, dtype=dtype, device=device)
    if configs:
        given = load_config(list(configs)).model_dump(include={"weight_types", "block_pattern"})
    elif loaded.kind == "embedded":
        assert isinstance(loaded.model, GPT)
        given = gpt_types(loaded.model.config.n_head, settings or Settings())
    else:
        raise ConfigError(
            f"{name}: say which linears are to be compressed: -c FILE.yaml with its weight types"
        )
    model = loaded.model.to(device, dtype).eval()
    return _compiled(name, model, given, settings or Settings(), seed=seed)


def _compiled(
    name: str, model: nn.Module, types: dict[str, Any], settings: Settings, *, seed: int
) -> Subject:
    ids = example_ids(model, seed=seed)
    vocabulary = vocabulary_of(model)
    if ids is None or vocabulary is None:
        raise ConfigError(f"{name}: expected a model that reads token ids; its forward does not")
    types = types_of_only(types, model, settings.only)
    cached = takes_cache(model)
    if settings.storage == UNITS:
        compiled = with_fewer_units(name, model, types, settings.kept, ids)
        return _subject(name, model, compiled, types, (ids, vocabulary))
    uniform = {"group_size": settings.group_size, "compression_rate": settings.kept}
    if cached:  # a graph of a plain call has no cache; the model's own class keeps its
        types = {**types, "capture": "modules"}
    if settings.storage in CODES:
        compiled = with_codes(model, types, CODES[settings.storage], ids)
        return _subject(name, model, compiled, types, (ids, vocabulary))
    compiled = compile_model(model, [types, uniform], example=ids)
    storage = storage_named(settings.storage)
    if storage != PLAIN:
        plan = with_storage(record_of(compiled).plan, storage, settings.kept)
        compiled = compile_model(model, [types, uniform], plan=plan, example=ids)
    return _subject(name, model, compiled, types, (ids, vocabulary))


def _subject(
    name: str,
    model: nn.Module,
    compiled: nn.Module,
    types: dict[str, Any],
    reads: tuple[Tensor, int],
) -> Subject:
    ids, vocabulary = reads
    return Subject(
        name=name,
        dense=model,
        compiled=compiled,
        make_exact=partial(compile_model, model, types, example=ids),
        plan=record_of(compiled).plan,
        vocabulary=vocabulary,
        context=context_of(model),
        kv_cache=takes_cache(model),
    )


def with_storage(plan: Plan, storage: Storage, kept: float) -> Plan:
    """The plan in another storage: each group at the largest rank that stores no more than ``kept``
    of its numbers."""

    def stored(group: Group) -> Group:
        limit = kept * group.dense_numbers
        rank = storage.largest_rank(group.in_features, group.out_features, numbers=limit)
        return group.model_copy(update={"rank": max(rank, 1), "storage": storage.name})

    return plan.model_copy(update={"groups": tuple(map(stored, plan.groups))})


def takes_cache(model: nn.Module) -> bool:
    """Whether the model's class decodes with a key-value cache as Hugging Face's do."""
    known = model.forward.__annotations__ if hasattr(model.forward, "__annotations__") else {}
    return {"past_key_values", "use_cache"} <= set(known) and hasattr(model, "config")


def _saved(
    loaded: LoadedModel, original: nn.Module | None, *, dtype: torch.dtype, device: torch.device
) -> Subject:
    record = record_of(loaded.model)
    compiled = loaded.model.to(device, dtype).eval()
    if original is None and record.source.kind == USER:
        raise ConfigError(
            f"{loaded.name}: cannot tell the class of the model that it was made from; give it: "
            "--original package.module:factory"
        )
    dense = original if original is not None else dense_again(compiled)
    vocabulary = vocabulary_of(compiled)
    if vocabulary is None or example_ids(dense) is None:
        raise ConfigError(f"{loaded.name}: expected a model that reads token ids")
    return Subject(
        name=loaded.name,
        dense=dense.to(device, dtype).eval(),
        compiled=compiled,
        make_exact=None,
        plan=record.plan,
        vocabulary=vocabulary,
        context=context_of(compiled),
        kv_cache=takes_cache(dense) and takes_cache(compiled),
    )


@torch.no_grad()
def dense_again(compiled: nn.Module) -> nn.Module:
    """A model of the original's class with the products multiplied out, for its speed.

    What the compiled model does not hold (buffers that its graph never reads) is zero.
    """
    from fxshare.store.manifest import SavedSource
    from fxshare.store.skeleton import hollow, skeleton
    from fxshare.store.tensors import tensors_of

    record = record_of(compiled)
    source = SavedSource(**copy.copy(vars(record.source)))
    here = {name: tensor for name, (_, tensor) in tensors_of(compiled).items()}
    first = next(iter(here.values()))

    def kind(name: str, tensor: Tensor) -> torch.dtype:
        return first.dtype if tensor.is_floating_point() else tensor.dtype

    model = hollow(skeleton(source, None), kind, first.device)
    weights = dense_sites(compiled, record.plan)
    for name, (_, tensor) in tensors_of(model).items():
        if name in here and here[name].shape == tensor.shape:
            tensor.copy_(here[name])
        else:
            tensor.zero_()
    for site in record.plan.sites:
        for call in site.readers:
            module: Any = model.get_submodule(call)
            weight = weights[site.name]
            module.weight.copy_(weight.t() if module.weight.shape != weight.shape else weight)
            bias = site_bias(compiled, site)
            if bias is not None and call in site.calls:
                module.bias.copy_(bias)
    return model
