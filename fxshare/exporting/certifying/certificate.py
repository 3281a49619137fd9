"""``certificate.json``: what was run when an export was made, what came out, and of which files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fxshare.base.hashes import sha256_of
from fxshare.base.json_text import parse_json
from fxshare.errors import StoreError

NAME = "certificate.json"
VERSION = 1
_DIGEST = "sha256"
_LIST = re.compile(r"\[([-\d.,\seE+]+)\]")
"""Lists of numbers, which are easier to read in one line."""
_IGNORED = (NAME, "__pycache__")


@dataclass(frozen=True)
class Difference:
    """The first token that differs. ``margin`` is by how much the compiled model preferred its own:
    where it is within what rounding does to logits, two tokens were as good as each other."""

    prompt: int
    position: int
    expected: int
    found: int
    margin: float
    within_rounding: bool


@dataclass(frozen=True)
class Certificate:
    """``kind`` is ``tokens`` (a causal language model: greedy tokens after each of the prompts),
    ``outputs`` (the first numbers of the first output of each call) or ``none``, where ``note``
    says why nothing was run. ``expected`` is the compiled model's, ``found`` the engine's, and
    ``logits`` are the compiled model's of its tokens, ``margins`` by how much it preferred each to
    the next likely one. ``gap`` is the largest absolute difference of
    a logit or an output, ``limit`` what rounding explains. ``inputs`` are the names of the
    arguments, ``rows`` and ``width`` the sizes of token ids that are fixed. ``files`` are SHA-256
    sums."""

    target: str
    model: str
    dtype: str
    engine: str
    engine_version: str
    seed: int
    kind: str
    made_by: str = ""
    prompts: tuple[Any, ...] = ()
    expected: tuple[tuple[float, ...], ...] = ()
    found: tuple[tuple[float, ...], ...] = ()
    logits: tuple[tuple[float, ...], ...] = ()
    margins: tuple[tuple[float, ...], ...] = ()
    equal: bool | None = None
    first_difference: Difference | None = None
    gap: float | None = None
    limit: float | None = None
    seconds: float = 0.0
    note: str = ""
    inputs: tuple[str, ...] = ()
    rows: int | None = None
    width: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION

    def of_files(self, export: Path) -> Certificate:
        """The certificate with the sums of the files of an export."""
        return replace(self, files={name: sha256_of(p) for name, p in files_of(export).items()})

    def to_json(self) -> str:
        """The file's text, with a sum over all of it, so that one that was edited is told."""
        plain = json.loads(json.dumps(asdict(self)))
        text = json.dumps({**plain, _DIGEST: _sum(plain)}, indent=1)
        return _LIST.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def certificate_path(export: Path) -> Path:
    """Where the certificate of an export is: in its folder, or beside its file."""
    return export / NAME if export.is_dir() else export.with_name(f"{export.name}.{NAME}")


def files_of(export: Path) -> dict[str, Path]:
    """The files of an export by their names: those of a folder, or the file and its data."""
    if export.is_dir():
        found = sorted(file for file in export.rglob("*") if file.is_file())
        named = {file.relative_to(export).as_posix(): file for file in found}
        return {n: p for n, p in named.items() if not any(part in _IGNORED for part in p.parts)}
    data = re.compile(re.escape(export.name) + r"\.([0-9a-f]{8}\.)?data")
    beside = sorted(file for file in export.parent.iterdir() if data.fullmatch(file.name))
    return {file.name: file for file in (export, *beside)}


def read_certificate(export: Path) -> Certificate:
    """The certificate of an export.

    Raises :class:`StoreError` where there is none, or it was edited since it was written.
    """
    path = certificate_path(export)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        given = dict(content)
        digest = given.pop(_DIGEST)
    except FileNotFoundError as error:
        raise StoreError(
            f"{export} has no certificate ({path.name}); export it again with this version"
        ) from error
    except KeyError as error:
        raise StoreError(f"{path}: not a certificate of fxshare: it has no {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path}: not a certificate of fxshare: {error}") from error
    if digest != _sum(given):
        raise StoreError(
            f"{path} was edited since it was written: its sum is not that of its content; export "
            "again"
        )
    if given["version"] > VERSION:
        raise StoreError(
            f"{path} has version {given['version']}, this fxshare reads up to {VERSION}; upgrade "
            "fxshare"
        )
    found = given.pop("first_difference")
    for key in ("prompts", "expected", "found", "logits", "margins", "inputs"):
        given[key] = tuple(tuple(each) if isinstance(each, list) else each for each in given[key])
    return Certificate(first_difference=Difference(**found) if found else None, **given)


def changes_since(export: Path, certificate: Certificate) -> list[str]:
    """What is not as it was certified, a sentence each; none where every file is."""
    now = files_of(export)
    changed = [
        f"{name} was changed"
        for name, digest in certificate.files.items()
        if name in now and sha256_of(now[name]) != digest
    ]
    missing = [f"{name} is missing" for name in certificate.files if name not in now]
    added = [f"{name} was added" for name in now if name not in certificate.files]
    return [*changed, *missing, *added]


def _sum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


__all__ = [
    "NAME",
    "Certificate",
    "Difference",
    "certificate_path",
    "changes_since",
    "files_of",
    "read_certificate",
]
