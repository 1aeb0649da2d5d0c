"""Events: how a caller orders its own work after a transfer."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from epcomm import streams


class EventHandle:
    """A moment on the caller's current stream, recorded when this is made.

    Where no framework uses a GPU there is nothing to record, and waiting does nothing.
    """

    def __init__(self) -> None:
        stream = streams.current_stream()
        self._event = None if stream is None else streams.record(stream)
        self._stream_of: Callable[[], int | None] = streams.current_stream

    @classmethod
    def passed(cls) -> EventHandle:
        """Return an event that has passed already."""
        return cls.of(None, streams.current_stream)

    @classmethod
    def of(cls, event: Any, stream_of: Callable[[], int | None]) -> EventHandle:
        """Return the handle of a recorded event.

        Args:
            event: From `epcomm.streams.record`, or None.
            stream_of: Gives the stream that `current_stream_wait` makes wait.
        """
        handle = cls.__new__(cls)
        handle._event = event
        handle._stream_of = stream_of
        return handle

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the recorded moment."""
        stream = self._stream_of()
        if self._event is not None and stream is not None:
            streams.wait(stream, self._event)

    def stream_wait(self, stream: int) -> None:
        """Make a stream wait for the recorded moment.

        Args:
            stream: Its handle.
        """
        if self._event is not None:
            streams.wait(stream, self._event)


class EventOverlap:
    """An event, and the arrays that must live until it has passed.

    As a context manager it waits on exit: what stands in the block overlaps the transfer.

    Args:
        event: The event, or None for an empty one: waiting for it does nothing.
        extra_tensors: Arrays to keep alive as long as this object is.
    """

    def __init__(
        self, event: EventHandle | None = None, extra_tensors: tuple[Any, ...] | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the event; nothing without one."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.current_stream_wait()
