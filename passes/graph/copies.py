"""Deep copies of modules, of which a model is copied many times while it is captured."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from typing import TypeVar

from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY, _CodeOnlyModule

ModuleT = TypeVar("ModuleT", bound=nn.Module)
GraphT = TypeVar("GraphT", bound=fx.GraphModule)


def copied(
    module: ModuleT, known: dict[int, object], one_code: bool, without_code: bool
) -> ModuleT:
    """``copy.deepcopy(module, known)``, which asks every module how it is pickled and every empty
    dict of hooks what is in it: of a small model that took most of the time."""
    parts = [part for part in module.modules() if id(part) not in known]
    kinds = {kind: _is_plain(kind) for kind in set(map(type, parts))}
    plain = [part for part in parts if kinds[type(part)]]
    for part in plain:  # all of them first: they hold one another
        known[id(part)] = object.__new__(type(part))
    # a graph module among them looks at what it holds as soon as it is made
    for part in reversed(plain):
        held = vars(known[id(part)])
        for name, value in vars(part).items():
            kind = type(value)
            if kind in _CONSTANTS:
                held[name] = value
            elif (kind is dict or kind is OrderedDict) and not value:
                held[name] = known.setdefault(id(value), kind())
            elif kind is set and all(type(item) in _CONSTANTS for item in value):
                held[name] = known.setdefault(id(value), set(value))
            elif name in _TENSORS_AND_MODULES and kind is dict:
                held[name] = known[id(value)] = {
                    key: known[id(inner)] if id(inner) in known else copy.deepcopy(inner, known)
                    for key, inner in value.items()
                }
            elif name != "_compiled_call_impl":  # as in nn.Module.__getstate__
                held[name] = copy.deepcopy(value, known)
    if one_code and isinstance(module, fx.GraphModule):
        known[id(module.graph)] = module.graph
        known[id(module)] = twin = object.__new__(type(module))
        vars(twin).update(copy.deepcopy(module.__dict__, known))
        return twin
    if without_code and isinstance(module, fx.GraphModule):
        return _without_code(module, known)
    return copy.deepcopy(module, known)


def _without_code(module: GraphT, known: dict[int, object]) -> GraphT:
    """The ``__deepcopy__`` of fx, which leaves out what others keep on a graph module (Dynamo notes
    where each weight came from), but for the code that it writes."""
    kind = type(module)
    twin: GraphT = kind.__new__(kind)
    known[id(module)] = twin
    held = _CodeOnlyModule(copy.deepcopy(module.__dict__, known))
    twin.__dict__["recompile"] = lambda: None  # is called where the graph is put into it
    module._deepcopy_init()(twin, held, held.__dict__["_graph"])
    del twin.__dict__["recompile"]
    kept = {name: held.__dict__[name] for name in _KEPT_BY_FX if name in held.__dict__}
    twin.__dict__.update(kept)
    for name, value in twin.meta.get(_USER_PRESERVED_ATTRIBUTES_KEY, {}).items():
        setattr(twin, name, value)
    for hook in kept.get("_deepcopy_hooks", ()):
        hook(twin)
    return twin


_KEPT_BY_FX = (
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_replace_hooks",
    "_create_node_hooks",
    "_erase_node_hooks",
    "_deepcopy_hooks",
    "meta",
)
_CONSTANTS = frozenset({bool, int, float, str, type(None)})
_TENSORS_AND_MODULES = frozenset({"_parameters", "_buffers", "_modules"})
_COPYING = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__")
_STATE = ("__getstate__", "__setstate__", "__new__")


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether a class leaves it to ``nn.Module`` how its objects are copied."""
    return (
        all(
            getattr(kind, name, None) is getattr(nn.Module, name, None)
            for name in (*_COPYING, *_STATE)
        )
        and kind not in copyreg.dispatch_table
        and not any("__slots__" in vars(base) for base in kind.__mro__[:-1])
    )
