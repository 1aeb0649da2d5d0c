"""Slots and deadlines of messages along a rail, with an MPI that does what the test says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from epcomm import CommTimeout, rail_link, streams
from epcomm.engines.device_exchange import Exchange, Piece
from epcomm.rail_link import Message, RailLink, Transfer, Window

PEER = 1


class Request:
    """MPI's: done when the test says so."""

    def __init__(self) -> None:
        self.is_done = False

    def Test(self) -> bool:  # noqa: N802
        return self.is_done


class FakeRail:
    """Rank 0 of a rail of two."""

    rank = 0

    def __init__(self) -> None:
        self.sends: list[Request] = []
        self.receives: list[Request] = []

    def send(self, memory: Any, node: int) -> Request:
        self.sends.append(Request())
        return self.sends[-1]

    def receive(self, memory: Any, node: int) -> Request:
        self.receives.append(Request())
        return self.receives[-1]

    def poll(self) -> None:
        pass


@pytest.fixture
def rail() -> FakeRail:
    return FakeRail()


@pytest.fixture
def link(rail: Any, monkeypatch: pytest.MonkeyPatch) -> RailLink:
    fake = SimpleNamespace(MPI=SimpleNamespace(Exception=ArithmeticError))
    monkeypatch.setitem(sys.modules, "mpi4py", fake)
    monkeypatch.setattr(rail_link, "_abandoned", [])
    return RailLink(rail, (0, 1), 0.05, 0, lambda phase: None, lambda peer: None)


@pytest.fixture
def transfer(link: RailLink, rail: FakeRail) -> Iterator[Transfer]:
    """Three messages to come, in two slots; two slots to send from."""
    messages = [Message(PEER, 8)] * 3
    with link.transfer("rows", Window(8, num_send=2, num_receive=2), messages) as made:
        yield made
        for request in rail.sends:
            request.is_done = True


def test_slots_of_what_is_received(transfer: Transfer, rail: FakeRail) -> None:
    assert (transfer.num_free, len(rail.receives)) == (2, 2)
    slots = []
    for num_left in (1, 0):
        rail.receives[1 - num_left].is_done = True
        slots.append(transfer.receive())
        assert transfer.num_free == num_left
    assert not np.shares_memory(*slots)
    assert len(rail.receives) == 2  # the third waits for a slot
    transfer.release()
    assert (transfer.num_free, len(rail.receives)) == (1, 3)
    rail.receives[2].is_done = True
    assert np.shares_memory(transfer.receive(), slots[0])


def test_slots_in_hand_are_not_free(transfer: Transfer, rail: FakeRail) -> None:
    assert transfer.can_send()
    slots = [transfer.next_send_slot()]
    assert transfer.can_send()
    slots.append(transfer.next_send_slot())
    assert not transfer.can_send()
    assert not np.shares_memory(*slots)
    transfer.send(PEER, 8)
    assert not transfer.can_send()  # it is on its way
    rail.sends[0].is_done = True
    assert transfer.can_send()


def test_a_receive_that_was_waited_for_in_vain_keeps_its_memory(
    link: RailLink, rail: FakeRail
) -> None:
    """MPI may still write there."""
    messages = [Message(PEER, 8)] * 2
    with pytest.raises(CommTimeout), link.transfer("rows", Window(8, 1, 2), messages) as transfer:
        transfer.receive()
    ((memory, requests),) = rail_link._abandoned
    assert requests == rail.receives
    assert len(memory) == 24
    assert link.memory is not memory


# --- rows of GPUs ------------------------------------------------------------------------------


class Event:
    """Of a copy: done when it is asked for the second time."""

    def __init__(self, stream: int) -> None:
        self._num_asked = 0

    @property
    def done(self) -> bool:
        self._num_asked += 1
        return self._num_asked > 1

    def synchronize(self) -> None:
        pass


class SlowTransfer:
    """One slot each way, and deadlines that pass when one has asked three times."""

    num_free = 1

    def __init__(self) -> None:
        self.sent: list[int] = []
        self._is_in_hand = False

    def wait(self, is_ready: Callable[[], bool], node: int) -> None:
        assert any(is_ready() for _ in range(3)), "the deadline has passed"

    def can_send(self) -> bool:
        return not self._is_in_hand

    def next_send_slot(self) -> Any:
        self._is_in_hand = True
        return np.empty(8, np.uint8)

    def send(self, node: int, num_bytes: int) -> None:
        self._is_in_hand = False
        self.sent.append(num_bytes)

    def finish(self) -> None:
        pass


def test_each_message_of_a_round_has_a_deadline_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "record", Event)
    transfer: Any = SlowTransfer()
    pieces = [Piece(num_bytes, lambda slot: None) for num_bytes in range(5)]
    Exchange(1, 2).run(transfer, PEER, pieces, PEER, [])
    assert transfer.sent == [0, 1, 2, 3, 4]
