"""What moves the parameters by their gradients: AdamW, or Muon for matrices.

Muon (Jordan et al. 2024) steps along the nearest semi-orthogonal matrix to a momentum of the
gradients, so that every direction of a factor moves equally far; its steps have the size of AdamW's
(Liu et al. 2025, 2502.16982, eq. 4), and so the learning rates mean the same. ``torch.optim.Muon``
multiplies in bfloat16, which most CPUs have no instructions for, and as wide as the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.refining.options import OptimiserName
from fxshare.refining.student import Student

_BETAS = (0.9, 0.98)
_NORM = 1.0
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MOMENTUM = 0.95
_SIZE = 0.2
"""The usual root mean square of AdamW's steps, by the learning rate."""
_SCHULZ = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class Optimiser:
    """AdamW without decay, or with ``kind`` ``"muon"`` Muon for the matrices of linears and AdamW
    for the rest; each tensor's learning rate is relative to its size, and the norm of the gradient
    at most 1."""

    def __init__(self, student: Student, scales: Mapping[str, float], kind: OptimiserName) -> None:
        self._student = student
        self._masters = dict(student.masters)
        self._scales = dict(scales)
        self._kind = kind
        self._taken = 0
        names = _matrices(student) if kind == "muon" else []
        self._momenta = {name: torch.zeros_like(self._masters[name]) for name in names}
        groups: list[dict[str, Any]] = [
            {"params": [master], "name": name}
            for name, master in self._masters.items()
            if name not in self._momenta
        ]
        self._adam = None
        if groups:
            self._adam = torch.optim.AdamW(
                groups, lr=0.0, betas=_BETAS, weight_decay=0.0, fused=True
            )

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> bool:
        """One step at a rate; without effect, and False, where a gradient is not finite."""
        for name, master in self._masters.items():
            master.grad = gradients[name]
        norm = self._student.norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(self._masters.values(), _NORM, norm)
        finite = bool(norm.isfinite())
        if finite:
            self._taken += 1
            self._muon_step(rate)
            if self._adam is not None:
                for group in self._adam.param_groups:
                    group["lr"] = rate * self._scales[group["name"]]
                self._adam.step()
        for master in self._masters.values():
            master.grad = None
        return finite

    @torch.no_grad()
    def _muon_step(self, rate: float) -> None:
        for name, momentum in self._momenta.items():
            master = self._masters[name]
            assert master.grad is not None
            momentum.lerp_(master.grad, 1 - _MOMENTUM)
            along = orthogonalised(master.grad.lerp(momentum, _MOMENTUM))  # Nesterov's
            size = _SIZE * math.sqrt(max(master.shape))
            master.add_(along, alpha=-rate * self._scales[name] * size)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its tensors by name, and its numbers."""
        found: dict[str, Tensor] = {}
        for group in [] if self._adam is None else self._adam.param_groups:
            (master,), name = group["params"], group["name"]
            held = self._adam.state.get(master, {}) if self._adam is not None else {}
            found.update({f"{moment}.{name}": held[moment] for moment in _MOMENTS if held})
        if self._taken:
            found.update({f"momentum.{name}": own for name, own in self._momenta.items()})
        return found, {"taken": self._taken, "scales": self._scales, "kind": self._kind}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._scales, self._taken = dict(numbers["scales"]), int(numbers["taken"])
        if not self._taken:
            return
        for name, master in self._masters.items():
            if name in self._momenta:
                self._momenta[name].copy_(tensors[f"momentum.{name}"])
            elif self._adam is not None:
                held = {m: tensors[f"{m}.{name}"].to(master.device).clone() for m in _MOMENTS}
                taken = torch.tensor(float(self._taken), device=master.device)
                self._adam.state[master] = {"step": taken, **held}


def orthogonalised(matrix_AB: Tensor) -> Tensor:
    """Near to ``U Vᵀ`` for ``matrix = U Σ Vᵀ``: singular values of 0.7 to 1.2, and less those below
    a thousandth of the norm.

    Five rounds of the quintic Newton-Schulz iteration of Jordan et al. 2024. It multiplies the
    matrix by polynomials of ``X Xᵀ`` alone, which are multiplied with each other on the shorter
    side: the matrix itself takes part in two products in place of fifteen.
    """
    wide = len(matrix_AB) <= matrix_AB.shape[1]
    x_RM = matrix_AB if wide else matrix_AB.T
    x_RM = x_RM / x_RM.norm().clamp(min=torch.finfo(x_RM.dtype).tiny)
    gram_RR = x_RM @ x_RM.T
    first, second, third = _SCHULZ
    product_RR: Tensor | None = None
    for number in range(_ROUNDS):
        round_RR = torch.addmm(gram_RR, gram_RR, gram_RR, beta=second, alpha=third)
        round_RR.diagonal().add_(first)
        product_RR = round_RR if product_RR is None else round_RR @ product_RR
        if number + 1 < _ROUNDS:
            gram_RR = round_RR @ gram_RR @ round_RR
    assert product_RR is not None
    found: Tensor = product_RR @ x_RM
    return found if wide else found.T


def _matrices(student: Student) -> list[str]:
    """The trained matrices but for tables, of whose rows a step reaches few."""
    tables = {id(m.weight) for m in student.gm.modules() if isinstance(m, nn.Embedding)}
    named = dict(student.gm.named_parameters())
    return [
        name
        for name, master in student.masters.items()
        if master.ndim == 2 and id(named[name]) not in tables
    ]


__all__ = ["Optimiser", "orthogonalised"]
