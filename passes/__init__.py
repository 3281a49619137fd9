"""The graph-rewriting library of fxshare: what a pass is, its runner, and the passes.

Imports torch and the standard library only; knows no configuration, no files, no transformers.
"""

from passes.base import Pass
from passes.clean_up import CleanUp
from passes.drop_cats import DropCats
from passes.errors import EnsuresError, FxShareError, PassError, RequiresError, ShapeError
from passes.fold_gathers import FoldGathers
from passes.fuse_coefficients import FuseCoefficients
from passes.graph import (
    LinearCall,
    is_linear,
    linear_calls,
    new_linear,
    put_module,
    structure_copy,
    weight_and_bias,
)
from passes.group_coefficients import GroupCoefficients
from passes.lay_out import LayOut
from passes.look_up_rows import LookedUp, LookUpRows, other_reader
from passes.lookups import Lookup, is_embedding, lookup_refusal, lookups
from passes.materialise import Materialise
from passes.merge_gathers import MergeGathers
from passes.merge_slices import MergeSlices
from passes.observe import ObserveInputs, observed
from passes.observe_gradients import ObserveGradients, tapped
from passes.observe_lookups import ObserveLookups, observed_lookups
from passes.origins import Origin, forget_origins, original, origins
from passes.pipeline import default_passes, lowering_passes
from passes.pivot_basis import PivotBasis, PivotedGroup, derive_gathers, derived_buffers
from passes.reuse_basis import ReuseBasis
from passes.runner import Applied, equal_outputs, run
from passes.share_basis import ShareBasis, SharedGroup
from passes.slices import Slice, slice_weight, slices
from passes.split_linear import Rows, SplitLinear, SplitSite
from passes.stack_bases import StackBases
from passes.unstack_experts import UnstackExperts, stacks
from passes.write_out_pivots import WriteOutPivots

__all__ = [
    "Applied",
    "CleanUp",
    "DropCats",
    "EnsuresError",
    "FoldGathers",
    "FuseCoefficients",
    "FxShareError",
    "GroupCoefficients",
    "LayOut",
    "LinearCall",
    "LookUpRows",
    "LookedUp",
    "Lookup",
    "Materialise",
    "MergeGathers",
    "MergeSlices",
    "ObserveGradients",
    "ObserveInputs",
    "ObserveLookups",
    "Origin",
    "Pass",
    "PassError",
    "PivotBasis",
    "PivotedGroup",
    "RequiresError",
    "ReuseBasis",
    "Rows",
    "ShapeError",
    "ShareBasis",
    "SharedGroup",
    "Slice",
    "SplitLinear",
    "SplitSite",
    "StackBases",
    "UnstackExperts",
    "WriteOutPivots",
    "default_passes",
    "derive_gathers",
    "derived_buffers",
    "equal_outputs",
    "forget_origins",
    "is_embedding",
    "is_linear",
    "linear_calls",
    "lookup_refusal",
    "lookups",
    "lowering_passes",
    "new_linear",
    "observed",
    "observed_lookups",
    "original",
    "origins",
    "other_reader",
    "put_module",
    "run",
    "slice_weight",
    "slices",
    "stacks",
    "structure_copy",
    "tapped",
    "weight_and_bias",
]
