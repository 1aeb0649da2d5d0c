"""Kernels of ranks that are threads of one process: none starts, and nobody goes on, alone."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from epcomm import CommTimeout, TransportError, run_threads
from epcomm.engines import cuda_launch
from epcomm.group import Group

NUM_RANKS = 4
PAUSE_S = 0.02


class Launches:
    """Stands in for CUDA: counts what was started, and what all ranks have come to before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_ready = self.num_started = 0

    def add_ready(self) -> None:
        with self._lock:
            self.num_ready += 1

    def launch(self, spec: Any, **options: Any) -> None:
        with self._lock:
            self.num_started += 1


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Replace what needs a GPU."""
    made = Launches()
    monkeypatch.setattr(cuda_launch, "launch", made.launch)
    monkeypatch.setattr(cuda_launch, "load_function", lambda spec, shared_bytes: None)
    return made


def run_kernel(launcher: cuda_launch.PeerLauncher, **options: Any) -> None:
    what: Any = {"spec": None, "stream": None, "params": None}
    launcher.launch(**what, num_blocks=1, num_threads=32, **options)


def test_threads_start_together_and_go_on_together(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen_before: list[int] = []
    start = launches.launch

    def launch(spec: Any, **options: Any) -> None:
        seen_before.append(launches.num_ready)
        start(spec, **options)

    monkeypatch.setattr(cuda_launch, "launch", launch)

    def fn(group: Group) -> None:
        launcher = cuda_launch.PeerLauncher(group, True, 30.0, range(group.size))
        for round_ in range(1, 6):
            time.sleep(PAUSE_S * ((group.rank + round_) % NUM_RANKS))
            launches.add_ready()
            run_kernel(launcher)
            assert launches.num_started >= round_ * NUM_RANKS

    run_threads(fn, NUM_RANKS)
    assert seen_before == [round_ * NUM_RANKS for round_ in range(1, 6) for _ in range(NUM_RANKS)]


@pytest.mark.parametrize(("are_threads", "meets"), [(False, True), (True, False)])
def test_others_start_at_once(launches: Launches, are_threads: bool, meets: bool) -> None:
    def fn(group: Group) -> None:
        launcher = cuda_launch.PeerLauncher(group, are_threads, 30.0, range(group.size))
        if group.rank == 0:
            run_kernel(launcher, meets=meets)

    run_threads(fn, 2)
    assert launches.num_started == 1


def test_a_rank_that_does_not_come_fails_the_others(launches: Launches) -> None:
    def fn(group: Group) -> None:
        launcher = cuda_launch.PeerLauncher(group, True, 0.2, names=(3, 4, 5))
        if group.rank == 2:
            return
        me = 3 + group.rank
        with pytest.raises(CommTimeout, match="launching a kernel") as caught:
            run_kernel(launcher)
        assert (caught.value.rank, caught.value.peers) == (me, (5,))
        start = time.monotonic()
        said = rf"earlier call .* failed: rank {me} gave up waiting for rank\(s\) 5\. Destroy"
        for _ in range(2):
            with pytest.raises(TransportError, match=said):
                run_kernel(launcher)
        assert time.monotonic() - start < 0.1  # nobody waits any more

    run_threads(fn, 3)
    assert launches.num_started == 0


def test_kernels_that_mask_ranks_go_on_without(launches: Launches) -> None:
    def fn(group: Group) -> None:
        launcher = cuda_launch.PeerLauncher(group, True, 0.2, range(group.size))
        if group.rank == 2:
            return
        for number in range(3):
            start = time.monotonic()
            run_kernel(launcher, can_mask=True)
            assert (time.monotonic() - start > 0.2) == (number == 0)
        with pytest.raises(CommTimeout):
            run_kernel(launcher)

    run_threads(fn, 3)
    assert launches.num_started == 6


def test_a_masked_rank_comes_back(launches: Launches) -> None:
    def fn(group: Group) -> None:
        launcher = cuda_launch.PeerLauncher(group, True, 5.0, range(group.size))
        start = time.monotonic()
        for is_masked in (False, True, False):
            if group.rank != 1:
                launcher.set_masked(1, is_masked)
            if group.rank != 1 or not is_masked:
                for _ in range(3):
                    run_kernel(launcher, can_mask=True)
            group.barrier()
        assert time.monotonic() - start < 4.0

    run_threads(fn, 3)
    assert launches.num_started == 24


def test_a_rank_that_was_late_is_in_step_again(launches: Launches) -> None:
    """It was masked by those that waited in vain, and they by it; then all unmask each other."""

    def fn(group: Group) -> None:
        launcher = cuda_launch.PeerLauncher(group, True, 0.3, range(group.size))
        if group.rank == 1:
            time.sleep(0.6)
        run_kernel(launcher, can_mask=True)
        group.barrier()
        for rank in range(2):
            launcher.set_masked(rank, False)
        for round_ in range(1, 4):
            time.sleep(PAUSE_S * ((group.rank + round_) % 2))
            launches.add_ready()
            run_kernel(launcher, can_mask=True)
            assert launches.num_ready >= 2 * round_
            assert launches.num_started >= 2 + 2 * round_
            group.barrier()

    run_threads(fn, 2)


def test_a_rank_that_raises_ends_the_others_waits(launches: Launches) -> None:
    def fn(group: Group) -> None:
        launcher = cuda_launch.PeerLauncher(group, True, 30.0, range(group.size))
        if group.rank == 0:
            raise ValueError("rank 0 cannot")
        run_kernel(launcher)

    start = time.monotonic()
    with pytest.raises(ValueError, match="rank 0 cannot"):
        run_threads(fn, 3)
    assert time.monotonic() - start < 5.0
