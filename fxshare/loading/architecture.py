"""The class of a transformers folder: the one that its configuration names, or the only one whose
parameters are those of its files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxshare.base.building import TooMany, at_most
from fxshare.base.randomness import randomness_as_before
from fxshare.errors import DataError, FxShareWarning
from fxshare.loading.keys import Keys, nearest_reading
from fxshare.loading.weights import tensor_names

_MAPPING = re.compile(r"MODEL_(FOR_\w+_)?MAPPING_NAMES")


def class_of(
    name: str, folder: Path, config: Mapping[str, Any], transformers: Any, most: int
) -> Any:
    """The model class. Where the configuration names none that transformers has, the only one of
    its type that fits, with a :class:`FxShareWarning` that names it.

    Raises :class:`DataError` where none fits, or several: whoever guesses drops a head.
    """
    named = config.get("architectures")
    named = [] if named is None else named
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise DataError(
            f'{name}: config.json: expected "architectures" to be a list of class names such as '
            f'["LlamaForCausalLM"], found {named!r:.80}; name the class that was saved'
        )
    for each in named:
        found = _exported(transformers, each)
        if found is not None and found.config_class.model_type == config.get("model_type"):
            return found
    given = (
        f"config.json names {named[0]!r} as its architecture, which is no class of transformers "
        f"{transformers.__version__} for model_type {config.get('model_type')!r}"
        if named
        else 'config.json names no "architectures"'
    )
    # fails where the type is unknown, in transformers' words
    parsed = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    names = tensor_names(folder)
    compared = [
        (made, None if names is None else _difference(made, parsed, names, most))
        for made in dict.fromkeys(_classes(transformers, parsed.model_type))
    ]
    fits = [made for made, keys in compared if keys is not None and not _size(keys)]
    if len(fits) != 1:
        raise DataError(f"{name}: {given}, and {_undecided(compared, fits)}")
    warnings.warn(
        f"{name}: {given}; loaded as {fits[0].__name__}, the only class of type "
        f"{parsed.model_type!r} whose parameters are those of the folder",
        FxShareWarning,
        stacklevel=5,
    )
    return fits[0]


def _exported(transformers: Any, name: str) -> Any:
    known = (
        name.isidentifier() and not name.startswith("_") and not name.endswith("PreTrainedModel")
    )
    found = getattr(transformers, name, None) if known else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        return None
    return found if found.__module__.startswith("transformers.") else None


def _classes(transformers: Any, model_type: str) -> Iterator[Any]:
    auto = transformers.models.auto.modeling_auto
    for mapping in sorted(key for key in vars(auto) if _MAPPING.fullmatch(key)):
        named = getattr(auto, mapping).get(model_type, ())
        for each in (named,) if isinstance(named, str) else named:
            found = _exported(transformers, each)
            if found is not None:
                yield found


def _difference(cls: Any, config: Any, names: frozenset[str], most: int) -> Keys | None:
    """Between the class and the names in the files; None for one that cannot be made."""
    try:
        with randomness_as_before(), at_most(most), torch.device("meta"):
            model = cls(config)
    except (TooMany, Exception):
        return None
    expected = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    buffers = {name for name, _ in model.named_buffers()}
    return Keys.of(
        expected.keys() - names - tied,
        [n for n in names - expected.keys() - buffers if not any(p.search(n) for p in ignored)],
        names=names,
    )


def _size(keys: Keys) -> int:
    return len(keys.missing) + len(keys.unexpected)


def _undecided(compared: Sequence[tuple[Any, Keys | None]], fits: Sequence[Any]) -> str:
    classes = [cls for cls, _ in compared]
    if fits:
        found = f"the weights fit several classes: {', '.join(c.__name__ for c in fits)}"
    else:
        found = "the names in the weights are those of none of its classes: "
        found += ", ".join(c.__name__ for c in classes) or "there are none"
    nearest = min((keys for _, keys in compared if keys), key=_size, default=None)
    reading = None if fits or nearest is None else nearest_reading(nearest)
    example = (list(fits) or classes)[:1]
    return (
        f"{found}.{f' {reading}.' if reading else ''} Name the class that was saved in "
        f'config.json: "architectures": ["{example[0].__name__ if example else "..."}"], or '
        "another of them"
    )


__all__ = ["class_of"]
