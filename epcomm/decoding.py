"""Low-latency dispatch and combine as an inference server calls them: one Buffer a rank.

Both transfers return the receive hook: the call itself only sends, and rows are there once the
hook has been called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from epcomm import arguments
from epcomm.buffer import Buffer
from epcomm.errors import InvalidArgument
from epcomm.events import EventOverlap
from epcomm.fp8 import BLOCK
from epcomm.group import as_group
from epcomm.one_buffer import OneBuffer

Handle = tuple[Any, Any, int, int, int]

_one = OneBuffer("decoding")


def get_buffer(
    group: Any,
    num_max_dispatch_tokens_per_rank: int,
    hidden: int,
    num_experts: int,
    *,
    engine: str | None = None,
    device: int | None = None,
) -> Buffer:
    """Return this rank's Buffer; collective where one has to be made.

    A new one is made when there is none, the group, the engine or the device changed, or it is too
    small for the shape.

    Args:
        group: What `Buffer` takes as group.
        num_max_dispatch_tokens_per_rank: Most tokens a rank passes in one call.
        hidden: Elements of a row, a multiple of 128: rows are sent as fp8.
        num_experts: Experts over all ranks.
        engine: What `Buffer` takes as engine.
        device: What `Buffer` takes as device.
    """
    if arguments.whole_number(hidden, "hidden", 1) % BLOCK:
        raise InvalidArgument(
            f"hidden is {hidden}; it must be a multiple of {BLOCK}, as rows are sent as fp8. Pad "
            "it, or send bf16: low_latency_dispatch of an epcomm.Buffer with use_fp8=False."
        )
    num_rdma_bytes = Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank,
        hidden,
        as_group(group).size,
        num_experts,
        engine=engine,
    )
    return _one.get(
        group,
        num_nvl_bytes=0,
        num_rdma_bytes=num_rdma_bytes,
        low_latency_mode=True,
        engine=engine,
        device=device,
    )


def low_latency_dispatch(
    hidden_states: Any, topk_idx: Any, num_max_dispatch_tokens_per_rank: int, num_experts: int
) -> tuple[Any, Any, Handle, EventOverlap, Callable[[], None]]:
    """Send each token to its experts, as fp8 with scales. Collective; arguments as the Buffer's.

    Returns:
        ``recv_hidden_states`` (data, scales), ``recv_expert_count [L] int32``, the handle, the
        event, and the hook: call it before using the first two.
    """
    recv, count, handle, event, hook = _one.current("low_latency_dispatch").low_latency_dispatch(
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
    combined, event, hook = _one.current("low_latency_combine").low_latency_combine(
        hidden_states, topk_idx, topk_weights, handle, return_recv_hook=True
    )
    assert hook is not None  # it was asked for
    return combined, event, hook
