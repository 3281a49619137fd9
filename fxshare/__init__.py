"""fxshare: a torch.fx graph-rewriting compiler for cross-layer basis sharing.

::

    import fxshare
    gm = fxshare.compile(model, "configs/gpt2.yaml", calibration=batches)
    print(gm.fxshare.report)
    fxshare.save(gm, "out/")
    gm = fxshare.load("out/")
"""

from fxshare.compiling import compile
from fxshare.compiling import make_plan_for as plan
from fxshare.config import ShareConfig, load_config
from fxshare.dynamo_backend import backend
from fxshare.errors import FxShareError, FxShareWarning
from fxshare.export import export
from fxshare.knowing import init, propose
from fxshare.lowering import lower, readable
from fxshare.plans import Plan
from fxshare.record import Record, ShareModule
from fxshare.store import load, save
from fxshare.verifying import verify

__version__ = "0.1.0"

__all__ = [
    "FxShareError",
    "FxShareWarning",
    "Plan",
    "Record",
    "ShareConfig",
    "ShareModule",
    "backend",
    "compile",
    "export",
    "init",
    "load",
    "load_config",
    "lower",
    "plan",
    "propose",
    "readable",
    "save",
    "verify",
]
