"""What each engine says to the prompts of a certificate: one row an engine."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxshare.base.hashes import sha256_of
from fxshare.errors import ConfigError, FxShareWarning
from fxshare.exporting.certifying.certificate import (
    Certificate,
    changes_since,
    files_of,
    read_certificate,
)
from fxshare.exporting.engines import worker

TARGETS: Mapping[str, str] = {
    "transformers": "vllm",
    "vllm": "vllm",
    "vllm-plugin": "vllm",
    "ort-genai": "ort-genai",
    "pt2": "pt2",
    "onnx": "onnx",
}
"""The target that each engine runs."""
_TESTED = {
    "transformers": ((5, 18), (5, 24)),
    "vllm": ((0, 32), (0, 33)),
    "vllm-plugin": ((0, 32), (0, 33)),
    "ort-genai": ((0, 18), (0, 19)),
    "pt2": ((2, 12), (2, 14)),
    "onnx": ((1, 18), (1, 33)),
}
"""Versions that were tested, the second not among them."""
_RUN_CODE = ("transformers", "vllm")
"""Those that run Python code of the folder."""
_SECONDS = 1800
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Row:
    """One engine. ``state`` is ``equal``, ``tie`` (the first token that differs is as likely within
    rounding), ``differs``, ``failed``, ``not installed`` or ``not run``; ``gap`` the largest
    difference of a chosen token's logit up to the first that differs, ``note`` why or where."""

    engine: str
    state: str
    version: str = ""
    gap: float | None = None
    tokens_per_second: float | None = None
    resident: int | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it does not say anything else than the compiled model."""
        return self.state not in ("differs", "failed")

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self)


def engines_of(names: Sequence[str]) -> tuple[str, ...]:
    """The engines of these names; :class:`ConfigError` says which there are."""
    for name in names:
        if name not in TARGETS:
            raise ConfigError(f"--on: expected some of {', '.join(TARGETS)}; found {name!r}")
    return tuple(dict.fromkeys(names))


def changes(export: Path) -> list[str]:
    """What of an export is not as it was certified; see :func:`read_certificate`."""
    return changes_since(export, read_certificate(export))


def row_of(engine: str, export: Path, python: str | None = None) -> Row:
    """Run an export in an engine and compare with what its certificate has of the compiled model.

    ``python`` is the interpreter of an environment that has the engine; ours where None. Code of a
    folder that is not as it was certified is not run.
    """
    certificate = read_certificate(export)
    if certificate.kind != "tokens":
        return Row(engine, "not run", note="it makes no tokens; it was compared when exported")
    if TARGETS[engine] != certificate.target:
        note = f"it runs exports to {TARGETS[engine]!r}, and this is one to {certificate.target!r}"
        return Row(engine, "not run", note=note)
    changed = _changed_code(export, certificate) if engine in _RUN_CODE else []
    if changed:
        note = f"{changed[0]} is code of the folder and not as it was certified: it is not run"
        return Row(engine, "not run", note=note)
    job = {
        "engine": engine,
        "path": str(export.resolve()),
        "dtype": certificate.dtype,
        "prompts": certificate.prompts,
        "new": len(certificate.expected[0]),
        "inputs": certificate.inputs,
        "rows": certificate.rows,
        "width": certificate.width,
    }
    answer = _answer(job, python)
    if "missing" in answer:
        return Row(engine, "not installed", note=f"{answer['missing']} cannot be imported")
    if "failed" in answer:
        return Row(engine, "failed", note=answer["failed"])
    _warn_of_version(engine, answer["version"])
    return _compared(engine, certificate, answer)


def _changed_code(export: Path, certificate: Certificate) -> list[str]:
    code = {name: path for name, path in files_of(export).items() if name.endswith(".py")}
    return [n for n, path in code.items() if certificate.files.get(n) != sha256_of(path)]


def _answer(job: Mapping[str, Any], python: str | None) -> dict[str, Any]:
    """What the worker says; isolated, so that nothing that lies beside it can be imported."""
    with tempfile.TemporaryDirectory() as scratch:
        # code of the folder is copied there, and not into the user's cache
        variables = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        command = [python or sys.executable, "-I", str(Path(worker.__file__).resolve())]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(job),
                capture_output=True,
                text=True,
                cwd=scratch,
                env=variables,
                timeout=_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"failed": f"{command[0]}: {error}"}
    lines = done.stdout.strip().splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines() or [""]
        return {"failed": f"ended with {done.returncode}: {said[-1]}"}
    return answer


def _compared(engine: str, certificate: Certificate, answer: Mapping[str, Any]) -> Row:
    allowed = 2 * (certificate.limit or 0.0)
    gaps = []
    others: list[tuple[bool, str]] = []
    for number, expected in enumerate(certificate.expected):
        found, own = answer["tokens"][number], answer["logits"][number]
        for at, token in enumerate(expected):
            other = found[at] if at < len(found) else None
            gap = abs(own[at] - certificate.logits[number][at]) if other is not None else math.inf
            if other != token:
                tie = max(gap, certificate.margins[number][at]) <= allowed
                what = f"prompt {number}, token {at}: {int(token)} expected, {other} found"
                others.append((tie, what))
                break
            gaps.append(gap)
    said = sum(map(len, answer["tokens"]))
    return Row(
        engine,
        "equal" if not others else "tie" if all(tie for tie, _ in others) else "differs",
        answer["version"],
        max(gaps, default=None),
        said / answer["seconds"] if answer["seconds"] else None,
        answer["resident"] or None,
        min(others, default=(False, ""))[1],
    )


def _warn_of_version(engine: str, version: str) -> None:
    oldest, newest = _TESTED[engine]
    found = tuple(int(number) for number in _NUMBER.findall(version)[:2])
    if not oldest <= found < newest:
        text = ".".join(map(str, oldest)), ".".join(map(str, newest))
        warnings.warn(
            f"{engine} {version} is outside the versions that were tested: {text[0]} to below "
            f"{text[1]}",
            FxShareWarning,
            stacklevel=3,
        )


__all__ = ["TARGETS", "Row", "changes", "engines_of", "row_of"]
