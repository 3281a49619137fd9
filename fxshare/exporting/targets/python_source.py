"""Write a graph module as Python source that needs torch and safetensors only."""

from __future__ import annotations

import inspect
import operator
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshare.capture.guards import (
    hold_dtype,
    hold_form,
    hold_given,
    hold_guard,
    ones_if_missing,
)
from fxshare.errors import ExportError
from passes.graph.modes import caller_modes, crossing, set_modes
from passes.sharing.unstack_experts import expert_rows, joined_rows

_PRELUDE: Mapping[str, str] = {
    "hold_guard": '''
        def _hold_guard(value, expected, where):
            """Refuse a call that would have taken another path through the original model."""
            found = bool(value) if isinstance(expected, bool) else value
            if found != expected:
                raise ValueError(f"{where} gave {expected} when captured, now {found}")
        ''',
    "hold_given": '''
        def _hold_given(value, name):
            """Refuse a call without an argument that the model was captured with."""
            if value is None:
                raise TypeError(f"argument {name!r} is missing")
            return value
        ''',
    "hold_form": '''
        def _hold_form(value, forms, name):
            """Refuse an argument with other containers, or other values, than when captured."""
            def form(value):
                if isinstance(value, torch.Tensor):
                    return ("tensor",)
                if type(value) in (list, tuple):
                    return (type(value).__name__, *map(form, value))
                if type(value) is dict:
                    return ("dict", *((key, form(inner)) for key, inner in value.items()))
                return ("value", value)
            if form(value) not in forms:
                raise TypeError(f"argument {name!r}: captured as {forms[0]}, found {form(value)}")
        ''',
    "hold_dtype": '''
        def _hold_dtype(found, captured, why):
            """Refuse a model that was cast: dtypes are constants of its graph."""
            if found != captured:
                raise TypeError(f"expected {captured}, found {found}: {why}")
        ''',
    "ones_if_missing": '''
        def _ones_if_missing(mask, input_ids):
            """Every token counts where no attention mask is given."""
            return torch.ones_like(input_ids) if mask is None else mask
        ''',
    "caller_modes": '''
        def _caller_modes():
            """Whether gradients and autocast are on around the call."""
            casts = tuple(
                (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
                for device in ("cpu", "cuda")
            )
            return torch.is_grad_enabled(), casts
        ''',
    "set_modes": '''
        def _set_modes(caller, grad=None, casts=()):
            """Gradients and autocast as around the call, but those that are given."""
            torch.set_grad_enabled(caller[0] if grad is None else grad)
            own = {cast[0]: cast for cast in casts}
            for device, enabled, dtype in caller[1]:
                device, on, dtype = own.get(device, (device, enabled, dtype))
                torch.set_autocast_enabled(device, on)
                if dtype is not None:
                    torch.set_autocast_dtype(device, dtype)
                if not on and not enabled:
                    torch.clear_autocast_cache()
        ''',
    "crossing": '''
        def _crossing(value):
            """The value as it is, read under other modes than it was computed in."""
            return value
        ''',
    "expert_rows": '''
        def _expert_rows(experts, count):
            """For each of `count` experts the positions in `experts` that name it."""
            return tuple((experts == number).nonzero().flatten() for number in range(count))
        ''',
    "joined_rows": '''
        def _joined_rows(rows, parts):
            """The parts of the experts in the order of their positions `rows`."""
            order = torch.cat(list(rows)).argsort()
            return torch.cat(list(parts)).index_select(0, order)
        ''',
}
_OURS: tuple[Callable[..., Any], ...] = (
    hold_guard,
    hold_given,
    hold_form,
    hold_dtype,
    ones_if_missing,
    caller_modes,
    set_modes,
    crossing,
    expert_rows,
    joined_rows,
)
"""Functions that graphs call and that the source has a text of its own for."""
_PUT = '''
def put(root, name, value):
    """Put a module, parameter or buffer at a dotted name."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(leaf, value)
    else:
        setattr(root, leaf, value)
'''
_LOAD = '''
def load(path=None, *, device="cpu"):
    """The model with its weights, in eval mode; they are in model.safetensors beside this file."""
    path = Path(__file__).with_name("model.safetensors") if path is None else path
    with torch.device("meta"):
        model = Model()
    tensors = load_file(path, device=device)
    tensors.update({alias: tensors[name] for alias, name in TIED.items()})
    model.load_state_dict(tensors, assign=True)
    for alias, name in TIED.items():
        put(model, alias, model.get_parameter(name))
    return model.eval()
'''


@dataclass(frozen=True, eq=False)
class Source:
    """The text of the module, and the tensors that its ``load`` reads, each once."""

    text: str
    tensors: Mapping[str, Tensor]


def source_of(gm: fx.GraphModule, name: str) -> Source:
    """The source of a closed graph.

    Raises :class:`ExportError` naming a module or function that the source cannot name.
    """
    state: dict[str, Tensor] = {}
    lines = list(_members(gm, state, name))
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for key, tensor in state.items():
        if id(tensor) in first and isinstance(tensor, nn.Parameter):
            tied[key] = first[id(tensor)]
        else:
            tensors[key] = tensor
            first[id(tensor)] = key
    code = gm.graph.python_code("self")
    body, imports, ours = _names(code.src.strip(), code.globals, name)
    blocks = [
        f'"""{_in_docstring(name)}, rewritten by fxshare; `load()` returns it with its weights."""',
        "\n".join([*imports, "from safetensors.torch import load_file", "from torch import nn"]),
        f"TIED = {tied!r}",
        *(textwrap.dedent(_PRELUDE[function]).strip() for function in ours),
        _PUT.strip(),
        "class Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        + textwrap.indent("\n".join(lines), " " * 8)
        + "\n\n"
        + textwrap.indent(body, " " * 4),
        _LOAD.strip(),
    ]
    text = "\n\n\n".join(blocks).replace("\n\n\n", "\n\n", 1) + "\n"
    return Source(text, tensors)


def _in_docstring(name: str) -> str:
    """A class may have any name, such as one with quotes in it."""
    return re.sub(r"[^\w.<>]", "_", name)


def _members(gm: fx.GraphModule, state: dict[str, Tensor], name: str) -> Iterator[str]:
    """A line for every module and tensor that the graph reads; the tensors go into ``state``."""
    modules = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "call_module")
    for target in modules:
        module = gm.get_submodule(target)
        made, fresh = _construction(module, target, name)
        yield f"put(self, {target!r}, {made})"
        own = {**module._parameters, **module._buffers}
        known = {**fresh._parameters, **fresh._buffers}
        for leaf, tensor in own.items():
            if tensor is None:
                continue
            if leaf not in known:
                yield f"put(self, {f'{target}.{leaf}'!r}, {_empty(tensor)})"
            state[f"{target}.{leaf}"] = tensor
    for target in dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "get_attr"):
        if target in state:
            continue
        value = operator.attrgetter(target)(gm)
        if not isinstance(value, Tensor):
            raise ExportError(
                f"to='py' of {name}: {target!r} is a {type(value).__name__}; expected a tensor. "
                "Compile with capture='fx', whose graphs have no graphs inside, or export to 'pt2'"
            )
        yield f"put(self, {target!r}, {_empty(value)})"
        state[target] = value


def _empty(tensor: Tensor) -> str:
    empty = f"torch.empty({tuple(tensor.shape)}, dtype={tensor.dtype})"
    if not isinstance(tensor, nn.Parameter):
        return empty
    return f"nn.Parameter({empty}{'' if tensor.requires_grad else ', requires_grad=False'})"


def _construction(module: nn.Module, target: str, name: str) -> tuple[str, nn.Module]:
    """The call that makes a module of torch.nn, and what it makes.

    What is said by the attributes of the constructor's parameters is tried out: a module that says
    another thing, or has other tensors, is refused.
    """
    cls = type(module)
    if cls.__module__.startswith("torch.nn.") and getattr(nn, cls.__name__, None) is cls:
        options = []
        for key, parameter in inspect.signature(cls).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue  # nn.Module's own, of classes without a constructor
            value = getattr(module, key, parameter.default)
            value = value is not None if key == "bias" else value
            if parameter.default is inspect.Parameter.empty or value != parameter.default:
                required = parameter.default is inspect.Parameter.empty
                options.append(f"{value!r}" if required else f"{key}={value!r}")
        made = f"nn.{cls.__name__}({', '.join(options)})"
        try:
            with torch.device("meta"):
                fresh: nn.Module = eval(made, {"nn": nn, "torch": torch})
        except Exception:  # the refusal below says what there is to say
            fresh = nn.Module()
        if _described(fresh) == _described(module):
            return made, fresh
    raise ExportError(
        f"to='py' of {name}: module {target!r} is a {cls.__module__}.{cls.__name__}, which cannot "
        "be written as a call of torch.nn; export to 'pt2', which holds operations only"
    )


def _described(module: nn.Module) -> object:
    shapes = {key: tuple(p.shape) for key, p in module._parameters.items() if p is not None}
    return type(module), module.extra_repr(), shapes, list(module._modules)


def _names(code: str, found: Mapping[str, Any], name: str) -> tuple[str, list[str], list[str]]:
    """The code with short names, the imports that it needs, and which of ours it calls."""
    imports = {"from pathlib import Path", "import torch"}
    ours = []
    for key, value in found.items():
        if not re.search(rf"(?<![\w.]){re.escape(key)}\b", code):
            continue
        if value in _OURS:
            # with an underscore: the graph has variables of the plain name
            code = re.sub(rf"\b{re.escape(key)}\b", f"_{value.__name__}", code)
            ours.append(value.__name__)
        else:
            line = _import_line(key, value, name)
            imports |= {line} if line else set()
    plain = sorted(i for i in imports if not i.startswith(("import torch", "from torch")))
    return code, [*plain, "", *sorted(imports - set(plain))], ours


def _import_line(key: str, value: Any, name: str) -> str | None:
    if key in ("inf", "nan"):
        return f"from math import {key}"
    if key == "NoneType":
        return "from types import NoneType"
    if isinstance(value, ModuleType):
        module, attribute = value.__name__, ""
    else:
        module, attribute = (
            str(getattr(value, "__module__", "")),
            str(getattr(value, "__qualname__", "")),
        )
    if module == "builtins" and key == attribute:
        return None
    top = module.partition(".")[0]
    if top != "torch" and top not in sys.stdlib_module_names:
        raise ExportError(
            f"to='py' of {name}: the graph calls {module}.{attribute or key}, which is neither "
            "torch's nor Python's; export to 'pt2', which holds operations only"
        )
    if not attribute:
        return f"import {module}" if key == module else f"import {module} as {key}"
    return f"from {module} import {attribute}" + ("" if key == attribute else f" as {key}")
