"""The finished module from a rewritten graph."""

from __future__ import annotations

from torch import fx, nn

from fxshare.capture import Captured
from fxshare.capture.modules import put_back
from fxshare.models.original import keep_original
from fxshare.plans.plan import Plan
from fxshare.result.module import ShareModule, keep_contract
from passes import derive_gathers, structure_copy


def assemble(captured: Captured, rewritten: fx.GraphModule, plan: Plan, *, copy: bool) -> nn.Module:
    """The finished module from a rewritten graph."""
    model = captured.model
    if captured.side_by_side:
        sites = [c for s in plan.sites for c in s.calls]
        whole = put_back(model, rewritten, sites, copy=copy)
        keep_original(whole, model)
        return whole
    root = structure_copy(rewritten, clone_parameters=copy, clone_buffers=False, without_code=True)
    result = ShareModule(root, root.graph, f"{type(model).__name__}Shared")
    result.meta.update(rewritten.meta)
    keep_contract(result, captured.contract)
    keep_original(result, model)
    derive_gathers(result)  # fx registers every buffer that a graph reads as part of the state
    return result
