"""A weight as integers and scales: a tensor that stores codes, and computes with their values.

Row o holds ``codes[o, i] · scale[o, i // group]``. Every operation that is not about rows gets the
values, made for it and dropped after it; what moves rows (slices, joins, another order) moves codes
and scales, so that a graph of quantised linears can be repacked like any other.

torchao 0.18 has such tensors as well, but its int8 tensor has no ``cat`` and no ``index_select`` of
rows, which packing takes.

Shape suffixes: O rows, I columns, G groups of columns, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

_aten = torch.ops.aten
BITS = (8, 4)
"""The widths of codes that there are, beside the dtype's own."""
GROUP = 32
"""Columns that share one scale with 4 bits; with 8 a whole row does."""
_SIGNS = 0x88888888 - (1 << 32)
"""Of a word with eight codes from 0 to 15 the bits that tell those below 8, which stand for less
than 0: with them turned codes are numbers with a sign."""


def group_of(bits: int, width: int) -> int:
    """How many columns share a scale; the last ones of a row may be fewer."""
    return width if bits == 8 else GROUP


def scale_dtype(dtype: torch.dtype, bits: int) -> torch.dtype:
    """What scales are stored in: the weights' dtype, but two bytes for groups in float32."""
    return torch.bfloat16 if bits == 4 and dtype == torch.float32 else dtype


def code_bytes(bits: int, rows: Any, width: Any) -> Any:
    """Bytes of the codes of a matrix; of ints, or of arrays of them."""
    return rows * (width if bits == 8 else (width + 1) // 2)


def scale_count(bits: int, rows: Any, width: Any) -> Any:
    """Scales of a matrix; of ints, or of arrays of them."""
    return rows * (1 if bits == 8 else -(-width // GROUP))


def matrix_bytes(bits: int, rows: Any, width: Any, itemsize: int) -> Any:
    """Stored bytes of a quantised matrix whose dtype has ``itemsize`` bytes, scales included; of
    ints, or of arrays of them."""
    each = 2 if bits == 4 and itemsize == 4 else itemsize
    return code_bytes(bits, rows, width) + each * scale_count(bits, rows, width)


class Quantised(Tensor):
    """``(O, I)`` of a floating-point dtype, stored as codes and scales."""

    stored: Tensor
    """``(O, I)`` int8, or ``(O, B)`` uint8 with two codes a byte: column i and column i + B."""
    scale: Tensor
    """``(O, G)``."""
    bits: int
    group: int

    @staticmethod
    def __new__(
        cls,
        stored: Tensor,
        scale: Tensor,
        bits: int,
        group: int,
        width: int,
        dtype: torch.dtype,
    ) -> Quantised:
        made: Quantised = Tensor._make_wrapper_subclass(
            cls,
            (len(stored), width),
            strides=(width, 1),
            dtype=dtype,
            device=stored.device,
            requires_grad=False,
        )
        made.stored, made.scale = stored, scale
        made.bits, made.group = bits, group
        return made

    def __init__(self, *_: object) -> None:
        """All is done when it is made."""

    @staticmethod
    def of(codes_OI: Tensor, scale_OG: Tensor, bits: int, dtype: torch.dtype) -> Quantised:
        """From codes, one an entry, and their scales, whose dtype is kept."""
        width = codes_OI.shape[1]
        stored = codes_OI.to(torch.int8) if bits == 8 else _packed(codes_OI)
        return Quantised(stored, scale_OG, bits, group_of(bits, width), width, dtype)

    @staticmethod
    def empty(
        rows: int, width: int, bits: int, dtype: torch.dtype, device: torch.device
    ) -> Quantised:
        """One without values worth reading."""
        kind = torch.int8 if bits == 8 else torch.uint8
        stored = torch.empty(rows, code_bytes(bits, 1, width), dtype=kind, device=device)
        groups = scale_count(bits, 1, width)
        scale = torch.empty(rows, groups, dtype=scale_dtype(dtype, bits), device=device)
        return Quantised(stored, scale, bits, group_of(bits, width), width, dtype)

    @property
    def codes(self) -> Tensor:
        """``(O, I)`` int8, one code an entry."""
        return self.stored if self.bits == 8 else _unpacked(self.stored, self.shape[1])

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.stored.nbytes + self.scale.nbytes

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """What the codes stand for, an ordinary tensor of the dtype, or of another."""
        dtype = dtype or self.dtype
        return self.codes.to(dtype) * self._scales(dtype)

    def _scales(self, dtype: torch.dtype) -> Tensor:
        """``(O, I)``, or ``(O, 1)`` where a row has one scale."""
        scale_OG = self.scale.to(dtype)
        if scale_OG.shape[1] == 1:
            return scale_OG
        # repeat_interleave and a slice would say the same, and inductor (torch 2.13, CPU) compiles
        # that into reads beyond the scales
        places = torch.arange(self.shape[1], device=self.device) // self.group
        return scale_OG.index_select(1, places)

    def with_rows(self, move: Callable[[Tensor], Tensor]) -> Quantised:
        """Codes and scales moved alike."""
        return self._like(move(self.stored), move(self.scale))

    def with_parts(self, stored: Tensor, scale: Tensor) -> Quantised:
        """One of this form with other codes and scales, where those are."""
        return self._like(stored, scale)

    def _like(self, stored: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Quantised:
        width = self.shape[1]
        return Quantised(stored, scale, self.bits, self.group, width, dtype or self.dtype)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"Quantised({self.bits} bits, {tuple(self.shape)}, {self.dtype}, {self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["stored", "scale"], (self.bits, self.group, self.shape[1], self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: Any, outer_size: Any, outer_stride: Any
    ) -> Quantised:
        bits, group, width, dtype = meta
        return Quantised(inner["stored"], inner["scale"], bits, group, width, dtype)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, for the cache of torch.compile."""
        return f"{self!r} {self.group} {self.scale.dtype} {tuple(self.scale.shape)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Quantised:
        if id(self) not in memo:
            twin = self.with_rows(torch.clone)
            if getattr(self, "_is_param", False):
                twin._is_param = True
            memo[id(self)] = twin
        found: Quantised = memo[id(self)]
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        move = _MOVES.get(func)
        found = NotImplemented if move is None else move(func, *args, **kwargs)
        if found is not NotImplemented:
            return found
        if func is _aten.copy_.default and isinstance(args[0], cls):
            return _copy(args[0], args[1])
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise TypeError(
                f"{func} would write into a quantised weight, which holds codes; train before the "
                "weights are quantised (docs/how-to/bits.md)"
            )

        def plain(value: Quantised) -> Tensor:
            return value.values()

        given = pytree.tree_map_only(cls, plain, (args, kwargs))
        return func(*given[0], **given[1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Quantised) or isinstance(x, Quantised):
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(x, weight, bias)
    rows = x.shape[:-1].numel()
    if rows == 1 and torch.compiler.is_compiling() and weight.device.type == "cpu":
        # one row: a compiler reads the codes where it adds up, and makes no values of them
        y = _one_row(x.reshape(1, -1), weight).reshape(*x.shape[:-1], weight.shape[0])
    elif weight.scale.shape[1] == 1:
        # the scale comes last: codes have few bits, and their values round in half precision
        y = F.linear(x, weight.codes.to(x.dtype)) * weight.scale[:, 0].to(x.dtype)
    else:
        y = F.linear(x, weight.values(x.dtype))
    return y if bias is None else y + bias


def _one_row(x_I: Tensor, weight: Quantised) -> Tensor:
    """``(O,)``, from products with the codes that are added up at once."""
    width, scale_OG = weight.shape[1], weight.scale.to(x_I.dtype)
    if weight.bits == 8:
        if width % 4 == 0:
            total_OI = _products(_words(weight.stored), x_I, 8)
        else:
            total_OI = weight.stored.to(x_I.dtype) * x_I
        return total_OI.sum(-1) * scale_OG[:, 0]
    half = weight.stored.shape[1]
    low_I, high_I = x_I[:, :half], x_I[:, half:]
    if half % GROUP == 0 and width == 2 * half:
        # the words' halves of bytes, as numbers with a sign
        words = _words(weight.stored) ^ _SIGNS
        scale_OW = scale_OG[:, :, None].expand(-1, -1, GROUP // 4).reshape(len(words), -1)
        first = _products(words, low_I, 4) * scale_OW[:, : half // 4]
        other = _products(words, high_I, 4, first=4) * scale_OW[:, half // 4 :]
        return (first + other).sum(-1)
    scale_OI = weight._scales(x_I.dtype).expand(-1, width)
    low = (weight.stored & 15).to(x_I.dtype) - 8
    high = (weight.stored >> 4).to(x_I.dtype) - 8
    rest = width - half
    added = (low * scale_OI[:, :half] * low_I).sum(-1)
    return added + (high[:, :rest] * scale_OI[:, half:] * high_I).sum(-1)


def _words(stored_OB: Tensor) -> Tensor:
    """Four bytes a word, ``(O, W)`` int32.

    Inductor (torch 2.13) loads as many bytes as floats have lanes, through a buffer, which takes
    most of the time. It loads integers through one as well, but floats as they are.
    """
    return stored_OB.view(torch.float32).view(torch.int32)


def _products(words_OW: Tensor, x_B: Tensor, bits: int, first: int = 0) -> Tensor:
    """``(O, W)``: of every word the sum over the four bytes' codes, each times its input of
    ``(1, B)``; a code has so many bits, the lowest of which is the byte's ``first``."""
    # in order by a product, since a copy would be fused, and read in steps of four then
    x_4W = torch.eye(4, dtype=x_B.dtype, device=x_B.device) @ x_B.reshape(-1, 4).t()
    total_OW = torch.zeros_like(words_OW, dtype=x_B.dtype)
    for byte in range(4):
        above = 32 - bits - first - 8 * byte
        total_OW = total_OW + ((words_OW << above) >> (32 - bits)).to(x_B.dtype) * x_4W[byte]
    return total_OW


def _packed(codes_OI: Tensor) -> Tensor:
    half = (codes_OI.shape[1] + 1) // 2
    shifted = (codes_OI + 8).to(torch.uint8)
    low, high = shifted[:, :half], shifted[:, half:]
    if high.shape[1] < half:
        high = F.pad(high, (0, half - high.shape[1]))
    return low | (high << 4)


def _unpacked(stored_OB: Tensor, width: int) -> Tensor:
    both = torch.cat([stored_OB & 15, stored_OB >> 4], 1)[:, :width]
    return both.to(torch.int8) - 8


def _copy(to: Quantised, source: Any) -> Quantised:
    if not isinstance(source, Quantised) or (source.bits, source.shape) != (to.bits, to.shape):
        raise TypeError(
            f"expected the codes and scales of {to!r}, found {type(source).__name__}; values that "
            "are not quantised cannot be copied into it"
        )
    to.stored.copy_(source.stored)
    to.scale.copy_(source.scale)
    return to


def _rowwise(func: Any, one: Any, *args: Any, **kwargs: Any) -> Any:
    """Of views and copies that keep columns as they are."""
    return one.with_rows(lambda t: func(t, *args, **kwargs))


def _along(func: Any, one: Any, dim: int = 0, *args: Any, **kwargs: Any) -> Any:
    """Of what picks along a dimension; of columns values are picked."""
    if not isinstance(one, Quantised) or dim not in (0, -2):
        return NotImplemented
    return one.with_rows(lambda t: func(t, 0, *args, **kwargs))


def _split(func: Any, one: Any, sizes: Any, dim: int = 0) -> Any:
    if dim not in (0, -2):
        return NotImplemented
    parts = zip(func(one.stored, sizes, 0), func(one.scale, sizes, 0), strict=True)
    return [one._like(stored, scale) for stored, scale in parts]


def _joined(func: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    first = tensors[0]
    alike = all(
        isinstance(t, Quantised)
        and (t.bits, t.group, t.shape[1:], t.dtype, t.scale.dtype)
        == (first.bits, first.group, first.shape[1:], first.dtype, first.scale.dtype)
        for t in tensors
    )
    if not alike or dim not in (0, -2):
        return NotImplemented
    return first._like(
        torch.cat([t.stored for t in tensors]), torch.cat([t.scale for t in tensors])
    )


def _moved_to(func: Any, one: Any, **kwargs: Any) -> Any:
    if not isinstance(one, Quantised):
        return NotImplemented
    dtype = kwargs.get("dtype") or one.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    where = {name: kwargs[name] for name in ("device", "non_blocking") if name in kwargs}
    stored, scale = one.stored.to(**where, copy=True), one.scale.to(**where, copy=True)
    if dtype.itemsize < scale.dtype.itemsize:
        scale = scale.to(dtype)
    return one._like(stored, scale, dtype)


def _looked_up(func: Any, one: Any, ids: Any, *_: Any, **__: Any) -> Any:
    """Rows by their numbers ``(..., I)``: of those that are read codes are gathered, and values
    made after."""
    if not isinstance(one, Quantised):
        return NotImplemented
    rows = one.with_rows(lambda t: t.index_select(0, ids.reshape(-1)))
    return rows.values().reshape(*ids.shape, one.shape[1])


def _empty_like(func: Any, one: Any, **kwargs: Any) -> Any:
    if not isinstance(one, Quantised) or kwargs.get("dtype") not in (None, one.dtype):
        return NotImplemented
    device = kwargs.get("device")
    return one.with_rows(lambda t: torch.empty_like(t, device=device))


_MOVES: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _rowwise,
    _aten.alias.default: _rowwise,
    _aten.clone.default: lambda func, one, **_: one.with_rows(torch.clone),
    _aten.contiguous.default: lambda func, one, **_: one.with_rows(Tensor.contiguous),
    _aten.slice.Tensor: _along,
    _aten.index_select.default: _along,
    _aten.narrow.default: _along,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.cat.default: _joined,
    _aten._to_copy.default: _moved_to,
    _aten.embedding.default: _looked_up,
    _aten.empty_like.default: _empty_like,
}

__all__ = [
    "BITS",
    "GROUP",
    "Quantised",
    "code_bytes",
    "group_of",
    "matrix_bytes",
    "scale_count",
    "scale_dtype",
]
