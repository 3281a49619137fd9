"""How much calibration data is looked at."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

from fxshare.config.section import Section
from fxshare.config.values import Count, as_floor, as_size


class Calibration(Section):
    """How much data is looked at, and how its statistics are made invertible."""

    max_tokens: Count | None = Field(
        default=None,
        description="Stop gathering statistics after this many tokens. Not given: all batches.",
    )
    max_memory: Annotated[
        int | None,
        BeforeValidator(as_size),
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}),
    ] = Field(
        default=None,
        description="Most resident memory, the model included, as bytes or with a unit (8GB). What "
        "does not fit goes to disk, with a pass over the data for each part of it. Not given: what "
        "is in use and half of what is free.",
    )
    relative_floor: Annotated[float, BeforeValidator(as_floor)] = Field(
        default=1e-8,
        description="Eigenvalues of the Gram matrix below this fraction of the largest are raised "
        "to it.",
        json_schema_extra={"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    )
