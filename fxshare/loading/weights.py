"""Whether a transformers folder has the weights that it says, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from fxshare.base.json_text import parse_json
from fxshare.errors import DataError

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_POINTER = b"version https://git-lfs"
# of a pickled tensor: its name, shape and type
_LEAST_BYTES = 64
_AGAIN = "the download is not complete; download it again, or copy it from where it is whole"


def check_weights(folder: Path) -> int:
    """Hold the safetensors files that transformers will read to their own headers, and an index to
    the files beside it; returns the most tensors that the files of weights can hold.

    Raises :class:`DataError` naming the file that is missing, cut off, or not what its name says.
    """
    if (folder / _WHOLE).is_file():
        return _check_file(folder / _WHOLE)
    index = folder / _INDEX
    if not index.is_file():
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        return size // _LEAST_BYTES
    files = _files_of(index)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(files)} files of weights are missing, the first is "
            f"{missing[0]}: {_INDEX} names it; {_AGAIN}"
        )
    return sum(_check_file(folder / name) for name in files)


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
    return files


def _check_file(path: Path) -> int:
    """How many tensors it has. The header says how long the file is: 8 bytes with its length,
    itself, and the tensors."""
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
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"{path}: cannot be read as safetensors: {error!r:.80}") from error
    expected = 8 + length + max(ends, default=0)
    if found != expected:
        raise DataError(
            f"{path} is cut off or altered: expected {expected:,} bytes, found {found:,}; {_AGAIN}"
        )
    return len(ends)


__all__ = ["check_weights"]
