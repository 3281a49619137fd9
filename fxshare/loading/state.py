"""Weights of a model that Python code makes, from a file of its state dict."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fxshare.errors import DataError
from fxshare.loading.keys import Keys, check_keys

ModuleT = TypeVar("ModuleT", bound=nn.Module)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_INSIDE = ("state_dict", "model_state_dict", "model")


def load_weights(
    model: ModuleT, path: str | os.PathLike[str], *, allow_missing: bool = False
) -> ModuleT:
    """Put the weights of a state dict (``.safetensors``, or what ``torch.save`` wrote) into
    ``model``, and return it: for factories, ``load_weights(Net(), "net.pt")``.

    Raises :class:`DataError` unless the file has a tensor of the same shape for each name of the
    model's state dict, and no others, saying what the names look like. With ``allow_missing`` a
    warning instead; what is missing stays as it is. Nothing is unpickled but tensors.
    """
    file = Path(path)
    state, around = _unwrapped(file, _read(file))
    expected = model.state_dict()
    shapes = [
        (name, tuple(tensor.shape), tuple(expected[name].shape))
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    missing = _untied(model, expected.keys() - state.keys(), state)
    keys = Keys.of(missing, state.keys() - expected.keys(), shapes, names=state.keys())
    name = f"{file}{around}"
    check_keys(name, type(model).__name__, keys, allow_missing=allow_missing)
    other = {name for name, _, _ in shapes}
    fits = {n: t for n, t in state.items() if n in expected and n not in other}
    model.load_state_dict(fits, strict=False)
    return model


def _read(file: Path) -> Mapping[str, Any]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as a state dict: {error!s:.200}") from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{file}: holds more than tensors, and code of a pickle is not run: save "
            "model.state_dict(), not the model"
        ) from error
    if not isinstance(found, Mapping):
        raise DataError(f"{file}: expected a state dict, found a {type(found).__name__}")
    return found


def _unwrapped(file: Path, found: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The tensors, and where in the file they stand: a checkpoint has them beside other things."""
    around = ""
    while not _is_state(found):
        inside = next((key for key in _INSIDE if isinstance(found.get(key), Mapping)), None)
        if inside is None:
            raise DataError(
                f"{file}{around}: expected a state dict, tensors by name, or a checkpoint with one "
                f"under {', '.join(_INSIDE)}; found {', '.join(map(str, list(found)[:5]))}"
            )
        found, around = found[inside], f"{around}[{inside!r}]"
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}, around


def _is_state(found: Mapping[str, Any]) -> bool:
    return bool(found) and all(isinstance(value, Tensor) for value in found.values())


def _untied(model: nn.Module, missing: set[str], state: Mapping[str, Tensor]) -> set[str]:
    """Without the other names of tensors that are there: safetensors keeps one name of each."""
    tensors = model.state_dict(keep_vars=True)
    there = {id(tensors[name]) for name in state if name in tensors}
    return {name for name in missing if id(tensors[name]) not in there}


__all__ = ["SUFFIXES", "load_weights"]
