"""``fxshare.estimate``: memory, disk and time of every stage before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxshare.base.placement import device_of, dtype_of
from fxshare.base.surroundings import plain_surroundings
from fxshare.capture import Captured
from fxshare.config import ConfigSource, ShareConfig, load_config
from fxshare.cost_model.pace import Pace
from fxshare.data.batches import rows_of_a_batch
from fxshare.errors import ConfigError, MatchError
from fxshare.estimating.counted import count, count_captured, made_up
from fxshare.estimating.pace import pace_at_hand, pace_for
from fxshare.estimating.stages import Data, Estimate, estimate_of
from fxshare.models.examples import made_up_call
from fxshare.models.traits import context_of, example_ids
from fxshare.models.wrapped import unwrapped
from fxshare.proposing.propose import init
from fxshare.sites.match import match
from fxshare.sites.refusals import refuse_quantised
from fxshare.sites.site import Site

_LONGEST = 2048


@plain_surroundings()
def estimate(
    model: nn.Module,
    cfg: ConfigSource | Sequence[ConfigSource] | None = None,
    *,
    tokens: int,
    length: int | None = None,
    batch_size: int | None = None,
    example: object = None,
    work: bool = False,
    device: str = "cpu",
) -> Estimate:
    """What compiling a model will take, stage by stage: seconds, memory and disk.

    Nothing of the model is computed, so that one on the meta device will do.

    Parameters
    ----------
    model
        As for :func:`fxshare.compile`.
    cfg
        The configuration; where None, what :func:`fxshare.init` finds in the model.
    tokens
        Of the calibration data, in windows of ``length`` (what the model was made for, at most
        2048, where None), ``batch_size`` a batch (where None 4, and fewer where that would leave
        fewer than ten batches, as the command line does).
    example
        A batch instead, of a model whose inputs cannot be made up; ``tokens`` are rows as the
        busiest of its linears sees them, of an image the patches.
    work
        Whether a work folder will be used.
    device
        ``cpu`` or ``cuda``, whose constants are measured here in a few seconds, once a process;
        or a name of :func:`fxshare.estimating.pace.devices`, from published peak rates.

    Raises
    ------
    ConfigError
        For a model that is none, no tokens, a device that is not known, or a model that does not
        say what it reads.
    MatchError
        Where there is nothing to rewrite.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"expected an nn.Module to estimate for, found {type(model).__name__}; load it first"
        )
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"tokens: expected a number of at least 1, found {tokens!r}")
    model = unwrapped(model)
    refuse_quantised(model)
    pace = pace_for(device, str(dtype_of(model)).removeprefix("torch."))
    config = init(model) if cfg is None else load_config(cfg)
    found = match(model, config)
    if not found.sites:
        first = found.skipped[0]
        raise MatchError(f"nothing to rewrite: {first.name!r} {first.reason}")
    batch = example if example is not None else _batch(model, tokens, length, batch_size)
    counted = count(model, found.sites, batch, gradients=config.mode == "planned")
    data = _data(tokens, counted.rows)
    if config.mode == "planned" and config.planner.search != "off" and data.batches < 2:
        raise ConfigError(
            f"{tokens:,} tokens in batches of {counted.rows:,} are one, and a search needs at "
            "least 2, of which one is held back to judge plans; give smaller batches, more tokens, "
            "or planner: {search: off}"
        )
    return estimate_of(model, config, found.sites, counted, data, pace, work=work)


def estimate_captured(
    captured: Captured,
    sites: Sequence[Site],
    cfg: ShareConfig,
    batches: Sequence[object],
    *,
    work: bool = False,
) -> Estimate:
    """The same of a model that was captured, in milliseconds, with constants that are at hand."""
    dtype = str(dtype_of(captured.model)).removeprefix("torch.")
    pace: Pace = pace_at_hand(device_of(captured.model).type, dtype)
    counted = count_captured(captured, sites, batches[0])
    data = Data(len(batches), len(batches) * counted.rows)
    return estimate_of(captured.model, cfg, sites, counted, data, pace, work=work)


def _batch(model: nn.Module, tokens: int, length: int | None, batch_size: int | None) -> object:
    if example_ids(model) is None:
        call = made_up_call(model)
        if call is not None:
            place = device_of(model)
            return pytree.tree_map_only(Tensor, lambda t: t.to(place), call)
        raise ConfigError(
            f"{type(model).__name__} does not say what it reads, so that no batch can be made up; "
            "give example=..., a batch of its inputs"
        )
    context = context_of(model)
    if length is None and context is None:
        raise ConfigError(
            f"{type(model).__name__} does not say how many tokens it reads at once; give a length"
        )
    if length is not None and length < 2:
        raise ConfigError(f"length: expected at least 2 tokens a window, found {length}")
    if length is not None and context is not None and length > context:
        raise ConfigError(
            f"length {length}: {type(model).__name__} was made for at most {context} tokens; give "
            "a smaller one"
        )
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, found {batch_size}")
    length = min(context or _LONGEST, _LONGEST) if length is None else length
    windows = max(-(-tokens // length), 1)
    return made_up(model, min(batch_size or rows_of_a_batch(windows), windows), length)


def _data(tokens: int, rows: int) -> Data:
    batches = max(-(-tokens // max(rows, 1)), 1)
    return Data(batches, tokens)


__all__ = ["estimate", "estimate_captured"]
