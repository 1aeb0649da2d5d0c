"""Dispatch and combine as a training loop calls them: forward and backward, one Buffer a rank.

The backward of dispatch is a combine, and the backward of combine is a dispatch along the same
routes. Call `get_buffer` first; `dispatch_forward` uses the Buffer it made, and the other
functions use the Buffer that their handle comes from, in whatever thread they are called.
"""

from __future__ import annotations

import weakref
from typing import Any

from epcomm.buffer import Buffer
from epcomm.errors import ClosedError, InvalidArgument, kind_of
from epcomm.events import EventOverlap
from epcomm.group import as_group
from epcomm.handle import DispatchHandle
from epcomm.one_buffer import OneBuffer

_one = OneBuffer("training")
_by_id: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()


def get_hidden_bytes(x: Any) -> int:
    """Return the bytes a row to size a Buffer by.

    Args:
        x: ``[num_tokens, hidden]``, or a pair of which the first is that. One-byte data counts
            two bytes an element, because combine brings it back as 16-bit rows.

    Raises:
        InvalidArgument: It is neither.
    """
    data = x[0] if isinstance(x, tuple | list) and len(x) == 2 else x
    shape = getattr(data, "shape", ())
    if len(shape) != 2:
        raise InvalidArgument(
            f"x is {kind_of(x)} of shape {list(shape)}; it must be an array [num_tokens, hidden], "
            "or a pair of which the first is that. Pass what dispatch_forward gets."
        )
    return int(data.shape[1]) * max(int(data.dtype.itemsize), 2)


def get_buffer(
    group: Any, hidden_bytes: int, *, engine: str | None = None, device: int | None = None
) -> Buffer:
    """Return this rank's Buffer; collective where one has to be made.

    A new one is made when there is none, the group, the engine or the device changed, or it is too
    small for the rows.

    Args:
        group: What `Buffer` takes as group.
        hidden_bytes: Bytes of a row, see `get_hidden_bytes`.
        engine: What `Buffer` takes as engine.
        device: What `Buffer` takes as device.
    """
    num_ranks = as_group(group).size
    configs = (Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks))
    buffer = _one.get(
        group,
        num_nvl_bytes=max(c.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) for c in configs),
        num_rdma_bytes=max(c.get_rdma_buffer_size_hint(hidden_bytes, num_ranks) for c in configs),
        low_latency_mode=False,
        engine=engine,
        device=device,
    )
    _by_id[buffer.id] = buffer
    return buffer


def dispatch_forward(
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    num_experts: int,
    previous_event: EventOverlap | None = None,
) -> tuple[Any, Any, Any, list[int], DispatchHandle, EventOverlap]:
    """Lay out and dispatch. Collective. Wait for the event before using what is returned.

    Args:
        x: ``[num_tokens, hidden]`` rows, or a pair with scales, see `Buffer.dispatch`.
        topk_idx: ``[num_tokens, num_topk]`` int64 or int32 expert ids, -1 for no choice.
        topk_weights: ``[num_tokens, num_topk] f32``.
        num_experts: Experts over all ranks.
        previous_event: Event to wait for; None takes the current stream as it stands now.

    Returns:
        ``recv_x [M, hidden]``, ``recv_topk_idx [M, num_topk]``, ``recv_topk_weights [M,
        num_topk]``, tokens for each local expert, the handle, and the event.
    """
    buffer = _one.current("dispatch_forward")
    per_rank, per_rdma_rank, per_expert, in_rank, laid_out = buffer.get_dispatch_layout(
        topk_idx,
        num_experts,
        previous_event=previous_event or Buffer.capture(),
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    recv_x, recv_idx, recv_weights, per_local_expert, handle, event = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        previous_event=laid_out,
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    # Both are None only where a handle was passed.
    assert per_local_expert is not None
    assert handle is not None
    return recv_x, recv_idx, recv_weights, per_local_expert, handle, event


def dispatch_backward(
    grad_recv_x: Any, grad_recv_topk_weights: Any, handle: DispatchHandle
) -> tuple[Any, Any, EventOverlap]:
    """Sum the gradients of a dispatch's outputs at the tokens they came from. Collective.

    Args:
        grad_recv_x: ``[M, hidden]``.
        grad_recv_topk_weights: ``[M, num_topk] f32``, or None.
        handle: From the forward pass.

    Returns:
        ``grad_x [num_tokens, hidden]``, ``grad_topk_weights [num_tokens, num_topk]``, the event.
    """
    return _buffer_of(handle).combine(
        grad_recv_x,
        handle,
        topk_weights=grad_recv_topk_weights,
        previous_event=Buffer.capture(),
        async_finish=True,
        allocate_on_comm_stream=True,
    )


def combine_forward(
    x: Any, handle: DispatchHandle, previous_event: EventOverlap | None = None
) -> tuple[Any, EventOverlap]:
    """Sum experts' rows at the tokens they belong to. Collective.

    Args:
        x: ``[M, hidden]`` bf16, f16 or f32.
        handle: From `dispatch_forward`.
        previous_event: Event to wait for; None takes the current stream as it stands now.

    Returns:
        ``combined_x [num_tokens, hidden]`` and the event.
    """
    combined, _, event = _buffer_of(handle).combine(
        x,
        handle,
        previous_event=previous_event or Buffer.capture(),
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    return combined, event


def combine_backward(
    grad_combined_x: Any, handle: DispatchHandle, previous_event: EventOverlap | None = None
) -> tuple[Any, EventOverlap]:
    """Send the gradient of every token to the rows that it was summed from. Collective.

    Args:
        grad_combined_x: ``[num_tokens, hidden]``.
        handle: From `dispatch_forward`.
        previous_event: Event to wait for; None takes the current stream as it stands now.

    Returns:
        ``grad_x [M, hidden]`` and the event.
    """
    grad_x, _, _, _, _, event = _buffer_of(handle).dispatch(
        grad_combined_x,
        handle=handle,
        previous_event=previous_event or Buffer.capture(),
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    return grad_x, event


def _buffer_of(handle: DispatchHandle) -> Buffer:
    if not isinstance(handle, DispatchHandle):
        raise InvalidArgument(
            f"handle is {kind_of(handle)}; pass the handle that dispatch_forward returned."
        )
    buffer = _by_id.get(handle.buffer_id)
    if buffer is None:
        raise ClosedError("the handle's Buffer is gone; pass a handle of the Buffer in use.")
    return buffer
