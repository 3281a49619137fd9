"""The Python file of a served folder."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

from fxshare.exporting.served import shared_linears
from fxshare.exporting.served.classes import SHARED
from fxshare.exporting.served.family import Family
from fxshare.store.transformers import MODEL_TYPE

FILE = "modeling_fxshare.py"
_HEADER = '''\
"""{name}, compiled by fxshare: some of its linears share bases.

Read by transformers with trust_remote_code=True, and by vLLM with --trust-remote-code. It needs
torch and transformers (written with {version}). In config.json, under "shared_linears", stand the
bases with their sizes and, for each linear that was replaced, its parts: rows that a coefficient
makes from the product of a basis or from columns of it, or that a weight makes from the input.
"same_input" has the linears that read one input, the first of which computes for the others.
"""

{body}

class {config}({original_config}):
    """The original's configuration and "shared_linears"."""

    model_type = "{model_type}"
    # parts of a linear fit no plan that was made for the whole of it
    base_model_tp_plan = None

'''
_CLASS = '''
class {name}({original}):
    """The original with the linears of the configuration."""

    config_class = {config}
    # the files have nothing to spare, and patterns of the original's may fit what they have
    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: {config}, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        share_linears(self{inside}, config)

'''


def model_type_of(family: Family) -> str:
    """A type of our own: by the original's, transformers would fill the original's class with what
    it finds and make up the rest."""
    return f"{MODEL_TYPE}_{family.model.config.model_type}"


def auto_map_of(family: Family) -> dict[str, str]:
    """What auto classes make of which classes; the configuration's first, which the others need."""
    stem = FILE.removesuffix(".py")
    found = {
        "AutoConfig": f"{stem}.{SHARED}{family.config.__name__}",
        "AutoModel": f"{stem}.{SHARED}{family.base.__name__}",
    }
    if family.auto != "AutoModel":
        found[family.auto] = f"{stem}.{architecture_of(family)}"
    return found


def architecture_of(family: Family) -> str:
    """The name of the class: not the original's, which engines have built in."""
    return f"{SHARED}{type(family.model).__name__}"


def modeling_text(family: Family) -> str:
    """The file's text: what makes shared linears, and a class for each of the original's."""
    head: Any = type(family.model)
    names = sorted({family.base.__name__, head.__name__})
    _, _, body = inspect.getsource(shared_linears).partition('"""\n\n')
    config = f"{SHARED}{family.config.__name__}"
    text = _HEADER.format(
        name=head.__name__,
        version=f"transformers {version('transformers')}",
        body=body.replace(
            "from torch import Tensor, nn\n",
            "from torch import Tensor, nn\n"
            f"from {family.config.__module__} import {family.config.__name__}\n"
            f"from {head.__module__} import {', '.join(names)}\n",
        ),
        config=config,
        original_config=family.config.__name__,
        model_type=model_type_of(family),
    )
    for original in dict.fromkeys((family.base, head)):
        inside = f".{family.inside}".rstrip(".") if original is head else ""
        text += _CLASS.format(
            name=f"{SHARED}{original.__name__}",
            original=original.__name__,
            config=config,
            inside=inside if family.inside else "",
        )
    return text.rstrip("\n") + "\n"
