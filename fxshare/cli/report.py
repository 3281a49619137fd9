"""``fxshare report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxshare.cli.options import AllowMissing, AsJson, Debug, Original
from fxshare.cli.output import Result

if TYPE_CHECKING:
    from fxshare.views.page_curves import Curve


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
    frontier: Annotated[
        Path | None,
        typer.Option(
            "--frontier",
            metavar="FILE",
            help="Show loss against size on the page as well: what 'fxshare bench frontier --json' "
            "or 'fxshare plan --sweep - --json' printed.",
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
      fxshare report out/ --html report.html --frontier sweep.json
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
    frontiers = _frontiers(frontier, html)
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

        write_text(html, page_of(record, out.rstrip("/") or out, why, frontiers))
        text += f"\nwritten to {html}"
        plain["html"] = str(html)
    return Result(plain, text)


def _frontiers(path: Path | None, html: Path | None) -> list[Curve]:
    from fxshare.base.json_text import parse_json
    from fxshare.errors import ConfigError
    from fxshare.views.page_curves import frontier_curves

    if path is None:
        return []
    if html is None:
        raise ConfigError(f"--frontier {path}: is shown on a page; give --html FILE as well")
    try:
        return frontier_curves(parse_json(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--frontier {path}: expected what 'fxshare bench frontier --json' or 'fxshare plan "
            f"--sweep - --json' printed; {error}"
        ) from error
