"""The planner's options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from fxshare.config.section import Section
from fxshare.config.values import Count, as_bits, as_list, as_part


class Planner(Section):
    """How a budget is spent."""

    strategy: Literal[
        "auto",
        "grown",
        "layers",
        "pairs",
        "same_input",
        "agglomerative",
        "exhaustive",
        "separate",
    ] = Field(
        default="auto",
        description="How slices are grouped: grown (runs of consecutive layers, from pairs that "
        "gain), layers (all runs, exact), pairs (at most two, exact), same_input (slices that read "
        "one activation first), agglomerative (any group, heuristic), exhaustive (any group, "
        "exact, for a dozen slices), separate (no sharing), or auto (the best of them).",
    )
    storage: Literal["auto", "plain", "pivoted"] = Field(
        default="auto",
        description="plain (basis and coefficient), pivoted (some inputs kept as they are: fewer "
        "numbers at the same rank), or auto (whichever is cheaper).",
    )
    kinds: Annotated[tuple[str, ...], BeforeValidator(as_list), Field(min_length=1)] = Field(
        default=("basis",),
        description="Kinds of candidates that compete: basis (slices that share a basis), units "
        "(hidden units of an MLP go), heads (values of an attention become narrower), keys (its "
        "queries and keys do), or one of your own as package.module:Name.",
    )
    bits: Annotated[tuple[int, ...], BeforeValidator(as_bits)] = Field(
        default=(16,),
        description="How many bits a number may have: 16 (the model's own dtype, whatever it is), "
        "8 (a scale a row) and 4 (a scale for 32 columns). Several compete under a budget in "
        "bytes; one alone goes with any.",
    )
    max_group: Count | None = Field(
        default=None, description="Most layers that may share one basis."
    )
    rank_multiple: Count | None = Field(
        default=None,
        description="Ranks are multiples of this (8, 16 or 64 suit accelerators). Not given: 1, "
        "or a small power of two for large matrices.",
    )
    never_slower: Annotated[bool | None, Field(strict=True)] = Field(
        default=None,
        description="Slices stay dense where a basis is predicted to take longer than their "
        "weights, for a prompt or for one token; needs the constants that `fxshare bench device` "
        "measures. Not given: with `budget.time_kept`.",
    )
    floor: Annotated[float, BeforeValidator(as_part)] = Field(
        default=0.0, description="Least share of its dense cost that every group keeps."
    )
    ceiling: Annotated[float, BeforeValidator(as_part)] = Field(
        default=1.0,
        description="Most of its dense cost that a group may keep; below 1 nothing stays dense.",
    )
    keep_dense: Annotated[
        tuple[Annotated[int, Field(strict=True)], ...], BeforeValidator(as_list)
    ] = Field(default=(), description="Numbers of layers whose weights stay as they are.")
    may_share: Annotated[tuple[tuple[str, ...], ...], BeforeValidator(as_list)] = Field(
        default=(),
        description="Sets of weight types that may meet in one basis, such as [[q, k], [gate, up]]"
        ". A type may always share with itself.",
    )
    tie: Annotated[tuple[tuple[str, ...], ...], BeforeValidator(as_list)] = Field(
        default=(), description="Sets of slice names that must share one basis."
    )
    search: Annotated[
        Literal["off", "kinds", "quick", "thorough", "refined"],
        # YAML 1.1 reads a bare off as false
        BeforeValidator(lambda value: "off" if value is False else value),
        WithJsonSchema({"enum": ["off", False, "kinds", "quick", "thorough", "refined"]}),
    ] = Field(
        default="quick",
        description="How many plans are tried on held-back calibration data: off (one, not "
        "measured), kinds (one of each set of kinds and widths of numbers), quick or thorough; "
        "refined: those of quick, of which a few are refined for some steps and compared by what "
        "they lose then.",
    )
    remeasure: Annotated[int, Field(strict=True, ge=0)] = Field(
        default=1,
        description="How often the statistics are measured again on an intermediate compressed "
        "model. No effect with `search: off`.",
    )
    refit: Annotated[bool | None, Field(strict=True)] = Field(
        default=None,
        description="Fit each coefficient to its own layer's inputs. Not given: where it measures "
        "better.",
    )
    bias: Annotated[bool, Field(strict=True)] = Field(
        default=True,
        description="Move the mean of what is lost into the bias, where there is one.",
    )
    cache: str | None = Field(
        default=None,
        description="Folder in which spectra are kept by content, so that planning the same model "
        "on the same data again is quick.",
    )
    sketch: Count | None = Field(
        default=None,
        description="Compute only this many leading eigenvalues of a candidate; what a group loses "
        "is then an upper bound. Not given: all of them.",
    )
    labels: Literal["data", "sampled"] = Field(
        default="data",
        description="Next tokens for the gradient statistics: those of the data, or drawn from "
        "the model (the Fisher matrix proper).",
    )
