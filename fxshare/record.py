"""What a compiled model knows about itself: ``gm.fxshare``."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxshare.capture import FrontEnd
from fxshare.capture.call import Call, Shapes
from fxshare.capture.guards import hold_guard
from fxshare.capture.modules_front_end import module_slices
from fxshare.config import ShareConfig
from fxshare.errors import FxShareError
from fxshare.generation.face import GenerationFace, SavingFace, Verbs, keep_verbs
from fxshare.pickling import reduced
from fxshare.plans import Plan, Site
from fxshare.report import Report
from fxshare.source import Source
from passes import Origin, derived_buffers
from passes.graph import weight_and_bias
from passes.pipeline import Prefer
from passes.slices import Slice, basis_of, rows_of

Step = Literal["memory", "speed", "readable"]


@dataclass(frozen=True)
class InputSpec:
    """Shape, dtype and range of one example tensor; enough to make another like it."""

    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float

    @staticmethod
    def of(t: Tensor) -> InputSpec:
        """The spec of a tensor; on the meta device its range is 0 to 1.

        Infinities, as in an additive mask, are left out of the range: numbers drawn between them
        would be NaN, and NaN would hide every difference. So are negative integers beside others:
        they are marks, such as the -100 of labels.
        """
        finite = t if t.device.type == "meta" else t[t.isfinite()]
        known = finite.device.type != "meta" and finite.numel() > 0
        low, high = (float(finite.min()), float(finite.max())) if known else (0.0, 1.0)
        if not t.is_floating_point() and high >= 0:
            low = max(low, 0.0)
        return InputSpec(tuple(t.shape), str(t.dtype).removeprefix("torch."), low, high)

    def random(self, generator: torch.Generator, device: torch.device) -> Tensor:
        """Uniform numbers in the range, of the shape and dtype. A range of one value stays."""
        dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            unit = torch.rand(self.shape, generator=generator, dtype=torch.float64)
            return (self.low + unit * (self.high - self.low)).to(device=device, dtype=dtype)
        low, high = int(self.low), int(self.high)
        return torch.randint(low, high + 1, self.shape, generator=generator).to(
            device=device, dtype=dtype
        )


@dataclass(frozen=True, eq=False)
class Readable:
    """The graph that a lowered one was made from: ``graph`` without values in its tensors, and
    where each of its linears is in the lowered graph (:class:`passes.Origin`); one that is not
    among the ``origins`` is there under its own name."""

    graph: fx.GraphModule
    origins: Mapping[str, Origin]


@dataclass(frozen=True, eq=False)
class Lowered:
    """How a module was lowered.

    ``graphs`` are the readable graphs by the name of the module that each was; the whole has the
    empty name. ``slices`` are the places of the slices in the readable module.
    """

    prefer: Prefer
    graphs: Mapping[str, Readable]
    slices: Mapping[str, Slice]
    dense: tuple[str, ...] = ()
    """The groups that were multiplied out."""
    written_out: tuple[str, ...] = ()
    """The groups whose pivoted bases are stored whole."""


@dataclass(frozen=True)
class Record:
    """The plan, the report, and where everything is.

    ``slice_errors`` are ``‖W − C B‖_F / ‖W‖_F`` per slice as they were when factorised, so that a
    rewrite that wired the wrong basis can be told from one that is merely lossy.
    ``bias_shifts`` are ``‖b' − b‖`` per slice whose bias took up the mean of what was lost.
    ``inputs`` are the two example calls as specs (names to :class:`InputSpec` or constants).
    ``lowering`` is how the graph was lowered (``"memory"``, ``"speed"``) or made readable again
    (``"readable"``), one step after the other, and ``lowered`` what the last one made, where the
    module is lowered now.
    ``extra_passes`` names the passes that are not ours; ``graph_sha256`` is the result's, see
    :func:`graph_sha256`.
    """

    config: ShareConfig
    plan: Plan
    report: Report
    front_end: FrontEnd
    source: Source
    relaxed: tuple[int, ...] = ()
    slice_errors: Mapping[str, float] = field(default_factory=dict)
    bias_shifts: Mapping[str, float] = field(default_factory=dict)
    inputs: tuple[Mapping[str, Any], ...] = ()
    extra_passes: tuple[str, ...] = ()
    graph_sha256: str = ""
    lowering: tuple[Step, ...] = ()
    lowered: Lowered | None = None

    @staticmethod
    def specs(shapes: Shapes | None) -> tuple[Mapping[str, Any], ...]:
        """The example calls as specs."""
        if shapes is None:
            return ()
        calls = [shapes.base] if shapes.other is None else [shapes.base, shapes.other]
        return tuple(
            {
                k: pytree.tree_map_only(Tensor, InputSpec.of, v, is_leaf=_is_leaf)
                for k, v in call.items()
            }
            for call in calls
        )

    def random_call(self, number: int, *, seed: int, device: torch.device) -> Call:
        """A random call of the form of example ``number``."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: pytree.tree_map_only(
                InputSpec, lambda spec: spec.random(generator, device), value, is_leaf=_is_leaf
            )
            for name, value in self.inputs[number].items()
        }


def _is_leaf(value: object) -> bool:
    # containers of other classes, such as a cache, are constants and not places for specs
    return type(value) not in (dict, list, tuple)


class ShareModule(GenerationFace, SavingFace, fx.GraphModule):
    """A rewritten model: a ``torch.fx.GraphModule`` that carries its :class:`Record`."""

    @property
    def fxshare(self) -> Record:
        """The plan, the report and the configuration it was compiled with."""
        found: Record = self.meta["fxshare"]
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        result = super().__deepcopy__(memo)
        assert isinstance(result, fx.GraphModule)
        for name in derived_buffers(result):  # fx makes every buffer it copies part of the state
            path, _, leaf = name.rpartition(".")
            result.get_submodule(path)._non_persistent_buffers_set.add(leaf)
        return result


def record_of(module: nn.Module) -> Record:
    """The record of a compiled model; :class:`FxShareError` if it is not one."""
    meta = getattr(module, "meta", None)
    if not isinstance(meta, dict) or "fxshare" not in meta:
        raise FxShareError(
            f"{type(module).__name__} was not made by fxshare.compile or fxshare.load"
        )
    found: Record = meta["fxshare"]
    return found


def attach(result: nn.Module, record: Record, verbs: Verbs) -> None:
    """Put the record where :func:`record_of` finds it; ``verbs`` are what the module does by later
    stages, given by those that stand above them."""
    record = replace(record, graph_sha256=graph_sha256(result))
    result.__dict__["meta"]["fxshare"] = record
    result.__dict__["meta"]["source"] = record.source
    keep_verbs(result, verbs)
    if not isinstance(result, ShareModule):
        result.__dict__["fxshare"] = record
        if hasattr(result, "save_pretrained"):  # its own would write weights that it cannot read
            result.__dict__["save_pretrained"] = functools.partial(verbs.save_pretrained, result)


def graph_sha256(module: nn.Module) -> str:
    """A hash over the text of every graph in a compiled model.

    Where in the model's source a guard arose is left out: lines move from one release to the next.
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        if isinstance(part, fx.GraphModule):
            digest.update(f"{name}\n{_graph_text(part.graph)}".encode())
    return digest.hexdigest()


def _graph_text(graph: fx.Graph) -> str:
    lines = []
    for node in graph.nodes:
        line = node.format_node() or ""
        if node.target is hold_guard:
            line = line.replace(str(node.args[2]), "")
        lines.append(re.sub(r"0x[0-9a-f]+", "0x", line))
    return "\n".join(lines)


def slices_of(module: nn.Module) -> Mapping[str, Slice]:
    """Where each slice of a compiled model is."""
    return module_slices(module)


def slice_product(module: nn.Module, name: str) -> Tensor:
    """The weight ``(out, in)`` that a slice of a compiled model stands for, in float64."""
    place = slices_of(module)[name]
    weight_OI, _ = weight_and_bias(module.get_submodule(place.module))
    rows = rows_of(module, place, weight_OI.detach()).double()
    if place.basis is None:
        return rows
    return rows @ basis_of(module, place).detach().double()


def site_bias(module: nn.Module, site: Site) -> Tensor | None:
    """The bias ``(out,)`` that a site of a compiled model adds; None where it has none."""
    rows = []
    for s in site.slices:
        place = slices_of(module)[s.name]
        _, bias = weight_and_bias(module.get_submodule(place.module))
        if bias is None:
            return None
        rows.append(rows_of(module, place, bias.detach()))
    return torch.cat(rows)


def dense_sites(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The weight ``(out, in)`` of every site multiplied out, in float64."""
    return {
        site.name: torch.cat([slice_product(module, s.name) for s in site.slices])
        for site in plan.sites
    }
