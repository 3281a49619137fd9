"""Which linears a call of a model reaches, where no graph shows it.

At module granularity the model's own code runs, and only a call tells whether it calls a module,
multiplies by its weight itself (Mamba's ``dt_proj``), or drops its result. The call is watched
below autograd, operation by operation: what is computed from a linear's result carries its name,
to the outputs or not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxshare.capture import Captured, device_of, quiet
from fxshare.capture.written import Unwritten
from fxshare.models.traits import example_ids
from passes import is_linear, structure_copy

_LOG = logging.getLogger(__name__)
_MOST_CALLS = 8
"""So many batches are tried for what the first of them does not reach, as an expert may be."""
_OF_SHAPE = frozenset(
    {f"{made}_like" for made in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")}
    | {f"new_{made}" for made in ("zeros", "ones", "empty", "full")}
)
# a number that leaves the tensors may decide about anything
_LEAVES = frozenset({"_local_scalar_dense", "is_nonzero", "item", "equal"})
_DEPTH = 3


@dataclass
class Reached:
    """What calls showed of linears, by their names: ``called``; ``used``, which have reached an
    output; ``read``, whose weight was read outside of them; ``written``, whose weight or bias was
    written to. ``calls`` is how many were watched in eval mode; one that is ``made_up`` says of no
    linear that it is not used as one."""

    called: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    calls: int = 0
    made_up: bool = False

    def refusal(self, name: str) -> str | None:
        """Why a linear is no site; None where it is called for its result, and for that only."""
        if name in self.written:
            return (
                "the model's forward writes to its weight or bias, which a rewritten linear does "
                "not have; write to it outside of forward (after the optimizer's step, say)"
            )
        if self.made_up:
            return None
        if name in self.read:
            beside = " beside calling it" if name in self.called else " and does not call it"
            return f"the model reads its weight itself{beside}"
        if name not in self.called:
            return f"is not called by the {self.calls} batches that were tried in eval mode"
        return None if name in self.used else "is called, and nothing depends on its result"


def reached(captured: Captured, batches: Iterable[object], names: Sequence[str]) -> Reached | None:
    """Watch the model on a few batches, until every linear of ``names`` was reached; without any on
    made-up token ids. None where a call fails, which whoever runs the model next will say."""
    model = structure_copy(captured.model).eval()
    modules = {n: m for n in names if is_linear(m := model.get_submodule(n))}
    if any(p.device.type == "meta" for p in model.parameters()):
        return None
    found = Reached()
    before = Unwritten(model, list(modules))
    for batch in _or_made_up(model, batches, found):
        try:
            with quiet(), _Watch(modules, found) as watch:
                watch.finish(model(**captured.caller(batch)))
        except Exception as error:
            _LOG.debug("a call to watch failed: %s", error)
            return None
        found.calls += 1
        if found.calls == 1:
            _watch_training(captured, batch, names, found)
        missing = set(modules) - found.used - found.read
        if not missing or found.calls == _MOST_CALLS:
            break
    found.written |= {name.rpartition(".")[0] for name in before.restore()}
    return found if found.calls else None


def _or_made_up(model: nn.Module, batches: Iterable[object], found: Reached) -> Iterator[object]:
    yield from batches
    ids = None if found.calls else example_ids(model)
    if ids is not None:
        found.made_up = True
        yield ids.to(device_of(model))


def _watch_training(
    captured: Captured, batch: object, names: Sequence[str], found: Reached
) -> None:
    """Take what is written to in training mode alone for written."""
    model = structure_copy(captured.model).train()
    modules = {n: m for n in names if is_linear(m := model.get_submodule(n))}
    trained = Reached()
    try:
        with quiet(), _Watch(modules, trained):
            model(**captured.caller(batch))
    except Exception as error:  # a model that does not train may be compiled
        _LOG.debug("a call to watch failed in training mode: %s", error)
    found.written |= trained.written


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Marks the results of linears, and follows the marks from operation to operation."""

    def __init__(self, modules: dict[str, nn.Module], found: Reached) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found
        # by storage: a view has the marks of what it is a view of. The reference keeps a storage's
        # address from being given to another
        self.marks: dict[int, tuple[StorageWeakRef, set[str]]] = {}
        self.inside: list[set[str]] = []
        self.weights: dict[int, set[str]] = {}
        self.handles = []
        self.parameters: list[tuple[str, nn.Module, str, nn.Parameter, Tensor]] = []
        for name, module in modules.items():
            for place, parameter in module.named_parameters(recurse=False):
                self.parameters.append((name, module, place, parameter, parameter.detach()))
                self.weights.setdefault(parameter.data_ptr(), set()).add(name)
            self.handles.append(module.register_forward_pre_hook(self._enter(name)))
            self.handles.append(module.register_forward_hook(self._leave(name)))

    def __exit__(self, *exception: Any) -> None:
        for handle in self.handles:
            handle.remove()
        for name, module, place, parameter, data in self.parameters:
            if module._parameters.get(place) is not parameter:
                self.found.written.add(name)
            if parameter.data_ptr() != data.data_ptr():
                self.found.written.add(name)
                parameter.data = data
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, _: Any) -> None:
            own = {p.data_ptr() for p in module.parameters(recurse=False)}
            self.inside.append({name}.union(*(self.weights.get(at, set()) for at in own)))

        return enter

    def _leave(self, name: str) -> Any:
        def leave(module: nn.Module, _: Any, y: Any) -> None:
            self.inside.pop()
            self.found.called.add(name)
            self._mark(y, {name})

        return leave

    def finish(self, output: object) -> None:
        """Take what reached the output for used."""
        for tensor in _tensors(output):
            self.found.used |= self._marks_of(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        inside = self.inside[-1] if self.inside else set()
        for tensor in given:
            self.found.read |= self.weights.get(tensor.data_ptr(), set()) - inside
        args, kwargs = self._unwritten(func, args, kwargs)
        marks = set().union(*(self._marks_of(tensor) for tensor in given))
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name in _LEAVES:
            self.found.used |= marks
        elif marks and name not in _OF_SHAPE:
            self._mark(result, marks)
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._mark(value, marks)
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.name in kwargs:
                    self._mark(kwargs[argument.name], marks)
        return result

    def _unwritten(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The arguments with copies of the weights that the operation writes to."""
        given, named = list(args), dict(kwargs)
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = given[at] if at < len(given) else named.get(argument.name)
            if isinstance(value, Tensor) and (names := self._owners_of(value)):
                self.found.written |= names
                if at < len(given):
                    given[at] = value.clone()
                else:
                    named[argument.name] = value.clone()
        return tuple(given), named

    def _owners_of(self, tensor: Tensor) -> set[str]:
        storage = tensor.untyped_storage()._cdata
        start = tensor.data_ptr()
        return {
            name
            for name, _, _, _, data in self.parameters
            if data.untyped_storage()._cdata == storage
            and data.data_ptr() <= start < data.data_ptr() + data.nbytes
        }

    def _marks_of(self, tensor: Tensor) -> set[str]:
        found = self.marks.get(tensor.untyped_storage()._cdata)
        return set() if found is None else found[1]

    def _mark(self, value: object, names: set[str]) -> None:
        for tensor in pytree.tree_leaves(value):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self.marks.setdefault(storage._cdata, (reference, set()))[1].update(names)


def _tensors(value: object, depth: int = _DEPTH) -> Iterator[Tensor]:
    """The tensors of an output, those in objects that torch cannot flatten included."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and depth:
            yield from _tensors(list(vars(leaf).values()), depth - 1)
