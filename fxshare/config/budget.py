"""The limits of a planned compression."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from fxshare.config.section import Section
from fxshare.config.values import Kept, Share, as_loss, as_size


class Budget(Section):
    """What a planned compression may cost: exactly one limit, and perhaps a bound on FLOPs."""

    params_kept: Kept = Field(
        default=None,
        description="Stored numbers after over weights before, of the matched linears (0.8 keeps "
        "80 %).",
    )
    max_bytes: Annotated[int | None, BeforeValidator(as_size)] = Field(
        default=None,
        description="Bytes of the whole model: every parameter and buffer; a whole number, or with "
        "a unit (350MB).",
    )
    bytes_kept: Kept = Field(
        default=None,
        description="Stored bytes after over the bytes of the weights as the model has them, of "
        "the matched linears (0.25 keeps a quarter). What bits are planned under.",
    )
    max_loss_increase: Annotated[float | None, BeforeValidator(as_loss)] = Field(
        default=None,
        description="The cheapest plan whose loss per token rises by at most this much (predicted, "
        "then checked on held-back calibration data).",
    )
    flops_kept: Share = Field(
        default=None,
        description="FLOPs per token after over before, of the matched linears. It may stand "
        "alone or beside another limit, and then both are kept.",
    )
    time_kept: Share = Field(
        default=None,
        description="Predicted seconds per token after over before, of the matched linears, for a "
        "prompt and for one token alike. Stands beside another limit, and both are kept; needs the "
        "constants that `fxshare bench device` measures.",
    )

    @model_validator(mode="after")
    def _one_limit(self) -> Budget:
        given = [
            name
            for name in ("params_kept", "max_bytes", "bytes_kept", "max_loss_increase")
            if getattr(self, name) is not None
        ]
        if len(given) > 1 or (not given and self.flops_kept is None):
            raise ValueError(
                "expected one limit of params_kept, max_bytes, max_loss_increase, bytes_kept and "
                "flops_kept "
                "(flops_kept or time_kept may stand beside another); found "
                f"{', '.join(given) or 'none'}"
            )
        if given and None not in (self.flops_kept, self.time_kept):
            raise ValueError(
                f"found flops_kept and time_kept beside {given[0]}: one limit may stand beside "
                "another; remove one of the two"
            )
        return self
