"""Events: how a caller orders its own work after a transfer."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class EventHandle:
    """A moment on the caller's current stream, recorded when this is made.

    On the host engine every call is finished when it returns, so there is nothing to record.
    """

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the recorded moment."""


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
