"""Messages along a rail: non-blocking MPI requests over a little memory that is used in turn.

A call's messages have a fixed order, the same on both sides of each pair, and a rank has a *window*
of them under way each way. A message is received into a slot of this rank's staging memory, and is
sent from one. Nothing is sent unasked: both sides know every message's size beforehand.

MPI moves messages on while it is called, so `Transfer.progress` is called wherever the host waits.
A helper thread that does so was measured to be no faster, see docs/performance.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epcomm.arrays import empty_aligned
from epcomm.errors import CommTimeout, TransportError
from epcomm.group import MpiGroup
from epcomm.waiting import Deadline, poll_until

#: ``[n] uint8``; on a GPU an array of CuPy, which can be cut like NumPy's and given to MPI.
Bytes = npt.NDArray[np.uint8]

#: Requests that were given up, with their memory: MPI may still read and write it.
_abandoned: list[Any] = []


@dataclass(frozen=True)
class Message:
    """One message that comes: from which node, and its size."""

    node: int
    num_bytes: int


@dataclass(frozen=True)
class Window:
    """The slots of a transfer.

    Attributes:
        slot_bytes: Bytes of the largest message.
        num_send: Messages that may be under way from here.
        num_receive: Messages that may be under way to here, or received and not yet released.
    """

    slot_bytes: int
    num_send: int
    num_receive: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return (self.num_send + self.num_receive) * self.slot_bytes


def empty_bytes(num_bytes: int) -> Bytes:
    """Return plain memory."""
    return empty_aligned((num_bytes,), np.dtype(np.uint8))


class RailLink:
    """This rank's staging memory and its way to its rail peers.

    Args:
        rail: The ranks of the rail, by node; for rows alone.
        ranks: Their numbers in the whole group, for errors.
        timeout_s: Deadline of every wait, in seconds.
        num_bytes: Staging memory to reserve; it grows when a call needs more.
        check_failed: Called with the phase while waiting; raises if a rank of the node has failed.
        fail: Called with the rank that was waited for in vain.
        empty: Makes the staging memory: so many bytes, of which MPI reads and writes any part.
    """

    def __init__(
        self,
        rail: MpiGroup,
        ranks: Sequence[int],
        timeout_s: float,
        num_bytes: int,
        check_failed: Callable[[str], None],
        fail: Callable[[int], None],
        empty: Callable[[int], Bytes] = empty_bytes,
    ) -> None:
        self._rail = rail
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._check_failed = check_failed
        self._fail = fail
        self._empty = empty
        self.memory = empty(num_bytes)
        self._current: Transfer | None = None

    @contextmanager
    def transfer(
        self,
        phase: str,
        window: Window,
        receives: Sequence[Message],
        memory: Bytes | None = None,
    ) -> Iterator[Transfer]:
        """Give the messages of one call. All must be sent and received when the block ends.

        Args:
            phase: What the messages carry, for errors.
            window: The slots.
            receives: All messages that will come, in order.
            memory: Where the slots are; None takes the staging memory.
        """
        if memory is None:
            if self.memory.size < window.num_bytes:
                self.memory = self._empty(window.num_bytes)
            memory = self.memory
        self._current = Transfer(self, phase, window, receives, memory)
        try:
            yield self._current
            self._current.finish()
        except BaseException:
            self._current.abandon()
            raise
        finally:
            self._current = None

    def close(self) -> None:
        """Let go of the memory."""
        self.memory = empty_bytes(0)

    def progress(self) -> None:
        """Let MPI move on what is under way."""
        if self._current is not None:
            self._current.progress()
        else:
            self.poll()

    def poll(self) -> None:
        """Let MPI move on what is no longer in hand: it may not have left yet."""
        self._rail.poll()

    def begin_send(self, node: int, memory: Bytes, phase: str) -> Any:
        """Begin to send to the rail peer in a node; return the request."""
        with self._mpi_errors(node, phase):
            return self._rail.send(memory, node)

    def begin_receive(self, node: int, memory: Bytes, phase: str) -> Any:
        """Begin to receive from the rail peer in a node; return the request."""
        with self._mpi_errors(node, phase):
            return self._rail.receive(memory, node)

    def is_done(self, request: Any, node: int, phase: str) -> bool:
        """Return whether a request is done; lets MPI move on all that is under way."""
        with self._mpi_errors(node, phase):
            return bool(request.Test())

    def wait(self, is_ready: Callable[[], bool], node: int, phase: str) -> None:
        """Wait for a rail peer, and look after the own node meanwhile."""

        def is_ready_or_failed() -> bool:
            if is_ready():
                return True
            self._check_failed(phase)
            return False

        if not poll_until(is_ready_or_failed, Deadline(self._timeout_s)):
            peer = self._ranks[node]
            self._fail(peer)
            me = self._ranks[self._rail.rank]
            detail = f"the rail peer in node {node}"
            raise CommTimeout(phase, me, [peer], self._timeout_s, detail)

    @contextmanager
    def _mpi_errors(self, node: int, phase: str) -> Iterator[None]:
        from mpi4py import MPI

        try:
            yield
        except MPI.Exception as error:
            peer = self._ranks[node]
            self._fail(peer)
            raise TransportError(
                f"{phase}: MPI failed between rank {self._ranks[self._rail.rank]} and its rail "
                f"peer, rank {peer} in node {node}: {error}. Look first at what that rank printed; "
                "then destroy this Buffer on every rank and make a new one."
            ) from error


class Transfer:
    """The messages of one call: made by `RailLink.transfer`."""

    def __init__(
        self,
        link: RailLink,
        phase: str,
        window: Window,
        receives: Sequence[Message],
        memory: Bytes,
    ) -> None:
        self._link = link
        self._phase = phase
        self._memory = memory
        slots = memory[: window.num_bytes].reshape(-1, max(1, window.slot_bytes))
        self._send_slots, self._receive_slots = slots[: window.num_send], slots[window.num_send :]
        self._sends: deque[tuple[Any, int]] = deque()
        self._num_claimed = 0
        self._num_sent = 0
        self._to_come = receives
        self._posted: deque[Any] = deque()
        self._num_received = 0
        self._num_released = 0
        self._post()

    # --- receiving -----------------------------------------------------------------------------

    def _post(self) -> None:
        """Begin to receive all messages for which there is a slot."""
        end = min(len(self._to_come), self._num_released + len(self._receive_slots))
        for i in range(self._num_received + len(self._posted), end):
            message = self._to_come[i]
            memory = self._receive_slot(i)[: message.num_bytes]
            self._posted.append(self._link.begin_receive(message.node, memory, self._phase))

    def _receive_slot(self, i: int) -> Bytes:
        slot: Bytes = self._receive_slots[i % len(self._receive_slots)]
        return slot

    def receive(self, pump: Callable[[], None] | None = None) -> Bytes:
        """Wait for the next message; return its slot, valid until it is released.

        Args:
            pump: Called again and again meanwhile, to send what can be sent; or None.
        """
        node = self._to_come[self._num_received].node
        request = self._posted[0]

        def is_here() -> bool:
            if pump is not None:
                pump()
            return self._link.is_done(request, node, self._phase)

        self._link.wait(is_here, node, self._phase)
        self._posted.popleft()
        self._num_received += 1
        return self._receive_slot(self._num_received - 1)

    def wait(self, is_ready: Callable[[], bool], node: int) -> None:
        """Wait for something that a rail peer has part in."""
        self._link.wait(is_ready, node, self._phase)

    @property
    def num_free(self) -> int:
        """Slots that hold no message which was received and not released."""
        return len(self._receive_slots) - (self._num_received - self._num_released)

    def release(self, count: int = 1) -> None:
        """Give back the slots of the messages that were received first."""
        self._num_released += count
        self._post()

    # --- sending -------------------------------------------------------------------------------

    def can_send(self) -> bool:
        """Return whether a slot is free."""
        self._drop_sent()
        num_filling = self._num_claimed - self._num_sent
        return len(self._sends) + num_filling < len(self._send_slots)

    def _drop_sent(self) -> None:
        while self._sends and self._link.is_done(*self._sends[0], self._phase):
            self._sends.popleft()

    def next_send_slot(self) -> Bytes:
        """Wait until a slot is free, and return it: to be filled and sent, in the order of calls.

        Several may be in hand at a time where `can_send` has said so before each.
        """
        if not self.can_send():
            self._link.wait(self.can_send, self._sends[0][1], self._phase)
        slot: Bytes = self._send_slots[self._num_claimed % len(self._send_slots)]
        self._num_claimed += 1
        return slot

    def send(self, node: int, num_bytes: int) -> None:
        """Begin to send the first bytes of the first slot in hand."""
        memory = self._send_slots[self._num_sent % len(self._send_slots)][:num_bytes]
        self._sends.append((self._link.begin_send(node, memory, self._phase), node))
        self._num_sent += 1

    # --- both ----------------------------------------------------------------------------------

    def progress(self) -> None:
        """Let MPI move on what is under way."""
        if self._sends:
            self._drop_sent()
        elif self._posted:
            node = self._to_come[self._num_received].node
            self._link.is_done(self._posted[0], node, self._phase)
        else:
            self._link.poll()

    def finish(self) -> None:
        """Wait until all that was sent may be overwritten."""
        while not self._all_sent():
            self._link.wait(self._all_sent, self._sends[0][1], self._phase)

    def _all_sent(self) -> bool:
        self._drop_sent()
        return not self._sends

    def abandon(self) -> None:
        """Leave what is under way to MPI, which may still use its memory."""
        requests = [request for request, _ in self._sends] + list(self._posted)
        if requests:
            _abandoned.append((self._memory, requests))
            self._link.close()
