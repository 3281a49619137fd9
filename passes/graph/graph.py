"""What every pass needs to know about a graph: its linears, and how to edit modules beside nodes.

A *linear call* is one node that computes ``x @ W.T + b`` with a weight that the module owns. It has
two dialects: ``call_module`` of ``nn.Linear`` or ``Conv1D`` (the fx tracer), and a function over
``get_attr`` nodes: ``F.linear``, ``addmm``, ``@`` or ``einsum`` (``torch.export``, parameters that
a model multiplies by itself).

Legend for shapes: I input features, O output features, R rank.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from passes.errors import NameFault, RequiresError
from passes.graph.closures import rebind
from passes.graph.copies import copied
from passes.graph.names import shortened, unwritable
from passes.graph.operands import operand_of, product_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_LINEAR_FUNCTIONS = (torch.ops.aten.linear.default, F.linear, torch._C._nn.linear)
_ADDMM_FUNCTIONS = (torch.ops.aten.addmm.default, torch.addmm)


@dataclass(frozen=True)
class LinearCall:
    """One node that computes ``x @ weight_OI.T + bias_O``.

    ``name`` is the qualified name of the module whose ``weight`` it reads, whatever the dialect; of
    a parameter that has another name, the parameter's, with ``.rows_0_32`` where only those rows
    are read. ``transposed``: stored as ``(in, out)`` in a parameter that a function reads.
    """

    node: fx.Node
    name: str
    input: fx.Node
    weight_OI: Tensor
    bias_O: Tensor | None
    transposed: bool = False


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

    A subclass of ``nn.Linear`` with a ``forward`` of its own (``FalconLinear``) is one where it
    holds no other tensor or module, and does so with small weights put in its place.
    """
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward or _acts_like_linear(module)
    return is_conv1d(module)


def _acts_like_linear(module: nn.Linear) -> bool:
    if module._buffers or module._modules or set(module._parameters) != {"weight", "bias"}:
        return False
    # values of our own, because those of the module may be huge, or zero, or none at all; on the
    # side of whatever mode the caller is in, such as fake tensors
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        generator = torch.Generator().manual_seed(0)
        weight_OI, bias_O, x = (
            torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            for shape in ((3, 2), (3,), (4, 5, 2))
        )
        bias = None if module.bias is None else bias_O
        expected = F.linear(x, weight_OI, bias)
        for training in (False, True):
            double = copy.copy(module)
            double.__dict__["_parameters"] = {
                "weight": nn.Parameter(weight_OI),
                "bias": None if bias is None else nn.Parameter(bias),
            }
            double.__dict__["training"] = training
            try:
                found = type(module).forward(double, x)
            except Exception:  # whatever it is, it is no linear
                return False
            if not isinstance(found, Tensor) or found.shape != expected.shape:
                return False
            if not torch.allclose(found, expected, rtol=1e-12, atol=1e-12):
                return False
    return True


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """``(weight_OI, bias_O)`` of a linear module; of a ``Conv1D`` a transposed view.

    Of a linear that no node calls, whose rows are looked up only, fx keeps the weight in a plain
    module.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    bias = getattr(module, "bias", None)
    assert bias is None or isinstance(bias, Tensor)
    return (_transposed(weight) if is_conv1d(module) else weight), bias


def bits_of(weight: Tensor) -> int | None:
    """How many bits the numbers of a quantised weight have; None for one of plain numbers."""
    bits: int | None = getattr(weight, "bits", None)
    return bits


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
    product = product_of(node)
    if product is not None:
        return product[0]
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
    found = multiplication(node)
    if found is None:
        return None
    x, weight, bias, by_rows, parameters_only = found
    read = operand_of(gm, weight)
    if read is None or not isinstance(x, fx.Node) or read.tensor.ndim != 2:
        return None
    if parameters_only and not isinstance(attribute(gm, read.target), nn.Parameter):
        return None
    transposed = read.transposed is by_rows
    weight_OI = _transposed(read.tensor) if transposed else read.tensor
    shift = operand_of(gm, bias)
    # addmm also takes a bias that broadcasts, such as a matrix; that is no linear
    if bias is not None and (shift is None or shift.tensor.shape != weight_OI.shape[:1]):
        return None
    bias_O = None if shift is None else shift.tensor
    return LinearCall(node, read.name, x, weight_OI, bias_O, transposed)


def multiplication(node: fx.Node) -> tuple[object, object, object, bool, bool] | None:
    """``(x, weight, bias, by_rows, parameters_only)`` of a function that multiplies; ``by_rows``
    says that it takes the weight as ``(out, in)``."""
    if node.op == "call_function" and node.target in _LINEAR_FUNCTIONS:
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        return linear_input(node), given.get("weight"), given.get("bias"), True, False
    if node.op == "call_function" and node.target in _ADDMM_FUNCTIONS:
        # addmm(bias, x, W) with W stored (in, out); beta and alpha would change the meaning
        if node.kwargs or len(node.args) != 3:
            return None
        bias, x, weight = node.args
        return x, weight, bias, False, False
    product = product_of(node)
    # what is multiplied by a buffer is mostly no linear (rotary frequencies, a fixed transform)
    return None if product is None else (product[0], product[1], None, product[2], True)


def attribute(root: nn.Module, name: str) -> object:
    """What is at the dotted ``name``: a module, a parameter, or another attribute."""
    return operator.attrgetter(name)(root)


def structure_copy(
    module: ModuleT,
    *,
    clone_parameters: bool = False,
    clone_buffers: bool = True,
    memo: Mapping[int, object] | None = None,
    one_code: bool = False,
    without_code: bool = False,
) -> ModuleT:
    """A copy of the module tree whose parameters are the *same tensors*.

    Buffers are cloned by default: batch norm and position caches write into them in ``forward``,
    and the original must stay as it is. Ties between parameters stay ties. A function that a module
    keeps, such as a ``forward`` that was put on it, reaches the copy's modules where it reached the
    original's. ``memo`` says by ``id`` what other things to put in place of tensors.

    With ``one_code`` the copy of a graph module has the original's graph and code, which are not to
    be changed then: for a copy that only runs, since writing the code takes longer than a small
    graph does. ``without_code`` gives a graph module a graph of its own and no code: for a copy
    that is changed before it runs, and has ``recompile()`` called then.
    """
    known: dict[int, object] = {}
    parts = list(module.modules())
    for part in parts:
        if not clone_parameters:
            known.update((id(p), p) for p in part._parameters.values() if p is not None)
        if not clone_buffers:
            known.update((id(b), b) for b in part._buffers.values() if b is not None)
    known.update(memo or {})
    result = copied(module, known, one_code, without_code)
    copies = {id(part): known.get(id(part)) for part in parts}
    rebind(result, {at: part for at, part in copies.items() if isinstance(part, nn.Module)})
    return result


def put_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at the dotted ``name``; a leaf in the way becomes a plain container.

    Raises :class:`passes.NameFault` for a name that the code of a graph cannot hold.
    """
    reason = unwritable(name)
    if reason is not None:
        raise NameFault(
            f"the name {shortened(name)} of a submodule {reason}; choose one that the graph's code "
            "can hold"
        )
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
    # without rows torch warns of what it initialises
    linear = nn.Linear(in_features, max(out_features, 1), bias=bias_O is not None, device="meta")
    linear.out_features = out_features
    linear.weight = nn.Parameter(weight_OI.detach(), requires_grad=requires_grad)
    if bias_O is not None:
        linear.bias = nn.Parameter(bias_O.detach(), requires_grad=requires_grad)
    linear.train(training)
    return linear


def put_weight(root: nn.Module, name: str, weight_OI: Tensor, bias_O: Tensor | None) -> None:
    """Another weight in the linear of a dotted ``name``, and another bias where it is given; what
    can be trained stays so."""
    old = attribute(root, name)
    assert isinstance(old, nn.Linear)
    trainable = old.weight.requires_grad
    linear = new_linear(
        weight_OI.contiguous(), None, requires_grad=trainable, training=root.training
    )
    linear.bias = old.bias
    if bias_O is not None:
        own = trainable if old.bias is None else old.bias.requires_grad
        linear.bias = nn.Parameter(bias_O, requires_grad=own)
    put_module(root, name, linear)


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
