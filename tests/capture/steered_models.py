"""Models whose gradients or training mode no value shows, for the tests of capture."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8
CONFIG = {
    "weight_types": {"a": {"pattern": r"layers\.\d+\.0$"}, "b": {"pattern": r"layers\.\d+\.2$"}},
    "block_pattern": r"layers\.(\d+)",
}


def x_of(seed: int = 0, batch: int = 3, length: int = 5) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


class Stack(nn.Module):
    """Residual blocks of two linears, and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(self.block() for _ in range(3))
            self.head = nn.Linear(WIDTH, 4)
            self.extra()

    def block(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def extra(self) -> None:
        """More modules."""

    def around(self, at: int, x: Tensor) -> Tensor:
        """Layer ``at``."""
        y: Tensor = self.layers[at](x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        for at in range(len(self.layers)):
            x = x + self.around(at, x)
        y: Tensor = self.head(x)
        return y


class First(Stack):
    """What differs is how the first layer is called."""

    def around(self, at: int, x: Tensor) -> Tensor:
        return self.first(x) if at == 0 else super().around(at, x)

    def first(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class NoGrad(First):
    def first(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.layers[0](x)
        return y


class Decorated(First):
    @torch.no_grad()
    def first(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](x)
        return y


class SetGrad(First):
    """Set and set back by calls."""

    def first(self, x: Tensor) -> Tensor:
        was = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        y: Tensor = self.layers[0](x)
        torch.set_grad_enabled(was)
        return y


class Inference(First):
    def first(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y: Tensor = self.layers[0](x)
        return y.clone()


class InferenceAlone(Stack):
    """All of it in inference mode."""

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Nested(First):
    def first(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.layers[0][0](x)
            with torch.enable_grad():
                z = self.layers[0][1](y)
                z = z + self.layers[0][2](z)[..., :1]
            return z[..., :WIDTH] + y[..., :WIDTH]


class EnableGrad(First):
    """Has gradients although its caller has none."""

    def first(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y: Tensor = self.layers[0](x)
        return y


class SameInput(Stack):
    """One module twice on one input, with and without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.layers[0](x)
        online = self.layers[0](x)
        y: Tensor = self.head(online - target + self.layers[1](target) + self.layers[2](target))
        return y


class InTraining(First):
    """Frozen in training only."""

    def first(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.training):
            y: Tensor = self.layers[0](x)
        return y


class InEval(First):
    def first(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            y: Tensor = self.layers[0](x)
        return y


class Detached(First):
    def first(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](x.detach())
        return y.detach() * 0.5 + y


class Round(torch.autograd.Function):
    """Straight-through rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: int = 4) -> Tensor:
        return (x * steps).round() / steps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class Reverse(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return -ctx.scale * gradients[0], None


class Split(torch.autograd.Function):
    """In the newer style, two outputs, and an argument that no graph can hold."""

    @staticmethod
    def forward(x: Tensor, how: Any) -> Any:
        return how(x), x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * 3, None


class StraightThrough(First):
    def first(self, x: Tensor) -> Tensor:
        return self.layers[0](Round.apply(x))  # type: ignore[no-any-return, no-untyped-call]


class Reversal(First):
    scale = 0.7

    def first(self, x: Tensor) -> Tensor:
        return Reverse.apply(self.layers[0](x), self.scale)  # type: ignore[no-any-return, no-untyped-call]


class TwoOutputs(First):
    def first(self, x: Tensor) -> Tensor:
        y, sign = Split.apply(self.layers[0](x), torch.tanh)  # type: ignore[no-untyped-call]
        return y * 0.5 + sign * 0.01  # type: ignore[no-any-return]


class StraightThroughDetach(First):
    """The other way to write a straight-through estimator."""

    def first(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        return y + (y.round() - y).detach()  # type: ignore[no-any-return]


class Checkpointed(First):
    reentrant = False

    def first(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers[0], x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


class Reentrant(Checkpointed):
    reentrant = True


class Clipped(First):
    """A hook on an intermediate result."""

    def first(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 0.1)
        return y  # type: ignore[no-any-return]


class ClippedAlways(First):
    def first(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        if torch.is_grad_enabled():
            y.register_hook(lambda gradient: gradient * 0.1)
        return y  # type: ignore[no-any-return]


class BackwardHook(Stack):
    """A hook on a module that a graph looks through."""

    def extra(self) -> None:
        self.layers[1].register_full_backward_hook(self.reverse)

    @staticmethod
    def reverse(module: Any, inputs: Any, outputs: Any) -> Any:
        return (-inputs[0],)


class BackwardPreHook(Stack):
    def extra(self) -> None:
        self.layers[1].register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2,))


class HeadHook(Stack):
    """A hook on a module that is called as a whole."""

    def extra(self) -> None:
        self.head.register_full_backward_hook(BackwardHook.reverse)


class RootHook(Stack):
    """Acts in training mode only."""

    def extra(self) -> None:
        self.register_forward_hook(self.scaled)

    @staticmethod
    def scaled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * 2 if module.training else output


class RootPreHook(Stack):
    def extra(self) -> None:
        self.register_forward_pre_hook(
            lambda module, inputs, named: (
                inputs,
                {name: x * (2 if module.training else 1) for name, x in named.items()},
            ),
            with_kwargs=True,
        )


class FrozenInForward(First):
    def first(self, x: Tensor) -> Tensor:
        self.layers[0][2].requires_grad_(False)
        y: Tensor = self.layers[0](x)
        return y


class FrozenByAttribute(First):
    def first(self, x: Tensor) -> Tensor:
        for parameter in self.layers[0].parameters():
            parameter.requires_grad = False
        y: Tensor = self.layers[0](x)
        return y


class Autocast(First):
    def first(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.layers[0](x)
        return y.float()  # type: ignore[no-any-return]


class Island(First):
    """In float32 whatever is around it."""

    def first(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y: Tensor = self.layers[0](x.float())
        return y


class IslandInAutocast(Stack):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layers[0](x)
        with torch.autocast("cpu", enabled=False):
            x = x + self.layers[1](x.float())
        with torch.no_grad():
            frozen = self.layers[2](x)
        y: Tensor = self.head(x + frozen)
        return y.float()


class AsksForAutocast(First):
    def first(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        return y.to(torch.float32).tanh() if torch.is_autocast_enabled("cpu") else y  # type: ignore[no-any-return]


class AsksForGrad(First):
    """The same numbers on both ways."""

    def first(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        return y * 1.0 if torch.is_grad_enabled() else y  # type: ignore[no-any-return]


class Normed(Stack):
    """Batch norm in every layer, and dropout."""

    def block(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH), nn.BatchNorm1d(5), nn.Dropout()
        )


class FrozenNorm(Normed):
    """Its normalisation stays in eval mode."""

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


class EvalInForward(Normed):
    def around(self, at: int, x: Tensor) -> Tensor:
        self.layers[at][3].eval()
        return super().around(at, x)


class AlwaysDropping(Normed):
    """Monte Carlo dropout: on in eval mode as well."""

    def around(self, at: int, x: Tensor) -> Tensor:
        self.layers[at][4].train()
        return super().around(at, x)


class NeverTrained(Normed):
    def train(self, mode: bool = True) -> NeverTrained:
        super().train(False)
        return self


class Noisy(First):
    """Other operations in training mode."""

    def first(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        return y * 2 + 1 if self.training else y  # type: ignore[no-any-return]


class LayerDrop(First):
    def first(self, x: Tensor) -> Tensor:
        if self.training and torch.rand([]) < 0.01:
            return torch.zeros_like(x)
        y: Tensor = self.layers[0](x)
        return y


class Interrupted(First):
    """Cannot run in training mode."""

    def first(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("for inference only")
        y: Tensor = self.layers[0](x)
        return y


def reference(model: nn.Module) -> nn.Module:
    """A copy to run, whose state changes."""
    return copy.deepcopy(model)
