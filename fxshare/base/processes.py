"""Several processes that run the same program, each on a part of the work (SPMD).

Inside of a process group of torch.distributed a call of ours is one of all its ranks: every rank
comes to the same result. They exchange at points that all of them pass. Each exchange says first
how everybody is, so that a rank that fails ends all of them with its reason; who is killed closes
its connections, which the others notice in their next exchange.

What is exchanged is on the CPU and goes over a gloo group of our own, whatever the caller's is.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from fxshare.errors import FxShareError, ProcessError

T = TypeVar("T")
R = TypeVar("R")
_MEETING = dt.timedelta(minutes=5)
"""How long the first rank waits for the last one to call."""
_WORKING = dt.timedelta(days=1)
"""How long one waits for another that is alive: for its share of the work."""
_PASSING = dt.timedelta(minutes=5)
"""How long one waits for another in the middle of a pass, which all have begun together."""
_NAMING = 3.0
"""Seconds to find out who it was that is gone."""
_CLOCK = 5.0
_SHOWN = 60


@dataclass(frozen=True)
class _Status:
    """What a rank brings to an exchange: a value, or why it can go no further and whose fault that
    is. ``at`` says which exchange it takes this one for."""

    at: str
    value: Any = None
    error: str = ""
    of: int = 0


@dataclass(frozen=True)
class _Peer:
    """A process on this machine."""

    rank: int
    pid: int
    created: float

    def is_alive(self) -> bool:
        """Whether it still runs; the number of one that ended may be another's by now."""
        try:
            process = psutil.Process(self.pid)
            ended = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            # clocks of virtual machines are set, and this is reckoned from when they started
            same = abs(process.create_time() - self.created) < _CLOCK
            return same and process.status() not in ended
        except psutil.Error:
            return False


class Processes:
    """The ranks that a call runs on; :data:`ALONE` is one by itself, which exchanges nothing."""

    def __init__(self, group: Any = None, beside: Any = None) -> None:
        self._group, self._beside = group, beside
        self._further: Any = None
        self._passing = False
        self._over = False
        self.rank, self.size = 0, 1
        self._peers: tuple[_Peer, ...] = ()
        self._bulletin = ""
        if group is None:
            return
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        own = psutil.Process()
        here = secrets.token_hex(8), socket.gethostname(), own.pid, own.create_time()
        met = self.gather(here, "the start")
        self._bulletin = f"fxshare/{met[0][0]}"
        peers = [_Peer(rank, pid, born) for rank, (_, host, pid, born) in enumerate(met)]
        # of two containers with one name the other's processes are not seen
        self._peers = tuple(
            one
            for one, (_, host, _, _) in zip(peers, met, strict=True)
            if one.rank != self.rank and host == here[1] and one.is_alive()
        )

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    @property
    def on_this_machine(self) -> int:
        """How many of the ranks are on this machine."""
        return 1 + len(self._peers)

    def gather(self, value: T, at: str = "an exchange") -> list[T]:
        """The values of all ranks, in their order. ``at`` has to be the same on all.

        Raises :class:`ProcessError` where a rank has failed or is gone.
        """
        if self.size == 1:
            return [value]
        found = self._exchanged(_Status(at, value))
        for rank, one in enumerate(found):
            if one.at != at:
                raise ProcessError(
                    f"rank {rank} is at {one.at} and rank {self.rank} at {at}: every rank has to "
                    "call the same with the same arguments",
                    rank=rank,
                )
        return [one.value for one in found]

    def broadcast(self, value: T, at: str = "an exchange") -> T:
        """The value of rank 0."""
        return self.gather(value if self.is_first else None, at)[0]  # type: ignore[return-value]

    def agree(self, values: Mapping[str, object]) -> None:
        """Raise :class:`ProcessError`, on every rank the same, where a value is not equal on all of
        them: it names the value and a rank that differs from most."""
        if self.size == 1:
            return
        found = self.gather(dict(values), "what is given")
        for name in values:
            given = [repr(one.get(name)) for one in found]
            usual, _ = Counter(given).most_common(1)[0]
            for rank, one in enumerate(given):
                if one != usual:
                    other = given.index(usual)
                    raise ProcessError(
                        f"rank {rank} has another {name} than rank {other}: {_short(one)}, not "
                        f"{_short(usual)}; give every rank the same, they divide the work "
                        "themselves",
                        rank=rank,
                    )

    def spread(
        self,
        items: Sequence[T],
        compute: Callable[[T], R],
        *,
        owner: Callable[[T], int] | None = None,
        at: str = "an exchange",
    ) -> list[R]:
        """``compute`` of every item, in order; each is computed by one rank: by turns, or by the
        ``owner`` modulo the number of ranks.

        An error of ours that one item raises is raised on all ranks alike, that of the first item
        that has one.
        """
        if self.size == 1:
            return [compute(item) for item in items]
        made: dict[int, R] = {}
        failed: tuple[int, FxShareError] | None = None
        for number, item in enumerate(items):
            if (number if owner is None else owner(item)) % self.size != self.rank:
                continue
            self.look()
            try:
                made[number] = compute(item)
            except ProcessError:
                raise
            except FxShareError as error:
                failed = number, error
                break
        told = None if failed is None else (failed[0], type(failed[1]), str(failed[1]))
        everybody = self.gather((made, told), f"{at} of {len(items)}")
        errors = sorted((one for _, one in everybody if one is not None), key=lambda one: one[0])
        if errors:
            first, kind, text = errors[0]
            raise failed[1] if failed is not None and failed[0] == first else kind(text)
        return [_of(everybody, number) for number in range(len(items))]

    def total(self, part: Tensor) -> Tensor:
        """The sum over all ranks, added in their order: the same bits on every rank."""
        if self.size == 1:
            return part
        whole = torch.zeros(part.shape, dtype=part.dtype, device="cpu")
        own = part.detach().cpu().contiguous()
        for rank in range(self.size):
            whole += self._sent(own if rank == self.rank else torch.empty_like(own), rank)
        return whole.to(part.device)

    def sent(self, tensors: Sequence[Tensor] | None, source: int) -> list[Tensor]:
        """The tensors of one rank, on the CPU where they come from another. They lie in memory as
        theirs do: products round by how their factors lie."""
        if self.size == 1:
            assert tensors is not None
            return list(tensors)
        told = [(t.shape, torch.empty_like(t).stride(), t.dtype) for t in tensors or ()]
        shapes = self.gather(told, "tensors")[source]
        if self.rank == source:
            assert tensors is not None
            for one in tensors:
                dense = torch.empty_like(one, device="cpu").copy_(one)
                self._sent(dense.as_strided((one.numel(),), (1,)), source)
            return list(tensors)
        return [
            self._sent(_flat(shape.numel(), dtype), source).as_strided(shape, stride)
            for shape, stride, dtype in shapes
        ]

    def further(self, backend: str) -> Any:
        """A group of all ranks for collectives of torch's own, for as long as there is work."""
        self._further = self._further or dist.new_group(backend=backend, timeout=_PASSING)
        return self._further

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Collectives of torch's own on :meth:`further`, which all ranks begin together.

        Raises :class:`ProcessError` where one fails since another rank has ended, which is noticed
        as its process does, or after five minutes.
        """
        self.gather(None, "a pass")
        self._passing = True
        try:
            yield
        except RuntimeError as error:
            said = str(error).lower()
            if isinstance(error, dist.DistError) or "connection" in said or "timed out" in said:
                raise self._lost(error) from error
            raise
        self._passing = False

    def look(self) -> None:
        """Raise :class:`ProcessError` where another rank has failed or is gone, without waiting for
        anybody; to be called now and then in long work."""
        if self.size > 1 and (reason := self._known()) is not None:
            raise reason

    def leave(self, error: BaseException) -> None:
        """Tell the others why this rank goes no further, and wait until they know."""
        if self.size == 1 or self._over:
            return
        known = isinstance(error, ProcessError) and error.rank is not None
        of = error.rank if isinstance(error, ProcessError) and known else self.rank
        text = str(error) if known else f"{type(error).__name__}: {error}".rstrip(": ")
        assert of is not None
        with contextlib.suppress(Exception):
            if of == self.rank:
                _store().set(self._bulletin, f"{of} {text}")
            if not self._passing:  # they wait in a collective of torch's own there
                self._exchanged(_Status("its end", None, text, of))
        self._over = True

    def close(self) -> None:
        """End the group."""
        self._over = True
        for group in (self._group, self._beside, self._further):
            if group is not None:
                with contextlib.suppress(Exception):
                    dist.destroy_process_group(group)

    def _exchanged(self, status: _Status) -> list[_Status]:
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, status, group=self._group)
        except Exception as error:
            self._over = True
            raise self._lost(error) from error
        failed = {one.of: one.error for one in found if one.error}
        # of who failed by itself, rather than of who has heard of it
        failed |= {
            rank: one.error for rank, one in enumerate(found) if one.error and one.of == rank
        }
        if failed and not status.error:
            self._over = True
            raise _failure(*min(failed.items()))
        return found

    def _sent(self, tensor: Tensor, source: int) -> Tensor:
        try:
            dist.broadcast(tensor, group=self._group, group_src=source)
        except Exception as error:
            self._over = True
            raise self._lost(error) from error
        return tensor

    def _known(self) -> ProcessError | None:
        """Whose failure or end is known by now."""
        with contextlib.suppress(Exception):  # a store is with rank 0, which may be who is gone
            if self._bulletin and _store().check([self._bulletin]):
                rank, _, text = _store().get(self._bulletin).decode().partition(" ")
                return _failure(int(rank), text)
        for one in self._peers:
            if not one.is_alive():
                return ProcessError(
                    f"rank {one.rank} (process {one.pid}) is gone without a word: it was killed, "
                    "by the system where memory ran out, or ended itself",
                    rank=one.rank,
                    gone=True,
                )
        return None

    def _lost(self, error: Exception) -> ProcessError:
        """Who it was that a connection was lost to."""
        until = time.monotonic() + _NAMING
        while time.monotonic() < until:
            known = self._known()
            if known is not None:
                return known
            time.sleep(0.05)
        said = next(iter(str(error).splitlines()), "")
        return ProcessError(
            f"the connection to another rank was lost, which says nothing of why ({said}); look at "
            "what it wrote",
            gone=True,
        )


def _flat(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="cpu")


def _of(everybody: Sequence[tuple[dict[int, R], object]], number: int) -> R:
    """What whoever computed it found of an item."""
    return next(made[number] for made, _ in everybody if number in made)


ALONE = Processes()
_HERE: ContextVar[Processes] = ContextVar("processes", default=ALONE)


def here() -> Processes:
    """The ranks that this call runs on."""
    return _HERE.get()


@contextlib.contextmanager
def in_step() -> Iterator[Processes]:
    """Run what is inside on all ranks of the process group that is initialised, if there is one.

    Nobody goes on before all have come to the end. Raises :class:`ProcessError` where another rank
    fails, is gone, or does not call.
    """
    if here().size > 1 or not (dist.is_available() and dist.is_initialized()):
        yield here()
        return
    if dist.get_world_size() == 1:
        yield ALONE
        return
    together = Processes(*_met())
    token = _HERE.set(together)
    try:
        yield together
        together.gather(None, "the end")
    except BaseException as error:
        together.leave(error)
        raise
    finally:
        _HERE.reset(token)
        together.close()


def _met() -> tuple[Any, Any]:
    """A group of all ranks, for as long as there is work; and one whose time is short, from which
    who waits for a rank that does not call has learnt it. That one ends with the other: a rank may
    still be connecting when the next has done so.
    """
    try:
        short = dist.new_group(backend="gloo", timeout=_MEETING)
        return dist.new_group(backend="gloo", timeout=_WORKING), short
    except Exception as error:
        said = next(iter(str(error).splitlines()), "")
        raise ProcessError(
            f"not every rank of the process group has called within {_MEETING.total_seconds():g} s "
            f"({said}); call it on every rank with the same arguments, or before "
            "torch.distributed.init_process_group"
        ) from error


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _failure(rank: int, text: str) -> ProcessError:
    return ProcessError(text if text.startswith("rank ") else f"rank {rank}: {text}", rank=rank)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


__all__ = ["ALONE", "Processes", "here", "in_step"]
