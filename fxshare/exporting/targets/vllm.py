"""``vllm``: a folder that vLLM and transformers load, in which bases stay shared."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.capture import dtype_of
from fxshare.errors import ExportError
from fxshare.exporting.certifying.certificate import NAME as CERTIFICATE
from fxshare.exporting.options import Options
from fxshare.exporting.served.family import Family, family_of
from fxshare.exporting.served.layout import check_layout
from fxshare.exporting.served.modeling import (
    FILE,
    architecture_of,
    auto_map_of,
    model_type_of,
    modeling_text,
)
from fxshare.exporting.served.reading import read_back
from fxshare.exporting.served.table import Table, bytes_of_whole, table_of
from fxshare.exporting.subject import Subject
from fxshare.exporting.targets.dense import state_of
from fxshare.exporting.written import Written
from fxshare.models.original import original_of
from fxshare.models.structure import structure_of
from fxshare.result.module import record_of
from fxshare.rewriting.lowering import readable
from fxshare.store.manifest import dtype_name
from fxshare.store.save import MAX_SHARD_BYTES
from fxshare.store.skeleton import ModelSource
from fxshare.store.tensors import (
    INDEX,
    check_storable,
    is_tensor_file,
    tensors_of,
    write_tensors,
)
from fxshare.store.tokenizer import is_tokenizer_file, write_tokenizer
from fxshare.store.transformers import HF_CONFIG, HF_GENERATION, write_json

_OF_THIS_RUN = ("attn_implementation", "experts_implementation", "_name_or_path")
"""What the configuration says of how the model was run here."""


def ours(name: str) -> bool:
    """Whether a folder of this target may hold a file of that name."""
    known = (CERTIFICATE, HF_CONFIG, HF_GENERATION, FILE, INDEX, "__pycache__")
    return name in known or is_tensor_file(name) or is_tokenizer_file(name)


def as_written(gm: nn.Module) -> nn.Module:
    """What is written of a compiled model: of a lowered one, whose linears are packed together,
    the readable one."""
    return gm if record_of(gm).lowered is None else readable(gm)


def write(
    subject: Subject, path: Path, options: Options, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Written:
    """Write the folder ``path``; ``AutoModelForCausalLM.from_pretrained(path,
    trust_remote_code=True)`` loads it, and ``vllm serve path --trust-remote-code --model-impl
    transformers``.

    Bases are the base model's, once each; with ``options.untie`` every linear has its own copy of
    those that it reads.

    Raises :class:`ExportError` with the reason for which engines would not run the model.
    """
    family = family_of(subject)
    for name, (_, tensor) in tensors_of(subject.model).items():
        check_storable(name, tensor)
    table = table_of(subject, family, untied=options.untie)
    path.mkdir()
    tensors = _named(subject, family, table, _given(options.original))
    write_tensors({name: ("parameter", t) for name, t in tensors.items()}, path, max_shard_bytes)
    _write_configs(subject, family, table, path)
    (path / FILE).write_text(modeling_text(family), encoding="utf-8")
    source = options.tokenizer or tokenizer_of(subject)
    if source is not None:
        write_tokenizer(source, path)
    loaded = read_back(path, family.auto)
    within = {_in_model(name, family): name for name in tensors}
    check_layout(loaded, within, set(getattr(loaded, "all_tied_weights_keys", None) or ()))
    loaded.to(next(iter(subject.model.parameters())).device)
    return Written(
        lambda call: loaded(**{**subject.constants, **call}),
        subject.shapes.batch,
        subject.shapes.sequence,
        _notes(subject, table),
        generate=_generate(loaded) if family.generates else None,
    )


def _generate(model: Any) -> Callable[[list[int], int], list[int]]:
    """Greedy tokens of transformers' own loop, with its cache."""

    def tokens(prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt], device=model.device)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        kept: list[int] = found[0, len(prompt) :].tolist()
        return kept

    return tokens


def _given(original: ModelSource | None) -> nn.Module | None:
    if original is None or isinstance(original, nn.Module):
        return original
    raise ExportError(
        f"original: to='vllm' takes parameters from it that the compiled graph does not use; "
        f"expected the model, found {type(original).__name__}"
    )


def _named(
    subject: Subject, family: Family, table: Table, original: nn.Module | None
) -> Mapping[str, Tensor]:
    """The tensors by their names in the files; tied ones under the first of their names."""
    first = original_of(subject.model).state
    state = state_of(subject, original, without=table.sites)
    for name in table.turned:
        weight_IO = state.pop(f"{name}.weight")
        table.tensors[family.stored(f"{name}.parts.0.weight")] = weight_IO.t().contiguous()
        bias = state.pop(f"{name}.bias", None)
        if bias is not None:
            table.tensors[family.stored(f"{name}.parts.0.bias")] = bias
    found = {family.stored(name): t for name, t in state.items() if first[name] == name}
    return {**found, **table.tensors}


def _in_model(name: str, family: Family) -> str:
    """The name that a tensor of the files has in the model as transformers makes it."""
    heads = tuple(f"{part}." for part, _ in family.model.named_children())
    inside = not family.inside or name.startswith(heads)
    return name if inside else f"{family.inside}{name}"


def _write_configs(subject: Subject, family: Family, table: Table, path: Path) -> None:
    source = subject.record.source
    config: dict[str, Any] = {
        key: value for key, value in (source.config or {}).items() if key not in _OF_THIS_RUN
    }
    config |= {
        "model_type": model_type_of(family),
        "architectures": [architecture_of(family)],
        "auto_map": auto_map_of(family),
        "dtype": dtype_name(dtype_of(subject.model)),
        "shared_linears": table.spec,
    }
    write_json(path / HF_CONFIG, config)
    generation: Any = getattr(subject.model, "generation_config", None)
    if family.generates and hasattr(generation, "to_dict"):
        write_json(path / HF_GENERATION, generation.to_dict())


def tokenizer_of(subject: Subject) -> str | None:
    """The folder that the original was loaded from, where it is one of this machine."""
    structure = structure_of(subject.model)
    name = getattr(getattr(structure and structure.model, "config", None), "_name_or_path", "")
    return name if isinstance(name, str) and name and os.path.isdir(name) else None


def _notes(subject: Subject, table: Table) -> tuple[str, ...]:
    return (*_notes_of_zeros(subject, table), *_notes_of_whole(subject, table))


def _notes_of_zeros(subject: Subject, table: Table) -> Iterator[str]:
    """What went in the compiled model and is there again, as zeros."""
    size = dtype_of(subject.model).itemsize
    plan = subject.record.plan
    narrow = [u for u in plan.units if u.runs_apart and table.sites.issuperset(u.sites)]
    again = [u for u in plan.units if u.kept < u.of and u not in narrow]
    for storage in dict.fromkeys(one.words.storage for one in again):
        names = [one.name for one in again if one.words.storage == storage]
        gone = [u.dense_numbers - u.stored_numbers for u in again if u.words.storage == storage]
        yield (
            f"of full size, with zeros where {storage} went: {', '.join(names[:3])}"
            + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            + f"; {sum(gone) * size:,} bytes that the compiled model does not have"
        )


def _notes_of_whole(subject: Subject, table: Table) -> tuple[str, ...]:
    if not table.whole:
        return ()
    size = bytes_of_whole(subject.record.plan, subject.model, table.whole)
    reasons: dict[str, list[str]] = {}
    for name, why in table.whole.items():
        reasons.setdefault(why, []).append(name)
    notes = [
        f"multiplied out, because {why}: {', '.join(names[:3])}"
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for why, names in reasons.items()
    ]
    return (*notes, f"what is multiplied out takes {size:,} bytes")
