"""What every pass needs to know about a graph: its linears, and how to edit modules beside nodes.

A *linear call* is one node that computes ``x @ W.T + b`` with a weight that the module owns. It has
two dialects: ``call_module`` of ``nn.Linear`` or ``Conv1D`` (the fx tracer), and ``aten.linear`` /
``aten.addmm`` / ``F.linear`` over ``get_attr`` nodes (``torch.export``, ``nn.MultiheadAttention``).

Legend for shapes: I input features, O output features, R rank.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from passes.errors import RequiresError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_LINEAR_FUNCTIONS = (torch.ops.aten.linear.default, F.linear, torch._C._nn.linear)
_ADDMM_FUNCTIONS = (torch.ops.aten.addmm.default, torch.addmm)


@dataclass(frozen=True)
class LinearCall:
    """One node that computes ``x @ weight_OI.T + bias_O``.

    ``name`` is the qualified name of the module whose weight it reads, whatever the dialect.
    """

    node: fx.Node
    name: str
    input: fx.Node
    weight_OI: Tensor
    bias_O: Tensor | None


def is_conv1d(module: nn.Module) -> bool:
    """transformers' ``Conv1D``, a linear that stores ``(in, out)``; known by its shape and not by
    its class, because this package does not import transformers."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(weight, Tensor)
        and weight.ndim == 2
        and weight.shape[1] == getattr(module, "nf", None)
    )


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes ``x @ W.T + b`` and nothing else.

    Subclasses of ``nn.Linear`` with a ``forward`` of their own are not: what they compute is not
    known.
    """
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return is_conv1d(module)


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """``(weight_OI, bias_O)`` of a linear module; of a ``Conv1D`` a transposed view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return (_transposed(weight) if is_conv1d(module) else weight), bias


def _transposed(weight: Tensor) -> Tensor:
    # under no_grad the view would say that a trainable weight is frozen
    with torch.enable_grad():
        return weight.t()


def linear_at(gm: nn.Module, name: str) -> nn.Linear:
    """The ``nn.Linear`` at the dotted ``name``."""
    module = gm.get_submodule(name)
    assert isinstance(module, nn.Linear), f"{name}: {type(module).__name__}"
    return module


def linear_calls(gm: fx.GraphModule) -> list[LinearCall]:
    """Every linear call of the graph, in execution order, in either dialect."""
    calls = []
    for node in gm.graph.nodes:
        call = _module_call(gm, node) if node.op == "call_module" else _function_call(gm, node)
        if call is not None:
            calls.append(call)
    return calls


def linear_input(node: fx.Node) -> object:
    """What a linear call multiplies, as the graph is now: rewriting one call may change the input
    of the next."""
    if node.op == "call_function" and node.target in _ADDMM_FUNCTIONS:
        return node.args[1]
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))


def _module_call(gm: fx.GraphModule, node: fx.Node) -> LinearCall | None:
    module = gm.get_submodule(str(node.target))
    if not is_linear(module):
        return None
    x = linear_input(node)
    if not isinstance(x, fx.Node):
        return None
    weight, bias = weight_and_bias(module)
    return LinearCall(node, str(node.target), x, weight, bias)


def _function_call(gm: fx.GraphModule, node: fx.Node) -> LinearCall | None:
    if node.op != "call_function":
        return None
    if node.target in _LINEAR_FUNCTIONS:
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        weight, bias = given.get("weight"), given.get("bias")
        transposed = False
    elif node.target in _ADDMM_FUNCTIONS:
        # addmm(bias, x, W) with W stored (in, out); beta and alpha would change the meaning
        if node.kwargs or len(node.args) != 3:
            return None
        bias, _, weight = node.args
        transposed = True
    else:
        return None
    x = linear_input(node)
    stored = _stored_tensor(gm, weight)
    if stored is None or not isinstance(x, fx.Node) or stored.ndim != 2:
        return None
    assert isinstance(weight, fx.Node)
    weight_OI = _transposed(stored) if transposed else stored
    bias_O = _stored_tensor(gm, bias)
    # addmm also takes a bias that broadcasts, such as a matrix; that is no linear
    if bias is not None and (bias_O is None or bias_O.shape != weight_OI.shape[:1]):
        return None
    owner, _, field = str(weight.target).rpartition(".")
    name = owner if field == "weight" else str(weight.target)
    return LinearCall(node, name, x, weight_OI, bias_O)


def _stored_tensor(gm: fx.GraphModule, argument: object) -> Tensor | None:
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    value = operator.attrgetter(str(argument.target))(gm)
    return value if isinstance(value, Tensor) else None


def structure_copy(
    module: ModuleT, *, clone_parameters: bool = False, clone_buffers: bool = True
) -> ModuleT:
    """A copy of the module tree whose parameters are the *same tensors*.

    Buffers are cloned by default: batch norm and position caches write into them in ``forward``,
    and the original must stay as it is. Ties between parameters stay ties.
    """
    memo: dict[int, object] = {}
    if not clone_parameters:
        for _, parameter in module.named_parameters(remove_duplicate=False):
            memo[id(parameter)] = parameter
    if not clone_buffers:
        for _, buffer in module.named_buffers(remove_duplicate=False):
            memo[id(buffer)] = buffer
    return copy.deepcopy(module, memo)


def put_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at the dotted ``name``; a leaf in the way becomes a plain container."""
    *path, leaf = name.split(".")
    parent = root
    for part in path:
        child = parent._modules.get(part)
        if child is None and hasattr(parent, part):
            delattr(parent, part)
        if child is None or is_linear(child):
            child = nn.Module()
            child.training = root.training
            parent.add_module(part, child)
        parent = child
    if hasattr(parent, leaf) and leaf not in parent._modules:
        delattr(parent, leaf)
    parent.add_module(leaf, module)


def new_linear(
    weight_OI: Tensor, bias_O: Tensor | None, *, requires_grad: bool, training: bool
) -> nn.Linear:
    """An ``nn.Linear`` around existing tensors: nothing is initialised, nothing is copied."""
    out_features, in_features = weight_OI.shape
    linear = nn.Linear(in_features, out_features, bias=bias_O is not None, device="meta")
    linear.weight = nn.Parameter(weight_OI.detach(), requires_grad=requires_grad)
    if bias_O is not None:
        linear.bias = nn.Parameter(bias_O.detach(), requires_grad=requires_grad)
    linear.train(training)
    return linear


def erase_dead(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase those of ``nodes`` that nothing reads any more, last first."""
    for node in reversed(list(nodes)):
        if not node.users:
            graph.erase_node(node)


def calls_by_target(
    gm: fx.GraphModule, keep: Callable[[nn.Module], bool]
) -> dict[str, list[fx.Node]]:
    """The ``call_module`` nodes of every module for which ``keep`` holds, by qualified name."""
    found: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and keep(gm.get_submodule(str(node.target))):
            found.setdefault(str(node.target), []).append(node)
    return found


def common_parent(names: Sequence[str]) -> str:
    """The longest dotted prefix that all ``names`` share, the names themselves left out."""
    split = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def read_instead(node: fx.Node, new: fx.Node) -> None:
    """Let every reader of ``node`` read ``new``, except ``new`` itself."""
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def named_node(gm: fx.GraphModule, name: str | None, asking: str) -> fx.Node | None:
    """The node of that name; None for None. Raises :class:`RequiresError` where there is none."""
    if name is None:
        return None
    found: fx.Node | None = next((n for n in gm.graph.nodes if n.name == name), None)
    if found is not None:
        return found
    raise RequiresError(f"{asking}: the graph has no node {name!r} to mask with")
