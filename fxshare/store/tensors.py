"""The tensors of a module as safetensors files, each stored once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxshare.base.quantised import Quantised
from fxshare.errors import StoreError
from fxshare.store.manifest import DTYPES, TensorEntry, dtype_name
from passes import derive_gathers, derived_buffers

Kind = Literal["parameter", "buffer", "attribute", "codes", "scale"]
"""What a tensor is to its module. A quantised parameter has two, its codes and its scales, named
after it: ``h.0.mlp.c_fc.weight.codes``."""
INDEX = "model.safetensors.index.json"
_TENSOR_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def is_tensor_file(name: str) -> bool:
    """Whether a file of this name holds tensors."""
    return _TENSOR_FILE.fullmatch(name) is not None


def tensors_of(module: nn.Module) -> dict[str, tuple[Kind, Tensor]]:
    """Every tensor by every name it has: parameters, buffers (persistent or not), and plain tensor
    attributes, which a module may read in its ``forward`` just as well. The indices of gathers are
    left out: they follow from the bases. Of a quantised weight its codes and its scales."""
    derived = derived_buffers(module)
    found: dict[str, tuple[Kind, Tensor]] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        kinds: list[tuple[Kind, Mapping[str, object]]] = [
            ("parameter", owner._parameters),
            ("buffer", owner._buffers),
            ("attribute", owner.__dict__),
        ]
        for kind, held in kinds:
            for leaf, value in held.items():
                name = f"{prefix}{leaf}"
                if isinstance(value, Quantised):
                    found[f"{name}.codes"] = ("codes", value.stored)
                    found[f"{name}.scale"] = ("scale", value.scale)
                elif isinstance(value, Tensor) and name not in derived:
                    found[name] = (kind, value)
    return found


def write_tensors(
    tensors: Mapping[str, tuple[Kind, Tensor]], folder: Path, max_shard_bytes: int
) -> tuple[dict[str, TensorEntry], list[str]]:
    """Write the tensors; returns their entries and the names of the files.

    Raises :class:`StoreError` naming a tensor that a file cannot hold.
    """
    entries: dict[str, TensorEntry] = {}
    owners: dict[str, Tensor] = {}
    by_object: dict[int, str] = {}
    by_memory: dict[object, str] = {}
    for name, (kind, tensor) in tensors.items():
        check_storable(name, tensor)
        entry = TensorEntry(
            kind=kind,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            requires_grad=tensor.requires_grad,
            order=_order(tensor),
            same_as=by_object.get(id(tensor)),
        )
        if entry.same_as is None:
            by_object[id(tensor)] = name
            memory = _memory(tensor)
            if tensor.numel() and memory in by_memory:
                entry = entry.model_copy(update={"shares": by_memory[memory]})
            else:
                by_memory[memory] = name
                owners[name] = tensor
        entries[name] = entry
    shards = _shards(owners, max_shard_bytes)
    files = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(_packed(owners, names), folder / file, metadata={"format": "pt"})
        files[file] = names
    if len(files) == 1:
        return entries, list(files)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in owners.values())},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return entries, [*files, INDEX]


def check_storable(name: str, tensor: Tensor) -> None:
    """:class:`StoreError` where no file can hold a tensor: quantised, wrapped, without values."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    if not plain or tensor.layout is not torch.strided or tensor.dtype not in DTYPES.values():
        kind = type(tensor).__name__ if not plain else f"{tensor.layout}, {tensor.dtype}"
        raise StoreError(
            f"tensor {name!r}: expected a dense torch.Tensor, found {kind}; save before "
            "quantizing or wrapping the model, and do that again after loading"
        )
    if tensor.device.type == "meta":
        raise StoreError(f"tensor {name!r} is on the meta device: it has no values to save")


def _memory(tensor: Tensor) -> object:
    where = (tensor.device, tensor.data_ptr(), tensor.dtype)
    return (*where, tuple(tensor.shape), tensor.stride())


def _order(tensor: Tensor) -> tuple[int, ...] | None:
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names in order, cut where the next tensor would not fit; at least one shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _packed(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in memory of its own: safetensors refuses shared memory."""
    packed: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in names:
        tensor = tensors[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        packed[name] = tensor
    return packed


def fill(
    module: nn.Module,
    entries: Mapping[str, TensorEntry],
    folder: Path,
    files: Iterable[str],
    device: torch.device,
    *,
    mapped: bool = False,
) -> None:
    """Put the saved tensors into a module of the same structure; ``mapped`` leaves them in the
    files where their layout is that of the file.

    Raises :class:`StoreError` where names or shapes differ from the module's, or a file does not
    hold what the manifest says.
    """
    _check_names(folder, tensors_of(module), entries)
    stored = _read(
        folder, [file for file in files if is_tensor_file(file)], entries, device, mapped
    )
    objects: dict[str, Tensor] = {}
    codes: dict[str, dict[str, Tensor]] = {}
    for name, entry in entries.items():
        if entry.same_as is not None:
            tensor = objects[_known(folder, name, entry.same_as, objects)]
        else:
            memory = name if entry.shares is None else entry.shares
            tensor = stored[_known(folder, name, memory, stored)]
            if entry.kind == "parameter":
                tensor = nn.Parameter(tensor, requires_grad=entry.requires_grad)
            elif entry.shares is not None:
                tensor = tensor.detach()
        objects[name] = tensor
        path, _, leaf = name.rpartition(".")
        if entry.kind in ("codes", "scale"):
            codes.setdefault(path, {})[leaf] = tensor
            continue
        owner = module.get_submodule(path)
        held: dict[Kind, dict[str, Any]] = {
            "parameter": owner._parameters,
            "buffer": owner._buffers,
            "attribute": owner.__dict__,
        }
        held[entry.kind][leaf] = tensor
    for name, parts in codes.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        empty = owner._parameters[leaf]
        assert isinstance(empty, Quantised)
        filled = empty.with_parts(parts["codes"], parts["scale"])
        owner._parameters[leaf] = nn.Parameter(filled, requires_grad=False)
    derive_gathers(module)


def _known(folder: Path, name: str, owner: str, known: Mapping[str, Tensor]) -> str:
    if owner not in known:
        raise StoreError(f"{folder}: tensor {name!r} is stored as {owner!r}, which is not there")
    return owner


def _check_names(
    folder: Path,
    found: Mapping[str, tuple[Kind, Tensor]],
    saved: Mapping[str, TensorEntry],
) -> None:
    missing, unexpected = sorted(saved.keys() - found.keys()), sorted(found.keys() - saved.keys())
    if missing or unexpected:
        raise StoreError(
            f"{folder}: the rebuilt module has other tensors than the folder: "
            f"{len(missing)} are only in the folder {missing[:3]}, {len(unexpected)} only in the "
            f"module {unexpected[:3]}; give the structure of the original model as model=..."
        )
    for name, entry in saved.items():
        kind, tensor = found[name]
        if kind == "codes" and entry.dtype != dtype_name(tensor.dtype):
            raise StoreError(
                f"{folder}: {name!r} has codes of {entry.dtype}, and the plan says "
                f"{dtype_name(tensor.dtype)}"
            )
        expected = (entry.kind, entry.shape)
        if (kind, tuple(tensor.shape)) != expected:
            raise StoreError(
                f"{folder}: {name!r} is a {entry.kind} of shape {entry.shape} in the folder, and "
                f"a {kind} of shape {tuple(tensor.shape)} in the rebuilt module; give a model of "
                "the original's sizes as model=..."
            )


def _read(
    folder: Path,
    files: Sequence[str],
    entries: Mapping[str, TensorEntry],
    device: torch.device,
    mapped: bool,
) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    tensor = opened.get_tensor(name)
                    _check_entry(folder / file, name, tensor, entries)
                    order = entries[name].order
                    in_place = mapped and order is None
                    stored[name] = tensor if in_place else _laid_out(tensor, order, device)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"cannot read {folder / file}: {error}") from error
    return stored


def _check_entry(path: Path, name: str, tensor: Tensor, entries: Mapping[str, TensorEntry]) -> None:
    entry = entries.get(name)
    found = (dtype_name(tensor.dtype), tuple(tensor.shape))
    if entry is None or (entry.dtype, entry.shape) != found:
        expected = "no such tensor" if entry is None else f"{entry.dtype} {entry.shape}"
        raise StoreError(f"{path}: {name!r}: expected {expected}, found {found[0]} {found[1]}")


def _laid_out(tensor: Tensor, order: Sequence[int] | None, device: torch.device) -> Tensor:
    """A copy in memory of its own, not in the mapped file: aligned, writable, and there when the
    folder is gone. With the strides it had, because another layout is rounded in another order."""
    if order is None:
        return torch.empty_like(tensor, device=device).copy_(tensor)
    back = [list(order).index(dim) for dim in range(tensor.ndim)]
    return tensor.to(device).permute(*order).contiguous().clone().permute(*back)
