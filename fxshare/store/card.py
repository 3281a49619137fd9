"""``README.md`` of a saved model."""

from __future__ import annotations

from fxshare.models.source import USER
from fxshare.result.record import Record

_CARD = """\
---
library_name: fxshare
tags:
- fxshare
- basis-sharing
---

# {model}, compiled by fxshare

A `{class_name}` rewritten as a graph in which
{what}. {kept}
It was captured by the `{front_end}` front end in {dtype}.

## Loading

```python
import fxshare

model = fxshare.load({call})
```
{structure}{passes}
`config.yaml` is the configuration it was compiled with and `plan.json` what was shared; the weights
are in safetensors files, each stored once. Loading runs no code from this folder.

## Licence

The licence of the original model applies to this one: the weights are derived from it.

## Report

{table}"""
_WHAT = {
    "exact": "every matched linear is split into slices over its original weights",
    "sharing": "linears of several layers share one basis (Basis Sharing, arXiv 2410.03765)",
    "planned": "linears share bases where a plan within a budget found it worth the loss",
}
_KEPT = (
    "The matched linears keep {kept:.4f}\nof their numbers (params_kept): {before:,} weights "
    "became {after:,} stored numbers."
)


def card(record: Record) -> str:
    """The model card."""
    report = record.report
    user = record.source.kind == USER
    arguments = ['"path/to/this/folder"', *(["model=..."] if user else [])]
    arguments += ["passes=[...]"] if record.extra_passes else []
    structure = (
        f"\n`model` is a `{record.source.class_name}` of the original sizes, or a function that "
        "makes one; its\nweights are not used.\n"
    )
    passes = f"\n`passes` are, in this order: {', '.join(record.extra_passes)}.\n"
    kept = _KEPT.format(
        kept=report.params_kept, before=report.numbers_before, after=report.numbers_after
    )
    return _CARD.format(
        model=report.model,
        class_name=record.source.class_name,
        what=_WHAT[report.mode],
        kept=kept,
        front_end=report.front_end,
        dtype=report.dtype,
        call=", ".join(arguments),
        structure=structure if user else "",
        passes=passes if record.extra_passes else "",
        table=report.to_markdown(),
    )
