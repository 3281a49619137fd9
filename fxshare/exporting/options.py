"""What a caller may ask of one target and not of another."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fxshare.errors import ExportError

if TYPE_CHECKING:
    from fxshare.store.skeleton import ModelSource
    from fxshare.store.tokenizer import TokenizerSource

Target = Literal["pt2", "aoti", "onnx", "dense", "py", "vllm", "ort-genai"]
TARGETS: tuple[str, ...] = get_args(Target)
_SUFFIXES = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
_TAKEN_BY = {
    "opset": ("onnx", "ort-genai"),
    "original": ("dense", "vllm"),
    "untie": ("vllm",),
    "tokenizer": ("vllm", "ort-genai"),
}


@dataclass(frozen=True, eq=False)
class Options:
    """The options of :func:`fxshare.export` that not every target has."""

    opset: int | None = None
    original: ModelSource | None = None
    untie: bool = False
    tokenizer: TokenizerSource | None = None

    def check(self, to: str, path: Path) -> None:
        """Refuse early what the target does not have: :class:`ExportError` names it."""
        if to not in TARGETS:
            near = difflib.get_close_matches(str(to), TARGETS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ExportError(f"to: expected one of {', '.join(TARGETS)}, found {to!r}{hint}")
        suffix = _SUFFIXES.get(to)
        if suffix is not None and path.suffix != suffix:
            raise ExportError(
                f"to={to!r} writes a file that ends in {suffix}, found {path.name!r}; loaders look "
                "at the ending"
            )
        for option, targets in _TAKEN_BY.items():
            if getattr(self, option) not in (None, False) and to not in targets:
                having = " or ".join(map(repr, targets))
                raise ExportError(
                    f"{option}: only to={having} has it, found to={to!r}; leave it out"
                )
        if to == "onnx":
            from fxshare.exporting.targets.onnx import check_opset

            check_opset(self.opset)


__all__ = ["TARGETS", "Options", "Target"]
