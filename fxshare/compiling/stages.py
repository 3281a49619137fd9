"""Capture and match: what is known before anything is measured."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from fxshare.base.processes import here
from fxshare.base.spool import Spooled
from fxshare.calibration.calibrate import calibrate, stored
from fxshare.calibration.losses import Loss
from fxshare.calibration.room import make_room
from fxshare.calibration.statistics import Statistics
from fxshare.capture import Caller, Captured, Mode, capture
from fxshare.capture.widening import to_measure
from fxshare.compiling.together import agree, held
from fxshare.config import ConfigSource, ShareConfig, load_config
from fxshare.data.usable import usable, usable_batches
from fxshare.errors import CalibrationError, CaptureError, ConfigError, MatchError
from fxshare.models.computed import offloaded, stateful
from fxshare.models.sharded import sharded
from fxshare.planning.work import Work, fingerprint, plan_key
from fxshare.proposing.propose import init
from fxshare.sites.match import match
from fxshare.sites.refusals import refuse_quantised
from fxshare.sites.site import Site, Skipped
from fxshare.sites.tensors import dense_weights
from fxshare.sites.visible import seen

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def working(
    stages: Stages, folder: str | os.PathLike[str] | None, loss: Loss | None, seed: int
) -> Iterator[tuple[Stages, Work | None]]:
    """The stages on data that can be gone through again, and the work folder, held meanwhile.

    Raises :class:`StoreError` for a folder that is none, is held by another process, or was made
    from something else; :class:`ProcessError` where processes were not given the same.
    """
    together = here()
    if folder is None and together.size == 1:
        yield stages, None
        return
    batches = stages.batches
    if batches is not None and not isinstance(batches, Sequence):
        batches = Spooled(batches)
        stages = replace(stages, batches=batches)
    made_from = fingerprint(stages.model, stages.sites, batches, stages.cfg, loss=loss, seed=seed)
    if together.size > 1:
        agree(stages.cfg, batches, made_from, folder)
    if folder is None:
        yield stages, None
        return
    with held(Path(folder), made_from, plan_key(stages.cfg)) as work:
        yield stages, work


def configuration(
    model: nn.Module, cfg: ConfigSource | Sequence[ConfigSource] | None
) -> ShareConfig:
    """The configuration as given, or what :func:`fxshare.init` finds in the model where None."""
    return init(model) if cfg is None else load_config(cfg)


@dataclass(frozen=True)
class Stages:
    """What is known once the model is captured and matched."""

    cfg: ShareConfig
    captured: Captured
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    batches: Iterable[object] | None

    @property
    def model(self) -> nn.Module:
        """What is compiled."""
        return self.captured.model

    @cached_property
    def measuring(self) -> Captured:
        """The capture as statistics and losses are taken of it."""
        return to_measure(self.captured)

    def calibrate(
        self,
        *,
        gradients: bool = False,
        loss: Loss | None = None,
        seed: int = 0,
        work: Work | None = None,
    ) -> Statistics | None:
        """Statistics of the data; None without. With ``work`` those that are there already."""
        folder = None if work is None else work.statistics(0) if gradients else work.inputs
        if self.batches is None:
            return None if folder is None else stored(folder, self.sites)
        first, batches = _peek(self.batches)
        weights = dense_weights(self.model, self.sites) if gradients else {}
        room = make_room(
            self.measuring,
            self.sites,
            weights,
            self.measuring.caller(first),
            limit=self.cfg.calibration.max_memory,
            gradients=gradients,
            folder=folder,
        )
        room.say(_LOG, asked=self.cfg.calibration.max_memory is not None)
        return calibrate(
            self.measuring,
            batches if batches is not None else (),
            self.sites,
            max_tokens=self.cfg.calibration.max_tokens,
            gradients=gradients,
            loss=loss,
            labels=self.cfg.planner.labels,
            seed=seed,
            keeping=room.keeping,
        )


def prepare(
    model: nn.Module,
    cfg: ShareConfig,
    calibration: Iterable[object] | None,
    example: object,
    mode: Mode | None,
) -> Stages:
    """Match and capture a model: all that a plan needs to be made."""
    check_module(model)
    matching = match(model, cfg)
    first, batches = _peek(calibration)
    if batches is not None:
        first, batches = usable(first), usable_batches(batches)
    example = usable(example)
    # an embedding that the graph reads another way is no reason to do without a graph
    needs = [name for site in matching.sites for name in site.calls]
    if example is None and first is not None:
        # labels among the data are for training; an example that has them wants the loss
        example = Caller(model, mask=False)(first)
    captured = capture(model, example, mode=mode or cfg.capture, needs=needs)
    tried: list[object] = []
    shown = seen(captured, matching, _kept(batches, example, tried))
    if batches is not None and not isinstance(batches, Sequence):
        batches = itertools.chain(tried, batches)
    if not shown.sites:
        raise MatchError(_nothing(shown.skipped))
    return Stages(cfg, shown.captured, shown.sites, shown.skipped, batches)


def _nothing(skipped: Sequence[Skipped]) -> str:
    """Why there is nothing to rewrite."""
    first = skipped[0]
    if any(not one.reason.startswith("is not called by this graph") for one in skipped):
        return f"nothing to rewrite: {first.name!r} {first.reason}"
    return (
        f"nothing to rewrite: none of the matched modules is called, {first.name!r} for one; give "
        "an example that reaches them, or other patterns"
    )


def _kept(
    batches: Iterable[object] | None, example: object, tried: list[object]
) -> Iterator[object]:
    """The batches, or without them the example; what was taken is in ``tried``."""
    for batch in batches if batches is not None else [example] if example is not None else []:
        tried.append(batch)
        yield batch


def check_module(model: object) -> None:
    """Raise :class:`ConfigError` for what is no module, :class:`MatchError` for a quantised one,
    :class:`CaptureError` for one whose weights are elsewhere, or change when they are read."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"expected an nn.Module to compile, found {type(model).__name__}; load the model first"
        )
    refuse_quantised(model)
    reason = offloaded(model) or sharded(model) or stateful(model)
    if reason is not None:
        raise CaptureError(f"{type(model).__name__} cannot be compiled: {reason}")


def _peek(
    calibration: Iterable[object] | None,
) -> tuple[object, Iterable[object] | None]:
    """The first batch, and all batches again; an iterator is read only once."""
    if calibration is None:
        return None, None
    if isinstance(calibration, (Tensor, Mapping)):
        raise CalibrationError(
            f"calibration: expected an iterable of batches, found one {type(calibration).__name__};"
            " wrap it in a list"
        )
    try:
        iterator: Iterator[object] = iter(calibration)
    except TypeError:
        raise CalibrationError(
            f"calibration: expected an iterable of batches, found {type(calibration).__name__}"
        ) from None
    try:
        first = next(iterator)
    except StopIteration:
        raise CalibrationError(
            "the calibration data is empty: expected an iterable of batches; leave calibration "
            "out for a plain SVD"
        ) from None
    if isinstance(calibration, Sequence):
        return first, calibration
    return first, itertools.chain([first], iterator)
