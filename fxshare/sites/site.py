"""What a site is: one weight parameter, its slices, and the modules that read it. No torch."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict

from fxshare.base.names import as_label, as_module_path, as_type_names

ModulePath: TypeAlias = Annotated[str, AfterValidator(as_module_path)]
TypeNames: TypeAlias = Annotated[str, AfterValidator(as_type_names)]
Label: TypeAlias = Annotated[str, AfterValidator(as_label)]


class Frozen(BaseModel):
    """Data that is not changed once made and refuses fields that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SliceSpec(Frozen):
    """A run of rows of one weight."""

    name: ModulePath
    """Qualified name: the site's, and where it is split the part and head (``...c_attn.q.3``)."""
    part: Label = ""
    """``q``, ``k``, ``v``, or empty."""
    head: int | None = None
    start: int
    """First row."""
    stop: int
    """One past the last row."""

    @property
    def out_features(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    @property
    def label(self) -> str:
        """``q.3``, ``q``, ``3`` or empty: what slices of one family have in common."""
        head = "" if self.head is None else str(self.head)
        return ".".join(filter(None, (self.part, head)))


class Site(Frozen):
    """One weight parameter that is rewritten, however many modules read it."""

    name: ModulePath
    """Qualified name of the first module that owns the weight."""
    calls: tuple[ModulePath, ...]
    """Every module that multiplies by this parameter; none where it is looked up only."""
    type: TypeNames
    """The weight type of the configuration that matched."""
    layer: int | None
    in_features: int
    out_features: int
    bias: bool
    slices: tuple[SliceSpec, ...]
    """In row order, covering every row once."""
    transposed: bool = False
    """A parameter that stores ``(in, out)``; of modules their class tells."""
    lookups: tuple[ModulePath, ...] = ()
    """Every embedding that looks rows of this parameter up."""

    @property
    def weights(self) -> int:
        """Numbers in the weight, the bias apart."""
        return self.in_features * self.out_features

    @property
    def readers(self) -> tuple[str, ...]:
        """Every module that reads this parameter, in either way."""
        return (*self.calls, *self.lookups)


class Skipped(Frozen):
    """A module that a pattern matched and that stays as it is, and why."""

    name: ModulePath
    type: TypeNames
    reason: str
