"""Waiting with a deadline: the loops in which the host waits for anything."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

#: Polls that only give up the processor, before the wait begins to sleep.
_NUM_YIELDS = 200
_FIRST_SLEEP_S = 100e-6
_LAST_SLEEP_S = 2e-4
_POLLED_S = 0.1


class Deadline:
    """A moment after which waiting ends.

    Args:
        timeout_s: Seconds from now, above 0.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """Return the seconds that are left, 0.0 when it has passed."""
        return max(0.0, self._end - time.monotonic())


def wait_until(is_ready: Callable[[], bool], deadline: Deadline) -> bool:
    """Poll until something holds.

    Yields the processor first and sleeps later, because ranks often outnumber cores and the one
    that is waited for needs the core.

    Args:
        is_ready: Called again and again; may raise to end the wait.
        deadline: When to give up.

    Returns:
        Whether it held before the deadline.
    """
    for _ in range(_NUM_YIELDS):
        if is_ready():
            return True
        time.sleep(0)
    pause_s = _FIRST_SLEEP_S
    while not is_ready():
        if deadline.remaining_s() == 0.0:
            return is_ready()
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, _LAST_SLEEP_S)
    return True


def poll_until(is_ready: Callable[[], bool], deadline: Deadline) -> bool:
    """Wait as `wait_until` does, where its pauses would be the longest part.

    That is for MPI's messages, which only move on while they are polled, and for what a GPU is
    about to tell the host.

    NOTE: time.sleep(0) takes 0.1 ms where the kernel's timer slack counts, and large messages over
    TCP then took two to three times as long; os.sched_yield() takes 2 us and lets others run.
    """
    began = time.monotonic()
    while not is_ready():
        if time.monotonic() - began < _POLLED_S:
            os.sched_yield()
            continue
        if deadline.remaining_s() == 0.0:
            return is_ready()
        time.sleep(_LAST_SLEEP_S)
    return True
