"""Events: their protocol, and what calls take and give. The host has nothing to wait for."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from ranks import fail_common as common

from epcomm import Buffer, EventHandle, EventOverlap, SingleGroup
from epcomm.engines.base import StreamOrder
from epcomm.frameworks.numpy import NumpyFramework

pytestmark = pytest.mark.timeout(60)


class Recorded(EventHandle):
    """An event that counts who waits for it."""

    def __init__(self) -> None:
        self.num_waits = 0

    def current_stream_wait(self) -> None:
        self.num_waits += 1


class Kept:
    """Something that can be watched being collected."""


def test_empty_event() -> None:
    event = EventOverlap()
    assert event.event is None
    assert event.extra_tensors is None
    assert event.current_stream_wait() is None
    with event as entered:
        assert entered is event


def test_waits_for_its_event() -> None:
    recorded = Recorded()
    event = EventOverlap(recorded)
    event.current_stream_wait()
    assert recorded.num_waits == 1


def test_context_waits_on_exit_only() -> None:
    recorded = Recorded()
    with EventOverlap(recorded):
        assert recorded.num_waits == 0
    assert recorded.num_waits == 1


def test_context_waits_and_passes_exceptions_on() -> None:
    recorded = Recorded()
    with pytest.raises(ZeroDivisionError), EventOverlap(recorded):
        raise ZeroDivisionError
    assert recorded.num_waits == 1


def test_extra_tensors_live_as_long_as_the_event() -> None:
    kept = Kept()
    watch = weakref.ref(kept)
    event = EventOverlap(EventHandle(), (kept,))
    del kept
    gc.collect()
    assert watch() is not None
    del event
    gc.collect()
    assert watch() is None


def test_handle_and_capture() -> None:
    assert EventHandle().current_stream_wait() is None
    captured = Buffer.capture()
    assert isinstance(captured, EventOverlap)
    assert isinstance(captured.event, EventHandle)
    captured.current_stream_wait()


@pytest.fixture
def buffer() -> Any:
    made = Buffer(SingleGroup())
    yield made
    made.destroy()


def events_of(buffer: Buffer, **options: Any) -> dict[str, EventOverlap]:
    """Make every call that takes stream arguments; return its events."""
    x, idx, weights = common.make_inputs(0, 0, 1)
    *layout, laid_out = buffer.get_dispatch_layout(idx, 2, **options)
    recv, _, _, _, handle, dispatched = buffer.dispatch(
        x,
        num_tokens_per_rank=layout[0],
        num_tokens_per_rdma_rank=layout[1],
        num_tokens_per_expert=layout[2],
        is_token_in_rank=layout[3],
        topk_idx=idx,
        topk_weights=weights,
        **options,
    )
    *_, again = buffer.dispatch(x, handle=handle, **options)
    *_, combined = buffer.combine(recv, handle, **options)
    return {"layout": laid_out, "dispatch": dispatched, "again": again, "combine": combined}


def test_synchronous_calls_give_empty_events(buffer: Buffer) -> None:
    for event in events_of(buffer).values():
        assert isinstance(event, EventOverlap)
        assert event.event is None


def test_asynchronous_calls_give_events(buffer: Buffer) -> None:
    for event in events_of(buffer, async_finish=True).values():
        assert isinstance(event.event, EventHandle)
        event.current_stream_wait()


def test_all_stream_arguments_together(buffer: Buffer) -> None:
    options = {"async_finish": True, "allocate_on_comm_stream": True}
    for previous in (EventOverlap(), Buffer.capture()):
        for event in events_of(buffer, previous_event=previous, **options).values():
            assert isinstance(event.event, EventHandle)


@pytest.mark.parametrize("tracks_streams", [True, False])
def test_an_empty_previous_event_is_none(
    buffer: Buffer, tracks_streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is not asynchronous gives one: what made its arrays is on the current stream."""
    monkeypatch.setattr(NumpyFramework, "tracks_streams", tracks_streams)
    orders: list[StreamOrder] = []
    monkeypatch.setattr(buffer._engine, "begin", orders.append)
    for previous, waits in (
        (None, True),
        (EventOverlap(), True),
        (Buffer.capture(), not tracks_streams),
    ):
        orders.clear()
        events_of(buffer, previous_event=previous, async_finish=True)
        assert [order.waits_for_current for order in orders] == [waits] * 4
        wanted = None if previous is None else previous.event
        assert all(order.previous_event is wanted for order in orders)


def test_previous_event_without_async(buffer: Buffer) -> None:
    for event in events_of(buffer, previous_event=Buffer.capture()).values():
        assert event.event is None


def test_asynchronous_event_keeps_the_inputs(buffer: Buffer) -> None:
    class Watched(np.ndarray):
        """An array that can be watched being collected."""

    x, idx, weights = common.make_inputs(0, 0, 1)
    watched = x.view(Watched)
    watch = weakref.ref(watched)
    *_, event = buffer.dispatch(
        watched, topk_idx=idx, topk_weights=weights, num_experts=2, async_finish=True
    )
    del watched
    gc.collect()
    assert watch() is not None
    del event
    gc.collect()
    assert watch() is None


def test_low_latency_events_and_hooks(buffer: Buffer) -> None:
    result = common.low_latency_dispatch(buffer, 1)
    assert (result[3].event, result[4]) == (None, None)
    *_, event, hook = common.low_latency_dispatch(buffer, 1, async_finish=True)
    assert isinstance(event.event, EventHandle)
    assert hook is None
    *_, event, hook = common.low_latency_dispatch(buffer, 1, return_recv_hook=True)
    assert event.event is None
    hook()
    _, event, hook = common.low_latency_combine(
        buffer, 1, result[0], result[2], return_recv_hook=True
    )
    assert event.event is None
    hook()
    _, event, hook = common.low_latency_combine(buffer, 1, result[0], result[2], async_finish=True)
    assert isinstance(event.event, EventHandle)
    assert hook is None


def test_there_is_no_communication_stream(buffer: Buffer) -> None:
    assert buffer.get_comm_stream() is None
