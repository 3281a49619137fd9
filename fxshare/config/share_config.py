"""The whole configuration, and what must hold between its sections."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fxshare.config.budget import Budget
from fxshare.config.calibration import Calibration
from fxshare.config.lower import Lower
from fxshare.config.planner import Planner
from fxshare.config.section import Section
from fxshare.config.values import (
    CONFIG_VERSION,
    Count,
    as_block_pattern,
    as_kept,
    as_list,
    as_pass_name,
    as_type_name,
    as_version,
)
from fxshare.config.weight_type import WeightType
from fxshare.config.wording import nearest, shown
from fxshare.errors import ConfigError


class ShareConfig(Section):
    """A complete configuration, as :func:`fxshare.compile` takes it."""

    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({"layer_pattern": "block_pattern"})

    version: Annotated[int, Field(strict=True, ge=1), AfterValidator(as_version)] = Field(
        default=CONFIG_VERSION, description="Version of the configuration's format."
    )
    weight_types: dict[Annotated[str, AfterValidator(as_type_name)], WeightType] = Field(
        min_length=1, description="The kinds of linear modules to rewrite, each under its name."
    )
    block_pattern: Annotated[str, AfterValidator(as_block_pattern)] | None = Field(
        default=None,
        description="Regular expression searched for in a module's name (`re.search`); its group "
        "1 is the layer number. `layer_pattern` is an alias.",
    )
    group_size: Count | None = Field(
        default=None,
        description="How many consecutive layers share one basis; 1 is one basis per matrix. "
        "Given together with `compression_rate`.",
    )
    compression_rate: Annotated[float | None, BeforeValidator(as_kept)] = Field(
        default=None,
        validate_default=True,
        description="Fraction of parameters kept (0.8 keeps 80 %). Given together with "
        "`group_size`; turns the sharing mode on.",
        json_schema_extra={"exclusiveMinimum": 0},
    )
    private: Annotated[tuple[str, ...], BeforeValidator(as_list)] = Field(
        default=(),
        description="Names of weight types that share nothing between layers (groups of one).",
    )
    budget: Budget | None = Field(
        default=None,
        description="What the result may cost; turns the planned mode on. Not together with "
        "`group_size` and `compression_rate`.",
    )
    planner: Planner = Field(
        default_factory=Planner, description="How the budget is spent; needs `budget`."
    )
    fuse: Annotated[bool, Field(strict=True)] = Field(
        default=True,
        description="Fuse the matrix products of the result again where it stays equivalent.",
    )
    lower: Lower | None = Field(
        default=None,
        description="Pack the result for speed (`fxshare.lower`). Not given: it stays readable.",
    )
    passes: Annotated[
        tuple[Annotated[str, AfterValidator(as_pass_name)], ...], BeforeValidator(as_list)
    ] = Field(
        default=(), description="Further passes to run, each as `package.module:Name`, in order."
    )
    calibration: Calibration = Field(
        default_factory=Calibration, description="How statistics of the activations are gathered."
    )
    capture: Literal["auto", "fx", "export", "modules"] = Field(
        default="auto",
        description="Front end that captures the model: fx (tracing with fake values), export "
        "(`torch.export`), modules (a copy with each matched module replaced), or auto (the first "
        "of these that passes its self-check).",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_block_pattern(cls, values: Any) -> Any:
        return canonical(values) if isinstance(values, dict) else values

    @field_validator("compression_rate")
    @classmethod
    def _rate_with_group_size(cls, value: float | None, info: ValidationInfo) -> float | None:
        if "group_size" not in info.data:
            return value
        group_size = info.data["group_size"]
        if value is not None and group_size is None:
            raise ValueError(
                f"found {shown(value)} without group_size: add group_size, the number of "
                "consecutive layers that share a basis (`group_size: 1` is one basis per matrix)"
            )
        if value is None and group_size is not None:
            raise ValueError(
                f"not given, but group_size is ({shown(group_size)}): add compression_rate, the "
                "fraction of parameters kept (`compression_rate: 0.8` keeps 80 %), or remove "
                "group_size"
            )
        return value

    @field_validator("private")
    @classmethod
    def _private_are_types(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if value and info.data.get("group_size", 1) is None:
            raise ValueError(
                f"found {shown(list(value))} without group_size, where it has no effect: add "
                "group_size and compression_rate, or remove private"
            )
        # Absent where a weight type is itself at fault, which is then reported instead.
        types = list(info.data.get("weight_types", value))
        unknown = [name for name in value if name not in types]
        if unknown:
            named = " ".join(
                f"{shown(name)} is no weight type.{nearest(name, types)}" for name in unknown[:8]
            )
            raise ValueError(f"{named} Weight types: {', '.join(types)}")
        return value

    @field_validator("budget")
    @classmethod
    def _budget_or_rate(cls, value: Budget | None, info: ValidationInfo) -> Budget | None:
        if value is not None and info.data.get("compression_rate") is not None:
            raise ValueError(
                "found together with compression_rate: a budget plans the ranks, a rate fixes "
                "them; remove one of the two"
            )
        return value

    @field_validator("planner")
    @classmethod
    def _planner_fits(cls, value: Planner, info: ValidationInfo) -> Planner:
        if info.data.get("budget", value) is None and value != Planner():
            raise ValueError("found without budget, where it has no effect: add a budget")
        types = list(info.data.get("weight_types", {}))
        for name in [name for names in value.may_share for name in names]:
            if types and name not in types:
                raise ValueError(
                    f"may_share: {shown(name)} is no weight type.{nearest(name, types)} Weight "
                    f"types: {', '.join(types)}"
                )
        _check_bits(value, info.data.get("budget"))
        if value.floor > value.ceiling:
            raise ValueError(f"floor {value.floor} is above ceiling {value.ceiling}")
        return value

    @property
    def mode(self) -> Literal["exact", "sharing", "planned"]:
        """``"planned"`` with a budget, ``"sharing"`` with a compression rate, else ``"exact"``."""
        if self.budget is not None:
            return "planned"
        return "exact" if self.compression_rate is None else "sharing"

    def group_size_of(self, type_name: str) -> int:
        """How many consecutive layers of this weight type share a basis: 1 for private types."""
        if type_name not in self.weight_types:
            raise ConfigError(
                f"{shown(type_name)} is no weight type.{nearest(type_name, self.weight_types)} "
                f"Weight types: {', '.join(self.weight_types)}"
            )
        if self.group_size is None or type_name in self.private:
            return 1
        return self.group_size


def _check_bits(planner: Planner, budget: Budget | None) -> None:
    if budget is None or planner.bits == (16,):
        return
    in_bytes = budget.max_bytes is not None or budget.bytes_kept is not None
    if len(planner.bits) > 1 and not in_bytes:
        raise ValueError(
            f"bits: {list(planner.bits)} compete under a budget in bytes; give bytes_kept or "
            "max_bytes (params_kept counts numbers, whatever their bits), or one width alone"
        )
    if planner.search == "refined":
        raise ValueError(
            f"bits: {list(planner.bits)} with search: refined: codes cannot be refined; take "
            "search: quick or thorough"
        )


def canonical(values: dict[str, Any]) -> dict[str, Any]:
    """``layer_pattern`` renamed to ``block_pattern``, before merging: one overrides the other.

    Where one source has both, both stay, and ``layer_pattern`` is reported as an unknown key.
    """
    if "layer_pattern" not in values or "block_pattern" in values:
        return values
    return {"block_pattern" if k == "layer_pattern" else k: v for k, v in values.items()}
