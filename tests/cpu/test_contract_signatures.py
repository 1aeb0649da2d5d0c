"""Names, order and defaults of everything callable, as the call contract has them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from epcomm import Buffer, Config, EventHandle, EventOverlap, SingleGroup, decoding, training

# Positional parameters with defaults; epcomm's own extras are keyword-only and left out here.
SIGNATURES: tuple[tuple[Callable[..., Any], str], ...] = (
    (
        Buffer.__init__,
        "self, group=None, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, "
        "num_qps_per_rank=24, allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, "
        "use_fabric=False, explicitly_destroy=False, enable_shrink=False, comm=None",
    ),
    (Buffer.set_num_sms, "new_num_sms"),
    (Buffer.capture, ""),
    (Buffer.is_sm90_compiled, ""),
    (Buffer.get_dispatch_config, "num_ranks"),
    (Buffer.get_combine_config, "num_ranks"),
    (
        Buffer.get_low_latency_rdma_size_hint,
        "num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts",
    ),
    (Buffer.get_comm_stream, "self"),
    (
        Buffer.get_local_buffer_tensor,
        "self, dtype, size=None, offset=0, use_rdma_buffer=False",
    ),
    (
        Buffer.get_dispatch_layout,
        "self, topk_idx, num_experts, previous_event=None, async_finish=False, "
        "allocate_on_comm_stream=False",
    ),
    (
        Buffer.dispatch,
        "self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, "
        "is_token_in_rank=None, num_tokens_per_expert=None, topk_idx=None, topk_weights=None, "
        "expert_alignment=1, num_worst_tokens=0, config=None, previous_event=None, "
        "async_finish=False, allocate_on_comm_stream=False",
    ),
    (
        Buffer.combine,
        "self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, "
        "async_finish=False, allocate_on_comm_stream=False",
    ),
    (
        Buffer.low_latency_dispatch,
        "self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, "
        "cumulative_local_expert_recv_stats=None, dispatch_wait_recv_cost_stats=None, "
        "use_fp8=True, round_scale=False, use_ue8m0=False, async_finish=False, "
        "return_recv_hook=False",
    ),
    (
        Buffer.low_latency_combine,
        "self, x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False, "
        "async_finish=False, return_recv_hook=False, out=None, combine_wait_recv_cost_stats=None",
    ),
    (
        Buffer.clean_low_latency_buffer,
        "self, num_max_dispatch_tokens_per_rank, hidden, num_experts",
    ),
    (Buffer.get_next_low_latency_combine_buffer, "self, handle"),
    (Buffer.low_latency_update_mask_buffer, "self, rank_to_mask, mask=False"),
    (Buffer.low_latency_query_mask_buffer, "self, mask_status"),
    (Buffer.low_latency_clean_mask_buffer, "self"),
    (Buffer.destroy, "self"),
    (
        Config.__init__,
        "self, num_sms=20, num_max_nvl_chunked_send_tokens=6, "
        "num_max_nvl_chunked_recv_tokens=256, num_max_rdma_chunked_send_tokens=6, "
        "num_max_rdma_chunked_recv_tokens=256",
    ),
    (Config.get_nvl_buffer_size_hint, "self, hidden_bytes, num_ranks"),
    (Config.get_rdma_buffer_size_hint, "self, hidden_bytes, num_ranks"),
    (EventOverlap.__init__, "self, event=None, extra_tensors=None"),
    (EventOverlap.current_stream_wait, "self"),
    (training.get_buffer, "group, hidden_bytes"),
    (training.get_hidden_bytes, "x"),
    (
        training.dispatch_forward,
        "x, topk_idx, topk_weights, num_experts, previous_event=None",
    ),
    (training.dispatch_backward, "grad_recv_x, grad_recv_topk_weights, handle"),
    (training.combine_forward, "x, handle, previous_event=None"),
    (training.combine_backward, "grad_combined_x, handle, previous_event=None"),
    (
        decoding.get_buffer,
        "group, num_max_dispatch_tokens_per_rank, hidden, num_experts",
    ),
    (
        decoding.low_latency_dispatch,
        "hidden_states, topk_idx, num_max_dispatch_tokens_per_rank, num_experts",
    ),
    (decoding.low_latency_combine, "hidden_states, topk_idx, topk_weights, handle"),
)


@pytest.mark.parametrize(
    ("function", "want"), SIGNATURES, ids=[function.__qualname__ for function, _ in SIGNATURES]
)
def test_signature(function: Callable[..., Any], want: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    got = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in parameters
        if p.kind is not p.KEYWORD_ONLY
    ]
    assert ", ".join(got) == want
    assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)


def test_attributes_of_a_buffer() -> None:
    group = SingleGroup()
    buffer = Buffer(group, 1000, 2000, True, explicitly_destroy=True)
    assert (buffer.rank, buffer.group_size) == (0, 1)
    assert buffer.group is group
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (1000, 2000)
    assert buffer.low_latency_mode is True
    assert buffer.explicitly_destroy is True
    assert Buffer.num_sms == 20
    buffer.destroy()


def test_communicator_as_comm() -> None:
    group = SingleGroup()
    buffer = Buffer(comm=group)
    assert buffer.group is group
    buffer.destroy()


def test_num_sms_is_in_configs_made_afterwards() -> None:
    before = Buffer.num_sms
    try:
        Buffer.set_num_sms(24)
        assert Buffer.num_sms == 24
        assert Buffer.get_dispatch_config(8).num_sms == 24
        assert Buffer.get_combine_config(8).num_sms == 24
    finally:
        Buffer.set_num_sms(before)


def test_events() -> None:
    assert isinstance(Buffer.capture(), EventOverlap)
    assert isinstance(Buffer.capture().event, EventHandle)
    assert EventOverlap().event is None
    waited = []

    class Event(EventHandle):
        def current_stream_wait(self) -> None:
            waited.append(self)

    event = Event()
    EventOverlap(event).current_stream_wait()
    with EventOverlap(event, ("kept",)) as overlap:
        assert waited == [event]
        assert overlap.extra_tensors == ("kept",)
    assert waited == [event, event]
    with EventOverlap() as overlap:  # without an event nothing is waited for
        overlap.current_stream_wait()


def test_hints_grow_with_what_they_are_for() -> None:
    config = Config()
    hint = config.get_nvl_buffer_size_hint(1024, 4)
    assert hint == config.get_nvl_buffer_size_hint(1024, 4, num_max_tokens=4096)
    assert config.get_nvl_buffer_size_hint(1024, 4, num_max_tokens=64) < hint
    assert config.get_nvl_buffer_size_hint(2048, 4) > hint
    assert config.get_nvl_buffer_size_hint(1024, 8) > hint
    assert config.get_rdma_buffer_size_hint(1024, 4) == 0
    low = Buffer.get_low_latency_rdma_size_hint
    assert low(64, 1024, 4, 32) < low(128, 1024, 4, 32) < low(128, 2048, 4, 32)
