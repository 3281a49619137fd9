"""Capture: from any ``nn.Module`` to a graph that passes can rewrite.

Three front ends, in the order in which ``capture="auto"`` tries them: the value-carrying fx tracer,
``torch.export``, and module granularity. The first two end with a self-check against the original
at two shapes.
"""

from fxshare.base.placement import device_of, dtype_of
from fxshare.capture.call import Call, Shapes, bind, resized, tensors, to_device
from fxshare.capture.caller import Caller
from fxshare.capture.captured import Captured, FrontEnd, Mode, quiet
from fxshare.capture.check import erase_guards, evaluate_unguarded, guard_nodes
from fxshare.capture.front_ends import capture, recapture, recapture_devices

__all__ = [
    "Call",
    "Caller",
    "Captured",
    "FrontEnd",
    "Mode",
    "Shapes",
    "bind",
    "capture",
    "device_of",
    "dtype_of",
    "erase_guards",
    "evaluate_unguarded",
    "guard_nodes",
    "quiet",
    "recapture",
    "recapture_devices",
    "resized",
    "tensors",
    "to_device",
]
