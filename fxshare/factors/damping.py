"""Roots of moments that may be singular.

A moment of few tokens, of dead units or of massive activations has no root, or a useless one. It is
damped by ``floor = relative_floor · largest eigenvalue``: where an eigenvalue is below the floor,
the floor is added to all of them, else the moment is left as it is. Whether one is below is what a
Cholesky factorisation of ``moment − floor`` fails of, so that no eigenvalue but the largest is ever
computed: a Cholesky factorisation of 3072 features takes a thirtieth of their eigenvectors.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

# up to here all eigenvalues take no longer than an iteration's calls
_FEW = 256
_STEPS = 40


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

    @property
    def added(self) -> float:
        """What is added to every eigenvalue."""
        return self.floor if self.singular else 0.0

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
    def root(self) -> Tensor:
        """Lower triangular ``(N, N)`` with ``root @ rootᵀ`` the damped moment, or the diagonal
        ``(N,)`` of one."""
        if self.moment.ndim == 1:
            return (self.moment + self.added).sqrt()
        damped = _shifted(self.moment, self.added) if self.added else self.moment
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(damped)
        if failed:  # a floor so low that rounding is more
            return _root_of_eigenvalues(self.moment, self.floor)
        return root


def _shifted(moment: Tensor, by: float) -> Tensor:
    shifted = moment.clone()
    shifted.diagonal().add_(by)
    return shifted


def _root_of_eigenvalues(moment: Tensor, floor: float) -> Tensor:
    """The root after raising eigenvalues to the floor: ``V e Vᵀ = Rᵀ R`` with ``(V √e)ᵀ = Q R``."""
    values, vectors = torch.linalg.eigh(moment)
    upper: Tensor = torch.linalg.qr((vectors * values.clamp(min=floor).sqrt()).T, mode="r").R
    return upper.T


def _negative(symmetric: Tensor) -> int:
    """How many eigenvalues are negative: as many as of D in ``L D Lᵀ`` (Sylvester's inertia)."""
    factor, pivots = torch.linalg.ldl_factor(symmetric)
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
