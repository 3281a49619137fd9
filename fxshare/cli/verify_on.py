"""``fxshare verify --on``: a compiled model, or an export of one, in the engines that run it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fxshare
from fxshare.cli.output import Result, note, table

if TYPE_CHECKING:
    from fxshare.exporting.engines.matrix import Row

_FAILED = 3
_NAMES = {"pt2": "m.pt2", "onnx": "m.onnx"}
_MB = 1e6


def verify_on(
    name: str, out: str | None, on: str | None, python: Sequence[str], *, seed: int
) -> Result:
    """The matrix of a saved folder or an export; exit code 3 where an engine says another token,
    or a file is not as it was certified."""
    from fxshare.exporting.certifying.certificate import certificate_path
    from fxshare.exporting.engines.matrix import TARGETS, engines_of
    from fxshare.loading.names import is_saved

    if out is not None:
        raise fxshare.errors.ConfigError(
            f"--on takes one folder, which is compared with itself in engines; found {name} and "
            f"{out}: leave --on out, or the first of them"
        )
    wanted = engines_of([each.strip() for each in on.split(",")]) if on is not None else None
    pythons = _pythons(python, wanted)
    if is_saved(name):
        if wanted is None:
            raise fxshare.errors.ConfigError(
                f"{name}: expected the model that it was compiled from before it, to compare with, "
                f"or --on with some of {','.join(TARGETS)}"
            )
        return _result(name, _rows_of_saved(name, wanted, pythons, seed), [])
    path = Path(name)
    if not path.exists() or not certificate_path(path).is_file():
        raise fxshare.errors.ConfigError(
            f"{name}: expected a folder of fxshare.save, or an export with its certificate; to "
            "compare two models give both"
        )
    return _of_export(name, path, wanted, pythons)


def _of_export(
    name: str, path: Path, wanted: Sequence[str] | None, pythons: Mapping[str, str]
) -> Result:
    from fxshare.exporting.certifying.certificate import read_certificate
    from fxshare.exporting.engines.matrix import TARGETS, changes, row_of

    target = read_certificate(path).target
    chosen = wanted or [engine for engine, takes in TARGETS.items() if takes == target]
    rows = [row_of(engine, path, pythons.get(engine)) for engine in chosen]
    changed = changes(path)
    if rows or changed:
        return _result(name, rows, changed)
    data = {"name": name, "ok": True, "engines": [], "changed": []}
    return Result(
        data,
        f"{name}: its files are as certified; no engine of --on runs exports to {target!r}, which "
        "was compared when it was made",
    )


def _rows_of_saved(
    name: str, engines: Sequence[str], pythons: Mapping[str, str], seed: int
) -> Iterator[Row]:
    """Every engine's row, each on an export to a temporary place."""
    from fxshare.errors import CheckFailed, ExportError
    from fxshare.exporting import TARGETS as KNOWN
    from fxshare.exporting import export
    from fxshare.exporting.engines.matrix import TARGETS, Row, row_of
    from fxshare.loading.names import load_model

    model = load_model(name).model
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Path | Row] = {}
        for engine in engines:
            target = TARGETS[engine]
            if target not in made:
                path = Path(folder) / _NAMES.get(target, target)
                note(f"exporting {name} to {target}")
                try:
                    if target not in KNOWN:
                        raise ExportError(f"there is no target {target!r}")
                    to: Any = target
                    export(model, path, to=to, seed=seed)
                    made[target] = path
                except ExportError as error:
                    made[target] = Row(engine, "not run", note=str(error))
                except CheckFailed as error:
                    made[target] = Row(engine, "differs", note=str(error))
            found = made[target]
            if isinstance(found, Path):
                note(f"running it on {engine}")
                yield row_of(engine, found, pythons.get(engine))
            else:
                yield Row(engine, found.state, note=found.note)


def _pythons(given: Sequence[str], wanted: Sequence[str] | None) -> dict[str, str]:
    from fxshare.exporting.engines.matrix import engines_of

    found = {}
    for each in given:
        engine, equals, path = each.partition("=")
        if not equals or not path:
            raise fxshare.errors.ConfigError(
                f"--python: expected ENGINE=PATH, as in vllm=/opt/vllm/bin/python; found {each!r}"
            )
        engines_of([engine])
        if wanted is not None and engine not in wanted:
            raise fxshare.errors.ConfigError(
                f"--python {engine}: expected an engine of --on, which has {', '.join(wanted)}"
            )
        if shutil.which(path) is None:
            raise fxshare.errors.ConfigError(
                f"--python {engine}: expected a Python interpreter that can be run, found {path!r}"
            )
        found[engine] = path
    return found


def _result(name: str, rows: Any, changed: Sequence[str]) -> Result:
    found: list[Row] = list(rows)
    header = ("engine", "version", "tokens", "worst gap", "tokens/s", "resident")
    lines = [
        (
            row.engine,
            row.version or "–",
            row.state,
            "–" if row.gap is None else f"{row.gap:.1e}",
            "–" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "–" if row.resident is None else f"{row.resident / _MB:,.0f} MB",
        )
        for row in found
    ]
    notes = [f"{row.engine}: {row.note}" for row in found if row.note]
    notes += [f"{name}: {change} since it was certified" for change in changed]
    failed = bool(changed) or not all(row.ok for row in found)
    data = {
        "name": name,
        "ok": not failed,
        "engines": [{**row.to_dict(), "ok": row.ok} for row in found],
        "changed": list(changed),
    }
    return Result(data, "\n".join([table(header, lines), *notes]), code=_FAILED if failed else 0)


__all__ = ["verify_on"]
