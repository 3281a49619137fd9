"""The face of a transformers model on a compiled graph: ``config``, ``generate`` and the like."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxshare.models.structure import Structure, structure_of

_KEY = "verbs"


@dataclass(frozen=True)
class Verbs:
    """What a compiled model does by stages that stand above this one, as functions of a module.

    Functions of modules, not bound methods, so that copying and pickling a model copies names.
    """

    generate: Callable[..., Any]
    save_pretrained: Callable[..., None]


def verbs_of(gm: nn.Module) -> Verbs:
    """The verbs that were given to :func:`keep_verbs` for this module, or for what it was made
    from."""
    found: Verbs = gm.__dict__["meta"][_KEY]
    return found


def keep_verbs(gm: nn.Module, verbs: Verbs) -> None:
    """Put the verbs where :func:`verbs_of` finds them."""
    gm.__dict__["meta"][_KEY] = verbs


class GenerationFace:
    """What generation, and tools around it such as lm-evaluation-harness, ask of a model.

    ``config`` and ``generation_config`` are there where the original is a transformers model; a
    graph of another model has no such attributes.
    """

    def _structure(self, attribute: str) -> Structure:
        assert isinstance(self, nn.Module)
        found = structure_of(self)
        if found is None or not hasattr(found.model, attribute):
            raise AttributeError(
                f"{type(self).__name__!r} has no attribute {attribute!r}: it was not made from a "
                "transformers model that has one"
            )
        return found

    @property
    def config(self) -> Any:
        """The original's configuration."""
        return self._structure("config").model.config

    @property
    def generation_config(self) -> Any:
        """The defaults of :meth:`generate`, to be changed as one likes."""
        return self._structure("generation_config").model.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self._structure("generation_config").model.generation_config = value

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        assert isinstance(self, nn.Module)
        return next(iter([*self.parameters(), *self.buffers()])).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        assert isinstance(self, nn.Module)
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def can_generate(self) -> bool:
        """Whether :meth:`generate` works: the original is a model of transformers that generates,
        causal or encoder and decoder."""
        assert isinstance(self, nn.Module)
        found = structure_of(self)
        return (
            found is not None
            and hasattr(found.model, "generate")
            and bool(found.model.can_generate())
        )

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: weights that were tied are so in the graph. For tools that call it."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of the original's class, with its arguments and its results.

        Each step runs a graph captured with the cache, made at the first step of its kind (seconds)
        and checked against the plain graph. Steps that cannot be captured run the model's own code
        on the same weights; the record's notes then say why.

        Raises :class:`FxShareError` where the original cannot generate.
        """
        assert isinstance(self, nn.Module)
        return verbs_of(self).generate(self, *args, **kwargs)


class SavingFace:
    """``save_pretrained`` on a compiled graph."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """:func:`fxshare.save` with the arguments of transformers' ``save_pretrained``."""
        assert isinstance(self, nn.Module)
        verbs_of(self).save_pretrained(self, save_directory, **options)


__all__ = ["GenerationFace", "SavingFace", "Verbs", "keep_verbs", "verbs_of"]
