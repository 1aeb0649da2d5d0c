"""Which stream each call of an engine on a GPU runs on, and what it waits for there.

All calls of an engine stay in one order, whatever streams they run on.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from epcomm import streams
from epcomm.engines.base import StreamOrder


class StreamHandle(NamedTuple):
    """A caller's stream, as far as launching needs one."""

    ptr: int


class CallStreams:
    """Orders the calls of one engine: after one another, and against their callers' streams.

    Args:
        comm_stream: The communication stream, with its handle as ``ptr``.

    Attributes:
        stream: Where the call in hand runs, with its handle as ``ptr``.
        is_capturing: Whether that call is captured in a graph.
    """

    def __init__(self, comm_stream: Any) -> None:
        self._comm_stream = comm_stream
        self.stream: Any = comm_stream
        self.is_capturing = False
        # Where the last call ended; None and any stream before the first.
        self._last_event: Any = None
        #: For calls whose event nobody else holds: one is made once, and recorded again.
        self._own_event: Any = None
        self._last_ptr = 0
        #: Events of earlier calls, and what must live until they have passed.
        self._kept: deque[tuple[Any, Any]] = deque()
        #: The same of captured calls, whose graphs may be replayed at any time.
        self._captured: list[tuple[Any, Any]] = []

    def begin(self, order: StreamOrder, is_capturing: bool) -> None:
        """Choose the stream of the next call, and make it wait for what comes before the call.

        A call that the caller's stream waits for anyway runs on that stream: it saves two events
        and their latency.

        Args:
            order: Against the caller's streams.
            is_capturing: Whether the caller's current stream is being captured.
        """
        # Nothing is asked of events during a capture: CUDA may take it for a mistake.
        while not is_capturing and self._kept and self._kept[0][0].done:
            self._kept.popleft()
        self.is_capturing = is_capturing
        current, previous = order.current_stream, order.previous_event
        waits = current is not None and order.waits_for_current
        if current is not None and waits and previous is None and not order.is_async:
            if self.stream.ptr != current:
                self.stream = StreamHandle(current)
        else:
            self.stream = self._comm_stream
            if previous is not None:
                previous.stream_wait(self.stream.ptr)
            if current is not None and waits:
                streams.wait(self.stream.ptr, streams.record(current))
        is_elsewhere = self._last_event is not None and self._last_ptr != self.stream.ptr
        if is_elsewhere and not is_capturing:
            streams.wait(self.stream.ptr, self._last_event)

    def end(self, order: StreamOrder, keep: Any, own: Any = None) -> Any:
        """Record the end of the call in hand; make the caller's stream wait where it is to.

        Args:
            order: As given to `begin`.
            keep: What must live until the call is done, where the caller does not wait here.
            own: What must live until then in any case; None stands for nothing.

        Returns:
            The event that was recorded; where the caller waits here, it may be recorded again.
        """
        ptr = self.stream.ptr
        is_held = self.is_capturing or order.is_async or own is not None
        event = streams.record(ptr) if is_held else self._record_again(ptr)
        if self.is_capturing:
            # A replay uses the same memory again, for as long as the graph lives.
            self._captured.append((event, (keep, own)))
        else:
            self._last_event, self._last_ptr = event, ptr
            if is_held:
                self._kept.append((event, (keep if order.is_async else None, own)))
        current = order.current_stream
        if current is not None and not order.is_async and ptr != current:
            streams.wait(current, event)
        return event

    def _record_again(self, stream: int) -> Any:
        if self._own_event is None:
            self._own_event = streams.record(stream)
        else:
            streams.record_again(self._own_event, stream)
        return self._own_event

    def wait_last(self) -> None:
        """Wait on the host for the last call: for its event, as its stream may be gone by now."""
        if self._last_event is not None:
            self._last_event.synchronize()

    def forget(self) -> None:
        """Let go of all that is kept; all calls are done, and no graph is replayed any more."""
        self._kept.clear()
        self._captured.clear()
        self._last_event = self._own_event = None
