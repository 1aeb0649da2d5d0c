"""Ranks that die, come late, never come, or disagree: every rank gets an error, none hangs."""

from __future__ import annotations

import contextlib
import gc
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launch
import ml_dtypes
import numpy as np
import pytest
from processes import start
from ranks import fail_common as common

from epcomm import (
    Buffer,
    CommTimeout,
    EpcommError,
    InvalidArgument,
    RankMismatch,
    SingleGroup,
    TransportError,
    env,
    run_threads,
)
from epcomm.board import LOW_LATENCY_SENT

pytestmark = pytest.mark.timeout(90)

BF16 = np.dtype(ml_dtypes.bfloat16)
#: Deadline of waits that are meant to expire, and one that never is.
SHORT_S, LONG_S = 0.5, 30.0


class Moment:
    """Something that one thread does and others wait for, with a deadline."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def has_come(self) -> None:
        self._event.set()

    def came(self, timeout_s: float) -> bool:
        return self._event.wait(timeout_s)

    def wait(self) -> None:
        assert self._event.wait(20), "the other ranks never got there"


def error_of(call: Callable[[], Any], kind: type[EpcommError] = EpcommError) -> Any:
    """Return the error that a call raises."""
    with pytest.raises(kind) as caught:
        call()
    return caught.value


# --- a rank that is refused -----------------------------------------------------------------------


def test_a_rank_that_is_refused_alone_makes_the_call_again_while_the_all_are_there() -> None:
    all_are_there = threading.Barrier(3, timeout=20)

    def fn(group: Any) -> None:
        buffer = Buffer(group, timeout_s=LONG_S)
        common.check_round(buffer, 0)
        all_are_there.wait()
        if group.rank == 1:
            x, idx, weights = common.make_inputs(1, 1, 3)
            wrong = {"topk_idx": idx.astype(np.int16), "topk_weights": weights}
            error_of(lambda: buffer.dispatch(x, **wrong, num_experts=6), InvalidArgument)
        common.check_round(buffer, 1)
        buffer.destroy()

    run_threads(fn, 3)


# --- a rank that never comes ----------------------------------------------------------------------


class Warm:
    """A Buffer with a handle and low-latency rows, ready for every kind of call."""

    def __init__(self, group: Any, **options: Any) -> None:
        self.buffer = Buffer(group, **{"timeout_s": SHORT_S, **options})
        result = common.dispatch(self.buffer, seed=0)
        self.recv, self.handle = result[0], result[4]
        self.x = common.make_inputs(0, group.rank, group.size)[0]
        self.low_latency = common.low_latency_dispatch(self.buffer, seed=0)


CALLS: dict[str, tuple[str, Callable[[Warm], Any]]] = {
    "dispatch": ("dispatch", lambda w: common.dispatch(w.buffer, seed=1)),
    "again": ("dispatch with a handle", lambda w: w.buffer.dispatch(w.x, handle=w.handle)),
    "combine": ("combine", lambda w: w.buffer.combine(w.recv, w.handle)),
    "ll_dispatch": (
        "low_latency_dispatch",
        lambda w: common.low_latency_dispatch(w.buffer, seed=1),
    ),
    "ll_combine": (
        "low_latency_combine",
        lambda w: common.low_latency_combine(w.buffer, 0, w.low_latency[0], w.low_latency[2]),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_rank_that_never_comes(name: str) -> None:
    phase, call = CALLS[name]

    def fn(group: Any) -> None:
        warm = Warm(group)
        if group.rank == 1:
            return
        error = error_of(lambda: call(warm))
        assert type(error) is CommTimeout
        assert error.phase == f"{phase}: arrival"
        assert (error.rank, error.peers) == (group.rank, (1,))
        assert error.timeout_s == SHORT_S
        if error.gave_up is None:
            assert f"{phase}: arrival: rank {group.rank} waited 0.5 s for rank(s) 1" in str(error)
        assert "raise timeout_s= or EPCOMM_TIMEOUT_S" in str(error)

    run_threads(fn, 3)


@pytest.mark.parametrize("name", CALLS)
def test_every_missing_rank_is_named(name: str) -> None:
    def fn(group: Any) -> Any:
        warm = Warm(group)
        return None if group.rank in (1, 3) else error_of(lambda: CALLS[name][1](warm)).peers

    assert run_threads(fn, 4)[0::2] in ([(1, 3), (1, 3)], [(1, 3), (1,)], [(1,), (1, 3)])


@pytest.mark.parametrize("name", CALLS)
def test_after_a_timeout_later_calls_fail_at_once_and_a_new_buffer_works(name: str) -> None:
    def fn(group: Any) -> None:
        warm = Warm(group)
        if group.rank != 1:
            error_of(lambda: CALLS[name][1](warm), CommTimeout)
            start_s = time.monotonic()
            for _, call in CALLS.values():
                error = error_of(lambda call=call: call(warm), TransportError)
                assert "an earlier call on this Buffer failed: rank" in str(error)
                assert "gave up waiting for rank 1. Destroy this Buffer" in str(error)
                assert "waited" not in str(error)
            assert time.monotonic() - start_s < SHORT_S
        warm.buffer.destroy()
        buffer = Buffer(group, timeout_s=LONG_S)
        common.check_round(buffer, seed=2)
        common.check_low_latency_round(buffer, seed=3)

    run_threads(fn, 3)


def test_a_timeout_on_one_rank_ends_the_waits_of_the_others() -> None:
    """Rank 0's short deadline ends rank 1's long wait for rank 2, and tells why."""

    def fn(group: Any) -> None:
        warm = Warm(group, timeout_s=SHORT_S if group.rank == 0 else LONG_S)
        if group.rank == 2:
            return
        start_s = time.monotonic()
        error = error_of(lambda: common.dispatch(warm.buffer, seed=1), CommTimeout)
        assert time.monotonic() - start_s < LONG_S / 2
        assert (error.rank, error.peers) == (group.rank, (2,))
        if group.rank == 1:
            assert error.gave_up == 0
            assert "rank 0 gave up waiting for rank(s) 2, so rank 1 ends too" in str(error)
            assert "waited" not in str(error)

    run_threads(fn, 3)


def test_hook_waits_with_a_deadline() -> None:
    """Rank 1 arrives in the call but dies before it has sent its rows."""

    def fn(group: Any) -> None:
        buffer = Buffer(group, timeout_s=SHORT_S)
        common.check_low_latency_round(buffer, seed=0)
        if group.rank == 1:
            engine = buffer._engine
            post = engine._board.post
            # Cells after the first, ARRIVED, are what it never gets to.
            engine._board.post = lambda cell, value: post(cell, value) if cell == 0 else None
        *_, hook = common.low_latency_dispatch(buffer, 1, return_recv_hook=True)
        if group.rank == 1:
            return
        error = error_of(hook, CommTimeout)
        assert error.phase == "low_latency_dispatch: rows"
        assert (error.rank, error.peers) == (group.rank, (1,))

    run_threads(fn, 2)


def test_environment_gives_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPCOMM_TIMEOUT_S", "0.4")
    env.settings.cache_clear()

    def fn(group: Any) -> None:
        buffer = Buffer(group)
        common.check_round(buffer, seed=0)
        if group.rank == 0:
            error = error_of(lambda: common.dispatch(buffer, seed=1), CommTimeout)
            assert error.timeout_s == 0.4
            with pytest.raises(CommTimeout) as caught:
                group.barrier()
            assert caught.value.timeout_s == 0.4

    try:
        run_threads(fn, 2)
    finally:
        monkeypatch.undo()
        env.settings.cache_clear()


def test_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPCOMM_TIMEOUT_S", "60")
    env.settings.cache_clear()

    def fn(group: Any) -> None:
        buffer = Buffer(group, timeout_s=0.3)
        if group.rank == 0:
            error = error_of(lambda: common.dispatch(buffer, seed=1), CommTimeout)
            assert error.timeout_s == 0.3

    try:
        run_threads(fn, 2)
    finally:
        monkeypatch.undo()
        env.settings.cache_clear()


def test_very_long_deadline() -> None:
    def fn(group: Any) -> None:
        buffer = Buffer(group, timeout_s=1e12)
        common.check_round(buffer, seed=0)

    run_threads(fn, 2)


# --- construction ---------------------------------------------------------------------------------


def test_construction_names_the_missing_ranks() -> None:
    def fn(group: Any) -> None:
        if group.rank in (1, 2):
            return
        error = error_of(lambda: Buffer(group, timeout_s=SHORT_S), CommTimeout)
        assert error.phase == "making a Buffer"
        assert (error.rank, error.peers, error.timeout_s) == (group.rank, (1, 2), SHORT_S)

    run_threads(fn, 4)


def test_construction_can_be_tried_again_after_a_rank_was_late() -> None:
    """The late rank's own attempt fails as well; a few tries later all are in step again."""
    gave_up = Moment()

    def fn(group: Any) -> None:
        if group.rank == 1:
            gave_up.wait()
        for attempt in range(4):
            try:
                buffer = Buffer(group, timeout_s=1.0)
            except TransportError:
                gave_up.has_come()
                continue
            assert attempt > 0 or group.rank == 1
            common.check_round(buffer, seed=0)
            return
        raise AssertionError("no Buffer after four tries")

    run_threads(fn, 2)


def test_every_exchange_of_construction_has_the_buffers_deadline() -> None:
    seen: dict[str, float | None] = {}

    class Watching(SingleGroup):
        """Remembers the deadline of each exchange."""

        def allgather(
            self, obj: Any, *, timeout_s: float | None = None, phase: str = ""
        ) -> list[Any]:
            seen[phase] = timeout_s
            return [obj]

    Buffer(Watching(), timeout_s=12.5)
    assert "making a Buffer" in seen
    assert set(seen.values()) == {12.5}, seen


# --- a late rank ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_late_rank_fails_too_and_at_once(name: str) -> None:
    gave_up = Moment()

    def fn(group: Any) -> None:
        warm = Warm(group)
        if group.rank == 0:
            error_of(lambda: CALLS[name][1](warm), CommTimeout)
            gave_up.has_come()
        else:
            gave_up.wait()
            start_s = time.monotonic()
            error = error_of(lambda: CALLS[name][1](warm), TransportError)
            assert time.monotonic() - start_s < SHORT_S
            assert "rank 0 gave up waiting for rank 1, this one, which did not take" in str(error)
            again = error_of(lambda: CALLS[name][1](warm), TransportError)
            assert "an earlier call on this Buffer failed: rank 0 gave up" in str(again)
        warm.buffer.destroy()
        common.check_round(Buffer(group, timeout_s=LONG_S), seed=1)

    run_threads(fn, 2)


def test_late_rank_is_not_told_that_it_waited_for_itself() -> None:
    gave_up = Moment()

    def fn(group: Any) -> None:
        warm = Warm(group)
        if group.rank == 0:
            error_of(lambda: common.dispatch(warm.buffer, 1), CommTimeout)
            gave_up.has_come()
        else:
            gave_up.wait()
            error = error_of(lambda: common.dispatch(warm.buffer, 1), TransportError)
            assert "rank 1 waited" not in str(error)
            assert 1 not in getattr(error, "peers", ())

    run_threads(fn, 2)


def test_rank_that_is_slow_but_in_time() -> None:
    def fn(group: Any) -> None:
        buffer = Buffer(group, timeout_s=LONG_S)
        for seed in range(3):
            if group.rank == seed:
                time.sleep(0.15)
            common.check_round(buffer, seed)
            common.check_low_latency_round(buffer, seed)

    run_threads(fn, 3)


# --- ranks that disagree --------------------------------------------------------------------------

DISAGREE: dict[str, tuple[Callable[[Warm, bool], Any], tuple[str, ...]]] = {}


def disagree(name: str, *pieces: str) -> Callable[..., Any]:
    """Register a call; it is told whether it runs on the rank that differs, which is rank 1."""

    def register(call: Callable[[Warm, bool], Any]) -> Callable[[Warm, bool], Any]:
        DISAGREE[name] = (call, pieces)
        return call

    return register


def plain_dispatch(warm: Warm, x: Any = None, idx_dtype: Any = np.int64, **changed: Any) -> Any:
    rows, idx, weights = common.make_inputs(0, warm.buffer.rank, warm.buffer.group_size)
    arguments = {
        "topk_idx": idx.astype(idx_dtype),
        "topk_weights": weights,
        "num_experts": 2 * warm.buffer.group_size,
    }
    return warm.buffer.dispatch(rows if x is None else x, **(arguments | changed))


def plain_ll_dispatch(warm: Warm, max_tokens: int = 8, experts: int = 6, **changed: Any) -> Any:
    rows, idx, _ = common.make_inputs(0, warm.buffer.rank, warm.buffer.group_size)
    arguments = {"x": rows.astype(BF16), "topk_idx": idx, "use_fp8": False}
    arguments |= {"num_max_dispatch_tokens_per_rank": max_tokens, "num_experts": experts}
    return warm.buffer.low_latency_dispatch(**(arguments | changed))


@disagree("hidden", "dispatch: ranks disagree on hidden", "rank 0: 32, rank 1: 64, rank 2: 32")
def _(warm: Warm, is_odd: bool) -> None:
    plain_dispatch(warm, np.zeros((5, 64 if is_odd else 32), np.float32))


@disagree("dtype", "disagree on dtype", "rank 0: float32, rank 1: bfloat16, rank 2: float32")
def _(warm: Warm, is_odd: bool) -> None:
    plain_dispatch(warm, warm.x.astype(BF16 if is_odd else np.float32))


@disagree("scales", "disagree on num_scales", "rank 0: 2, rank 1: 3, rank 2: 2")
def _(warm: Warm, is_odd: bool) -> None:
    scales = np.zeros((5, 3 if is_odd else 2), np.float32)
    plain_dispatch(warm, (np.zeros((5, 32), np.uint8), scales))


@disagree("scales-dtype", "disagree on scales_dtype", "rank 0: float32, rank 1: int32")
def _(warm: Warm, is_odd: bool) -> None:
    scales = np.zeros((5, 2), np.int32 if is_odd else np.float32)
    plain_dispatch(warm, (np.zeros((5, 32), np.uint8), scales))


@disagree("no-scales", "disagree on num_scales", "rank 0: 2, rank 1: 0, rank 2: 2")
def _(warm: Warm, is_odd: bool) -> None:
    data = np.zeros((5, 32), np.uint8)
    plain_dispatch(warm, data if is_odd else (data, np.zeros((5, 2), np.float32)))


@disagree("topk", "disagree on num_topk", "rank 0: 3, rank 1: 2, rank 2: 3")
def _(warm: Warm, is_odd: bool) -> None:
    end = 2 if is_odd else 3
    _, idx, weights = common.make_inputs(0, warm.buffer.rank, 3)
    plain_dispatch(warm, topk_idx=idx[:, :end].copy(), topk_weights=weights[:, :end].copy())


@disagree("topk-dtype", "disagree on topk_dtype", "rank 0: int64, rank 1: int32, rank 2: int64")
def _(warm: Warm, is_odd: bool) -> None:
    plain_dispatch(warm, idx_dtype=np.int32 if is_odd else np.int64)


@disagree("no-topk", "disagree on num_topk", "rank 0: 3, rank 1: 0, rank 2: 3")
def _(warm: Warm, is_odd: bool) -> None:
    _, idx, weights = common.make_inputs(0, warm.buffer.rank, 3)
    per_rank, _, per_expert, in_rank, _ = warm.buffer.get_dispatch_layout(idx, 6)
    topk = {} if is_odd else {"topk_idx": idx, "topk_weights": weights}
    warm.buffer.dispatch(
        warm.x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_expert=per_expert,
        is_token_in_rank=in_rank,
        **topk,
    )


@disagree("experts", "disagree on num_experts", "rank 0: 6, rank 1: 9, rank 2: 6")
def _(warm: Warm, is_odd: bool) -> None:
    plain_dispatch(warm, num_experts=9 if is_odd else 6)


@disagree("alignment", "disagree on expert_alignment", "rank 0: 1, rank 1: 4, rank 2: 1")
def _(warm: Warm, is_odd: bool) -> None:
    plain_dispatch(warm, expert_alignment=4 if is_odd else 1)


@disagree("again-hidden", "dispatch with a handle: ranks disagree on hidden", "rank 1: 16")
def _(warm: Warm, is_odd: bool) -> None:
    warm.buffer.dispatch(np.zeros((5, 16 if is_odd else 32), np.float32), handle=warm.handle)


@disagree("again-dtype", "disagree on dtype", "rank 0: float32, rank 1: int32, rank 2: float32")
def _(warm: Warm, is_odd: bool) -> None:
    warm.buffer.dispatch(warm.x.astype(np.int32 if is_odd else np.float32), handle=warm.handle)


@disagree("combine-hidden", "combine: ranks disagree on hidden", "rank 0: 32, rank 1: 8")
def _(warm: Warm, is_odd: bool) -> None:
    warm.buffer.combine(warm.recv[:, : 8 if is_odd else 32].copy(), warm.handle)


@disagree("combine-dtype", "disagree on dtype", "rank 0: float32, rank 1: float16")
def _(warm: Warm, is_odd: bool) -> None:
    warm.buffer.combine(warm.recv.astype(np.float16 if is_odd else np.float32), warm.handle)


@disagree("combine-weights", "combine: ranks disagree on num_topk", "rank 0: 3", "rank 2: 3")
def _(warm: Warm, is_odd: bool) -> None:
    weights = None if is_odd else np.zeros((len(warm.recv), 3), np.float32)
    warm.buffer.combine(warm.recv, warm.handle, topk_weights=weights)


@disagree("call", "disagree on call", "rank 0: dispatch, rank 1: combine, rank 2: dispatch")
def _(warm: Warm, is_odd: bool) -> None:
    if is_odd:
        warm.buffer.combine(warm.recv, warm.handle)
    else:
        plain_dispatch(warm)


@disagree("call-again", "disagree on call", "rank 0: dispatch, rank 1: dispatch with a handle")
def _(warm: Warm, is_odd: bool) -> None:
    if is_odd:
        warm.buffer.dispatch(warm.x, handle=warm.handle)
    else:
        plain_dispatch(warm)


@disagree("call-ll", "disagree on call", "rank 0: low_latency_dispatch, rank 1: dispatch, rank 2")
def _(warm: Warm, is_odd: bool) -> None:
    if is_odd:
        plain_dispatch(warm)
    else:
        plain_ll_dispatch(warm)


@disagree("call-ll-kind", "rank 0: low_latency_combine, rank 1: low_latency_dispatch, rank 2")
def _(warm: Warm, is_odd: bool) -> None:
    if is_odd:
        plain_ll_dispatch(warm)
    else:
        rows, _, handle, _, _ = warm.low_latency
        common.low_latency_combine(warm.buffer, 0, rows, handle)


@disagree("ll-max", "low_latency_dispatch", "num_max_dispatch_tokens_per_rank", "rank 1: 16")
def _(warm: Warm, is_odd: bool) -> None:
    plain_ll_dispatch(warm, max_tokens=16 if is_odd else 8)


@disagree("ll-hidden", "disagree on hidden", "rank 0: 32, rank 1: 64, rank 2: 32")
def _(warm: Warm, is_odd: bool) -> None:
    plain_ll_dispatch(warm, x=np.zeros((5, 64 if is_odd else 32), BF16))


@disagree("ll-experts", "disagree on num_experts", "rank 0: 6, rank 1: 12, rank 2: 6")
def _(warm: Warm, is_odd: bool) -> None:
    plain_ll_dispatch(warm, experts=12 if is_odd else 6)


@disagree("ll-topk", "disagree on num_topk", "rank 0: 3, rank 1: 1, rank 2: 3")
def _(warm: Warm, is_odd: bool) -> None:
    _, idx, _ = common.make_inputs(0, warm.buffer.rank, 3)
    plain_ll_dispatch(warm, topk_idx=idx[:, :1].copy() if is_odd else idx)


@disagree("ll-fp8", "disagree on fp8_format", "rank 0:", "rank 1:", "rank 2:")
def _(warm: Warm, is_odd: bool) -> None:
    plain_ll_dispatch(warm, x=np.zeros((5, 128), BF16), use_fp8=is_odd)


@disagree("ll-precision", "disagree on combine_precision", "rank 0:", "rank 1:", "rank 2:")
def _(warm: Warm, is_odd: bool) -> None:
    rows, _, handle, _, _ = warm.low_latency
    precision = "expert" if is_odd else "rank"
    common.low_latency_combine(warm.buffer, 0, rows, handle, combine_precision=precision)


def check_all_alike(messages: list[str], pieces: tuple[str, ...]) -> None:
    assert len(set(messages)) == 1, messages
    for piece in pieces:
        assert piece in messages[0]
    assert "rank 1" in messages[0]


@pytest.mark.parametrize("name", DISAGREE)
def test_ranks_that_disagree(name: str) -> None:
    call, pieces = DISAGREE[name]

    def fn(group: Any) -> str:
        warm = Warm(group, timeout_s=5.0)
        error = error_of(lambda: call(warm, group.rank == 1), RankMismatch)
        np.testing.assert_array_equal(
            warm.buffer.dispatch(warm.x, handle=warm.handle)[0], warm.recv
        )
        common.check_round(warm.buffer, seed=1)
        common.check_low_latency_round(warm.buffer, seed=2)
        return str(error)

    messages = run_threads(fn, 3)
    check_all_alike(messages, pieces)
    rule = "call with the same " if "on call" not in messages[0] else "calls in the same order."
    assert f"Every rank must make the same {rule}" in messages[0]


def test_handles_that_differ() -> None:
    def fn(group: Any) -> str:
        buffer = Buffer(group, timeout_s=5.0)
        handles = [common.dispatch(buffer, seed)[4] for seed in range(2)]
        mine = handles[1 if group.rank == 1 else 0]
        rows = np.zeros((mine.num_recv_rows, 32), np.float32)
        error = error_of(lambda: buffer.combine(rows, mine), RankMismatch)
        common.check_round(buffer, seed=2)
        return str(error)

    messages = run_threads(fn, 3)
    check_all_alike(messages, ("combine: ranks disagree on handle", "rank 0: 1, rank 1: 2"))


def test_absent_arrays_are_not_shown_as_numbers() -> None:
    """Where one rank passes no weights at all, the message does not speak of -1 of them."""

    def fn(group: Any) -> str:
        warm = Warm(group, timeout_s=5.0)
        weights = None if group.rank == 1 else np.zeros((len(warm.recv), 3), np.float32)
        call = lambda: warm.buffer.combine(warm.recv, warm.handle, topk_weights=weights)  # noqa: E731
        return str(error_of(call, RankMismatch))

    assert "rank 1: -1" not in run_threads(fn, 2)[0]


CONSTRUCTION = {
    "num_nvl_bytes": (0, 1 << 20),
    "num_rdma_bytes": (1 << 16, 0),
    "enable_shrink": (False, True),
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_ranks_that_disagree_on_construction(name: str) -> None:
    usual, odd = CONSTRUCTION[name]

    def fn(group: Any) -> str:
        value = odd if group.rank == 1 else usual
        error = error_of(lambda: Buffer(group, timeout_s=5.0, **{name: value}), RankMismatch)
        common.check_round(Buffer(group, timeout_s=5.0), seed=0)
        return str(error)

    messages = run_threads(fn, 3)
    wanted = f"rank 0: {usual}, rank 1: {odd}, rank 2: {usual}"
    check_all_alike(messages, (f"Buffer: ranks disagree on {name}", wanted, "pass the same"))


def test_too_few_worst_tokens_on_one_rank() -> None:
    def fn(group: Any) -> str:
        warm = Warm(group, timeout_s=5.0)
        worst = 1 if group.rank == 1 else 100
        error = error_of(lambda: plain_dispatch(warm, num_worst_tokens=worst), InvalidArgument)
        common.check_round(warm.buffer, seed=1)
        recv, _, _, per_expert, _, _ = plain_dispatch(warm, num_worst_tokens=15)
        assert (len(recv), per_expert) == (15, [])
        return str(error)

    messages = run_threads(fn, 3)
    check_all_alike(messages, ("num_worst_tokens is 1 on rank 1", "rows arrive there"))


# --- a rank that raises ---------------------------------------------------------------------------


class UserError(Exception):
    """Raised by a rank's own code."""


@pytest.mark.parametrize("where", ["Buffer", "dispatch", "ll_combine", "barrier"])
def test_rank_that_raises_ends_the_others_promptly(where: str) -> None:
    seen: list[Exception] = []

    def fn(group: Any) -> None:
        warm = None if where == "Buffer" else Warm(group, timeout_s=60.0)
        group.barrier()  # all are past the last of the calls that succeed
        if group.rank == 1:
            time.sleep(0.1)  # the others wait already
            raise UserError("out of ideas")
        try:
            if where == "Buffer":
                Buffer(group, timeout_s=60.0)
            elif where == "barrier":
                group.barrier(timeout_s=60.0)
            else:
                CALLS[where][1](warm)
        except Exception as error:
            seen.append(error)
            raise

    start_s = time.monotonic()
    with pytest.raises(UserError, match="out of ideas"):
        run_threads(fn, 3)
    assert time.monotonic() - start_s < 30
    assert len(seen) == 2
    for error in seen:
        assert type(error) is TransportError
        assert "rank 1 failed: UserError: out of ideas" in str(error)
        assert isinstance(error.__cause__, UserError)


# --- low latency with masks -----------------------------------------------------------------------


def mask_of(buffer: Buffer) -> list[int]:
    status = np.full(buffer.group_size, 7, np.int32)
    buffer.low_latency_query_mask_buffer(status)
    return status.tolist()


def shrinking_buffer(group: Any, timeout_s: float = SHORT_S) -> Buffer:
    size = Buffer.get_low_latency_rdma_size_hint(
        common.MAX_TOKENS, common.HIDDEN, group.size, 2 * group.size
    )
    return Buffer(group, num_rdma_bytes=size, enable_shrink=True, timeout_s=timeout_s)


@pytest.mark.parametrize("first_missed", ["dispatch", "combine"])
def test_rank_that_stops_answering_is_masked(first_missed: str) -> None:
    def fn(group: Any) -> None:
        buffer = shrinking_buffer(group)
        common.check_low_latency_round(buffer, seed=0)
        assert mask_of(buffer) == [0, 0, 0]
        if group.rank == 1 and first_missed == "dispatch":
            return
        if first_missed == "combine":
            result = common.low_latency_dispatch(buffer, seed=1)
            common.check_received(buffer, 1, result)
            if group.rank == 1:
                return
            combined, _, _ = common.low_latency_combine(buffer, 1, result[0], result[2])
            want = common.combined_rows(buffer, 1, gone=(1,))
            np.testing.assert_array_equal(combined.astype(np.float32), want)
        else:
            common.check_low_latency_round(buffer, seed=1, gone=(1,))
        assert mask_of(buffer) == [0, 1, 0]
        # From now on nobody waits for rank 1.
        start_s = time.monotonic()
        for seed in range(2, 5):
            common.check_low_latency_round(buffer, seed, gone=(1,))
        assert time.monotonic() - start_s < SHORT_S

    run_threads(fn, 3)


def test_rank_that_arrives_but_does_not_send_is_masked() -> None:
    def fn(group: Any) -> None:
        buffer = shrinking_buffer(group)
        common.check_low_latency_round(buffer, seed=0)
        if group.rank == 1:
            post = buffer._engine._board.post
            buffer._engine._board.post = lambda cell, value: (
                post(cell, value) if cell == 0 else None
            )
            common.low_latency_dispatch(buffer, 1, return_recv_hook=True)
            return
        waited = np.zeros(3, np.int64)
        result = common.low_latency_dispatch(buffer, 1, dispatch_wait_recv_cost_stats=waited)
        common.check_received(buffer, 1, result, gone=(1,))
        assert mask_of(buffer) == [0, 1, 0]

    run_threads(fn, 3)


def test_masked_rank_that_comes_back_is_told_so() -> None:
    went_on = Moment()

    def fn(group: Any) -> None:
        buffer = shrinking_buffer(group)
        common.check_low_latency_round(buffer, seed=0)
        if group.rank == 1:
            went_on.wait()
            for _ in range(5):
                error = error_of(lambda: common.check_low_latency_round(buffer, 1), TransportError)
                assert "did not take part in time, so the others went on without it" in str(error)
                assert "make a new one" in str(error)
        else:
            for seed in range(1, 3):
                common.check_low_latency_round(buffer, seed, gone=(1,))
            group.split(0)  # all but rank 1 are done; nothing of theirs changes any more
            went_on.has_come()
        buffer.destroy()

    def with_subgroups(group: Any) -> None:
        fn(_SplitLess(group))

    run_threads(with_subgroups, 3)


class _SplitLess:
    """A group whose `split` is a barrier of ranks 0 and 2 alone, so that rank 1 can stay away."""

    _meet = threading.Barrier(2)

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size
        self.allgather, self.barrier, self.check = group.allgather, group.barrier, group.check

    def split(self, color: int) -> None:
        self._meet.wait(20)


def test_mask_set_by_hand_and_cleared() -> None:
    def fn(group: Any) -> None:
        buffer = shrinking_buffer(group, timeout_s=5.0)
        buffer.low_latency_update_mask_buffer(2, True)
        assert mask_of(buffer) == [0, 0, 1]
        group.barrier()
        if group.rank != 2:
            common.check_low_latency_round(buffer, seed=0, gone=(2,))
        else:  # it makes the same calls, so that it is in step when it is wanted again
            result = common.low_latency_dispatch(buffer, seed=0)
            common.low_latency_combine(buffer, 0, result[0], result[2])
        group.barrier()
        buffer.low_latency_update_mask_buffer(2, True)
        buffer.low_latency_update_mask_buffer(0, True)
        assert mask_of(buffer) == [1, 0, 1]
        buffer.low_latency_update_mask_buffer(0, False)
        assert mask_of(buffer) == [0, 0, 1]
        buffer.low_latency_clean_mask_buffer()
        assert mask_of(buffer) == [0, 0, 0]
        group.barrier()
        common.check_low_latency_round(buffer, seed=1)
        common.check_round(buffer, seed=2)

    run_threads(fn, 3)


def test_throughput_calls_do_not_mask() -> None:
    def fn(group: Any) -> None:
        buffer = shrinking_buffer(group)
        if group.rank == 0:
            error = error_of(lambda: common.dispatch(buffer, seed=0), CommTimeout)
            assert error.peers == (1,)
            assert mask_of(buffer) == [0, 0]

    run_threads(fn, 2)


def test_throughput_calls_refuse_a_masked_rank() -> None:
    """Their results would miss its rows; low-latency calls go on, and so do all after unmasking."""

    def fn(group: Any) -> None:
        buffer = shrinking_buffer(group)
        common.dispatch(buffer, seed=0)
        if group.rank == 0:
            buffer.low_latency_update_mask_buffer(1, True)
            error = error_of(lambda: common.dispatch(buffer, seed=1), TransportError)
            assert "rank(s) 1 are masked" in str(error)
            buffer.low_latency_clean_mask_buffer()
        common.dispatch(buffer, seed=2)

    run_threads(fn, 2)


def test_ranks_that_wait_for_each_other_end() -> None:
    """As ranks out of step do: both show that they live, and neither comes."""

    def fn(group: Any) -> None:
        timeout_s = SHORT_S / 2
        buffer = shrinking_buffer(group, timeout_s)
        missing: list[int] = []
        group.barrier(timeout_s=30.0, phase="begin")
        start_s = time.monotonic()
        board: Any = buffer._engine._board  # type: ignore[union-attr]
        board.wait(LOW_LATENCY_SENT, 1 << 40, "rows that never come", missing.extend)
        assert missing == [0, 1]
        waited_s = time.monotonic() - start_s
        assert group.size * timeout_s <= waited_s < group.size * timeout_s + 4 * SHORT_S
        group.barrier(timeout_s=30.0, phase="end")

    run_threads(fn, 2)


def test_rank_that_waits_for_a_dead_one_is_not_masked() -> None:
    """Rank 2 waits for rank 1 in a hook, and so comes late to the call where rank 0 waits."""

    def fn(group: Any) -> None:
        buffer = shrinking_buffer(group)
        common.check_low_latency_round(buffer, seed=0)
        if group.rank == 1:
            post = buffer._engine._board.post
            buffer._engine._board.post = lambda cell, value: (
                post(cell, value) if cell == 0 else None
            )
        first = common.low_latency_dispatch(buffer, 1, return_recv_hook=True)
        if group.rank == 1:
            return
        if group.rank == 2:
            time.sleep(SHORT_S / 2)
            first[-1]()
        second = common.low_latency_dispatch(buffer, 2, return_recv_hook=True)
        if group.rank == 0:
            first[-1]()
        second[-1]()
        common.check_received(buffer, 2, second, gone=(1,))
        assert mask_of(buffer) == [0, 1, 0]

    run_threads(fn, 3)


def test_slots_do_not_grow_while_a_rank_is_masked() -> None:
    def fn(group: Any) -> None:
        buffer = Buffer(group, enable_shrink=True, timeout_s=SHORT_S)
        if group.rank == 0:
            buffer.low_latency_update_mask_buffer(1, True)
            error = error_of(lambda: common.low_latency_dispatch(buffer, 0), TransportError)
            assert "num_rdma_bytes=" in str(error)

    run_threads(fn, 2)


def test_all_ranks_masked() -> None:
    """Nothing arrives, and nothing breaks."""
    buffer = shrinking_buffer(SingleGroup())
    buffer.low_latency_update_mask_buffer(0, True)
    assert common.low_latency_dispatch(buffer, 0)[1].sum() == 0


def test_without_shrink_nobody_is_masked() -> None:
    def fn(group: Any) -> None:
        buffer = Buffer(group, timeout_s=SHORT_S)
        common.check_low_latency_round(buffer, seed=0)
        if group.rank != 1:
            error = error_of(lambda: common.low_latency_dispatch(buffer, 1), CommTimeout)
            assert error.peers == (1,)

    run_threads(fn, 3)


# --- slots of low latency -------------------------------------------------------------------------


def test_result_is_not_overwritten_when_hooks_are_called_out_of_order() -> None:
    """Two results are outstanding and the younger is received: the older still has its slot."""

    def fn(group: Any) -> None:
        buffer = Buffer(group, timeout_s=5.0)
        older = common.low_latency_dispatch(buffer, 1, return_recv_hook=True)
        younger = common.low_latency_dispatch(buffer, 2, return_recv_hook=True)
        younger[-1]()
        common.check_received(buffer, 2, younger)
        try:
            third = common.low_latency_dispatch(buffer, 3, return_recv_hook=True)
        except InvalidArgument:
            third = None
        group.barrier()
        older[-1]()
        common.check_received(buffer, 1, older)
        if third is not None:
            third[-1]()
            common.check_received(buffer, 3, third)
        common.check_low_latency_round(buffer, 4)

    run_threads(fn, 2)


def test_zero_copy_buffer_is_free_when_it_is_given_out() -> None:
    """Rank 0 fills its next combine buffer while rank 1 has yet to read an earlier result."""
    filled = Moment()

    def fn(group: Any) -> None:
        buffer = Buffer(group, timeout_s=5.0)
        result = common.low_latency_dispatch(buffer, 1)
        rows, handle = result[0], result[2]
        combined, _, hook = common.low_latency_combine(
            buffer, 1, rows, handle, return_recv_hook=True
        )
        if group.rank == 0:
            hook()
        dispatched = common.low_latency_dispatch(buffer, 2, return_recv_hook=True)
        if group.rank == 0:
            dispatched[-1]()
            # It may be refused, or wait for rank 1; it may not be what rank 1 still reads.
            with contextlib.suppress(InvalidArgument):
                buffer.get_next_low_latency_combine_buffer(dispatched[2])[...] = 99.0
            filled.has_come()
        else:
            filled.came(1.0)  # not at all, where rank 0 waits for this rank's receipt instead
            hook()
        want = common.combined_rows(buffer, 1)
        np.testing.assert_array_equal(combined.astype(np.float32), want)

    run_threads(fn, 2)


def test_failed_receive_frees_its_slot() -> None:
    """Choices that were never dispatched make the sum fail; the Buffer goes on all the same."""

    def fn(group: Any) -> None:
        buffer = Buffer(group, timeout_s=5.0)
        result = common.low_latency_dispatch(buffer, 1)
        num_tokens = common.MAX_TOKENS * 2 * group.size + 1
        idx = np.zeros((num_tokens, 1), np.int64)
        for _ in range(3):
            with pytest.raises((EpcommError, IndexError)):
                buffer.low_latency_combine(
                    result[0], idx, np.ones((num_tokens, 1), np.float32), result[2]
                )
        common.check_low_latency_round(buffer, 2)

    run_threads(fn, 2)


# --- destroy and collection -----------------------------------------------------------------------


def test_peer_that_destroyed_its_buffer() -> None:
    def fn(group: Any) -> None:
        warm = Warm(group)
        if group.rank == 1:
            warm.buffer.destroy()
            return
        for _, call in CALLS.values():
            error_of(lambda call=call: call(warm), TransportError)

    run_threads(fn, 2)


def test_hook_after_destroy() -> None:
    """It either receives or says that the Buffer is gone; it does not crash."""

    def fn(group: Any) -> None:
        buffer = Buffer(group, timeout_s=5.0)
        result = common.low_latency_dispatch(buffer, 1, return_recv_hook=True)
        group.barrier()
        buffer.destroy()
        del buffer
        gc.collect()
        group.barrier()
        try:
            result[-1]()
        except EpcommError:
            return
        common.check_received(_Numbers(group), 1, result)

    run_threads(fn, 2)


class _Numbers:
    """Rank and size as a Buffer gives them."""

    def __init__(self, group: Any) -> None:
        self.rank, self.group_size = group.rank, group.size


@pytest.mark.parametrize("order", ["destroy", "destroy-twice", "del", "gc"])
def test_arrays_outlive_the_buffer(order: str) -> None:
    def fn(group: Any) -> None:
        buffer = Buffer(group, num_nvl_bytes=1 << 16, num_rdma_bytes=1 << 16, timeout_s=5.0)
        result = common.dispatch(buffer, seed=1)
        low_latency = common.low_latency_dispatch(buffer, 2)
        place = buffer.get_next_low_latency_combine_buffer(low_latency[2])
        arrays = [
            buffer.get_local_buffer_tensor(np.uint8),
            buffer.get_local_buffer_tensor(np.float32, (3, 5), use_rdma_buffer=True),
            place,
        ]
        for i, array in enumerate(arrays):
            array[...] = i + 1
        group.barrier()
        held = result, low_latency
        if order.startswith("destroy"):
            buffer.destroy()
        if order == "destroy-twice":
            buffer.destroy()
        if order == "gc":
            cycle = [buffer]
            cycle.append(cycle)
            del cycle
        del buffer
        gc.collect()
        assert (arrays[0] == 1).all()
        assert (arrays[2] == 3).all()  # it lies over the second one
        for i, array in enumerate(arrays):
            array[...] = i + 10
            assert (array == i + 10).all()
        common.check_received(_Numbers(group), 2, held[1])

    run_threads(fn, 2)
    gc.collect()
    assert common.epcomm_maps() == []


def test_buffers_are_collected_in_any_order() -> None:
    def fn(group: Any) -> None:
        buffers = [Buffer(group, timeout_s=5.0) for _ in range(3)]
        for i in (1, 0):
            for seed, buffer in enumerate(buffers):
                common.check_round(buffer, seed)
            del buffers[i]
            del buffer
        common.check_round(buffers[0], seed=3)

    run_threads(fn, 2)
    gc.collect()
    assert common.epcomm_maps() == []


def test_two_handles_are_alive() -> None:
    def fn(group: Any) -> None:
        buffer = Buffer(group, timeout_s=5.0)
        results = [common.dispatch(buffer, seed) for seed in range(3)]
        for seed in (1, 0, 2):
            x, idx, _ = common.make_inputs(seed, group.rank, group.size)
            spread = (idx[:, :, None] // 2 == np.arange(group.size)).any(axis=1).sum(axis=1)
            combined, _, _ = buffer.combine(results[seed][0], results[seed][4])
            np.testing.assert_array_equal(combined, x * spread[:, None])

    run_threads(fn, 3)


def test_buffer_of_one_rank_never_waits() -> None:
    buffer = Buffer(SingleGroup(), timeout_s=0.001)
    for seed in range(20):
        common.check_round(buffer, seed)
        common.check_low_latency_round(buffer, seed)


# --- a rank that dies -----------------------------------------------------------------------------


def read(printed: str) -> dict[str, Any]:
    """Return what a rank of fail_killed printed."""
    found: dict[str, Any] = json.loads(printed)
    return found


KILLED = {
    # what the rank does when it dies: the phase in which the others notice
    "before_dispatch": "dispatch: arrival",
    "in_dispatch": "dispatch: staged rows",
    "before_combine": "combine: arrival",
    "before_ll_dispatch": "low_latency_dispatch: arrival",
    "in_ll_dispatch": "low_latency_dispatch: rows",
    "before_construction": "making a Buffer",
}


@pytest.mark.parametrize("when", KILLED)
def test_killed_rank(when: str, tmp_path: Path) -> None:
    with start("fail_killed", 3, when, folder=tmp_path) as ranks:
        ranks.wait_for("ready-1")
        ranks.kill(1)
        ranks.tell("killed")
        printed = ranks.results()
    assert printed[1] == ""
    for rank in (0, 2):
        found = read(printed[rank])
        assert found["error"] == "CommTimeout"
        assert found["phase"] == KILLED[when]
        assert (found["rank"], found["peers"]) == (rank, [1])
        assert "rank(s) 1" in found["message"]
        assert found["maps_after"] == []
        assert found["later"] in ("TransportError", "CommTimeout", "")
        assert found["survivors_work"]
    assert common.epcomm_files() == []


def test_killed_rank_is_masked(tmp_path: Path) -> None:
    with start("fail_killed", 3, "shrink", folder=tmp_path) as ranks:
        ranks.wait_for("ready-1")
        ranks.kill(1)
        ranks.tell("killed")
        printed = ranks.results()
    for rank in (0, 2):
        assert read(printed[rank]) == {"mask": [0, 1, 0]}


def test_rank_killed_under_mpiexec(mpiexec: Callable[..., launch.Result]) -> None:
    """With its usual clean-up, mpiexec ends all ranks at once; epcomm leaves nothing behind."""
    result = mpiexec("fail_mpi_killed", 3, check=False, timeout_s=60)
    assert result.returncode != 0
    assert result.ok_ranks() == []
    assert result.wall_s < 25
    assert common.epcomm_files() == []


def test_rank_that_raises_under_mpiexec(mpiexec: Callable[..., launch.Result]) -> None:
    result = mpiexec("fail_mpi_raises", 3, check=False, timeout_s=60)
    assert result.returncode != 0
    assert result.ok_ranks() == []
    assert "UserError: out of ideas" in result.stderr
    assert result.wall_s < 25
    assert common.epcomm_files() == []


@pytest.mark.parametrize("what", ["disagree", "calls", "missing", "construction", "first_use"])
def test_failures_under_mpiexec(mpiexec: Callable[..., launch.Result], what: str) -> None:
    """Late ranks, missing ranks, and ranks that disagree, with ranks as MPI processes."""
    mpiexec("fail_mpi", 3, what, timeout_s=25)
