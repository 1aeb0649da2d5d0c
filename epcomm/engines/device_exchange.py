"""One round of messages along a rail whose rows are copied from and to a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from epcomm import streams
from epcomm.rail_link import Bytes, Transfer


class Piece(NamedTuple):
    """One message.

    Attributes:
        num_bytes: Its size.
        copy: Queues its copy into a slot, or out of one.
    """

    num_bytes: int
    copy: Callable[[Bytes], None]


class Exchange:
    """Sends and receives, copies and MPI's messages at the same time.

    Args:
        to_host: Handle of the stream of copies into slots that are sent.
        to_device: Handle of the stream of copies out of slots that were received.
    """

    def __init__(self, to_host: int, to_device: int) -> None:
        self._to_host, self._to_device = to_host, to_device

    def run(
        self,
        transfer: Transfer,
        to: int,
        sends: Sequence[Piece],
        source: int,
        receives: Sequence[Piece],
    ) -> None:
        """Send all messages of a round to one node, and receive all from another."""
        to_fill, filling, emptying = deque(sends), deque[tuple[Any, int]](), deque[Any]()

        def pump() -> None:
            while emptying and emptying[0].done:
                emptying.popleft()
                transfer.release()
            while filling and filling[0][0].done:
                transfer.send(to, filling.popleft()[1])
            while to_fill and transfer.can_send():
                piece = to_fill.popleft()
                piece.copy(transfer.next_send_slot())
                filling.append((streams.record(self._to_host), piece.num_bytes))

        def has_room() -> bool:
            pump()
            return transfer.num_free > 0

        def has_fewer(num_left: int) -> bool:
            pump()
            return len(to_fill) + len(filling) < num_left

        for piece in receives:
            transfer.wait(has_room, source)
            piece.copy(transfer.receive(pump))
            emptying.append(streams.record(self._to_device))
        while to_fill or filling:
            # Each message has a deadline of its own.
            transfer.wait(partial(has_fewer, len(to_fill) + len(filling)), to)
        transfer.finish()
        for event in emptying:
            event.synchronize()
            transfer.release()
