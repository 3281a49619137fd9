"""Blocks of numbers in the order in which they are best kept: pivoted elimination, a block at a
time (``units`` has it for single ones)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def blocks_by_gain(
    gram_nn: Tensor, metric_nn: Tensor, blocks: Sequence[Sequence[int]]
) -> tuple[list[int], list[float]]:
    """The places of blocks, that first whose elimination from the Gram takes most off ``tr(metric
    gram)``, and what each takes; float64."""
    left_nn = gram_nn.clone()
    moved_nn = left_nn @ metric_nn @ left_nn
    tiny = 1e-12 * float(left_nn.diagonal().mean().clamp(min=1e-300))
    places = [torch.tensor(list(block), device=left_nn.device) for block in blocks]
    open_ = list(range(len(blocks)))
    order: list[int] = []
    gains: list[float] = []
    while open_:
        found = []
        for at in open_:
            own = left_nn[places[at]][:, places[at]]
            own.diagonal().add_(tiny)
            root, failed = torch.linalg.cholesky_ex(own)
            moved = moved_nn[places[at]][:, places[at]]
            gain = -1.0 if failed else float(torch.cholesky_solve(moved, root).diagonal().sum())
            found.append((gain, at, root))
        gain, at, root = max(found, key=lambda one: (one[0], -one[1]))
        open_.remove(at)
        order.append(at)
        gains.append(max(gain, 0.0))
        if gain < 0 or not open_:
            continue
        columns = torch.linalg.solve_triangular(root, left_nn[places[at]], upper=False).T
        images = torch.linalg.solve_triangular(root, moved_nn[places[at]], upper=False).T
        own = torch.linalg.solve_triangular(
            root, images[places[at]], upper=False
        )  # Vᵀ Q V, with R Q V the images
        images = images - 0.5 * columns @ own
        left_nn.addmm_(columns, columns.T, alpha=-1)
        moved_nn.addmm_(images, columns.T, alpha=-1)
        moved_nn.addmm_(columns, images.T, alpha=-1)
    return order, gains


__all__ = ["blocks_by_gain"]
