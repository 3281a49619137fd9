"""The section of ``docs/reference/support.md`` about every causal family."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.zoo.causal.measure import NEW_TOKENS, Row

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "support.md"
BEGIN, END = "<!-- every causal family -->\n", "<!-- end of every causal family -->\n"

_HEAD = """
## Every causal family of transformers

Written by `python -m tests.zoo.causal -o causal.jsonl --page`, which takes minutes and goes on
where it was stopped; `--afresh` measures all of the file again. Each model type that
`AutoModelForCausalLM` knows is built with random weights, width 32 and one layer of each kind, at
least two, and compiled in exact mode with the configuration that `fxshare init` proposes.

"""

_COLUMNS = """
* **exact, ulps**: largest difference of the logits from the original's, on a call of another size
  with padding, in units of the last place of the largest value.
* **generate**: {tokens} greedy tokens of two prompts of different length, padded on the left, are
  those of the original; – where the original has none. **by**: what made the steps, graphs with a
  cache, the model's own code over the weights of the graph, or the model itself at module
  granularity.
* **in sites**: share of the numbers in matrices which the call reads, embeddings and head left out.
"""


def section(rows: Sequence[Row], version: str) -> str:
    """The section as Markdown, between its two marks."""
    rows = sorted(rows, key=lambda row: row.name)
    built = [row for row in rows if not row.not_built]
    lines = [_HEAD.strip("\n"), "", *_counts(rows, built, version), "", *_table(built)]
    lines.append(_COLUMNS.format(tokens=NEW_TOKENS).rstrip("\n"))
    for title, found in (
        ("Not captured by fx, and why", [(r.name, r.reason) for r in built if r.front_end != "fx"]),
        ("Steps that no graph runs, and why", [(r.name, _after(r.runs)) for r in built if _own(r)]),
        ("Other tokens, or none", [(r.name, r.generate) for r in built if not _generates(r)]),
        ("Not built", [(row.name, row.not_built) for row in rows if row.not_built]),
    ):
        if found:
            lines += ["", f"### {title}", ""]
            lines += [f"* **{name}**: {shortened(why)}" for name, why in found]
    return BEGIN + "\n".join(lines) + "\n" + END


def put_into(page: str, text: str) -> str:
    """The page with the section in place of the one that it has, or before its last line."""
    if BEGIN in page:
        before, _, rest = page.partition(BEGIN)
        return before + text + rest.partition(END)[2]
    before, dot, last = page.rstrip("\n").rpartition("\n\n")
    return f"{before}\n\n{text}{dot.lstrip(chr(10))}\n{last}\n"


def section_of(page: str) -> str:
    """The section of a page; empty where it has none."""
    _, begin, rest = page.partition(BEGIN)
    return begin + rest.partition(END)[0] + END if begin else ""


def shortened(reason: str) -> str:
    """A reason without nodes of a graph and paths of a machine, on one line."""
    text = re.sub(r"\S*/site-packages/", "", " ".join(reason.split()))
    text = re.sub(r", after %.*?: (?=\w+(?:Error|Exception)\b)", ": ", text)
    text = text.replace("|", "/").replace("<", "‹").replace(">", "›")
    return text if len(text) <= 240 else text[:239] + "…"


def _counts(rows: Sequence[Row], built: Sequence[Row], version: str) -> list[str]:
    by = Counter(row.front_end for row in built)
    able = [row for row in built if not row.generate.startswith("–") and row.front_end != "none"]
    same = [row for row in able if row.generate == "same"]
    made = Counter("own code" if _own(row) else row.runs for row in same)
    exact = sum(row.is_exact and row.front_end != "none" for row in built)
    return [
        f"* {len(rows)} families of transformers {version}, {len(built)} of them built small",
        "* captured by " + ", ".join(f"{name}: {n}" for name, n in by.most_common()),
        f"* exact within what rounding explains: {exact}",
        f"* the original's tokens: {len(same)} of {len(able)} that generate ("
        + ", ".join(f"{name}: {n}" for name, n in made.most_common())
        + ")",
    ]


def _table(rows: Sequence[Row]) -> list[str]:
    lines = ["| family | captured by | exact, ulps | generate | by | in sites |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        ulps = f"{row.ulps:.1f}" + ("" if row.is_exact else " **not equal**")
        cells = [
            row.name,
            row.front_end,
            "–" if row.front_end == "none" else ulps,
            "–" if row.generate[:1] in ("–", "") else "yes" if row.generate == "same" else "no",
            "own code" if _own(row) else row.runs or "–",
            f"{row.in_sites:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _own(row: Row) -> bool:
    return row.runs.startswith("generate:")


def _generates(row: Row) -> bool:
    return row.generate == "same" or not row.generate


def _after(runs: str) -> str:
    before, _, why = runs.partition("because no graph does: ")
    return why or before.removeprefix("generate: ")
