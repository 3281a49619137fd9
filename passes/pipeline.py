"""The default lists of passes, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from passes.base import Pass
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
from passes.sharing.drop_heads import DropHeads, DroppedHeads
from passes.sharing.drop_joins import DropJoins
from passes.sharing.look_up_rows import LookedUp, LookUpRows
from passes.sharing.narrow_heads import NarrowedHeads, NarrowHeads
from passes.sharing.narrow_keys import NarrowedKeys, NarrowKeys
from passes.sharing.reuse_basis import ReuseBasis
from passes.sharing.select_units import SelectedUnits, SelectUnits
from passes.sharing.share_basis import ShareBasis, SharedGroup
from passes.sharing.split_linear import SplitLinear, SplitSite
from passes.sharing.store_codes import StoreCodes

Narrower: TypeAlias = "SelectedUnits | NarrowedHeads | NarrowedKeys | DroppedHeads"
"""Linears that become smaller together."""
Prefer = Literal["memory", "speed"]
"""What a lowered graph is to be: no larger than the readable one, or fast at any size."""


def default_passes(
    sites: Sequence[SplitSite],
    groups: Sequence[SharedGroup] = (),
    storing: Sequence[Pass] = (),
    *,
    fuse: bool = True,
    extra: Sequence[Pass] = (),
    looked_up: Sequence[LookedUp] = (),
    units: Sequence[Narrower] = (),
    codes: StoreCodes | None = None,
    apart: bool = False,
) -> tuple[Pass, ...]:
    """The passes from a captured graph to the rewritten one.

    Without ``groups`` this is exact mode: slices over the original weights, left visible.
    ``storing`` are the passes that change how the bases of ``groups`` are stored.
    ``extra`` are the user's own passes; they see the shared graph before it is cleaned up.
    ``units`` are the hidden units that stay where some go, and heads that go, or that become
    narrower, or whose queries and keys do;
    ``apart`` says that the graph has its linears side by side, each for itself. ``codes`` are the
    weights that are quantised.
    """
    coded = () if codes is None or not codes.weights else (codes,)
    selected = tuple(one for one in units if isinstance(one, SelectedUnits))
    reading = tuple(name for one in selected for name in one.consumers)
    narrowed = tuple(one for one in units if isinstance(one, NarrowedHeads))
    keys = tuple(one for one in units if isinstance(one, NarrowedKeys))
    dropped = tuple(one for one in units if isinstance(one, DroppedHeads))
    return (
        # before the linears are split: one that is tied to an embedding reads the embedding's
        *((LookUpRows(sites=tuple(looked_up)),) if looked_up else ()),
        # first, so that every later pass meets one dialect: call_module of nn.Linear, one per slice
        SplitLinear(sites=tuple(sites)),
        # experts of different widths cannot be put together between their linears
        *((DropJoins(linears=reading),) if selected and not apart else ()),
        # needs the slices whole; what it makes smaller shares no basis
        *((SelectUnits(selections=selected, apart=apart),) if selected else ()),
        # likewise
        *((NarrowHeads(selections=narrowed, apart=apart),) if narrowed else ()),
        # likewise; either may be first
        *((NarrowKeys(selections=keys, apart=apart),) if keys else ()),
        # likewise; of other attentions
        *((DropHeads(selections=dropped, apart=apart),) if dropped else ()),
        *(
            (
                # needs the slices; leaves one basis product per coefficient
                ShareBasis(groups=tuple(groups)),
                # before fusing: coefficients can only be fused once they read the same product
                ReuseBasis(),
                # after reuse, so that a product's gather is made once
                *storing,
                # once the factors are as they are stored, and before any two become one
                *coded,
                # after reuse; `fuse=False` leaves the slices apart for people who read the graph
                *((FuseCoefficients(),) if fuse else ()),
                # after fusing, so that a producer which was fused with others is left alone
                *((FoldGathers(),) if storing and fuse else ()),
            )
            if groups
            else coded
        ),
        *extra,
        # last: whatever the passes above made dead
        CleanUp(),
    )


def lowering_passes(prefer: Prefer = "memory") -> tuple[Pass, ...]:
    """The passes from a rewritten, readable graph to the fast one.

    All but the first two, for speed, only repack rows: ``passes.origins(gm)`` says where each
    linear went.
    """
    speed = prefer == "speed"
    return (
        # first: what becomes dense is merged with its neighbours by all that follows
        # next, for the same reason: a basis that is written out is stacked with its neighbours
        *((Materialise(), WriteOutPivots()) if speed else ()),
        # one product for all readers of an input, before anything is merged into it
        ReuseBasis(),
        # `fuse: false` left them apart
        FuseCoefficients(),
        # dense slices of one weight, what exact mode consists of
        MergeSlices(),
        # after fusing: a coefficient is told by the product it reads, and that becomes a view
        StackBases(duplicate=speed),
        # needs the stacked product, and the `cat` that DropCats may take apart
        GroupCoefficients(),
        # when the parts are as few as they will be
        DropCats(),
        # after materialising, which leaves pieces unread
        MergeGathers(),
        # needs a gather of one basis alone
        FoldGathers(),
        # once the tensors are final
        LayOut(),
        # last: whatever the passes above made dead
        CleanUp(),
    )
