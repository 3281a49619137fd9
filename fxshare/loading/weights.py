"""Whether a transformers folder has the weights that it says, before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fxshare.base.json_text import parse_json
from fxshare.errors import DataError

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_PICKLED = "pytorch_model.bin"
_SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")
_POINTER = b"version https://git-lfs"
# of a pickled tensor: its name, shape and type
_LEAST_BYTES = 64
_AGAIN = "the download is not complete; download it again, or copy it from where it is whole"


def check_weights(folder: Path) -> int:
    """Hold the safetensors files that transformers will read to their own headers, and an index to
    the files beside it; returns the most tensors that the files of weights can hold.

    Raises :class:`DataError` naming the file that is missing, cut off, or not what its name says.
    """
    files = _safetensors(folder)
    if files is not None:
        return sum(_check_file(folder / name) for name in files)
    _check_pickled(folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return size // _LEAST_BYTES


def tensor_names(folder: Path) -> frozenset[str] | None:
    """The names in the safetensors files that transformers will read, after
    :func:`check_weights`; None where the folder has others."""
    files = _safetensors(folder)
    if files is None:
        return None
    return frozenset(name for file in files for name in _header(folder / file)[0])


def _safetensors(folder: Path) -> list[str] | None:
    """The names of the files that transformers reads; None where it reads others."""
    if (folder / _WHOLE).is_file():
        return [_WHOLE]
    if (folder / _INDEX).is_file():
        return _files_of(folder / _INDEX)
    shards = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    if shards and not any((folder / f"{_PICKLED}{end}").is_file() for end in ("", ".index.json")):
        raise DataError(
            f"{folder}: expected {_INDEX} beside {len(shards)} files of weights such as "
            f"{shards[0]}, found none; {_AGAIN}"
        )
    return None


def _check_pickled(folder: Path) -> None:
    index = folder / f"{_PICKLED}.index.json"
    if not (folder / _PICKLED).is_file() and index.is_file():
        _files_of(index)


def _files_of(index: Path) -> list[str]:
    try:
        weight_map = parse_json(index.read_bytes())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{index}: expected JSON with a weight_map, found {error!r:.80}; {_AGAIN}"
        ) from error
    wrong = [name for name in files if name != Path(name).name]
    if wrong:
        raise DataError(f"{index}: expected the names of files beside it, found {wrong[0]!r}")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise DataError(
            f"{index.parent}: {len(missing)} of {len(files)} files of weights are missing, the "
            f"first is {missing[0]}: {index.name} names it; {_AGAIN}"
        )
    return files


def _check_file(path: Path) -> int:
    """How many tensors it has; the header says how long the file is."""
    tensors, length = _header(path)
    found = path.stat().st_size
    try:
        ends = [entry["data_offsets"][1] for entry in tensors.values()]
        expected = 8 + length + max(ends, default=0)
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: cannot be read as safetensors: {error!r:.80}") from error
    if found != expected:
        raise DataError(
            f"{path} is cut off or altered: expected {expected:,} bytes, found {found:,}; {_AGAIN}"
        )
    return len(ends)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors that a file says it has, and the length of what says it, which follows 8 bytes
    with that length."""
    found = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if _POINTER.startswith(first) and first:
            raise DataError(
                f"{path}: expected weights, found a pointer of git-lfs; fetch the files with "
                "'git lfs pull'"
            )
        length = int.from_bytes(first, "little") if len(first) == 8 else None
        if length is None or length > found - 8:
            raise DataError(
                f"{path}: expected a safetensors file, found {found:,} bytes, which end in its "
                f"header; {_AGAIN}"
            )
        try:
            header = parse_json(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: cannot be read as safetensors: {error!r:.80}") from error
    return tensors, length


__all__ = ["check_weights", "tensor_names"]
