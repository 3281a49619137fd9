"""The copy of a compiled model that is trained, with numbers of its own to train."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshare.base.processes import here
from fxshare.calibration.offload import offloaded
from fxshare.capture import Call, device_of
from fxshare.capture.call import as_float32, to_device
from fxshare.capture.steered import set_training
from fxshare.errors import RefineError
from fxshare.refining.float32 import in_float32, widen_rest
from fxshare.refining.parameters import Trainable
from fxshare.refining.shards import Shards, local, passing
from fxshare.result.module import Compiled, record_of
from fxshare.result.record import Record
from fxshare.rewriting.lowering import shared_copy
from passes.graph.graph import structure_copy

State = Mapping[str, Tensor]
_LEAST_SCALE = 1e-2
# gradients of half precision with five bits of exponent vanish unless they are scaled
_LOSS_SCALE = 1024.0


class Student:
    """``gm`` with copies of the trained parameters, in eval mode; everything else is shared with
    ``gm``, and frozen.

    Parameters in half precision are trained in float32 and rounded before each run: a step is
    smaller than their last digit. With ``wide`` the module computes in float32 on what they are
    rounded to.
    """

    def __init__(self, gm: nn.Module, trainable: Trainable, *, wide: bool = False) -> None:
        self.gm = gm
        self.trainable = trainable
        self._wide = wide
        named = dict(gm.named_parameters())
        self._dtypes = {name: named[name].dtype for name in trainable.names}
        self._stored = {
            name: nn.Parameter(self._read(named[name]).clone(memory_format=torch.preserve_format))
            for name in trainable.names
        }
        instead: dict[int, object] = {
            id(parameter): nn.Parameter(self._read(parameter), requires_grad=False)
            for parameter in named.values()
        }
        instead.update({id(named[name]): own for name, own in self._stored.items()})
        self.module: nn.Module = structure_copy(gm, memo=instead, one_code=not wide)
        set_training(self.module, False)
        if wide:
            widen_rest(self.module)
        self.masters: dict[str, Tensor] = {
            name: own.detach()
            if own.dtype == self._dtypes[name] and own.itemsize > 2
            # of its own, since it is rounded on its way to the module
            else own.detach().to(torch.promote_types(own.dtype, torch.float32), copy=True)
            for name, own in self._stored.items()
        }
        """What the optimiser changes; of a parameter in full precision its own memory. After
        :meth:`shard` this rank's rows, as all states and gradients."""
        self._shards: Shards | None = None
        half = any(own.dtype == torch.float16 for own in self._stored.values())  # not where wide
        self.loss_scale = _LOSS_SCALE if half else 1.0
        """What the loss is multiplied by for the backward pass: 1 but in float16."""

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Those in which the trained parameters are stored."""
        return set(self._dtypes.values())

    def _read(self, parameter: Tensor) -> Tensor:
        """A parameter as the module reads it."""
        return in_float32(parameter.detach()) if self._wide else parameter.detach()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return device_of(self.gm)

    def __call__(self, call: Call, *, run: Any = None) -> Any:
        """The output for a call; ``run`` in place of the module, where it was compiled."""
        module = self.module if run is None else run
        with self._passing():
            given = to_device(call, self.device)
            return module(**(as_float32(given) if self._wide else given))

    def backward(self, loss: Tensor, *, share: float = 1.0) -> None:
        """Add the gradient of a share of ``loss`` to what is there."""
        try:
            with self._passing():
                (loss * (share * self.loss_scale)).backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what the model's own code would raise as well
            first = (str(error).strip().splitlines() or [""])[0]
            raise RefineError(
                f"{type(self.gm).__name__} cannot be trained: its backward pass fails "
                f"({first:.300}); a model that writes into what it read before has no gradients. "
                "Take out such writes and compile it again"
            ) from error

    def gradients(self) -> dict[str, Tensor]:
        """The gradients at the masters, taken away from the parameters; zero where there is
        none."""
        found = {}
        for name, own in self._stored.items():
            master = self.masters[name]
            grad = own.grad
            gradient = torch.zeros_like(master) if grad is None else local(grad).to(master.dtype)
            found[name] = gradient if self.loss_scale == 1.0 else gradient / self.loss_scale
            own.grad = None
        return found

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Of all gradients, parts of all ranks included."""
        if self._shards is None:
            return torch.nn.utils.get_total_norm(gradients.values())
        squares = {name: one.double().pow(2).sum() for name, one in gradients.items()}
        parts = [square for name, square in squares.items() if self.has_part_of(name)]
        wholes = [square for name, square in squares.items() if not self.has_part_of(name)]
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        total = here().total(sum(parts, zero)) + sum(wholes, zero)
        return total.sqrt().to(next(iter(gradients.values())).dtype)

    def scaled_down(self) -> bool:
        """Halve what the loss is multiplied by, where it is; False where it is not."""
        if self.loss_scale <= 1.0:
            return False
        self.loss_scale /= 2
        return True

    def has_gradients(self) -> bool:
        """Whether any parameter has one."""
        return any(own.grad is not None for own in self._stored.values())

    def scales(self) -> dict[str, float]:
        """The size of each trained tensor, by which its learning rate is multiplied."""
        sizes = {name: master.double().pow(2).mean() for name, master in self.masters.items()}
        if self._shards is not None:
            for name in self._shards.parameters:
                square = here().total(self.masters[name].double().pow(2).sum())
                sizes[name] = square / self._shards.parameters[name].numel()
        return {name: max(float(size.sqrt()), _LEAST_SCALE) for name, size in sizes.items()}

    def shard(self) -> None:
        """Keep this rank's rows of what is trained. From here on the ranks run equally many forward
        and backward passes."""
        masters = dict(self.masters)
        assert isinstance(self.module, fx.GraphModule)
        self._shards = Shards(self.module, self._stored)
        for name, own in self._shards.parameters.items():
            rows = local(own.detach())
            self._stored[name] = own
            self.masters[name] = rows if rows.itemsize > 2 else rows.float()
            self.masters[name].copy_(self.part(name, masters[name]))

    def _passing(self) -> AbstractContextManager[None]:
        return nullcontext() if self._shards is None else passing()

    @property
    def is_sharded(self) -> bool:
        """Whether ranks have parts of what is trained."""
        return self._shards is not None

    def has_part_of(self, name: str) -> bool:
        """Whether this rank has only a part of a trained tensor."""
        return self._shards is not None and name in self._shards.parameters

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor like a trained one."""
        return whole if self._shards is None else self._shards.part(name, whole)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """All rows of a tensor like a trained one, on every rank."""
        return part if self._shards is None else self._shards.whole(name, part)

    @torch.no_grad()
    def round(self) -> None:
        """Put the masters, rounded, where the module reads them."""
        for name, own in self._stored.items():
            if self._dtypes[name] != self.masters[name].dtype:
                local(own.detach()).copy_(self.masters[name].to(self._dtypes[name]))

    def state(self) -> dict[str, Tensor]:
        """A copy of what is trained."""
        return {name: master.clone() for name, master in self.masters.items()}

    @torch.no_grad()
    def put(self, state: State) -> None:
        """Go on from another state."""
        for name, master in self.masters.items():
            master.copy_(state[name])
        self.round()

    def offloading(self, wanted: bool) -> AbstractContextManager[None]:
        """Activations in a file until the backward pass, where ``wanted``."""
        return offloaded(self.module) if wanted else nullcontext()

    def result(self, state: State | None, record: Record | None = None) -> Compiled:
        """A compiled model with this state, or with that of ``gm`` where None; tensors that were
        not trained are those of ``gm``, and all flags are as there."""
        named = dict(self.gm.named_parameters())
        instead: dict[int, object] = {}
        for name in self.trainable.names:
            old = named[name]
            new = old.detach() if state is None else self.whole(name, state[name]).to(old.dtype)
            instead[id(old)] = nn.Parameter(
                new.clone(memory_format=torch.preserve_format), requires_grad=old.requires_grad
            )
        return shared_copy(self.gm, record or record_of(self.gm), instead)


__all__ = ["State", "Student"]
