"""One kind of linear module: the pattern of its names, and how its rows are split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from fxshare.config.section import Section
from fxshare.config.values import Count, as_pattern, as_permutation, as_split
from fxshare.config.wording import shown

_SplitValue = Annotated[
    Literal[False, "qkv", "heads", "gate_up"],
    BeforeValidator(as_split),
    WithJsonSchema({"enum": [False, True, None, "none", "qkv", "heads", "gate_up"]}),
]


class WeightType(Section):
    """One kind of linear module of the model, matched by name, and how its rows are split."""

    pattern: Annotated[str, AfterValidator(as_pattern)] = Field(
        description="Regular expression of the qualified names of this type's modules, matched "
        "from the start of the name (`re.match`)."
    )
    split: _SplitValue = Field(
        default=False,
        description="How the rows of each module are cut into slices: false (one slice), qkv "
        "(one slice each for q, k and v), heads (one slice per head) or gate_up (two halves, the "
        "gate first). true means qkv; null and none mean false.",
    )
    qkv_order: Annotated[str, AfterValidator(as_permutation)] | None = Field(
        default=None,
        description="Order of the row blocks of a fused projection, a permutation of qkv. Not "
        "given: qkv with `split: qkv`, and an unfused projection with `split: heads`.",
    )
    n_head: Count | None = Field(
        default=None,
        description="Number of heads of the projection; of query heads where it is fused and has "
        "fewer key and value heads.",
    )
    n_kv_head: Count | None = Field(
        default=None,
        description="Number of key heads and of value heads where it is not `n_head` "
        "(grouped-query attention): the blocks of q, k and v are then of unequal height.",
    )
    interleaved: Annotated[bool, Field(strict=True)] = Field(
        default=False,
        description="Rows are per head [q k v], as in GPT-NeoX, not in three blocks; with "
        "`n_kv_head` per key head [its q heads, k, v], as in Falcon-40B. Needs `split: heads` and "
        "`qkv_order`.",
    )
    embedding: Annotated[bool, Field(strict=True)] = Field(
        default=False,
        description="Whether this type may mean embeddings, whose rows are looked up: an "
        "embedding by itself, or with the output projection that is tied to it, both then reading "
        "one basis and one coefficient. Without it embeddings, and what is tied to one, stay as "
        "they are.",
    )
    basis: Literal["slice", "part", "site"] = Field(
        default="slice",
        description="Which slices of one layer pool into one basis in the sharing mode: slice "
        "(each slice has its own basis per layer group, Basis Sharing as published), part (all "
        "heads of q together, likewise k and v) or site (all slices of the module).",
    )

    @field_validator("embedding")
    @classmethod
    def _rows_of_an_embedding_are_not_split(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("split", False) is not False:
            raise ValueError(
                f"found true with `split: {info.data['split']}`: the rows of an embedding are "
                "tokens, which have no heads; remove one of the two"
            )
        return value

    @field_validator("qkv_order")
    @classmethod
    def _order_needs_split(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("split", value) is False:
            raise ValueError(
                f"found {shown(value)} without a split, where it has no effect: add `split: qkv` "
                "(or `split: heads`), or remove qkv_order"
            )
        if value is not None and info.data.get("split") == "gate_up":
            raise ValueError(
                f"found {shown(value)} with `split: gate_up`, which has no q, k and v: remove it"
            )
        return value

    @field_validator("interleaved")
    @classmethod
    def _interleaved_needs_heads(cls, value: bool, info: ValidationInfo) -> bool:
        if not value or "split" not in info.data:
            return value
        split = info.data["split"]
        if split == "qkv":
            raise ValueError(
                "found true with `split: qkv`: in interleaved rows [q k v] per head the rows of q "
                "are not one run; use `split: heads`"
            )
        if split in (False, "gate_up"):
            raise ValueError(
                "found true without a split into heads, where it has no effect: add `split: heads` "
                "and `qkv_order: qkv`, or remove interleaved"
            )
        if info.data.get("qkv_order", "") is None:
            raise ValueError(
                "found true without qkv_order, which means an unfused projection: add "
                "`qkv_order: qkv` (the order inside each head), or remove interleaved"
            )
        return value

    @property
    def order(self) -> str | None:
        """Order of q, k and v in the fused projection; None where the projection is not fused."""
        if self.split == "qkv":
            return self.qkv_order or "qkv"
        return self.qkv_order
