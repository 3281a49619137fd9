"""Small models of the causal families, with random weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tests.zoo.causal.sizes import IMPOSSIBLE, LAYERS, OTHERS, PER_LAYER, VOCABULARY, small

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def families() -> Mapping[str, str]:
    """The class of each model type that transformers' ``AutoModelForCausalLM`` knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(name: str) -> Any:
    """The small configuration of a family."""
    import transformers

    cls = getattr(transformers, families()[name])
    changes = dict(OTHERS.get(name, {}))
    return _shrunk(cls.config_class, changes)


def _shrunk(cls: Any, changes: Mapping[str, Any]) -> Any:
    """A small configuration of a class, and of those below it."""
    from transformers import PretrainedConfig

    default = cls(**changes.get("defaults", {}))
    values: dict[str, Any] = {}
    below = getattr(cls, "sub_configs", None) or {}
    known = set(PretrainedConfig().to_dict()) - {"bos_token_id", "eos_token_id", "pad_token_id"}
    for field, value in vars(default).items():
        if field.startswith("_") or field in known or isinstance(_member(cls, field), property):
            continue
        if isinstance(value, PretrainedConfig):
            values[field] = _shrunk(type(value), changes.get(field, {}))
            continue
        is_number = isinstance(value, int) and not isinstance(value, bool)
        found, new = small(field)
        if found and (is_number or (field.endswith("token_id") and not isinstance(value, bool))):
            values[field] = new
        elif is_number and field.endswith(("_token_id", "_token_index")) and value >= VOCABULARY:
            values[field] = VOCABULARY - 1
    if "is_decoder" in vars(default):
        values["is_decoder"] = True
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    values.update(_layers(default))
    values.update({k: v for k, v in changes.items() if k not in ("defaults", *below)})
    return cls(**{name: v for name, v in values.items() if v is not ...})


def _member(cls: type, name: str) -> object:
    return inspect.getattr_static(cls, name, None)


def _layers(default: Any) -> dict[str, Any]:
    """One layer of each kind, where the configuration lists them."""
    lists: dict[str, Sequence[Any]] = {}
    for field in PER_LAYER:
        value = vars(default).get(field)
        if isinstance(value, (list, tuple)) and value:
            lists[field] = value
    if not lists:
        return {}
    size = min(len(value) for value in lists.values())
    kinds: dict[tuple[Any, ...], int] = {}
    for n in range(size):
        kinds.setdefault(tuple(str(v[n]) for v in lists.values()), n)
    chosen = sorted(kinds.values())
    while len(chosen) < LAYERS:
        chosen.append(chosen[-1])
    result: dict[str, Any] = {field: [v[n] for n in chosen] for field, v in lists.items()}
    for field in ("num_hidden_layers", "num_layers", "n_layer"):
        if field in vars(default):
            result[field] = len(chosen)
    return result


def build(name: str, seed: int = 0) -> Any:
    """The small model of a family, in eval mode and float32, with weights of unit gain.

    Raises whatever its classes raise; :data:`IMPOSSIBLE` says why some cannot be built.
    """
    import transformers

    if name in IMPOSSIBLE:
        raise ValueError(IMPOSSIBLE[name])
    cls = getattr(transformers, families()[name])
    config = config_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).eval()
        convolutions = {id(m.weight) for m in model.modules() if isinstance(m, _CONVOLUTIONS)}
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                of_kernel = id(parameter) in convolutions
                inputs = parameter[0].numel() if of_kernel else parameter.shape[-1]
                nn.init.normal_(parameter, 0.0, inputs**-0.5)
            else:
                with torch.no_grad():
                    parameter += torch.randn(parameter.shape) * 0.1
    return model
