"""The default list of passes, in one place."""

from __future__ import annotations

from collections.abc import Sequence

from passes.base import Pass
from passes.clean_up import CleanUp
from passes.fold_gathers import FoldGathers
from passes.fuse_coefficients import FuseCoefficients
from passes.pivot_basis import PivotBasis, PivotedGroup
from passes.reuse_basis import ReuseBasis
from passes.share_basis import ShareBasis, SharedGroup
from passes.split_linear import SplitLinear, SplitSite


def default_passes(
    sites: Sequence[SplitSite],
    groups: Sequence[SharedGroup] = (),
    pivots: Sequence[PivotedGroup] = (),
    *,
    fuse: bool = True,
    extra: Sequence[Pass] = (),
) -> tuple[Pass, ...]:
    """The passes from a captured graph to the rewritten one.

    Without ``groups`` this is exact mode: slices over the original weights, left visible.
    ``extra`` are the user's own passes; they see the shared graph before it is cleaned up.
    """
    return (
        # first, so that every later pass meets one dialect: call_module of nn.Linear, one per slice
        SplitLinear(sites=tuple(sites)),
        *(
            (
                # needs the slices; leaves one basis product per coefficient
                ShareBasis(groups=tuple(groups)),
                # before fusing: coefficients can only be fused once they read the same product
                ReuseBasis(),
                # after reuse, so that a product's gather is made once
                *((PivotBasis(groups=tuple(pivots)),) if pivots else ()),
                # after reuse; `fuse=False` leaves the slices apart for people who read the graph
                *((FuseCoefficients(),) if fuse else ()),
                # after fusing, so that a producer which was fused with others is left alone
                *((FoldGathers(),) if pivots and fuse else ()),
            )
            if groups
            else ()
        ),
        *extra,
        # last: whatever the passes above made dead
        CleanUp(),
    )
