"""CUDA streams and events, by their handles: what calls are ordered with."""

from __future__ import annotations

import sys
from typing import Any

from epcomm.gpus import load_cupy


def current_stream() -> int | None:
    """Return the handle of the caller's current stream, or None where no framework uses a GPU.

    CuPy's current stream where one was chosen, else torch's.
    """
    cupy = sys.modules.get("cupy")
    torch = sys.modules.get("torch")
    if cupy is None or not cupy.is_available():
        return None
    stream = int(cupy.cuda.get_current_stream().ptr)
    if stream == 0 and torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.current_stream().cuda_stream)
    return stream


def record(stream: int) -> Any:
    """Return an event recorded now on a stream."""
    event = load_cupy().cuda.Event(block=False, disable_timing=True)
    record_again(event, stream)
    return event


def record_again(event: Any, stream: int) -> None:
    """Record an event anew: who waits for it already waits for the earlier moment still."""
    load_cupy().cuda.runtime.eventRecord(event.ptr, stream)


def wait(stream: int, event: Any) -> None:
    """Make a stream wait for an event."""
    load_cupy().cuda.runtime.streamWaitEvent(stream, event.ptr)


def is_capturing(stream: int) -> bool:
    """Return whether a stream's work is being captured in a graph."""
    return bool(load_cupy().cuda.runtime.streamIsCapturing(stream))
