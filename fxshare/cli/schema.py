"""``fxshare schema``."""

from __future__ import annotations

from fxshare.cli.options import AsJson, Debug
from fxshare.cli.output import Result, json_text


def schema(as_json: AsJson = False, debug: Debug = False) -> Result:
    """Print the JSON schema of the configuration, for editors that complete and check YAML.

    \b
    Example:
      fxshare schema > fxshare.schema.json
    """
    from fxshare.config import json_schema

    del as_json, debug
    document = json_schema()
    return Result(document, json_text(document))
