"""Which stream a call runs on, what waits for what, and what is kept until then, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from epcomm import EventHandle, streams
from epcomm.engines.base import StreamOrder
from epcomm.engines.call_streams import CallStreams

COMM, CURRENT, OTHER = 7, 5, 6


class Event:
    """A moment on a stream."""

    def __init__(self, name: str) -> None:
        self.name, self.done = name, False


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace CUDA; return what it is told, in order."""
    told: list[str] = []

    def record(stream: int) -> Event:
        event = Event(f"{stream}#{len(told)}")
        told.append(f"record {event.name}")
        return event

    def record_again(event: Event, stream: int) -> None:
        event.name = f"{stream}#{len(told)}"
        told.append(f"record {event.name}")

    monkeypatch.setattr(streams, "record", record)
    monkeypatch.setattr(streams, "record_again", record_again)
    monkeypatch.setattr(
        streams, "wait", lambda stream, event: told.append(f"{stream} waits for {event.name}")
    )
    return told


@pytest.fixture
def calls() -> CallStreams:
    return CallStreams(SimpleNamespace(ptr=COMM))


def order_of(
    current: int | None = CURRENT, previous: Any = None, waits: bool = True, is_async: bool = False
) -> StreamOrder:
    handle = None if previous is None else EventHandle.of(previous, lambda: current)
    return StreamOrder(current, waits, handle, is_async)


def call(calls: CallStreams, order: StreamOrder, keep: Any = None, **options: Any) -> Any:
    calls.begin(order, options.pop("is_capturing", False))
    return calls.end(order, keep, **options)


@pytest.mark.parametrize(
    ("order", "want"),
    [
        (order_of(), ["record 5#0"]),
        (order_of(None), ["record 7#0"]),
        (order_of(is_async=True), ["record 5#0", "7 waits for 5#0", "record 7#2"]),
        (
            order_of(previous=Event("given")),
            ["7 waits for given", "record 5#1", "7 waits for 5#1", "record 7#3", "5 waits for 7#3"],
        ),
        (
            order_of(previous=Event("given"), waits=False, is_async=True),
            ["7 waits for given", "record 7#1"],
        ),
    ],
    ids=["here", "no stream", "async", "previous", "previous alone"],
)
def test_the_first_call(
    said: list[str], calls: CallStreams, order: StreamOrder, want: list[str]
) -> None:
    call(calls, order)
    assert said == want


def test_calls_follow_one_another_on_any_stream(said: list[str], calls: CallStreams) -> None:
    for stream in (CURRENT, CURRENT, OTHER):
        call(calls, order_of(stream))
    call(calls, order_of(OTHER, is_async=True))
    assert said == [
        *("record 5#0", "record 5#1", "6 waits for 5#1", "record 6#3"),
        *("record 6#4", "7 waits for 6#4", "7 waits for 6#3", "record 7#7"),
    ]


def test_only_an_event_that_nobody_holds_is_recorded_again(
    said: list[str], calls: CallStreams
) -> None:
    own = call(calls, order_of())
    assert call(calls, order_of(is_async=True)) is not own
    assert call(calls, order_of(), own=[]) is not own
    assert call(calls, order_of(), is_capturing=True) is not own
    assert call(calls, order_of(previous=Event("given"))) is own


def test_a_captured_call_is_not_in_the_order(said: list[str], calls: CallStreams) -> None:
    call(calls, order_of(OTHER))
    call(calls, order_of(), is_capturing=True)
    call(calls, order_of(OTHER))
    assert said == ["record 6#0", "record 5#1", "record 6#2"]


def test_what_is_kept(said: list[str], calls: CallStreams) -> None:
    class Thing:
        """Counted by its list of living ones."""

        def __init__(self, name: str) -> None:
            self.name = name
            living.append(name)

        def __del__(self) -> None:
            living.remove(self.name)

    living: list[str] = []
    call(calls, order_of(), Thing("waited for"))
    call(calls, order_of(), own=Thing("own"))
    owned = calls._last_event
    used = call(calls, order_of(is_async=True), Thing("async"))
    call(calls, order_of(), Thing("captured"), is_capturing=True)
    assert living == ["own", "async", "captured"]
    used.done = True
    call(calls, order_of())
    assert living == ["own", "async", "captured"]  # in order: the first has not passed
    owned.done = True
    call(calls, order_of(), is_capturing=True)
    assert living == ["own", "async", "captured"]  # events are not asked during a capture
    call(calls, order_of())
    assert living == ["captured"]
    calls.forget()
    assert living == []
