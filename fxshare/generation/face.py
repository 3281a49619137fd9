"""The face of a transformers model on a compiled graph: ``config``, ``generate`` and the like."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxshare.errors import FxShareError
from fxshare.generation.structure import Structure, structure_of


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
        if not self.can_generate():
            raise FxShareError(_refusal(self))
        try:
            import transformers  # noqa: F401 - to say what is missing
        except ImportError as error:
            raise FxShareError(
                f"generate() needs transformers, which cannot be imported ({error}); "
                "pip install 'fxshare[hf]'"
            ) from error
        from fxshare.generation.shell import shell_of

        return shell_of(self).generate(*args, **kwargs)


def _refusal(gm: nn.Module) -> str:
    found = structure_of(gm)
    if found is None:
        return (
            f"{type(gm).__name__} cannot generate: expected the graph of a causal language model "
            "of transformers, found that of another model; write the loop over gm(ids) yourself"
        )
    name = type(found.model).__name__
    return (
        f"{name} cannot generate: expected a model with a language head, such as the "
        "...ForCausalLM, ...LMHeadModel or ...ForConditionalGeneration class of the same family"
    )


__all__ = ["GenerationFace"]
