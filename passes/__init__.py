"""The graph-rewriting library of fxshare: what a pass is, its runner, and the passes.

Imports torch and the standard library only; knows no configuration, no files, no transformers.
"""

from passes.base import Pass
from passes.errors import (
    DialectError,
    EnsuresError,
    FxShareError,
    NameFault,
    PassError,
    RequiresError,
    ShapeError,
)
from passes.graph.graph import (
    LinearCall,
    is_linear,
    linear_calls,
    new_linear,
    put_module,
    structure_copy,
    weight_and_bias,
)
from passes.graph.heads import Heads, NotHeads, attention_heads, reads_own
from passes.graph.hidden import Hidden, NotHidden, hidden_units
from passes.graph.lookups import Lookup, is_embedding, lookup_refusal, lookups
from passes.graph.origins import Origin, forget_origins, original, origins
from passes.graph.scores import (
    NotScores,
    attention_scores,
    calls_by_slices,
    operands_of,
    score_calls,
    together,
)
from passes.graph.slices import KeptUnits, Slice, slice_weight, slices
from passes.graph.stacks import stacks
from passes.graph.uses import other_readers, used_nodes
from passes.graph.whole_heads import NotWhole, whole_heads
from passes.observing.gradients import ObserveGradients, tapped
from passes.observing.inputs import ObserveInputs, observed
from passes.observing.lookups import ObserveLookups, observed_lookups
from passes.packing.clean_up import CleanUp
from passes.packing.drop_cats import DropCats
from passes.packing.fold_gathers import FoldGathers
from passes.packing.fuse_coefficients import FuseCoefficients
from passes.packing.group_coefficients import GroupCoefficients
from passes.packing.lay_out import LayOut
from passes.packing.materialise import Materialise
from passes.packing.merge_gathers import MergeGathers
from passes.packing.merge_slices import MergeSlices
from passes.packing.stack_bases import StackBases
from passes.packing.write_out_pivots import WriteOutPivots
from passes.pipeline import default_passes, lowering_passes
from passes.runner import Applied, equal_outputs, run
from passes.sharing.drop_heads import DropHeads, DroppedHeads
from passes.sharing.drop_joins import DropJoins, kept_joins, takes_apart
from passes.sharing.look_up_rows import LookedUp, LookUpRows, other_reader
from passes.sharing.narrow_heads import NarrowedHeads, NarrowHeads
from passes.sharing.narrow_keys import NarrowedKeys, NarrowKeys
from passes.sharing.pivot_basis import PivotBasis, PivotedGroup, derive_gathers, derived_buffers
from passes.sharing.reuse_basis import ReuseBasis
from passes.sharing.select_units import SelectedUnits, SelectUnits
from passes.sharing.share_basis import ShareBasis, SharedGroup
from passes.sharing.split_linear import Rows, SplitLinear, SplitSite
from passes.sharing.store_codes import StoreCodes
from passes.sharing.unstack_experts import UnstackExperts, unstacked_as

__all__ = [
    "Applied",
    "CleanUp",
    "DialectError",
    "DropCats",
    "DropHeads",
    "DropJoins",
    "DroppedHeads",
    "EnsuresError",
    "FoldGathers",
    "FuseCoefficients",
    "FxShareError",
    "GroupCoefficients",
    "Heads",
    "Hidden",
    "KeptUnits",
    "LayOut",
    "LinearCall",
    "LookUpRows",
    "LookedUp",
    "Lookup",
    "Materialise",
    "MergeGathers",
    "MergeSlices",
    "NameFault",
    "NarrowHeads",
    "NarrowKeys",
    "NarrowedHeads",
    "NarrowedKeys",
    "NotHeads",
    "NotHidden",
    "NotScores",
    "NotWhole",
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
    "SelectUnits",
    "SelectedUnits",
    "ShapeError",
    "ShareBasis",
    "SharedGroup",
    "Slice",
    "SplitLinear",
    "SplitSite",
    "StackBases",
    "StoreCodes",
    "UnstackExperts",
    "WriteOutPivots",
    "attention_heads",
    "attention_scores",
    "calls_by_slices",
    "default_passes",
    "derive_gathers",
    "derived_buffers",
    "equal_outputs",
    "forget_origins",
    "hidden_units",
    "is_embedding",
    "is_linear",
    "kept_joins",
    "linear_calls",
    "lookup_refusal",
    "lookups",
    "lowering_passes",
    "new_linear",
    "observed",
    "observed_lookups",
    "operands_of",
    "original",
    "origins",
    "other_reader",
    "other_readers",
    "put_module",
    "reads_own",
    "run",
    "score_calls",
    "slice_weight",
    "slices",
    "stacks",
    "structure_copy",
    "takes_apart",
    "tapped",
    "together",
    "unstacked_as",
    "used_nodes",
    "weight_and_bias",
    "whole_heads",
]
