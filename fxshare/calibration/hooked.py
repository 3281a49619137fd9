"""Statistics at module granularity: hooks on the model's own modules, removed afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxshare.base.placement import dtype_of
from fxshare.calibration.gram import sums_dtype
from fxshare.calibration.lookups import LookupStatistics
from fxshare.calibration.observed import Counting, InputObserver, tap_of
from fxshare.capture.call import MASK, Call, as_called
from fxshare.sites.site import Site
from passes import is_linear, structure_copy


class HookStage:
    """A copy of the model with hooks on its linears; for capture at module granularity."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        weights: Mapping[str, Tensor],
        *,
        gradients: bool,
    ) -> None:
        self.model = structure_copy(model).eval()
        self.dtype = sums_dtype(dtype_of(model))
        called = {name: site for site in sites for name in site.calls}
        self.taps = {}
        if gradients:
            self.taps = {
                name: tap_of(site, weights[site.name], self.dtype) for name, site in called.items()
            }
        self.tapped = {name: (name,) for name in self.taps}
        # at this granularity embeddings are no sites
        self.looked_up: dict[str, tuple[LookupStatistics, ...]] = {}
        self.observers: dict[str, InputObserver] = {}
        self.seen: dict[str, tuple[str, ...]] = {}
        self._mask: Tensor | None = None
        self._last: tuple[Tensor, str] | None = None
        self._handles: list[RemovableHandle] = []
        for name in called:
            module = self.model.get_submodule(name)
            if is_linear(module):
                hook = self._hook(name)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                if name in self.taps:
                    self._handles.append(module.register_forward_hook(self._tap(name)))

    def _tap(self, name: str) -> Any:
        def tap(module: nn.Module, args: Any, y: Tensor) -> Any:
            return self.taps[name](y, self._mask)

        return tap

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            # q, k and v are handed the same tensor object, one after the other
            if self._last is not None and self._last[0] is x:
                observer = self._last[1]
                if observer == self.seen.get(name, (observer,))[0]:
                    self.seen[name] = (observer,)
                    return
            observer = self.seen.get(name, (name,))[0]
            if observer not in self.observers:
                self.observers[observer] = InputObserver(x.shape[-1], self.dtype)
            self.seen[name] = (observer,)
            self._last = (x, observer)
            self.observers[observer](x, self._mask)

        return look

    @property
    def module(self) -> nn.Module:
        """What is run."""
        return self.model

    @property
    def counting(self) -> list[Counting]:
        """What counts tokens."""
        return list(self.observers.values())

    def __call__(self, call: Call) -> Any:
        mask = call.get(MASK)
        self._mask = mask if isinstance(mask, Tensor) else None
        try:
            args, kwargs = as_called(self.model, call)
            return self.model(*args, **kwargs)
        finally:
            self._last = self._mask = None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
