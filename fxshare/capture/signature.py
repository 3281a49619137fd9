"""Functions whose arguments have given names, and the names that generated code may hold."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from fxshare.errors import CaptureError, NameFault
from passes.graph.names import check_names, no_identifier, odd_characters, shortened

# no argument can have it: it is no identifier
_CALLED = "the function called"


def method_taking(names: Iterable[str], call: Callable[..., Any]) -> Callable[..., Any]:
    """A method ``forward(self, a, b)`` that returns ``call(self, a=a, b=b)``.

    fx and torch.export read names from a function's code object, so it has to be one that is
    compiled. It is made as a tree, in which a name is a name and cannot become anything else.

    Raises :class:`CaptureError` for what is not the name of an argument.
    """
    names = list(names)
    for name in names:
        reason = no_identifier(name)
        if reason is not None or names.count(name) > 1:
            raise CaptureError(
                f"the argument {shortened(name)} {reason or 'is given twice'}; expected a name "
                "that a function's argument can have"
            )
    read: list[ast.expr] = [ast.Name(name, ast.Load()) for name in ("self", *names)]
    passed = [ast.keyword(name, value) for name, value in zip(names, read[1:], strict=True)]
    body = ast.Return(ast.Call(ast.Name(_CALLED, ast.Load()), read[:1], passed))
    arguments = ast.arguments(
        posonlyargs=[],
        args=[ast.arg(name) for name in ("self", *names)],
        kwonlyargs=[],
        kw_defaults=[],
        defaults=[],
    )
    function = ast.FunctionDef("forward", arguments, [body], [])
    tree = ast.fix_missing_locations(ast.Module([function], []))
    scope: dict[str, Any] = {_CALLED: call}
    exec(compile(tree, "<fxshare: forward of the example's arguments>", "exec"), scope)
    made: Callable[..., Any] = scope["forward"]
    return made


def check_model_names(model: nn.Module) -> None:
    """Refuse a model with names that could end the string that some generated code writes them
    into, ours or that of torch.export.

    Raises :class:`CaptureError` naming the module or tensor.
    """
    modules = (name for name, _ in model.named_modules(remove_duplicate=False))
    tensors = (
        name
        for named in (model.named_parameters, model.named_buffers)
        for name, _ in named(remove_duplicate=False)
    )
    for names, what in ((modules, "module"), (tensors, "tensor")):
        for name in names:
            reason = odd_characters(name)
            if reason is not None:
                raise CaptureError(
                    f"{type(model).__name__} has a {what} named {shortened(name)}, which {reason}; "
                    "rename it: the code of a graph would hold the name as it is"
                )


def checked_names(graph: fx.Graph, model: nn.Module) -> None:
    """Hold the names in a graph's code to the grammar, before any is made.

    Raises :class:`CaptureError` naming the model.
    """
    try:
        check_names(graph)
    except NameFault as error:
        raise CaptureError(f"{type(model).__name__} cannot be captured: {error}") from error


def check_arguments(gm: fx.GraphModule, model: nn.Module) -> None:
    """Hold the arguments of a graph to other names than those that its code reads.

    Raises :class:`CaptureError` naming the model.
    """
    read = {*type(gm).forward.__globals__, "getattr", "slice"}
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.target in read:
            raise CaptureError(
                f"the argument {node.target!r} of {type(model).__name__} has the name of what the "
                "graph's own code reads; rename it in forward, or use capture='modules'"
            )
