"""Measure causal families, a JSON line for each.

::

    python -m tests.zoo.causal -o causal.jsonl           # every family; those in the file stay
    python -m tests.zoo.causal llama bart                # some, to stdout
    python -m tests.zoo.causal --list                    # names alone
    python -m tests.zoo.causal -o causal.jsonl --page    # and write the table of the support page
    python -m tests.zoo.causal -o causal.jsonl --again good  # measure anew what was not so

Each runs in a process of its own with one thread and a limit of time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.zoo.causal.measure import Row, measure
from tests.zoo.causal.models import families
from tests.zoo.causal.page import PAGE, put_into, section

LIMIT = 120.0


def run(names: Sequence[str], limit: float = LIMIT) -> Iterator[Row]:
    """The rows of these families, one after another."""
    torch.set_num_threads(1)
    _warm_up()
    context = multiprocessing.get_context("fork")
    for name in names:
        start = time.perf_counter()
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(name, sender), daemon=True)
        worker.start()
        sender.close()
        row = Row(name, front_end="none", reason=f"not done within {limit:.0f} s")
        try:
            if receiver.poll(limit):
                row = receiver.recv()
        except EOFError:
            worker.join()
            row = Row(name, front_end="none", reason=f"the process ended: {worker.exitcode}")
        worker.kill()
        worker.join()
        yield replace(row, seconds=round(time.perf_counter() - start, 1))


def _work(name: str, sender: Connection) -> None:
    import transformers

    # torch.export writes its graphs to stdout where it fails
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    sender.send(measure(name))


def _warm_up() -> None:
    """What every process needs, imported before there are processes."""
    for name in (
        "torch._dynamo",
        "torch.export",
        "transformers.generation.utils",
        "transformers.models.llama.modeling_llama",
        "fxshare.compiling.compile",
        "fxshare.generation.shell",
    ):
        importlib.import_module(name)


def read(file: Path) -> list[Row]:
    """The rows of a file, the last of each family."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return list({row.name: row for row in rows}.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.causal", description=__doc__)
    parser.add_argument("names", nargs="*", help="families; all where none is named")
    parser.add_argument("-o", "--output", type=Path, help="a file to go on with")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a family")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--afresh", action="store_true", help="measure all of the file again")
    parser.add_argument("--page", action="store_true", help=f"write the section of {PAGE.name}")
    parser.add_argument("--again", choices=["fx", "good"], help="measure anew what is not so")
    given = parser.parse_args(arguments)
    names = given.names or list(families())
    if given.list:
        print("\n".join(names))
        return
    if given.page and not given.output:
        parser.error("--page writes what is in the file of -o FILE; name one")
    if given.afresh and given.output:
        given.output.unlink(missing_ok=True)
    done = {row.name for row in read(given.output)} if given.output else set()
    if given.again and given.output:
        done = {row.name for row in read(given.output) if _is(row, given.again)}
    for row in run([name for name in names if name not in done or given.names], given.limit):
        line = json.dumps(asdict(row), ensure_ascii=False)
        if given.output:
            with given.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        print(line if not given.output else f"{row.name}: {row.seconds} s", flush=True)
    if given.page:
        text = section(read(given.output), version("transformers"))
        PAGE.write_text(put_into(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")


def _is(row: Row, wanted: str) -> bool:
    if row.not_built or (wanted == "fx" and row.front_end == "fx"):
        return True
    return row.front_end == "fx" and row.is_exact and row.generate[:1] in ("s", "–")


if __name__ == "__main__":
    main()
