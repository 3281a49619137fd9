"""The packaged model cut off after its first layers: as wide and as trained, in less time."""

from __future__ import annotations

from dataclasses import replace

from fxshare.embedded import load_embedded
from fxshare.embedded.model import GPT


def first_layers(count: int) -> GPT:
    """The embeddings, the first ``count`` layers and the head of the packaged model."""
    whole = load_embedded()
    model = GPT(replace(whole.config, n_layer=count))
    kept = model.state_dict().keys()
    model.load_state_dict({name: t for name, t in whole.state_dict().items() if name in kept})
    return model.eval()
