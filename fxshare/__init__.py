"""fxshare: a torch.fx graph-rewriting compiler for cross-layer basis sharing.

::

    import fxshare
    gm = fxshare.compile(model, "configs/gpt2.yaml", calibration=batches)
    print(gm.fxshare.report)
    fxshare.save(gm, "out/")
    gm = fxshare.load("out/")

Names are loaded when they are first used: ``fxshare --help`` needs no torch, which takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxshare import errors as errors
    from fxshare.compiling.compile import compile
    from fxshare.compiling.survey import make_plan_for as plan
    from fxshare.config import ShareConfig, load_config
    from fxshare.dynamo.backend import backend
    from fxshare.errors import FxShareError, FxShareWarning
    from fxshare.estimating.estimate import estimate
    from fxshare.exporting import export
    from fxshare.loading.load import load
    from fxshare.plans import Plan
    from fxshare.proposing.propose import init, propose
    from fxshare.refining.refine import refine
    from fxshare.result.module import Compiled, ShareModule
    from fxshare.result.record import Record
    from fxshare.rewriting.lowering import lower, readable
    from fxshare.store.save import save
    from fxshare.verifying.verify import verify

__version__ = "0.1.0"

_HOMES = {
    "Compiled": "fxshare.result.module:Compiled",
    "FxShareError": "fxshare.errors:FxShareError",
    "FxShareWarning": "fxshare.errors:FxShareWarning",
    "Plan": "fxshare.plans:Plan",
    "Record": "fxshare.result.record:Record",
    "ShareConfig": "fxshare.config:ShareConfig",
    "ShareModule": "fxshare.result.module:ShareModule",
    "backend": "fxshare.dynamo.backend:backend",
    "compile": "fxshare.compiling.compile:compile",
    "estimate": "fxshare.estimating.estimate:estimate",
    "export": "fxshare.exporting:export",
    "init": "fxshare.proposing.propose:init",
    "load": "fxshare.loading.load:load",
    "load_config": "fxshare.config:load_config",
    "lower": "fxshare.rewriting.lowering:lower",
    "plan": "fxshare.compiling.survey:make_plan_for",
    "propose": "fxshare.proposing.propose:propose",
    "readable": "fxshare.rewriting.lowering:readable",
    "refine": "fxshare.refining.refine:refine",
    "save": "fxshare.store.save:save",
    "verify": "fxshare.verifying.verify:verify",
}


def __getattr__(name: str) -> Any:
    """A public name from its module, or a submodule, loaded now."""
    if name in _HOMES:
        module, _, attribute = _HOMES[name].partition(":")
        value = getattr(import_module(module), attribute)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Compiled",
    "FxShareError",
    "FxShareWarning",
    "Plan",
    "Record",
    "ShareConfig",
    "ShareModule",
    "backend",
    "compile",
    "estimate",
    "export",
    "init",
    "load",
    "load_config",
    "lower",
    "plan",
    "propose",
    "readable",
    "refine",
    "save",
    "verify",
]
