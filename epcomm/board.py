"""The board: a few cells a rank in shared memory, with which the host engine's ranks keep step.

Each rank writes only its own row and reads all. A *round* is one collective call. A rank posts
its header and then its ARRIVED cell; it posts STAGED when its staged rows may be read.

Ordering: a header is written before the ARRIVED cell that announces it, rows before STAGED.
Headers have two slots, used in turn: a rank that posts round n + 2 has seen all ranks arrive at
round n + 1, and a rank arrives there only when done with the headers, and the staged rows, of
round n. So neither is ever overwritten while it is read, with no second barrier.

Signs of life: a rank that waits for one that died comes late itself, by a whole deadline. In calls
that mask such ranks, whoever waits changes its SIGN cell again and again, and only ranks that have
not come and show no sign for a deadline are masked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epcomm.arrays import DTYPES
from epcomm.errors import CommTimeout, RankMismatch, TransportError, failed_before
from epcomm.group import Group
from epcomm.slab import HostSlabs
from epcomm.waiting import Deadline, wait_until

Words = npt.NDArray[np.int64]

ARRIVED, STAGED, LOW_LATENCY_SENT, LOW_LATENCY_RECEIVED, FAILED, SIGN = range(6)
_NUM_CELLS = 8
_NUM_SLOTS = 2
_SIGNS_PER_DEADLINE = 8
#: Words of a header before the counts: the round, the call, and the values that must agree.
_NUM_VALUES = 30


@dataclass(frozen=True)
class Call:
    """A collective call that all ranks must make alike.

    Attributes:
        code: Number of the call, unique.
        name: As users know it.
        agreed: Names of the values that every rank must pass alike.
        own: Names of further values that may differ, such as ``num_tokens``.
    """

    code: int
    name: str
    agreed: tuple[str, ...]
    own: tuple[str, ...] = ()


class Board:
    """The cells of all ranks of a group. Collective.

    Args:
        group: Ranks of one host.
        num_counts: Counts that a header has room for.
        shm_dir: See `HostSlabs`.
        timeout_s: Deadline of every wait, in seconds.
        names: What errors call the ranks, where these are some of a larger group.
    """

    def __init__(
        self,
        group: Group,
        num_counts: int,
        shm_dir: str | None,
        timeout_s: float,
        names: Sequence[int] | None = None,
    ) -> None:
        self._group = group
        self._names = tuple(range(group.size) if names is None else names)
        self._timeout_s = timeout_s
        self._num_words = 2 + _NUM_VALUES + num_counts
        width = _NUM_CELLS + _NUM_SLOTS * self._num_words
        sizes = [width * group.size * 8] + [0] * (group.size - 1)
        self._slabs = HostSlabs(group, sizes, shm_dir, timeout_s)
        rows = self._slabs.views[0].view(np.int64).reshape(group.size, width)
        self._cells: Words = rows[:, :_NUM_CELLS]
        self._headers: Words = rows[:, _NUM_CELLS:].reshape(group.size, _NUM_SLOTS, -1)
        self._round = 0
        self._is_lost = False
        self._has_failed = False
        self._fence = threading.Lock()
        self._next_sign_s = 0.0
        self.masked = np.zeros(group.size, bool)

    def close(self) -> None:
        """Let go of the memory."""
        self._slabs.close()

    def agree(
        self,
        call: Call,
        values: Mapping[str, int],
        counts: Words | None = None,
        on_missing: Callable[[Sequence[int]], None] | None = None,
    ) -> tuple[dict[str, Words], Words]:
        """Begin a call: exchange headers and hold all ranks to the same arguments. Collective.

        Args:
            call: The call.
            values: A number for each name in ``call.agreed`` and ``call.own``.
            counts: ``[num_counts] int64`` more numbers for all to see, or None.
            on_missing: See `wait`.

        Returns:
            Each value ``[num_ranks]`` by name, and the counts ``[num_ranks, num_counts]``. Copies.

        Raises:
            RankMismatch: Ranks differ; all raise the same, and the board can be used on.
            CommTimeout: Ranks did not come; the board is unusable from then on.
        """
        if self._is_lost:
            self._raise_lost(call.name)
        if on_missing is None and self.masked.any():
            ranks = ", ".join(str(rank) for rank in np.flatnonzero(self.masked))
            raise TransportError(
                f"{call.name}: rank(s) {ranks} are masked, and only low-latency calls go on "
                "without a rank. Unmask them if they are back, or make a Buffer of those left."
            )
        names = call.agreed + call.own
        words = np.array([self._round + 1, call.code, *(values[name] for name in names)], np.int64)
        self._round += 1  # only now: what could fail on this rank alone lies behind
        slot = self._round % _NUM_SLOTS
        header = self._headers[self._group.rank, slot]
        header[: len(words)] = words
        if counts is not None:
            header[2 + _NUM_VALUES : 2 + _NUM_VALUES + len(counts)] = counts
        self.post(ARRIVED, self._round)
        self.wait(ARRIVED, self._round, f"{call.name}: arrival", on_missing)
        headers = self._headers[:, slot].copy()
        self._hold_to(call, headers)
        by_name = {name: headers[:, 2 + i] for i, name in enumerate(names)}
        return by_name, headers[:, 2 + _NUM_VALUES :]

    def _hold_to(self, call: Call, headers: Words) -> None:
        here = np.flatnonzero(~self.masked)
        if not len(here):
            return  # every rank is masked, this one included
        if (headers[here, 0] != self._round).any():
            self._raise_lost(call.name)
        check_agreement(call, [self._names[rank] for rank in here], headers[here, 1:])

    def check_in_step(self, name: str) -> None:
        """Raise TransportError where others, which masked this rank, are two calls ahead.

        They then write again what this rank has just read.
        """
        if (self._cells[~self.masked, ARRIVED] > self._round + 1).any():
            self._raise_lost(name)

    def _raise_lost(self, name: str) -> None:
        self._is_lost = True
        raise TransportError(
            f"{name}: rank {self._group.rank} did not take part in time, so the others went on "
            "without it. Destroy this Buffer on every rank and make a new one."
        )

    def post(self, cell: int, value: int) -> None:
        """Write one of this rank's cells, after all that this rank wrote before."""
        # NOTE: Python has no fence of its own. Two lock round trips order earlier stores before
        # the next one on weakly ordered CPUs as well (release, then acquire of the same lock).
        for _ in range(2):
            with self._fence:
                pass
        self._cells[self._group.rank, cell] = value

    def post_staged(self) -> None:
        """Tell all that this rank's staged rows of this round may be read."""
        self.post(STAGED, self._round)

    def wait_staged(self, phase: str) -> None:
        """Wait until every rank has staged its rows of this round."""
        self.wait(STAGED, self._round, phase)

    def wait(
        self,
        cell: int,
        value: int,
        phase: str,
        on_missing: Callable[[Sequence[int]], None] | None = None,
        waited_us: Words | None = None,
    ) -> None:
        """Wait until every rank that is not masked has posted at least a value.

        Args:
            cell: Which cell.
            value: What to wait for.
            phase: What is waited for, named in the error.
            on_missing: In place of failing, called with the missing ranks that have shown no sign
                of life for a deadline; it masks them.
            waited_us: ``[num_ranks] int64``; the microseconds waited for each are added; or None.

        Raises:
            CommTimeout: Ranks are missing, or a peer gave up; all later waits fail as well.
        """
        column = self._cells[:, cell]
        began = time.perf_counter()
        seen = np.zeros(self._group.size, bool)

        def is_ready() -> bool:
            self._group.check()
            self.check_failed(phase)
            if on_missing is not None:
                self._show_sign()
            here = (column >= value) | self.masked
            if waited_us is not None:
                waited_us[here & ~seen] += round((time.perf_counter() - began) * 1e6)
                seen[:] = here
            return bool(here.all())

        def missing() -> list[int]:
            return [int(rank) for rank in np.flatnonzero((column < value) & ~self.masked)]

        if on_missing is not None:
            self._wait_for_living(is_ready, missing, on_missing)
            return
        if wait_until(is_ready, Deadline(self._timeout_s)):
            return
        named = [self._names[rank] for rank in missing()]
        self.fail(named[0])
        raise CommTimeout(phase, self._names[self._group.rank], named, self._timeout_s)

    def _wait_for_living(
        self,
        is_ready: Callable[[], bool],
        missing: Callable[[], list[int]],
        on_missing: Callable[[Sequence[int]], None],
    ) -> None:
        # Ranks out of step, which wait for each other, end after as many deadlines as there are
        # ranks. One dead rank makes no wait so long: each of the others waits for it once.
        num_silent = np.zeros(self._group.size, np.int64)
        for _ in range(self._group.size * _SIGNS_PER_DEADLINE):
            signs = self._cells[:, SIGN].copy()
            if wait_until(is_ready, Deadline(self._timeout_s / _SIGNS_PER_DEADLINE)):
                return
            num_silent = np.where(self._cells[:, SIGN] == signs, num_silent + 1, 0)
            on_missing([rank for rank in missing() if num_silent[rank] >= _SIGNS_PER_DEADLINE])
        on_missing(missing())

    def _show_sign(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_sign_s:
            self._next_sign_s = now_s + self._timeout_s / _SIGNS_PER_DEADLINE
            self._cells[self._group.rank, SIGN] += 1

    def fail(self, missed: int) -> None:
        """Make all ranks' waits, and all later ones, fail: this rank gave up waiting for another.

        Args:
            missed: The rank that was waited for, by its name.
        """
        self._has_failed = True
        self.post(FAILED, missed + 1)

    def check_failed(self, phase: str) -> None:
        """Raise what `wait` would if a rank has failed."""
        if self._cells[:, FAILED].any():
            self._raise_failed(phase)

    def _raise_failed(self, phase: str) -> None:
        failed = int(np.flatnonzero(self._cells[:, FAILED])[0])
        missed = int(self._cells[failed, FAILED]) - 1
        who, me = self._names[failed], self._names[self._group.rank]
        why = f"rank {who} gave up waiting for rank {missed}"
        if self._has_failed:
            raise failed_before(phase, why)
        self._has_failed = True
        if missed != me:
            raise CommTimeout(phase, me, [missed], self._timeout_s, gave_up=who)
        raise TransportError(
            f"{phase}: {why}, this one, which did not take part in time. Destroy this Buffer on "
            "every rank and make a new one."
        )


def check_agreement(call: Call, ranks: Sequence[int], headers: Words) -> None:
    """Hold ranks to the same call and the same agreed values.

    Args:
        call: This rank's.
        ranks: The ranks whose headers these are.
        headers: ``[len(ranks), ...]``: the call's code, then its values.

    Raises:
        RankMismatch: Ranks differ; all raise the same.
    """
    for column, name in enumerate(("call", *call.agreed)):
        seen = headers[:, column]
        if (seen != seen[0]).any():
            shown = ", ".join(
                f"rank {rank}: {_shown(name, value)}"
                for rank, value in zip(ranks[:16], seen, strict=False)
            )
            # The message is the same on every rank, so it cannot begin with its own call.
            where, rule = call.name, f"same call with the same {name}"
            if name == "call":
                where, rule = "Buffer", "same calls in the same order"
            raise RankMismatch(
                f"{where}: ranks disagree on {name} ({shown}). Every rank must make the {rule}. "
                "Nothing was sent."
            )


CALLS: dict[int, Call] = {}


def define_call(name: str, agreed: tuple[str, ...], own: tuple[str, ...] = ()) -> Call:
    """Make a `Call` with a code of its own; while modules load, so alike on every rank."""
    if len(agreed + own) > _NUM_VALUES:
        raise ValueError(
            f"{name} has {len(agreed + own)} values, headers have room for {_NUM_VALUES}"
        )
    call = Call(len(CALLS) + 1, name, agreed, own)
    CALLS[call.code] = call
    return call


def _shown(name: str, value: int) -> str:
    if name == "call" and value in CALLS:
        return CALLS[value].name
    if value == -1:
        return "none"
    if name.endswith("dtype") and 0 <= value < len(DTYPES):
        return DTYPES[value].name
    return str(value)
