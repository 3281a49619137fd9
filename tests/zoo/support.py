"""Write ``docs/reference/support.md``: what was measured, family by family.

Run from the repository root::

    python -m tests.zoo.support                    # everything; minutes
    python -m tests.zoo.support llama phi3         # some rows to stdout, the page stays
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.zoo.causal.page import put_into, section_of
from tests.zoo.families import FAMILIES, family
from tests.zoo.measure import KEPT, NEW_TOKENS, Row, Subject, capture_seconds, measure

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "support.md"
_STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260K"

_HEAD = """\
# Supported models

Written by `python -m tests.zoo.support`, from the code that the tests of `tests/zoo/` run; edit
that and not this page. Families are small models with random weights, two layers of width 32, built
from their transformers class or written in `tests/zoo/written.py`.

"""

_COLUMNS = """
* **sites**: weights that were rewritten, of all linears that the model calls; an expert is one, and
  a projection that cross attention reads in parts is one for each part. What is missing is listed
  below.
* **exact, ulps**: largest difference of exact mode from the original, on a call that it was not
  captured with, in units of the last place of the largest value; in brackets what rounding
  explains.
* **generate**: {tokens} greedy tokens, or as many as the model has positions for, of two prompts
  are those of the original, and graphs made them; – where there is none.
* **compile**: `torch.compile(fullgraph=True, dynamic=True)` with all but the code generator
  (`aot_eager`), compared at two shapes. **export**: `fxshare.export(to="pt2")`, read back and
  compared.
* **loss, BS** and **planned**: predicted loss increase per token (second order, K-FAC, statistics
  of the dense model) of Basis Sharing at {kept:.0%} of the numbers in groups of two layers, and of
  the planner without a search at the numbers that Basis Sharing stores.
* **capture**: CPU seconds of capture with its self-check, on one thread.
"""


_EMBEDDINGS = """\
Embeddings are not counted above. `embedding: true` factorises them, with the head that is tied to
one ([how](../how-to/write-a-configuration.md#embeddings-and-the-head));
`tests/zoo/test_embeddings.py` does it for every family here that reads tokens.

[Hidden units](../explanation/planning.md#hidden-units) go in MLPs that the graph shows, those
inside the experts of mixtral, qwen2_moe and gpt_oss (whose gates and ups alternate row by row)
among them. `tests/zoo/test_units.py` lets half of them go.
"""


def subjects(names: Sequence[str]) -> Iterable[Subject]:
    """The real models where they are at hand, then the families."""
    for name in names or ["embedded", "stories260K", *(one.name for one in FAMILIES)]:
        if name == "embedded":
            yield _embedded()
        elif name == "stories260K":
            if (_STORIES / "model.safetensors").is_file():
                yield _stories()
        else:
            yield family(name).subject()


def _embedded() -> Subject:
    from fxshare.bench.demo import CONFIG
    from fxshare.embedded import load_embedded, load_tokenizer
    from fxshare.embedded.corpus import calibration, load_documents, pack, token_stream

    text = calibration(load_documents(), n_bytes=40_000)
    tokens = pack(token_stream(text, load_tokenizer()))
    model = load_embedded()
    return _of_tokens("embedded", model, CONFIG, tokens, model.forward.__code__.co_varnames[1])


def _stories() -> Subject:
    from safetensors.torch import load_file

    from fxshare.loading.names import load_model

    tokens = load_file(_STORIES / "tokens.safetensors")["calibration"].long()[:32]
    config = family("llama").config
    model = load_model(str(_STORIES)).model.eval()
    return _of_tokens("stories260K", model, config, tokens, "input_ids")


def _of_tokens(
    name: str, model: torch.nn.Module, config: dict[str, object], tokens: Tensor, argument: str
) -> Subject:
    batches = [{argument: part} for part in tokens[:24].split(6)]
    generative = hasattr(model, "generate")
    return Subject(
        name,
        model,
        config,
        {argument: tokens[:2, :24]},
        {argument: tokens[2:5, :17]},
        list(batches),
        tokens[:2, :7] if generative else None,
        strategy="separate",
    )


def page(rows: Sequence[Row], captures: Sequence[tuple[str, float, float]]) -> str:
    """The page as Markdown."""
    lines = [_HEAD, _table(rows), _COLUMNS.format(kept=KEPT, tokens=NEW_TOKENS)]
    lines.append("\n## What stays as it is\n")
    lines.append(_EMBEDDINGS)
    lines += [f"* **{row.name}**: {_missed(row)}" for row in rows if row.missed]
    lines.append("\n## What the captures say\n")
    lines += [f"* **{row.name}**: {note}" for row in rows for note in row.notes]
    broken = [
        f"* **{row.name}**, {what}: {why}"
        for row in rows
        for what, why in (
            ("generate", row.generate),
            ("compile", row.compiles),
            ("export", row.exports),
        )
        if why not in ("", "–")
    ]
    if broken:
        lines += ["\n## What does not work, and why\n", *broken]
    if captures:
        lines += [
            "\n## Capture of full-sized shapes\n",
            "On the meta device, without weights; CPU seconds of one thread, and parameters.\n",
            "| model | parameters | seconds |",
            "|---|---|---|",
            *(f"| {name} | {size / 1e9:.1f} B | {s:.1f} |" for name, size, s in captures),
        ]
    lines.append(
        f"\nMeasured with torch {torch.__version__.partition('+')[0]}, transformers "
        f"{_version('transformers')}, Python {platform.python_version()} on "
        f"{platform.machine()}, one thread."
    )
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| model | captured by | sites | exact, ulps | generate | compile | export | loss, BS "
        "| planned | capture, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.name,
            row.front_end,
            f"{row.matched} / {row.matched + len(row.missed)}",
            f"{row.ulps:.1f} ({row.limit:.0f})" + ("" if row.is_exact else " **not equal**"),
            *(_mark(text) for text in (row.generate, row.compiles, row.exports)),
            f"{row.sharing_error:.2e}",
            f"{row.planned_error:.2e}",
            f"{row.seconds:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mark(text: str) -> str:
    if text in ("–", "not tried"):
        return text
    return "no" if text else "yes"


def _missed(row: Row) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, why in row.missed.items():
        by_reason.setdefault(why, []).append(f"`{name}`")
    parts = []
    for why, names in by_reason.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append(f"{', '.join(names[:3])}{more} ({why})")
    return "; ".join(parts)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main(names: Sequence[str]) -> None:
    """Measure, and write the page, or the rows alone where names are given."""
    torch.set_num_threads(1)
    # first, as in a process of its own: what torch.compile leaves behind slows everything down
    captures = [] if names else capture_seconds()
    rows = []
    for subject in subjects(names):
        start = time.perf_counter()
        rows.append(measure(subject))
        print(f"{subject.name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    if names:
        print(_table(rows))
        return
    text = page(rows, captures)
    of_families = section_of(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else ""
    PAGE.write_text(put_into(text, of_families) if of_families else text, encoding="utf-8")
    print(f"written to {PAGE.name}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
