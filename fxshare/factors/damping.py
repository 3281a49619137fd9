"""Roots of moments that may be singular.

A moment of few tokens, of dead units or behind a LayerNorm has no root, or a useless one: its
eigenvalues below ``floor = relative_floor · largest`` are raised to it. Whether any is below is
what a Cholesky factorisation of ``moment − floor`` fails of. Where it does not, that of the moment
is its root, and no eigenvalue but the largest is computed: of 3072 features it takes a tenth of the
time of their eigenvectors.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fxshare.factors.elimination import Elimination

# up to here all eigenvalues take no longer than an iteration's calls
_FEW = 256
_STEPS = 40
# eigenvalues below the floor up to which they alone are looked for
_FEW_BELOW = 8


class Damping:
    """The damping of one moment ``(N, N)``, or of the diagonal ``(N,)`` of one, in float64. What
    was not asked for is not computed."""

    def __init__(self, moment: Tensor, relative_floor: float) -> None:
        self.moment = moment.detach().double()
        self.relative_floor = relative_floor

    @cached_property
    def largest(self) -> float:
        """The largest eigenvalue; of many features to a thousandth, from below."""
        if self.moment.ndim == 1:
            return float(self.moment.max())
        return largest_eigenvalue(self.moment)

    @property
    def floor(self) -> float:
        """What an eigenvalue must have at least."""
        return self.relative_floor * max(self.largest, 0.0)

    @cached_property
    def singular(self) -> bool:
        """Whether an eigenvalue is below the floor."""
        if self.moment.ndim == 1:
            return bool((self.moment < self.floor).any())
        _, failed = torch.linalg.cholesky_ex(_shifted(self.moment, -self.floor))
        return bool(failed)

    @cached_property
    def floored(self) -> int:
        """How many eigenvalues are below the floor."""
        if self.largest <= 0:
            return len(self.moment)
        if not self.singular:
            return 0
        if self.moment.ndim == 1:
            return int((self.moment < self.floor).sum())
        return _negative(_shifted(self.moment, -self.floor))

    @cached_property
    def elimination(self) -> Elimination:
        """What error feedback asks of the moment."""
        return Elimination.of(self.moment)

    @cached_property
    def root(self) -> Tensor:
        """Lower triangular ``(N, N)`` with ``root @ rootᵀ`` the damped moment, or the diagonal
        ``(N,)`` of one."""
        if self.moment.ndim == 1:
            return self.moment.clamp(min=self.floor).sqrt()
        root: Tensor
        if not self.singular:
            root, failed = torch.linalg.cholesky_ex(self.moment)
            if not failed:
                return root
        raised = _raised(self.moment, self.floor, self.floored)
        if raised is not None:
            root, failed = torch.linalg.cholesky_ex(raised)
            if not failed:
                return root
        # G = V e Vᵀ = (V √e)(V √e)ᵀ, and with (V √e)ᵀ = Q R, G = Rᵀ R
        values, vectors = torch.linalg.eigh(self.moment)
        scaled = (vectors * values.clamp(min=self.floor).sqrt()).T
        upper: Tensor = torch.linalg.qr(scaled, mode="r").R
        return upper.T


def _raised(moment_NN: Tensor, floor: float, count: int) -> Tensor | None:
    """The moment with its ``count`` eigenvalues below the floor raised to it, where these are few:
    behind a LayerNorm it is one. Their vectors are found by inverse iteration of a block with
    Rayleigh-Ritz (Parlett 1998, ch. 14); None where it does not converge at once."""
    size = len(moment_NN)
    if size <= _FEW or not 0 < count <= _FEW_BELOW:
        return None
    root, failed = torch.linalg.cholesky_ex(_shifted(moment_NN, floor))
    if failed:
        return None
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(size, 2 * count + 4, generator=generator, dtype=torch.float64)
    block = block.to(moment_NN.device)
    for _ in range(4):
        block, _ = torch.linalg.qr(torch.cholesky_solve(block, root))
        image = moment_NN @ block
        values, turned = torch.linalg.eigh(block.T @ image)
        low, vectors = values[:count], block @ turned[:, :count]
        rest = (image @ turned[:, :count] - vectors * low).norm()
        if float(rest) <= 1e-4 * floor:
            return torch.addmm(moment_NN, vectors * (floor - low).clamp(min=0), vectors.T)
    return None


def _shifted(moment: Tensor, by: float) -> Tensor:
    shifted = moment.clone()
    shifted.diagonal().add_(by)
    return shifted


def _negative(symmetric: Tensor) -> int:
    """How many eigenvalues are negative: as many as of D in ``L D Lᵀ`` (Sylvester's inertia)."""
    factor, pivots, _ = torch.linalg.ldl_factor_ex(symmetric)  # an exact 0 is no failure
    # a block of two, which negative pivots mark, has an eigenvalue of either sign
    single = pivots > 0
    return int((factor.diagonal()[single] < 0).sum()) + int((~single).sum()) // 2


def largest_eigenvalue(moment_NN: Tensor) -> float:
    """The largest eigenvalue of a symmetric matrix; of a large one by Lanczos iteration with full
    reorthogonalisation, which never exceeds it."""
    size = len(moment_NN)
    if size <= _FEW:
        return float(torch.linalg.eigvalsh(moment_NN)[-1])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator, dtype=torch.float64).to(moment_NN.device)
    basis = moment_NN.new_zeros(_STEPS, size)
    small = moment_NN.new_zeros(_STEPS, _STEPS)
    vector = start / start.norm()
    steps = 0
    for step in range(_STEPS):
        basis[step] = vector
        steps = step + 1
        image = moment_NN @ vector
        size_of_image = image.norm()
        small[step, step] = image @ vector
        for _ in range(2):
            image = image - basis[:steps].T @ (basis[:steps] @ image)
        rest = image.norm()
        if not bool(rest > 1e-14 * size_of_image):  # the start lies in what is found
            break
        if steps < _STEPS:
            small[step, steps] = small[steps, step] = rest
            vector = image / rest
    return float(torch.linalg.eigvalsh(small[:steps, :steps])[-1])
