"""What passes that leave parts of slices out ask of a graph before they change it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from passes.errors import RequiresError
from passes.graph.slices import Slice


def check_whole(
    of: str, entry: str, names: Iterable[str], known: Mapping[str, Slice], seen: set[str]
) -> None:
    """Raise :class:`RequiresError` where one of ``names`` is no slice of the graph, has a basis, or
    was ``seen`` in another entry; they are seen from then on."""
    for name in names:
        if name not in known or name in seen or known[name].basis is not None:
            raise RequiresError(
                f"{of}: {name!r} of {entry!r} is not a slice that is still whole; the graph has "
                f"{sorted(known)[:6]}"
            )
        seen.add(name)


def check_together(of: str, entry: str, *, apart: bool) -> None:
    """Raise :class:`RequiresError` where the linears stand ``apart``, each for itself."""
    if apart:
        raise RequiresError(
            f"{of}: {entry!r} stands in no graph that shows what is between its linears; leave it "
            "out"
        )


__all__ = ["check_together", "check_whole"]
