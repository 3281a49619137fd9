"""Weights in few bits in a transformers folder, as compressed-tensors stores them.

Where every matched weight is dense, in few bits or as it was, the folder of ``dense`` holds the
codes: format ``pack-quantized``, which vLLM and transformers read (with the package
``compressed-tensors``; extra ``quant``). A weight ``(O, I)`` is three tensors there:
``weight_packed`` int32, 32 bits of codes in each, the first in the lowest bits and 0 for the least
code; ``weight_scale`` ``(O, G)``, one for a row or for 32 columns; ``weight_shape``.

Shape suffixes: O rows, I columns, G groups of columns.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxshare.base.files import write_text
from fxshare.base.quantised import GROUP, Quantised
from fxshare.exporting.subject import Subject
from fxshare.models.original import Original, original_of
from fxshare.plans.bits import bits_of_slices
from fxshare.result.products import slices_of
from fxshare.sites.site import Site
from fxshare.sites.tensors import stored_at
from passes.graph.graph import weight_and_bias
from passes.graph.slices import rows_of

_PACKAGE = "compressed_tensors"
_WORD = 32


def codes_by_module(subject: Subject, model: nn.Module) -> dict[str, Quantised] | str:
    """The codes of each linear of the original in few bits, or why its weights have to be
    multiplied out; ``model`` is of the original's class."""
    plan = subject.record.plan
    bits = bits_of_slices(plan.rounded)
    if plan.groups or plan.units:
        some = (plan.groups or plan.units)[0].name
        return f"{some!r} is no dense weight"
    names = original_of(subject.model)
    found: dict[str, Quantised] = {}
    for site in plan.sites:
        widths = {bits.get(s.name) for s in site.slices}
        if widths == {None}:
            continue
        fault = _fault(site, widths, names, model)
        if fault is not None:
            return fault
        weight = torch.cat([_rows(subject.model, s.name) for s in site.slices])
        assert isinstance(weight, Quantised)
        found[site.calls[0]] = weight
    if importlib.util.find_spec(_PACKAGE) is None:
        return (
            "compressed-tensors, whose format keeps the codes, is not installed; pip install "
            "'fxshare[quant]'"
        )
    return found


def pack(path: Path, codes: Mapping[str, Quantised], linears: Iterable[str]) -> None:
    """Put codes in the place of weights in a folder that ``save_pretrained`` wrote, and say so in
    its configuration; ``linears`` are all linears of the model."""
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        here = [name for name in codes if f"{name}.weight" in tensors]
        for name in here:
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": t for part, t in _tensors(codes[name]).items()}
        if here:
            save_file(tensors, file, metadata={"format": "pt"})
    _index_again(path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _scheme(codes, linears)
    write_text(path / "config.json", json.dumps(config, indent=2) + "\n")


def _fault(site: Site, widths: set[Any], names: Original, model: nn.Module) -> str | None:
    if len(widths) > 1:
        return f"parts of {site.name!r} differ in their bits"
    if site.lookups:
        return f"rows of {site.name!r} are looked up, and compressed-tensors has linears"
    call = site.calls[0]
    one = site.calls == site.readers == (call,) and stored_at(site, names.state) is None
    if not one or names.state.get(f"{call}.weight") != f"{call}.weight":
        return f"{site.name!r} is no weight of one linear"
    kind = type(model.get_submodule(call))
    if kind is not nn.Linear:
        return f"{site.name!r} is a {kind.__name__}, and compressed-tensors has linears"
    if widths == {4} and site.in_features % GROUP:
        return f"{site.name!r} has {site.in_features} inputs, no multiple of {GROUP}"
    return None


def _rows(gm: nn.Module, name: str) -> Tensor:
    place = slices_of(gm)[name]
    weight, _ = weight_and_bias(gm.get_submodule(place.module))
    return rows_of(gm, place, weight.detach())


def _tensors(codes: Quantised) -> dict[str, Tensor]:
    scale = codes.scale.to("cpu", codes.dtype)  # values have the dtype of their scales there
    shape = torch.tensor(codes.shape)
    packed = packed_words(codes.codes.cpu(), codes.bits)
    return {"weight_packed": packed, "weight_scale": scale.contiguous(), "weight_shape": shape}


def packed_words(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes ``(O, I)`` as int32 ``(O, ⌈I · bits / 32⌉)``; the last word is filled up with zeros."""
    each = _WORD // bits
    shifted = codes_OI.long() + (1 << (bits - 1))
    shifted = nn.functional.pad(shifted, (0, -shifted.shape[1] % each))
    words = (shifted.reshape(len(shifted), -1, each) << (torch.arange(each) * bits)).sum(-1)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).to(torch.int32)


def _scheme(codes: Mapping[str, Quantised], linears: Iterable[str]) -> dict[str, Any]:
    widths = sorted({one.bits for one in codes.values()}, reverse=True)
    alone = len(widths) == 1
    groups = {}
    for number, bits in enumerate(widths):
        named = [name for name, one in codes.items() if one.bits == bits]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if alone else named,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if bits == 8 else "group",
                "group_size": None if bits == 8 else GROUP,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in codes],
    }


def _index_again(path: Path) -> None:
    """Say again in which file each tensor is, where there are several."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return
    found = json.loads(index.read_text(encoding="utf-8"))
    weights, size = {}, 0
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            weights[name] = file.name
            size += tensor.nbytes
    found["weight_map"] = weights
    found["metadata"] = {**found.get("metadata", {}), "total_size": size}
    write_text(index, json.dumps(found, indent=2) + "\n")


__all__ = ["codes_by_module", "pack", "packed_words"]
