"""How much calibration data is looked at."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from fxshare.config.section import Section
from fxshare.config.values import Count, as_floor


class Calibration(Section):
    """How much data is looked at, and how its statistics are made invertible."""

    max_tokens: Count | None = Field(
        default=None,
        description="Stop gathering statistics after this many tokens. Not given: all batches.",
    )
    relative_floor: Annotated[float, BeforeValidator(as_floor)] = Field(
        default=1e-8,
        description="Eigenvalues of the Gram matrix below this fraction of the largest are raised "
        "to it.",
        json_schema_extra={"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    )
