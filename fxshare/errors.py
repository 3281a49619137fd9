"""Every error that fxshare raises on purpose.

All derive from :class:`FxShareError`. A message names the subject, what was expected, what was
found, and the way out. The command line maps :class:`ConfigError` to exit code 2,
:class:`CheckFailed` to 3 and every other :class:`FxShareError` to 1.
"""

from __future__ import annotations

from passes.errors import (
    EnsuresError,
    FxShareError,
    NameFault,
    PassError,
    RequiresError,
    ShapeError,
)


class ConfigError(FxShareError):
    """A configuration that cannot be used: names the file, the key and the nearest valid key."""


class MatchError(FxShareError):
    """A pattern that matches nothing, a module matched twice, heads that do not divide, ..."""


class CaptureError(FxShareError):
    """A model that no front end could capture, or whose graph failed its self-check."""


class GuardError(CaptureError):
    """A captured graph was called in a way that it was not captured for."""


class CalibrationError(FxShareError):
    """Calibration data that is empty, not finite, or does not fit the model."""


class FactoriseError(FxShareError):
    """Weights or statistics that cannot be factorised (not finite, wrong shape)."""


class PlanError(FxShareError):
    """A plan that is contradictory or does not fit the model."""


class RefineError(FxShareError):
    """Refining that cannot be done: nothing to train, data or a teacher that do not fit, ..."""


class StoreError(FxShareError):
    """A folder that is not ours, is damaged, comes from a newer version, or cannot be written."""


class ExportError(FxShareError):
    """A model or an option that an export cannot carry, or a runtime that is not installed."""


class DataError(FxShareError):
    """Text or token data that is missing or cannot be read."""


class ProcessError(FxShareError):
    """Another process of the group failed, was killed, or was given something else."""

    def __init__(self, message: str, *, rank: int | None = None, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone
        """Whether it has ended without a word."""
        self.rank = rank
        """Which one, where that is known."""

    @property
    def of_first(self) -> bool:
        """Whether it may be that the first rank, which speaks for all, is gone."""
        return self.gone and self.rank in (0, None)


class CheckFailed(FxShareError):
    """A numerical check found a difference beyond the tolerance."""


class FxShareWarning(UserWarning):
    """Something the user should know: a rate that costs more than dense, too little data, ..."""


__all__ = [
    "CalibrationError",
    "CaptureError",
    "CheckFailed",
    "ConfigError",
    "DataError",
    "EnsuresError",
    "ExportError",
    "FactoriseError",
    "FxShareError",
    "FxShareWarning",
    "GuardError",
    "MatchError",
    "NameFault",
    "PassError",
    "PlanError",
    "ProcessError",
    "RefineError",
    "RequiresError",
    "ShapeError",
    "StoreError",
]
