"""Launching kernels that wait for the kernels of other ranks.

Ranks that are threads of one process meet before each such launch and after it. CUDA holds up calls
that allocate, map or load something until kernels that run on any GPU of the process have ended; a
kernel would then wait for a rank whose thread is held up by that very kernel. So no kernel starts
before all ranks are about to start theirs, and no rank goes on before all have.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from epcomm.errors import CommTimeout, failed_before
from epcomm.group import Group
from epcomm.jit.compile import load_function
from epcomm.jit.kernels import KernelSpec
from epcomm.jit.launch import launch

_PHASE = "launching a kernel on all ranks"
#: Between looks whether a rank's function has failed.
_LOOK_S = 0.2


class Meeting:
    """Where the threads of a group meet; one object for all of them.

    Each pair of ranks keeps count of how often one came and meant the other to come, so that ranks
    that leave each other out for a while are in step again when they no longer do.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_times: Counter[tuple[int, int]] = Counter()

    def come(self, group: Group, others: Collection[int], timeout_s: float) -> list[int]:
        """Wait until the others have come as often as this rank; return those that did not."""
        me, end = group.rank, time.monotonic() + timeout_s

        def missing() -> list[int]:
            times = self._num_times
            return [other for other in others if times[other, me] < times[me, other]]

        with self._changed:
            for other in others:
                self._num_times[me, other] += 1
            self._changed.notify_all()
            while missing():
                left_s = end - time.monotonic()
                if left_s <= 0:
                    found = missing()
                    for other in found:  # this time does not count between the two
                        self._num_times[me, other] = self._num_times[other, me]
                    return found
                self._changed.wait(min(left_s, _LOOK_S))
                group.check()
        return []


class PeerLauncher:
    """Starts kernels that wait for peers. Construction is collective.

    Args:
        group: The ranks.
        are_threads: Whether they are threads of one process.
        timeout_s: Deadline of every meeting, in seconds.
        names: What errors call each rank.
    """

    def __init__(
        self, group: Group, are_threads: bool, timeout_s: float, names: Sequence[int]
    ) -> None:
        self._group, self._timeout_s, self._names = group, timeout_s, names
        # Threads get the very object that rank 0 made.
        self._meeting: Meeting | None = None
        if are_threads:
            self._meeting = group.allgather(Meeting(), timeout_s=timeout_s, phase=_PHASE)[0]
        self._others = [rank for rank in range(group.size) if rank != group.rank]
        self._masked: set[int] = set()
        self._missing: list[int] = []

    def set_masked(self, rank: int, is_masked: bool) -> None:
        """Leave a rank out of meetings for kernels that can do without it, or no longer."""
        (self._masked.add if is_masked else self._masked.discard)(rank)

    def launch(
        self,
        spec: KernelSpec,
        *,
        stream: Any,
        num_blocks: int,
        num_threads: int,
        params: bytes,
        shared_bytes: int = 0,
        meets: bool = True,
        can_mask: bool = False,
    ) -> None:
        """Start a kernel; what is not said here is as in `epcomm.jit.launch.launch`.

        Args:
            spec: The kernel.
            stream: A cupy.cuda.Stream, or anything with its ``ptr``.
            num_blocks: Blocks of the grid.
            num_threads: Threads of a block.
            params: The kernel's argument.
            shared_bytes: Dynamic shared memory of a block.
            meets: False where all that the kernel waits for is launched already, and while a graph
                is captured.
            can_mask: Whether the kernel goes on without ranks that do not come.

        Raises:
            CommTimeout: A rank did not come.
            TransportError: So it was at an earlier call.
        """
        meeting = self._meeting if meets else None
        if meeting is not None:
            load_function(spec, shared_bytes)
            self._meet(meeting, can_mask)
        launch(
            spec,
            stream=stream,
            num_blocks=num_blocks,
            num_threads=num_threads,
            params=params,
            shared_bytes=shared_bytes,
        )
        if meeting is not None:
            self._meet(meeting, can_mask)

    def _meet(self, meeting: Meeting, can_mask: bool) -> None:
        me = self._names[self._group.rank]
        if self._missing:
            missed = ", ".join(map(str, self._missing))
            raise failed_before(_PHASE, f"rank {me} gave up waiting for rank(s) {missed}")
        left_out = self._masked if can_mask else ()
        others = [rank for rank in self._others if rank not in left_out]
        missing = meeting.come(self._group, others, self._timeout_s)
        if missing and can_mask:
            self._masked.update(missing)  # the kernel finds out for itself, and masks them
        elif missing:
            self._missing = [self._names[rank] for rank in missing]
            raise CommTimeout(_PHASE, me, self._missing, self._timeout_s)
