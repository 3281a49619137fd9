"""Which parameters of a compiled model are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fxshare.errors import RefineError
from fxshare.refining.options import Also
from fxshare.result.products import slices_of
from passes.graph.graph import bits_of


@dataclass(frozen=True)
class Group:
    """A basis by the name of its parameter, and the coefficients that read it. ``pivoted`` is one
    whose identity rows are not stored."""

    basis: str
    coefficients: tuple[str, ...]
    pivoted: bool


@dataclass(frozen=True)
class Trainable:
    """The names of the parameters that are trained, each by the first of its names."""

    groups: tuple[Group, ...]
    others: tuple[str, ...] = ()
    """Norms and biases."""
    units: tuple[str, ...] = ()
    """The weights of MLPs whose hidden units went."""

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, in an order that follows from the model."""
        found: dict[str, None] = {}
        for group in self.groups:
            found.update(dict.fromkeys((group.basis, *group.coefficients)))
        found.update(dict.fromkeys(self.units))
        return (*found, *(name for name in self.others if name not in found))


def trainable_of(gm: nn.Module, model: nn.Module, also: tuple[Also, ...]) -> Trainable:
    """Bases, coefficients and pivot tables of ``gm``, what is left of MLPs whose units went, and
    what ``also`` asks for. With ``also`` what is stored in codes stays as it is.

    Raises :class:`RefineError` where there is none, or where they are no plain tensors.
    """
    named = dict(gm.named_parameters())
    first = {id(parameter): name for name, parameter in named.items()}
    readers: dict[str, dict[str, None]] = {}
    pivoted: dict[str, bool] = {}
    units: dict[str, None] = {}
    for place in slices_of(gm).values():
        if also and _is_coded(gm, place.module):
            continue  # norms and biases may make up for what its codes lose (2309.02784)
        if place.unit_rows is not None or place.unit_columns is not None:
            units[_name(gm, place.module, first)] = None
        if place.basis is None:
            continue
        basis = _name(gm, place.basis, first)
        readers.setdefault(basis, {})[_name(gm, place.module, first)] = None
        pivoted[basis] = place.pivoted
    groups = tuple(Group(name, tuple(found), pivoted[name]) for name, found in readers.items())
    others = _others(named, model, also)
    if not groups and not others and not units:
        raise RefineError(
            f"{type(gm).__name__} has no factors to train: nothing has a basis (exact mode, or "
            "a plan that leaves everything dense); compile it with a budget or a compression rate "
            'first, or train what else there is: also=("norms", "biases"), --also norms,biases'
        )
    found = Trainable(groups, others, tuple(units))
    for name in found.names:
        _check(name, named[name])
    return found


def _is_coded(gm: nn.Module, module: str) -> bool:
    weight = getattr(gm.get_submodule(module), "weight", None)
    return isinstance(weight, Tensor) and bits_of(weight) is not None


def _name(gm: nn.Module, module: str, first: Mapping[int, str]) -> str:
    weight = gm.get_submodule(module).weight
    name = first.get(id(weight))
    if name is None:
        raise RefineError(
            f"the factor {module!r} is stored as {type(weight).__name__}, which is no parameter of "
            "its own; refine before quantising or wrapping the model, and do that again afterwards"
        )
    return name


def _check(name: str, parameter: Tensor) -> None:
    plain = type(parameter) in (Tensor, nn.Parameter)
    if not plain or not parameter.is_floating_point() or parameter.itemsize < 2:
        kind = str(parameter.dtype) if plain else type(parameter).__name__
        raise RefineError(
            f"{name!r} is stored as {kind}: codes of a quantised model cannot be trained; refine "
            "before quantising, and quantise the result, or train norms and biases alone: "
            "also=('norms', 'biases')"
        )
    if parameter.device.type == "meta":
        raise RefineError(f"{name!r} is on the meta device: it has no values to train")


def _others(
    named: Mapping[str, nn.Parameter], model: nn.Module, also: tuple[Also, ...]
) -> tuple[str, ...]:
    """Norms are told by the original's classes: in a graph their code is written out."""
    norms = {
        f"{path}.{leaf}".lstrip(".")
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point()
    }
    found = []
    for name, parameter in named.items():
        is_bias = name.rpartition(".")[2].endswith("bias") and parameter.ndim == 1
        kind = "norms" if name in norms else "biases" if is_bias else None
        if kind in also:
            found.append(name)
    return tuple(found)


__all__ = ["Group", "Trainable", "trainable_of"]
