"""Whether a captured graph is the model in more than its values: gradients, hooks, training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fxshare.base.placement import device_of
from fxshare.capture.captured import Captured
from fxshare.capture.gradients import check_gradients, check_training
from fxshare.capture.hooks import refuse_lost_hooks
from fxshare.capture.steered import SteeringDiffers, eval_only, release_eval
from passes import linear_calls
from passes.graph.graph import is_linear


class Trainable:
    """Which parameters of a model are trainable: a model that freezes some in ``forward`` does so
    to those of its copies too, which are the same."""

    def __init__(self, model: nn.Module) -> None:
        self._before = [(name, p, p.requires_grad) for name, p in model.named_parameters()]

    def changed(self) -> list[str]:
        """The parameters of which running or tracing the model has changed it."""
        return [name for name, p, before in self._before if p.requires_grad != before]

    def restore(self) -> None:
        """Set it as it was."""
        for _, parameter, before in self._before:
            if parameter.requires_grad != before:
                parameter.requires_grad_(before)


def check_faithful(
    captured: Captured, original: nn.Module, trainable: Trainable, *, keep_eval: bool
) -> tuple[str, ...]:
    """Compare a graph with the original; returns notes on what could not be compared.

    ``keep_eval`` keeps a graph that holds eval mode alone although the original trains otherwise:
    it refuses calls in training mode. On the meta device there are no numbers to compare.

    Raises :class:`SteeringDiffers` for what the graph lacks.
    """
    gm, shapes = captured.graph, captured.shapes
    assert shapes is not None
    refuse_lost_hooks(original, gm)
    frozen = trainable.changed()
    if frozen:
        raise SteeringDiffers(
            f"the model's forward changes requires_grad of {frozen[0]!r} ({len(frozen)} parameters "
            "in all), which a graph cannot do; set it before, outside of forward, or use "
            "capture='modules'"
        )
    reason = eval_only(gm)
    if reason is not None and captured.front_end == "fx" and not keep_eval:
        # whoever asks for any front end may train what comes of it, which the next one can
        raise SteeringDiffers(
            f"the graph would hold eval mode alone (capture='fx' gives it): {reason}"
        )
    if device_of(original).type == "meta":
        return ()
    depth = len(linear_calls(gm))
    notes = check_gradients(gm, original, shapes, depth)
    if reason is not None and captured.front_end == "fx":
        return notes
    try:
        notes += check_training(gm, original, shapes, depth)
    except SteeringDiffers:
        if reason is None or not keep_eval:
            raise
    else:
        release_eval(gm)
    return notes


def modules_show(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether capture at module granularity can rewrite all linears of these names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {
        name
        for name, module in modules.items()
        if is_linear(module) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }
    return bool(linears) and linears.issuperset(names)
