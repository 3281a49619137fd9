"""``import fxshare.hf``: transformers' Auto classes load saved folders from then on.

The ``config.json`` of a folder names the model type ``fxshare``, which is registered here with
:class:`AutoConfig`, :class:`AutoTokenizer` and every ``AutoModel...`` class. What
``from_pretrained`` returns is what :func:`fxshare.load` returns, in eval mode: the graph, with the
``generate`` of the original's class. No code in the folder is run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxshare.errors import DataError, StoreError
from fxshare.store.transformers import HF_CONFIG, HF_GENERATION, MODEL_TYPE

# Options that change where files come from, or that only the loading of dense weights knows.
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_WITHOUT_EFFECT = frozenset(
    {
        "_commit_hash",
        "_from_auto",
        "adapter_kwargs",
        "low_cpu_mem_usage",
        "proxies",
        "trust_remote_code",
        "use_safetensors",
        "weights_only",
    }
)


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise DataError(
            f"fxshare.hf needs transformers, which cannot be imported ({error}); "
            "pip install 'fxshare[hf]'"
        ) from error
    return transformers


def _make_config_class(transformers: Any) -> Any:
    class FxShareConfig(transformers.PreTrainedConfig):  # type: ignore[misc]
        """The configuration of a saved folder; attributes that it does not have are those of
        ``original``, the configuration of the model that was compiled."""

        model_type = MODEL_TYPE

        def __init__(self, original: Mapping[str, Any] | None = None, **options: Any) -> None:
            self.original = dict(original or {})
            super().__init__(**options)

        def __getattr__(self, name: str) -> Any:
            original = self.__dict__.get("original", {})
            if name.startswith("_") or name not in original:
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
            return original[name]

    FxShareConfig.__module__, FxShareConfig.__qualname__ = __name__, "FxShareConfig"
    return FxShareConfig


def _auto_classes(transformers: Any) -> Iterator[Any]:
    """Every ``AutoModel...`` class that has a mapping of its own."""
    auto = transformers.models.auto.modeling_auto
    for name in sorted(vars(auto)):
        if name.startswith("AutoModel") and getattr(auto, name)._model_mapping is not None:
            yield getattr(auto, name)


def _register() -> Any:
    transformers = _import_transformers()
    config_class = _make_config_class(transformers)
    transformers.AutoConfig.register(MODEL_TYPE, config_class, exist_ok=True)
    for auto in _auto_classes(transformers):
        loader = type("FxShareModel", (_Loader,), {"auto": auto, "config_class": config_class})
        auto.register(config_class, loader, exist_ok=True)
    return config_class


class _Loader:
    """What an Auto class finds for our model type: it makes modules of another class, like the Auto
    classes themselves."""

    auto: Any
    config_class: Any

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        """Load a saved folder, or the id of one on the hub.

        ``dtype`` and ``device_map`` (one device) are followed; :class:`StoreError` for an option
        that is not, for an Auto class that the original is none of, and as :func:`fxshare.load`.
        """
        options.pop("config", None)
        hub = {key: options.pop(key) for key in _OF_THE_HUB if key in options}
        subfolder = options.pop("subfolder", None) or ""
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
        device = _device(options.pop("device_map", None))
        with_info = options.pop("output_loading_info", False)
        given = {
            key: value
            for key, value in options.items()
            if value is not None and key not in _WITHOUT_EFFECT
        }
        if given or args:
            what = next(iter(given), "a positional argument")
            raise StoreError(
                f"{name}: from_pretrained does not take {what} for a folder of fxshare, whose "
                "graph is as it was saved; load it without, and change the module after that"
            )
        gm = _load(cls.auto, _folder(name, hub) / subfolder, device, _dtype(dtype))
        if not with_info:
            return gm
        names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        return gm, {key: set() for key in names}

    @classmethod
    def from_config(cls, *args: Any, **options: Any) -> Any:
        """Refused: the graph is not in the configuration."""
        raise StoreError(
            "a compiled model cannot be made from its config.json alone, which does not hold the "
            "graph; use from_pretrained, or fxshare.compile a model of the original class"
        )

    _from_config = from_config


def _folder(name: str | os.PathLike[str], hub: Mapping[str, Any]) -> Path:
    from fxshare.loading.hub import snapshot

    return Path(name) if Path(name).is_dir() else snapshot(os.fspath(name), **hub)


def _load(auto: Any, folder: Path, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    from fxshare.loading.load import load
    from fxshare.store.manifest import read_manifest

    _check_class(auto, folder, read_manifest(folder).source.class_name)
    gm: nn.Module = load(folder, device=device).eval()
    if dtype is not None:
        gm.to(dtype)
    config: Any = gm.config
    config.name_or_path = str(folder)
    if (folder / HF_GENERATION).is_file() and hasattr(gm, "generation_config"):
        transformers = _import_transformers()
        gm.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return gm


def _check_class(auto: Any, folder: Path, class_name: str) -> None:
    """Refuse an Auto class that would not have made the original's class."""
    transformers = _import_transformers()
    name = class_name.partition(":")[2]
    original = getattr(transformers, name, None)
    config_class = getattr(original, "config_class", None)
    if original is None or config_class is None:
        return  # fxshare.load says what is wrong
    if _makes(auto, config_class, original):
        return
    fitting = [a.__name__ for a in _auto_classes(transformers) if _makes(a, config_class, original)]
    raise StoreError(
        f"{folder} holds a compiled {name}, which {auto.__name__} does not make; use "
        f"{' or '.join([*fitting[:3], 'fxshare.load'])}"
    )


def _makes(auto: Any, config_class: Any, original: Any) -> bool:
    try:
        found = auto._model_mapping[config_class]
    except KeyError:
        return False
    return original in (found if isinstance(found, (tuple, list)) else (found,))


def _device(device_map: Any) -> torch.device | None:
    if isinstance(device_map, Mapping):
        places = set(device_map.values())
        device_map = places.pop() if len(places) == 1 else device_map
    if device_map is None:
        return None
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device_map, int):
        return torch.device("cuda", device_map)
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise StoreError(
            f"device_map: expected one device or 'auto', found {device_map!r}; a compiled model is "
            "one graph on one device"
        ) from error


def _dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return None if dtype == "auto" else dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype):
        raise StoreError(f"dtype: expected a torch.dtype or its name, found {dtype!r}")
    return found


FxShareConfig = _register()


__all__ = ["HF_CONFIG", "MODEL_TYPE", "FxShareConfig"]
