"""Example inputs made up for a model that says what it reads."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from fxshare.models.traits import context_of, example_ids, vocabulary_of


def made_up_call(model: nn.Module, *, seed: int = 0) -> Tensor | dict[str, Tensor] | None:
    """One call to capture ``model`` with, by the names of its arguments and the sizes that its
    configuration states: token ids ``(2, 16)``, of an encoder and decoder both, images, or
    log-mel features. None where the model does not say what it reads."""
    parameters = list(inspect.signature(model.forward).parameters)
    config = getattr(model, "config", None)
    first = parameters[0] if parameters else ""
    ids = example_ids(model, seed=seed)
    targets = {"decoder_input_ids": _ids(model, seed)} if _has_decoder(model, parameters) else {}
    if ids is not None:
        return {first: ids, **targets} if targets else ids
    shape: tuple[object, ...] = ()
    if first == "pixel_values":
        sides = getattr(config, "image_size", None)
        height, width = (sides, sides) if isinstance(sides, int) else sides or (None, None)
        shape = (2, getattr(config, "num_channels", 3), height, width)
    elif first == "input_features":
        positions = getattr(config, "max_source_positions", None)
        # two convolutions before the encoder, the second with stride 2
        length = 2 * positions if isinstance(positions, int) else None
        shape = (2, getattr(config, "num_mel_bins", None), length)
    sizes = [size for size in shape if isinstance(size, int)]
    if not sizes or len(sizes) != len(shape):
        return None
    generator = torch.Generator().manual_seed(seed)
    return {first: torch.randn(*sizes, generator=generator), **targets}


def _has_decoder(model: nn.Module, parameters: list[str]) -> bool:
    config = getattr(model, "config", None)
    return (
        "decoder_input_ids" in parameters
        and getattr(config, "is_encoder_decoder", False) is True
        and vocabulary_of(model) is not None
    )


def _ids(model: nn.Module, seed: int) -> Tensor:
    vocabulary = vocabulary_of(model)
    assert vocabulary is not None
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(vocabulary, (2, min(12, context_of(model) or 12)), generator=generator)
