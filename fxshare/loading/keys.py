"""Whether the weights that were read are those of the model, and the nearest reading where not."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fxshare.errors import DataError, FxShareWarning

_SHOWN = 3
# constants that earlier versions of a class stored and later ones compute
_COMPUTED = re.compile(r"(^|\.)(masked_bias|inv_freq|position_ids)$")
_WRAPPERS = {
    "_orig_mod": "saved from a model that torch.compile had wrapped",
    "_fsdp_wrapped_module": "saved from a model under FSDP",
    "_checkpoint_wrapped_module": "saved from a model with activation checkpointing around it",
}
_WRAPPER = re.compile(rf"(?:^|(?<=\.))({'|'.join(_WRAPPERS)})\.")
_PREFIXES = {
    "module.": "saved from a model in DataParallel or DistributedDataParallel",
    "base_model.model.": "saved from a model of PEFT; merge_and_unload() gives the model itself",
    "model.": "saved from a module that holds the model as .model, as Lightning's do",
    "state_dict.": "a checkpoint around the state dict",
}
_TRACES = (
    (
        r"\.(lora_|base_layer\.|modules_to_save\.)",
        "saved with adapters of PEFT that are not merged; model.merge_and_unload() before saving "
        "merges them",
    ),
    (
        r"\.(parametrizations\.|weight_[gv]$)",
        "saved with a parametrisation such as weight_norm; torch.nn.utils.parametrize."
        "remove_parametrizations (or remove_weight_norm) before saving leaves the weight itself",
    ),
    (
        r"\.weight_(orig|mask)$",
        "saved while pruned; torch.nn.utils.prune.remove before saving leaves the weight itself",
    ),
    (
        r"\.(qweight|qzeros|scales|SCB|absmax|_packed_params.*|weight_scale.*|weight_format)$",
        "saved quantised; give the folder of the original weights",
    ),
)


@dataclass(frozen=True)
class Keys:
    """What a file and a model do not have in common: ``missing`` from the file, ``unexpected`` in
    it, ``mismatched`` as (name, shape in the file, shape in the model). ``fitting`` is how many
    keys have their place; None where the names in the file are not known."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    fitting: int | None = None

    @staticmethod
    def of(
        missing: Collection[str],
        unexpected: Collection[str],
        mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]] = (),
        names: Collection[str] | None = None,
    ) -> Keys:
        """In order, without constants that classes compute; ``names`` are all those of the file."""
        fitting = None
        if names is not None:
            other = {*unexpected, *(key for key, _, _ in mismatched)}
            fitting = sum(key not in other and not _COMPUTED.search(key) for key in names)
        return Keys(
            tuple(sorted(missing)),
            tuple(sorted(key for key in unexpected if not _COMPUTED.search(key))),
            tuple(sorted((key, tuple(a), tuple(b)) for key, a, b in mismatched)),
            fitting,
        )

    def counted(self, count: int) -> str:
        """How ``count`` of the keys without a place are said: all only where no other key is
        there."""
        if self.fitting is None:
            return f"{count} keys"
        total = self.fitting + len(self.unexpected) + len(self.mismatched)
        return "All keys" if count == total else f"{count} of {total} keys"


def check_keys(name: str, class_name: str, keys: Keys, *, allow_missing: bool) -> None:
    """A :class:`DataError` that names what is missing, unexpected and of another shape, with the
    nearest reading; a warning where that is allowed."""
    found = _described(keys, class_name)
    if not found:
        return
    said = f"{name}: {'; '.join(found)}"
    if allow_missing:
        if keys.missing or keys.mismatched:
            said += ". Parameters without weights are random"
        warnings.warn(said, FxShareWarning, stacklevel=4)
        return
    reading = nearest_reading(keys)
    raise DataError(
        f"{said}.{f' {reading}.' if reading else ''} To go on all the same, with random numbers "
        "for what is missing and without what has no place: --allow-missing (in Python "
        "allow_missing=True)"
    )


def _described(keys: Keys, class_name: str) -> list[str]:
    found = []
    if keys.missing:
        found.append(
            f"no weights for {len(keys.missing)} parameters of {class_name} ({_few(keys.missing)})"
        )
    if keys.unexpected:
        found.append(
            f"{len(keys.unexpected)} weights that {class_name} has no place for "
            f"({_few(keys.unexpected)})"
        )
    if keys.mismatched:
        shapes = [f"{key}: {list(a)} instead of {list(b)}" for key, a, b in keys.mismatched]
        found.append(f"{len(keys.mismatched)} weights of another shape ({_few(shapes)})")
    return found


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def nearest_reading(keys: Keys) -> str | None:
    """What the difference looks like, and the way out; None where it looks like nothing known."""
    wrapped = _wrapped(keys)
    if wrapped is not None:
        return wrapped
    for pattern, meaning in _TRACES:
        names = [key for key in keys.unexpected if re.search(pattern, f".{key}")]
        if names:
            return f"{names[0]!r}: {meaning}"
    return _prefixed(keys) or _lacking(keys) or _sized(keys)


def _wrapped(keys: Keys) -> str | None:
    names = [key for key in keys.unexpected if _WRAPPER.search(key)]
    if not names:
        return None
    parts = list(dict.fromkeys(part for key in names for part in _WRAPPER.findall(key)))
    place = "begin with" if all(key.startswith(parts[0] + ".") for key in names) else "contain"
    many = keys.counted(len(names))
    renamed = "".join(f'.replace("{part}.", "")' for part in parts)
    of = "model._orig_mod" if parts == ["_orig_mod"] else "the model inside"
    return (
        f"{many} {place} {' and '.join(f'{part}.' for part in parts)}: {_WRAPPERS[parts[0]]}; save "
        f"{of}, or load it with model.load_state_dict({{k{renamed}: v for k, v in "
        "state.items()}) and save that model"
    )


def _prefixed(keys: Keys) -> str | None:
    """Keys that are the model's behind a prefix."""
    missing = set(keys.missing)
    prefixes: Counter[str] = Counter()
    for key in keys.unexpected:
        cuts = (at.end() for at in re.finditer(r"\.", key))
        prefixes.update(key[:cut] for cut in cuts if key[cut:] in missing)
    if not prefixes:
        return None
    prefix, count = prefixes.most_common(1)[0]
    if 2 * count < len(keys.unexpected):
        return None
    many = keys.counted(count)
    meaning = _PREFIXES.get(prefix, "saved from a module that holds the model")
    return (
        f"{many} begin with {prefix}: {meaning}; load it with model.load_state_dict("
        f'{{k.removeprefix("{prefix}"): v for k, v in state.items()}}) and save that model'
    )


def _lacking(keys: Keys) -> str | None:
    """Keys that are the model's without a prefix."""
    turned = Keys(missing=keys.unexpected, unexpected=keys.missing)
    unexpected = set(turned.missing)
    prefixes: Counter[str] = Counter()
    for key in turned.unexpected:
        cuts = (at.end() for at in re.finditer(r"\.", key))
        prefixes.update(key[:cut] for cut in cuts if key[cut:] in unexpected)
    if not prefixes:
        return None
    prefix, count = prefixes.most_common(1)[0]
    return (
        f"{count} keys lack {prefix} at their beginning: saved from the part of the model that "
        "stands under that name; save the whole model"
    )


def _sized(keys: Keys) -> str | None:
    if keys.mismatched:
        return "Shapes of another size: config.json and the weights are not of one model"
    numbered = [key for key in keys.unexpected if re.search(r"\.\d+\.", key)]
    if numbered and not keys.missing:
        return (
            f"{numbered[0]!r} belongs to a layer or part that the configuration does not make: "
            "config.json is not the one that the weights were saved with"
        )
    if keys.unexpected and not keys.missing:
        return (
            'They belong to parts of another class; name it as "architectures" in config.json if '
            "it is the model that is meant"
        )
    heads = [key for key in keys.missing if re.search(r"(lm_head|decoder|output)\.", key)]
    if heads and not keys.unexpected and len(keys.missing) <= 2:
        return (
            f'If {heads[0]!r} is to be the embedding, config.json needs "tie_word_embeddings": true'
        )
    return None


__all__ = ["Keys", "check_keys", "nearest_reading"]
