"""The rules of each stage, and the check that runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import fx

import passes.dialect.findings as findings
import passes.dialect.view as view
from passes.base import Pass
from passes.dialect.view import Named, View
from passes.errors import DialectError

Stage = Literal["captured", "split", "shared", "lowered"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class Rule:
    """Something that holds of everything of one kind in a graph."""

    name: str
    applies_to: Callable[[View], Named[Any]]
    """What it applies to, each with words that name it and its node."""
    wrong: Callable[[View, Any], str | None]
    """Words for what is wrong with one of them; None where nothing is."""
    expected: str
    way_out: str


_MAKE = "Make the change with a pass that writes its record"
_GRAPH = (
    Rule(
        "operation",
        view.nodes,
        findings.not_an_operation,
        f"one of {', '.join(findings.OPERATIONS)}",
        "Write the node with the methods of fx.Graph",
    ),
    Rule(
        "target",
        view.nodes,
        findings.no_target,
        "a target that the module has, a function, or the name of a method",
        "Put the module or tensor where the node looks for it, or erase the node",
    ),
    Rule(
        "border",
        view.nodes,
        findings.out_of_place,
        "inputs first and one output last",
        "Insert the node between them",
    ),
    Rule(
        "modes",
        view.ends,
        findings.modes_left,
        "the caller's modes at the output",
        "Set them before it with passes.graph.modes.set_modes(caller)",
    ),
    Rule(
        "crossing",
        view.crossed,
        findings.other_modes,
        "an input from the same modes, or through passes.graph.modes.crossing",
        "Leave the node where it was, between the same calls of set_modes",
    ),
)
# after the rules of records, which can say more of the same fault
_CALLS = Rule(
    "linear-call",
    view.linear_calls,
    findings.not_linear,
    "one input, a weight (out, in) as wide as it, and a bias (out,) or none",
    "Make the linear with passes.new_linear and call it with its input alone",
)
_CAPTURED = (
    Rule(
        "no-records",
        view.records,
        findings.is_there,
        "a graph that no pass has cut, shared or packed",
        "Capture the model again, or check it at a later stage",
    ),
)
_SLICES = (
    Rule("slice-owner", view.each_slice, findings.no_owner, "a linear that holds its rows", _MAKE),
    Rule(
        "slice-rows",
        view.owners,
        findings.no_partition,
        "slices that are its rows, each row once",
        _MAKE,
    ),
    Rule(
        "hidden-units",
        view.each_slice,
        findings.other_units,
        "as many rows or columns as hidden units are recorded, ascending, the same in all that "
        "compute and read them",
        "Make it with SelectUnits",
    ),
)
_LINEARS = Rule(
    "linear-module",
    view.owners,
    findings.not_looked_up,
    "an nn.Linear that is called, or a weight whose rows are looked up",
    "Put an nn.Linear there with passes.put_module",
)
_SPLIT = (
    _LINEARS,
    Rule(
        "no-basis",
        view.each_slice,
        findings.shares,
        "a slice of the original weight",
        "Check the graph as 'shared'",
    ),
    Rule(
        "own-linear",
        view.each_slice,
        findings.not_its_own,
        "a linear of the slice's name with its rows alone",
        "Cut the weight with SplitLinear",
    ),
    Rule(
        "rejoined",
        view.cats,
        findings.not_rejoined,
        "all slices of one weight, in its order, on one input",
        "Cut the weight with SplitLinear, which writes the cat",
    ),
)
_BASES = (
    Rule(
        "basis-owner",
        view.bases,
        findings.not_at_the_root,
        "a linear without bias at the root that alone owns its weight",
        "Make it with ShareBasis, and call it from wherever it is read",
    ),
    Rule(
        "rank",
        view.each_slice,
        findings.other_rank,
        "a coefficient with a column for each row of its basis",
        "Make both of one factorisation",
    ),
    Rule(
        "pivot-recorded",
        view.bases,
        findings.mixed,
        "all slices of a pivoted basis recorded as such",
        _MAKE,
    ),
    Rule(
        "kept-inputs",
        view.bases,
        findings.not_kept,
        "one kept input for each row of a pivoted basis, ascending, distinct and in range, and "
        "none where it is whole",
        "Make it with PivotBasis",
    ),
    Rule(
        "piece-sizes",
        view.parts,
        findings.other_sizes,
        "sizes that add up to the width of what is taken apart",
        "Take the sizes from the linears",
    ),
    Rule(
        "basis-reader",
        view.basis_readers,
        findings.no_coefficient,
        "a coefficient that is recorded with these rows of the basis",
        _MAKE,
    ),
    Rule(
        "basis-lookup",
        view.basis_reads,
        findings.no_lookup,
        "a product of looked-up rows of a coefficient with the basis",
        "Call the basis instead",
    ),
    Rule(
        "pivot-pieces",
        view.pivoted_calls,
        findings.other_pieces,
        "kept + basis(rest), both pieces of one torch.split",
        "Make it with PivotBasis",
    ),
    Rule(
        "folded-order",
        view.each_slice,
        findings.no_order,
        "rows in the order of a pivoted basis, or in their own",
        "Put the rows back in their order before the basis goes",
    ),
    Rule(
        "gather-index",
        view.each_gather,
        findings.wrong_index,
        "the orders of its bases as integers, in a buffer outside the state",
        "Make it with passes.derive_gathers",
    ),
)
_SHARED = (
    _LINEARS,
    Rule(
        "no-stack",
        view.each_slice,
        findings.stacked,
        "a basis by itself",
        "Check the graph as 'lowered'",
    ),
)
_LOWERED = (
    Rule(
        "linear-module",
        view.owners,
        findings.not_grouped,
        "an nn.Linear that is called, or a weight that is looked up or multiplied in a batch",
        "Put an nn.Linear there with passes.put_module",
    ),
    Rule(
        "batched-product",
        view.batched,
        findings.other_batch,
        "views that cut the weight and its input into as many parts",
        "Make it with GroupCoefficients",
    ),
    Rule("origin-rows", view.each_origin, findings.no_rows, "rows of a linear", _MAKE),
    Rule(
        "left-over",
        view.each_origin,
        findings.left_over,
        "each linear in one place, but for recorded copies",
        "Delete the linear whose rows were packed",
    ),
    Rule(
        "packed-origin",
        view.packed,
        findings.no_origin,
        "an origin for each row, each row once",
        "Record what was packed with passes.graph.origins.moved",
    ),
)
RULES: Mapping[Stage, tuple[Rule, ...]] = {
    "captured": (*_GRAPH, *_CAPTURED, _CALLS),
    "split": (*_GRAPH, *_SLICES, *_SPLIT, _CALLS),
    "shared": (*_GRAPH, *_SLICES, *_BASES, *_SHARED, _CALLS),
    "lowered": (*_GRAPH, *_SLICES, *_BASES, *_LOWERED, _CALLS),
}
_LEADS_TO: Mapping[str, Stage] = {
    "look-up-rows": "split",
    "narrow-heads": "split",
    "select-units": "split",
    "split-linear": "split",
    "share-basis": "shared",
    "pivot-basis": "shared",
    "merge-slices": "lowered",
    "stack-bases": "lowered",
    "group-coefficients": "lowered",
    "drop-cats": "lowered",
    "merge-gathers": "lowered",
    "lay-out": "lowered",
}


def check(gm: fx.GraphModule, stage: Stage) -> None:
    """Hold a graph to the rules of its stage.

    Raises :class:`passes.DialectError`, which names what breaks which rule, what was expected and
    what was found.
    """
    _check(View(gm), stage)


def _check(seen: View, stage: Stage) -> None:
    for rule in RULES[stage]:
        for subject, value in rule.applies_to(seen):
            wrong = rule.wrong(seen, value)
            if wrong is not None:
                raise DialectError(
                    f"{stage} graph: {seen.words(subject)} breaks rule {rule.name!r}: expected "
                    f"{rule.expected}, found {wrong}. {rule.way_out}"
                )


def stage_of(gm: fx.GraphModule) -> Stage:
    """The stage that the slices of a graph are at."""
    return _stage_of(View(gm))


def _stage_of(seen: View) -> Stage:
    if any(place.basis_rows for place in seen.slices.values()):
        return "lowered"
    if seen.bases:
        return "shared"
    # slices that were merged, or fused coefficients that were multiplied out
    if any(len(held) > 1 for held in seen.owners.values()):
        return "lowered"
    return "split" if seen.slices else "captured"


def watch(one: Pass, gm: fx.GraphModule) -> None:
    """Check the graph after each pass: ``passes.run(gm, some, watch=passes.dialect.watch)``.

    The stage is the later one of where the pass leads to and where the slices are.
    """
    seen, leads_to = View(gm), _LEADS_TO.get(one.name, "captured")
    _check(seen, max(_stage_of(seen), leads_to, key=STAGES.index))
