"""The shortest patterns that mean exactly the weights they are to mean, and names for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from fxshare.proposing.weights import Weight


def matchable(model: nn.Module) -> dict[str, int]:
    """What a pattern is held against, module or parameter, with the identity of its tensor."""
    found = {
        name: id(module.weight)
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.removesuffix(".weight") not in found:
            found[name] = id(parameter)
    return found


def pattern_of(weights: Sequence[Weight], names: dict[str, int]) -> str:
    """The shortest regular expression that matches ``weights`` and nothing else among ``names``
    (as :func:`matchable` lists them)."""
    wanted = {w.parameter for w in weights}
    for pattern in _patterns(weights):
        compiled = re.compile(pattern)
        if {tensor for name, tensor in names.items() if compiled.match(name)} == wanted:
            return pattern
    return f"(?:{'|'.join(re.escape(w.name) for w in weights)})$"


def _patterns(weights: Sequence[Weight]) -> Iterator[str]:
    steps = weights[0].steps
    own = [r"\d+" if step == "#" else re.escape(step) for step in steps]
    # a number says nothing about a weight and does not begin a pattern; the owner does (`attn`,
    # `mlp`) and is part of the shortest
    shortest = 2 if len(own) > 2 and steps[-2] != "#" else 1
    for count in range(shortest, len(own)):
        if steps[-count] != "#":
            yield r".*\." + r"\.".join(own[-count:]) + "$"
    yield r"\.".join(own) + "$"
    first = weights[0]
    if first.stack is not None:  # another container has weights of this name: not its numbers
        inside = [r"\d+" if s == "#" else re.escape(s) for s in first.kind.split(".") if s]
        yield r"\.".join([re.escape(first.stack), r"\d+", *inside]) + "$"


def block_pattern_of(weights: Iterable[Weight]) -> str | None:
    """A regular expression that finds the layer number of each weight; None where no weight is in
    a layer, or no expression finds them all."""
    placed = [w for w in weights if w.stack is not None]
    stacks = list(dict.fromkeys(w.stack for w in placed if w.stack is not None))
    if not stacks:
        return None
    last = list(dict.fromkeys(_tail(stack) for stack in stacks))
    # the innermost first: a container's name is the beginning of the names of those inside it
    whole = sorted((re.escape(stack) for stack in stacks), key=len, reverse=True)
    # ".*" finds the last of several, where one container stands in another
    for choices, start in ((last, ""), (last, r"(?:^|\.)"), (last, r".*\b"), (whole, "^")):
        name = choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"
        pattern = rf"{start}{name}\.(\d+)"
        found = [re.search(pattern, w.name) for w in placed]
        if all(f is not None and int(f[1]) == w.layer for f, w in zip(found, placed, strict=True)):
            return pattern
    return None


def _tail(stack: str) -> str:
    """The end of a container's name from its last word on: ``stages.3`` is ``stages\\.\\d+``."""
    steps = stack.split(".")
    words = [i for i, step in enumerate(steps) if not step.isdecimal()]
    tail = steps[words[-1] if words else 0 :]
    return r"\.".join(r"\d+" if step.isdecimal() else re.escape(step) for step in tail)


def type_names(groups: Sequence[Sequence[Weight]]) -> list[str]:
    """A name for each weight type: the last parts of its weights' names that tell it from others.

    Where only the stack tells (encoder and decoder), its part stands in front.
    """
    parts = [[s for s in group[0].steps if s != "#"] for group in groups]
    lengths = [1] * len(groups)
    while True:
        names = [_joined(p[-n:]) for p, n in zip(parts, lengths, strict=True)]
        clashing = [i for i, name in enumerate(names) if names.count(name) > 1]
        longer = [i for i in clashing if lengths[i] < len(parts[i])]
        if not longer:
            break
        for i in longer:
            lengths[i] += 1
    names = [_shortened(p, n, parts) for p, n in zip(parts, lengths, strict=True)]
    # numbers tell stages apart, and where they do not, nothing but the shapes does
    stages = [re.findall(r"\b\d+\b", group[0].stack or "") for group in groups]
    numbered = ["_".join([n, *s]) for n, s in zip(names, stages, strict=True)]
    names = [n if names.count(n) == 1 else m for n, m in zip(names, numbered, strict=True)]
    return [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]


def _shortened(own: Sequence[str], length: int, all_parts: Sequence[Sequence[str]]) -> str:
    """The last ``length`` parts without those in the middle that tell nothing."""
    kept = list(own[-length:])
    at = 1
    while at < len(kept) - 1:
        shorter = kept[:at] + kept[at + 1 :]
        others = [p for p in all_parts if p != own and p[-1] == own[-1]]
        if any(_within(shorter, p) for p in others):
            at += 1
        else:
            kept = shorter
    return _joined(kept)


def _within(some: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether ``some`` comes in ``parts`` in this order."""
    rest = iter(parts)
    return all(one in rest for one in some)


def _joined(parts: Sequence[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]", "_", "_".join(parts)) or "weight"
    return name if name[0].isalpha() or name[0] == "_" else f"_{name}"
