"""The curve of an attention whose heads become narrower, or fewer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fxshare.planning.kinds.kind import Scene
from fxshare.planning.solver.curve import DENSE, Curve, allowed
from fxshare.plans.cost import Shape, ranks


def curve_of_widths(
    scene: Scene,
    width: int,
    shapes: Callable[[int], Sequence[Shape]],
    lost: npt.NDArray[np.float64],
    *,
    multiple: int | None = None,
) -> Curve:
    """The loss of every width of a head below ``width`` that a plan may take, and of all of it, the
    dense one. ``shapes`` are those of the weights at a width, ``lost`` what each width loses; what
    is not finite is no option. Widths are multiples of ``multiple``, by default that of ranks; of
    1, they are numbers of heads."""
    counts = ranks(Shape(width, width), multiple or scene.options.rank_multiple)
    counts = counts[(counts < width) & np.isfinite(lost[counts])]
    counts = np.append(counts, width)
    cost = np.array([scene.costs(shapes(int(count))) for count in counts])
    side, none = scene.sides(), np.array([0])
    beside = np.array([sum(int(side(x, none, None)[0]) for x in shapes(int(n))) for n in counts])
    label = counts.copy()
    label[-1] = DENSE
    dense, options = float(cost[-1]), scene.options
    most = None if options.ceiling >= 1.0 else options.ceiling * dense
    taken = allowed(cost, label, least=options.floor * dense, most=most)
    return Curve(
        cost[taken],
        np.maximum(lost[counts[taken]], 0.0),
        label[taken],
        beside[taken],
        range(width + 1),
    )
