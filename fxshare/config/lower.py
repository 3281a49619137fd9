"""The options of lowering."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fxshare.config.section import Section


class Lower(Section):
    """What the result is packed for after rewriting."""

    prefer: Literal["memory", "speed"] = Field(
        default="memory",
        description="memory (never more numbers than the readable graph) or speed (may store a "
        "basis twice, and multiplies out what needs fewer operations as a dense weight).",
    )
