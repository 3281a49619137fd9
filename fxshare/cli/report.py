"""``fxshare report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxshare.cli.options import AllowMissing, AsJson, Debug, Original
from fxshare.cli.output import Result


def report_model(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder that fxshare saved.")],
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write a page as well: results, the plan as a picture, trials, curves.",
        ),
    ] = None,
    original: Original = None,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Show the report of a saved folder, and write it as a page that needs nothing beside itself.

    \b
    Examples:
      fxshare report out/
      fxshare report out/ --html report.html
    """
    del as_json, debug
    from fxshare.base.files import check_writable, write_text
    from fxshare.cli.why import explain
    from fxshare.errors import ConfigError
    from fxshare.loading.names import load_model
    from fxshare.result.record import Record
    from fxshare.views.page import page_of

    if html is not None:
        if html.suffix.lower() not in (".html", ".htm"):
            raise ConfigError(
                f"--html {html}: expected the name of a page, ending in .html; found "
                f"{html.suffix or 'no ending'}"
            )
        check_writable(html)
    structure = (
        None if original is None else load_model(original, allow_missing=allow_missing).model
    )
    loaded = load_model(out, original=structure, allow_missing=allow_missing)
    meta = getattr(loaded.model, "meta", None)
    record = meta.get("fxshare") if isinstance(meta, dict) else None
    if not isinstance(record, Record):
        raise ConfigError(
            f"{out}: expected a folder that fxshare saved, found a model that is not compiled; "
            "'fxshare compile ... -o DIR' makes one"
        )
    text = str(record.report)
    plain = record.report.to_dict()
    if html is not None:

        def why(name: str) -> list[str]:
            return explain(loaded.model, name, record.config, record)

        write_text(html, page_of(record, out.rstrip("/") or out, why))
        text += f"\nwritten to {html}"
        plain["html"] = str(html)
    return Result(plain, text)
