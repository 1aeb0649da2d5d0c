"""Low-latency dispatch and combine as an inference server calls them: one Buffer a rank.

Both transfers return the receive hook: the call itself only sends, and rows are there once the
hook has been called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from epcomm.buffer import Buffer
from epcomm.errors import ClosedError
from epcomm.events import EventOverlap
from epcomm.group import ThreadGroup, as_group

Handle = tuple[Any, Any, int, int, int]

# One Buffer a process; but where threads are ranks (run_threads), one a thread.
_of_thread = threading.local()
_of_process: Buffer | None = None


def get_buffer(
    group: Any, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
) -> Buffer:
    """Return this rank's Buffer; collective where one has to be made.

    A new one is made when there is none, the group changed, or it is too small for the shape.

    Args:
        group: What `Buffer` takes as group.
        num_max_dispatch_tokens_per_rank: Most tokens a rank passes in one call.
        hidden: Elements of a row.
        num_experts: Experts over all ranks.
    """
    global _of_process
    num_rdma_bytes = Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank, hidden, as_group(group).size, num_experts
    )
    is_thread = isinstance(group, ThreadGroup)
    buffer = getattr(_of_thread, "buffer", None) if is_thread else _of_process
    if (
        buffer is not None
        and buffer.group is group
        and not buffer.is_destroyed
        and buffer.num_rdma_bytes >= num_rdma_bytes
    ):
        return buffer
    if buffer is not None:
        buffer.destroy()
    buffer = Buffer(group, num_rdma_bytes=num_rdma_bytes, low_latency_mode=True)
    if is_thread:
        _of_thread.buffer = buffer
    else:
        _of_process = buffer
    return buffer


def low_latency_dispatch(
    hidden_states: Any, topk_idx: Any, num_max_dispatch_tokens_per_rank: int, num_experts: int
) -> tuple[Any, Any, Handle, EventOverlap, Callable[[], None]]:
    """Send each token to its experts, as fp8 with scales. Collective; arguments as the Buffer's.

    Returns:
        ``recv_hidden_states`` (data, scales), ``recv_expert_count [L] int32``, the handle, the
        event, and the hook: call it before using the first two.
    """
    recv, count, handle, event, hook = _buffer().low_latency_dispatch(
        hidden_states,
        topk_idx,
        num_max_dispatch_tokens_per_rank,
        num_experts,
        return_recv_hook=True,
    )
    assert hook is not None  # it was asked for
    return recv, count, handle, event, hook


def low_latency_combine(
    hidden_states: Any, topk_idx: Any, topk_weights: Any, handle: Handle
) -> tuple[Any, EventOverlap, Callable[[], None]]:
    """Bring experts' rows back and sum them, weighted. Collective; arguments as the Buffer's.

    Returns:
        ``combined_hidden_states [num_tokens, hidden]``, the event, and the hook: call it before
        using the first.
    """
    combined, event, hook = _buffer().low_latency_combine(
        hidden_states, topk_idx, topk_weights, handle, return_recv_hook=True
    )
    assert hook is not None  # it was asked for
    return combined, event, hook


def _buffer() -> Buffer:
    buffer: Buffer | None = getattr(_of_thread, "buffer", None) or _of_process
    if buffer is None:
        raise ClosedError("no Buffer yet; call decoding.get_buffer first.")
    return buffer
