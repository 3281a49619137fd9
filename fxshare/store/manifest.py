"""``fxshare.json``: what a folder holds, and how to see that it still does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from fxshare.base.json_text import parse_json
from fxshare.base.names import as_class_name, as_file_name, as_module_path
from fxshare.capture import FrontEnd
from fxshare.errors import StoreError
from fxshare.result.record import Step
from fxshare.result.refinement import Refinement
from fxshare.store.probe import Probe
from fxshare.store.units import UnitRuns
from passes.graph.names import shortened

FORMAT = "fxshare"
FORMAT_VERSION = 2
"""What this version reads; a folder without quantised weights is written as version 1, which
earlier ones read as well."""
MANIFEST = "fxshare.json"
CONFIG = "config.yaml"
PLAN = "plan.json"
REPORT = "report.json"
REPORT_TABLE = "report.md"
CARD = "README.md"
# people edit these, and nothing is read from them
_FOR_PEOPLE = (REPORT_TABLE, CARD)
_DIGEST = "sha256"
DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
    )
}
"""The dtypes that a folder can hold; a name from a file is looked up here and nowhere else."""


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


ModulePath: TypeAlias = Annotated[str, AfterValidator(as_module_path)]
FileName: TypeAlias = Annotated[str, AfterValidator(as_file_name)]
_MOST_STEPS = 64


def _as_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"expected one of {', '.join(DTYPES)}; found {shortened(name)}")
    return name


Dtype: TypeAlias = Annotated[str, AfterValidator(_as_dtype)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileEntry(_Frozen):
    """One file beside the manifest."""

    bytes: int
    sha256: str


class TensorEntry(_Frozen):
    """One tensor of the module. Of those that are one object, or one memory, the first is stored.

    ``attribute`` is a tensor that is neither a parameter nor a buffer of its module, ``codes`` and
    ``scale`` are those of a quantised parameter, whose name theirs begin with.
    """

    kind: Literal["parameter", "buffer", "attribute", "codes", "scale"]
    dtype: Dtype
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    requires_grad: bool = False
    order: tuple[int, ...] | None = None
    """Dimensions from the largest stride to the smallest, where that is not their order."""
    same_as: ModulePath | None = None
    """Another name of the same object."""
    shares: ModulePath | None = None
    """Another object with the same memory."""


class SavedSource(_Frozen):
    """:class:`fxshare.models.source.Source`."""

    kind: str
    class_name: Annotated[str, AfterValidator(as_class_name)]
    config: dict[str, Any] | None
    generation_config: dict[str, Any] | None


class Manifest(_Frozen):
    """Everything about a compiled model that is not in another file of its folder."""

    format: Literal["fxshare"] = "fxshare"
    format_version: int = 1
    versions: dict[str, str]
    """Of fxshare, torch and, where it is installed, transformers."""
    source: SavedSource
    front_end: FrontEnd
    relaxed: tuple[int, ...]
    extra_passes: tuple[str, ...]
    lowering: tuple[Step, ...] = ()
    """How the graph was lowered; see :class:`fxshare.Record`."""
    training: bool
    training_differs: tuple[ModulePath, ...]
    """Modules in the other mode."""
    dtype: Dtype
    site_dtypes: dict[ModulePath, Dtype]
    """Of sites in another dtype than that."""
    inputs: tuple[dict[str, Any], ...]
    """The example calls; see :func:`fxshare.store.calls.encode_inputs`."""
    frozen: tuple[ModulePath, ...] | None = None
    """The original's parameters that took no gradient when it was compiled; see
    :class:`fxshare.Record`."""
    frozen_when_lowered: tuple[ModulePath, ...] | None = None
    """Those of the readable module when it was lowered."""
    fills_mask: bool = True
    """Whether a mask of ones stands for an attention mask that is left out."""
    slice_errors: dict[ModulePath, float]
    bias_shifts: dict[ModulePath, float] = Field(default_factory=dict)
    other_shifts: dict[ModulePath, float] = Field(default_factory=dict)
    kept_units: dict[ModulePath, UnitRuns] = Field(default_factory=dict)
    """Which hidden units stay, by the plan's name of the MLP: ``0-3,7``."""
    refined: tuple[Refinement, ...] = ()
    """What refining did; see :class:`fxshare.Record`."""
    tensors: dict[ModulePath, TensorEntry]
    graph_sha256: str
    probe: Probe | None
    no_probe: str | None
    """Why there is no probe."""
    files: dict[FileName, FileEntry]

    @field_validator("lowering")
    @classmethod
    def _is_legal(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        if len(steps) > _MOST_STEPS:
            raise ValueError(f"expected at most {_MOST_STEPS} steps; found {len(steps):,}")
        for before, step in zip((None, *steps), steps, strict=False):
            if step == "readable" and before in (None, "readable"):
                raise ValueError("expected 'readable' after 'memory' or 'speed' only")
        return steps

    def then_and_now(self) -> str:
        """The versions it was saved with, and the present ones."""
        then, now = (
            ", ".join(f"{k} {v}" for k, v in vs.items()) for vs in (self.versions, versions())
        )
        return f"saved with {then}; now {now}"


def versions() -> dict[str, str]:
    """The versions that decide what a graph looks like."""
    found = {}
    for name in ("fxshare", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileEntry(bytes=path.stat().st_size, sha256=digest.hexdigest())


def _digest(plain: Mapping[str, Any]) -> str:
    content = {key: value for key, value in plain.items() if key != _DIGEST}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with the hash of its own content.

    Raises :class:`StoreError` where the model's configuration has a value that JSON cannot hold.
    """
    try:
        plain = json.loads(json.dumps(manifest.model_dump()))
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"the configuration of {manifest.source.class_name} cannot be written as JSON: {error}"
        ) from error
    text = json.dumps({**plain, _DIGEST: _digest(plain)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_text(folder: Path, name: str) -> str:
    """A text file of the folder; :class:`StoreError` where it cannot be read."""
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StoreError(f"{folder / name} is missing; copy the folder again") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {folder / name}: {error}") from error


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest.

    Raises :class:`StoreError` where the folder is not one of ours, comes from a newer fxshare, or
    its manifest was altered.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "has no fxshare.json" if folder.is_dir() else "does not exist"
        raise StoreError(
            f"{folder} is not an fxshare folder: it {what}; expected what fxshare.save wrote"
        )
    try:
        plain = parse_json(read_text(folder, MANIFEST))
    except ValueError as error:
        raise StoreError(f"{path} is truncated or altered: not JSON ({error})") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise StoreError(f"{path} is not the manifest of an fxshare folder")
    found = plain.get("format_version")
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise StoreError(
            f"{folder} has format version {found}, this fxshare reads up to {FORMAT_VERSION}; "
            "upgrade fxshare"
        )
    if plain.get(_DIGEST) != _digest(plain):
        raise StoreError(
            f"{path} was altered: its content does not have the hash that it states; copy the "
            "folder again, or compile again to change something"
        )
    try:
        return Manifest.model_validate({k: v for k, v in plain.items() if k != _DIGEST})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        steps = map(str, first["loc"])
        where = ".".join(s if s.isprintable() and len(s) <= 80 else shortened(s) for s in steps)
        raise StoreError(f"{path}: {where}: {first['msg']}") from error


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Hold every file that loading reads to its size and hash.

    Raises :class:`StoreError` naming the first one that is missing, truncated or altered.
    """
    missing = {CONFIG, PLAN, REPORT} - set(manifest.files)
    if missing:
        raise StoreError(f"{folder / MANIFEST} does not list {sorted(missing)[0]}")
    for name, expected in manifest.files.items():
        if name in _FOR_PEOPLE:
            continue
        path = folder / name
        if name != Path(name).name or not path.is_file():
            raise StoreError(f"{path} is missing: {MANIFEST} lists it; copy the folder again")
        try:
            found = file_entry(path)
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
        if found.bytes != expected.bytes:
            raise StoreError(
                f"{path} is truncated or altered: expected {expected.bytes:,} bytes, found "
                f"{found.bytes:,}; copy the folder again"
            )
        if found.sha256 != expected.sha256:
            raise StoreError(
                f"{path} was altered: its sha256 is {found.sha256[:12]}…, {MANIFEST} says "
                f"{expected.sha256[:12]}…; copy the folder again. An edited plan or configuration "
                "goes to fxshare.compile"
            )
