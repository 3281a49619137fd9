"""The configuration of a compression: what is matched, how it is split, what shares a basis.

A :class:`ShareConfig` is frozen and complete. :func:`load_config` builds one from YAML files,
mappings and ``--set`` overrides, and is where everything a user writes is checked: it returns a
:class:`ShareConfig` or raises one :class:`~fxshare.errors.ConfigError` that lists every fault,
one a line, each naming the source, the dotted key, what was found and what is expected.

This package imports neither torch nor transformers, so a configuration can be checked without them.
"""

from fxshare.config.budget import Budget
from fxshare.config.calibration import Calibration
from fxshare.config.composition import ConfigSource, load_config
from fxshare.config.lower import Lower
from fxshare.config.planner import Planner
from fxshare.config.share_config import ShareConfig
from fxshare.config.values import CONFIG_VERSION
from fxshare.config.weight_type import WeightType
from fxshare.config.writing import dump_config, json_schema

__all__ = [
    "CONFIG_VERSION",
    "Budget",
    "Calibration",
    "ConfigSource",
    "Lower",
    "Planner",
    "ShareConfig",
    "WeightType",
    "dump_config",
    "json_schema",
    "load_config",
]
