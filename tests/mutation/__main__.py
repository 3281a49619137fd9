"""Change functions one at a time and see whether the tests that call them fail.

``python -m tests.mutation passes --count 40`` (see ``--help``). The tests of a part run once and
say which of them call which function; then each mutant is made in a forked process, by giving the
loaded function other code, and only those tests run, the quickest first, until one fails. Mutants
that compute the same as the original are listed with the reason in ``equivalent.txt`` and left out
of the score. On POSIX, from Python 3.11 on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.mutation.judge import OPTIONS, functions_by_place, judge
from tests.mutation.mutants import Mutant, mutants_of
from tests.mutation.watch import Calls, Watch

ROOT = Path(__file__).parents[2]
EQUIVALENT = Path(__file__).parent / "equivalent.txt"
PARTS: dict[str, tuple[str, ...]] = {
    "passes": ("tests/passes", "tests/rewriting"),
    "fxshare/planning": ("tests/planning",),
    "fxshare/plans": ("tests/plans", "tests/planning", "tests/views/test_table.py"),
    "fxshare/factors": ("tests/factors", "tests/planning"),
    "fxshare/store": ("tests/store", "tests/loading"),
}
"""What is changed, and the tests that must see it."""


def equivalents(path: Path = EQUIVALENT) -> dict[str, str]:
    """The mutants that compute the same, and why: lines ``file:name:change at line # why``."""
    found = {}
    for line in path.read_text().splitlines():
        if line.strip():
            key, mark, why = line.rpartition("  # ")
            if not mark or not why.strip():
                raise ValueError(f"{path.name}: no reason after '  # ' in {line!r}")
            found[key] = why.strip()
    return found


def every_mutant(part: str) -> list[Mutant]:
    """The mutants of the files in a folder."""
    files = sorted((ROOT / part).rglob("*.py"))
    return [m for file in files for m in mutants_of(file, str(file.relative_to(ROOT)))]


def _calls(part: str, kept: Path | None, again: Sequence[str]) -> Calls:
    """Which tests call which functions; from the file if it tells, else by running the tests.

    They run in a forked process as mutants do: what fails there says nothing about mutants, and
    nothing that they have computed is kept here. Tests ``again`` run even if the file tells.
    """
    # what is slow to import must be there before processes are forked
    pytest.main([*OPTIONS, "--collect-only", *PARTS[part]])
    for file in sorted((ROOT / part).rglob("*.py")):
        if file.name not in ("__init__.py", "__main__.py"):
            importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    importlib.import_module("torch._dynamo")
    importlib.import_module("torch.export")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "calls.json" if kept is None else kept
        told: dict[str, Calls] = json.loads(path.read_text()) if path.is_file() else {}
        tests = again if part in told else PARTS[part]
        if tests:
            child = os.fork()
            if child == 0:
                for calls in told.get(part, {}).values():  # tests that are there no longer
                    for test in [t for t in calls if t.startswith(tuple(tests))]:
                        del calls[test]
                watch = Watch(ROOT, part)
                pytest.main([*OPTIONS, *tests], plugins=[watch])
                for name, calls in watch.told().items():
                    told.setdefault(part, {}).setdefault(name, {}).update(calls)
                path.write_text(json.dumps(told))
                os._exit(0)
            os.waitpid(child, 0)
            told = json.loads(path.read_text())
    return told[part]


def _tests(seconds: dict[str, float], most: float) -> tuple[list[str], float]:
    """The quickest of the tests, at least one, and their time."""
    tests: list[str] = []
    total = 0.0
    for test in sorted(seconds, key=lambda t: (seconds[t], t)):
        if tests and total + seconds[test] > most:
            break
        total += seconds[test]
        tests.append(test)
    # those of one file together: what they share is made once
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    return sorted(tests, key=lambda t: files.index(t.partition("::")[0])), total


def _score(outcomes: Counter[str]) -> str:
    killed = outcomes["killed"] + outcomes["timeout"]
    judged = killed + outcomes["survived"]
    share = 100 * killed / judged if judged else 100.0
    return f"{killed} of {judged} killed ({share:.1f} %), {dict(outcomes)}"


def _run(part: str, given: argparse.Namespace) -> Counter[str]:
    calls = _calls(part, given.calls, given.again)
    every = every_mutant(part)
    called = [m for m in every if f"{m.file}:{m.name}" in calls]
    print(
        f"{part}: {len(every)} mutants, {len(called)} in functions that its tests call", flush=True
    )
    if given.only:
        called = [m for m in called if any(fnmatch(m.key, only) for only in given.only)]
    if given.count is not None:
        called = random.Random(given.seed).sample(called, min(given.count, len(called)))
    same = equivalents()
    places = functions_by_place(str(ROOT / part))
    outcomes: Counter[str] = Counter()
    for mutant in called:
        tests, total = _tests(calls[f"{mutant.file}:{mutant.name}"], given.most)
        outcome = (
            "equivalent"
            if mutant.key in same
            else judge(ROOT, mutant, tests, limit=20 + 5 * total, places=places)
        )
        outcomes[outcome] += 1
        if outcome == "survived":
            print(f"survived {len(tests)} tests: {mutant}", flush=True)
        if given.o is not None:
            with given.o.open("a") as file:
                print(json.dumps({**asdict(mutant), "outcome": outcome}), file=file)
    print(f"{part}: {_score(outcomes)}", flush=True)
    return outcomes


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--count", type=int, help="a random choice of so many mutants a part")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice")
    parser.add_argument("--only", nargs="*", help="mutants with such a key, `*` for anything")
    parser.add_argument("--most", type=float, default=60.0, help="seconds of tests for a mutant")
    parser.add_argument(
        "--calls", type=Path, help="a file for which tests call what; read if there"
    )
    parser.add_argument("--again", nargs="*", default=(), help="tests that `--calls` lacks")
    parser.add_argument("-o", type=Path, help="a line of JSON for every mutant")
    given = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    total: Counter[str] = Counter()
    for part in given.parts:
        total += _run(part, given)
    print(f"all: {_score(total)}", flush=True)
    sys.exit(bool(total["survived"]))


if __name__ == "__main__":
    main()
