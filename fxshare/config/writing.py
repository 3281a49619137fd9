"""A configuration as YAML text, and the schema that editors check it with."""

from __future__ import annotations

from typing import Any

import yaml

from fxshare.config.share_config import ShareConfig
from fxshare.config.yaml_text import Dumper


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors that complete and check YAML."""
    schema = ShareConfig.model_json_schema()
    # Accepted under this name too, so an editor must not mark it as unknown.
    alias = {**schema["properties"]["block_pattern"], "description": "Alias of `block_pattern`."}
    schema["properties"]["layer_pattern"] = {**alias, "title": "Layer Pattern"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def dump_config(cfg: ShareConfig) -> str:
    """YAML text that :func:`load_config` reads back to an equal configuration.

    Defaults are written out, so the file keeps its meaning should a default ever change; what is
    not given (null) is left out.
    """
    values = cfg.model_dump(exclude_none=True)
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, width=100)
