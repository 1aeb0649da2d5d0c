"""Calls that fail, on GPUs: what each rank is told, and that it can go on.

    gpu_fail.py FRAME SCENARIO

Every rank makes the failing calls; a call whose failure only the device sees raises at the next.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from common import Checker, frame_of
from contract_dispatch import (
    BF16,
    F32,
    Case,
    all_inputs,
    check_combine,
    check_dispatch,
    for_frame,
)
from contract_low_latency import Case as LowLatencyCase
from contract_low_latency import call_plainly, send
from frames import FRAMES, poison_byte

from epcomm import Buffer, CommTimeout, InvalidArgument, RankMismatch

CASE = Case("failures", (40, 33), 64, 4, 4, "uniform", F32)
LATE, TIMEOUT_S, LATE_BY_S, PATIENCE_S = 1, 4.0, 3.0, 10.0
NUM_BYTES = 32 * 2**20
#: Rows behind the outputs that nobody may write.
NUM_GUARD_ROWS = 64


def check_round(check: Checker, buffer: Buffer, case: Case, round_: int = 0) -> Any:
    """Dispatch and combine, held to the oracle."""
    sent = check_dispatch(check, buffer, case, round_)
    check_combine(check, buffer, case, round_, sent)
    return sent


def arguments_of(check: Checker, case: Case, round_: int = 0) -> dict[str, Any]:
    """Return a plain dispatch's arguments: the layout is made in the call."""
    inputs = all_inputs(case, round_, check.size)[check.rank]
    return {
        "x": check.frame.make(inputs.x),
        "topk_idx": check.frame.make(inputs.topk_idx),
        "topk_weights": check.frame.make(inputs.topk_weights),
        "num_experts": case.num_local * check.size,
    }


def error_of(check: Checker, buffer: Buffer, call: Callable[[], Any]) -> tuple[Exception, float]:
    """Return what a call raises, or the next after it once the device is done; and after how long.

    The next call is none that peers take part in.
    """
    start = time.monotonic()
    try:
        call()
        check.frame.synchronize()
        idx = check.frame.make(np.zeros((1, 1), np.int64))
        buffer.get_dispatch_layout(idx, check.size)
    except (CommTimeout, InvalidArgument, RankMismatch) as error:
        return error, time.monotonic() - start
    check.fail("the call and the one after it", "raised nothing")
    raise AssertionError


def is_a(check: Checker, error: Exception, kind: type[Exception], *parts: str) -> None:
    """Check an error's class, and what its message says."""
    check.holds(type(error) is kind, f"{type(error).__name__}, want {kind.__name__}", error)
    for part in parts:
        check.holds(part in str(error), f"{part!r} is not in the message", error)


def late(check: Checker, frame_case: Case, phases: set[str], is_combine: bool) -> None:
    """One rank comes after the others' deadline."""
    with check.buffer() as buffer:
        check_round(check, buffer, frame_case)  # compiles
    # The deadline holds for making it and for growing, too: neither must be slow.
    check.ranks.barrier()
    buffer = Buffer(check.group, NUM_BYTES, engine=check.engine, timeout_s=TIMEOUT_S)
    sent = check_dispatch(check, buffer, frame_case, 0)
    rows = check.frame.make(np.zeros((sent.num_rows, frame_case.hidden), np.float32))
    arguments = arguments_of(check, frame_case)
    check.frame.synchronize()
    check.ranks.barrier()
    is_late = check.rank == LATE
    if is_late:
        time.sleep(TIMEOUT_S + LATE_BY_S)

    def call() -> None:
        if is_combine:
            buffer.combine(rows, sent.handle)
        else:
            buffer.dispatch(**arguments)

    error, seconds = error_of(check, buffer, call)
    is_a(check, error, CommTimeout)
    assert isinstance(error, CommTimeout)
    said = f"rank {check.rank} waited {TIMEOUT_S:g} s for rank(s) {error.peers[0]}; expected epoch"
    if error.gave_up is not None:
        said = f"rank {error.gave_up} gave up waiting, so rank {check.rank} ends too"
    check.holds(said in str(error), f"{said!r} is not in the message", error)
    check.holds(error.phase in phases, f"phase {error.phase!r} is none of {phases}")
    check.equal("rank", error.rank, check.rank)
    check.equal("number of peers", len(error.peers), 1)
    check.holds(error.peers[0] != check.rank, "peer", error)
    check.holds(seconds < PATIENCE_S, "seconds", seconds)
    if not is_late:
        check.holds(error.peers == (LATE,) or error.gave_up is not None, "peer", error)
    blamed = check.ranks.allgather((is_late, error.peers[0]))
    check.holds((False, LATE) in blamed, "no rank names the late one", blamed)
    # The Buffer stays failed; a new one works.
    again, _ = error_of(check, buffer, call)
    is_a(check, again, CommTimeout)
    check.ranks.barrier()
    buffer.destroy()
    with check.buffer() as other:
        for round_ in range(3):
            check_round(check, other, frame_case, round_)


def run_late_dispatch(check: Checker, case: Case) -> None:
    # The late rank finds all counts and lists; those that gave up do not arrive to move rows.
    late(check, case, {"dispatch: counts", "arrival"}, is_combine=False)


def run_late_combine(check: Checker, case: Case) -> None:
    late(check, case, {"arrival", "combine: rows"}, is_combine=True)


def run_disagree(check: Checker, case: Case) -> None:
    """One rank's rows are longer, in a dispatch, in one along a handle, and in a combine."""
    disagree(check, case, NUM_BYTES)


def run_disagree_and_grow(check: Checker, case: Case) -> None:
    """The same where the slab has no room for the longer rows."""
    disagree(check, case, 0)


def disagree(check: Checker, case: Case, num_bytes: int) -> None:
    hidden = case.hidden * (2 if check.rank == LATE else 1)
    with check.buffer(num_bytes) as buffer:
        check_round(check, buffer, case)
        arguments = arguments_of(check, case)
        arguments["x"] = check.frame.make(np.ones((arguments["x"].shape[0], hidden), np.float32))
        sent = check_dispatch(check, buffer, case, 0)
        rows = check.frame.make(np.ones((sent.num_rows, hidden), np.float32))
        check.frame.synchronize()
        calls: dict[str, Callable[[], Any]] = {
            "dispatch": lambda: buffer.dispatch(**arguments),
            "with a handle": lambda: buffer.dispatch(arguments["x"], handle=sent.handle),
            "combine": lambda: buffer.combine(rows, sent.handle),
        }
        for name, call in calls.items():
            check.case = f"disagreement, {name}"
            error, _ = error_of(check, buffer, call)
            own, other = f"rank 0: {case.hidden}", f"rank {LATE}: {2 * case.hidden}"
            is_a(check, error, RankMismatch, "hidden", own, other)
            said = check.ranks.allgather(str(error))
            check.equal("ranks' messages", said, [said[0]] * check.size)
            check_round(check, buffer, case, 1)


def run_worst(check: Checker, case: Case) -> None:
    """Too few num_worst_tokens on every rank; the memory behind the outputs is guarded."""
    with check.buffer(NUM_BYTES) as buffer:
        check_round(check, buffer, case)
        num_worst = 20  # no length of another output
        guards = guard_outputs(check, num_worst)
        arguments = arguments_of(check, case)
        check.frame.synchronize()
        check.ranks.barrier()
        call = lambda: buffer.dispatch(**arguments, num_worst_tokens=num_worst)  # noqa: E731
        error, _ = error_of(check, buffer, call)
        is_a(check, error, InvalidArgument, f"num_worst_tokens is {num_worst}", "rows arrive")
        arriving = int(re.search(r"(\d+) rows arrive", str(error))[1])  # type: ignore[index]
        check.holds(arriving > num_worst, "rows that arrive", arriving)
        check.frame.synchronize()
        check.equal("guarded outputs", len(guards), 3)
        for guard in guards:
            raw = np.ascontiguousarray(check.frame.numpy(guard)).reshape(-1).view(np.uint8)
            want = poison_byte(check.frame.numpy(guard).dtype)
            check.holds(bool((raw == want).all()), "memory past the end", "was written")
        check.ranks.barrier()
        check.case = "after too few num_worst_tokens"
        check_round(check, buffer, case, 1)


def guard_outputs(check: Checker, num_rows: int) -> list[Any]:
    """Put poisoned rows behind all outputs of so many rows; return them as they are made."""
    module, name = check.frame.adapter
    adapter = getattr(importlib.import_module(module), name)
    make, guards = adapter.empty, []

    def make_guarded(self: Any, shape: Any, *args: Any, **options: Any) -> Any:
        if shape[0] != num_rows:
            return make(self, shape, *args, **options)
        large = self.finish(make(self, (num_rows + NUM_GUARD_ROWS, *shape[1:]), *args, **options))
        guard = large[num_rows:]
        check.frame.overwrite(guard)
        check.frame.synchronize()
        guards.append(guard)
        return self.view(large[:num_rows], "output")

    adapter.empty = make_guarded
    return guards


def run_many_tokens(check: Checker, case: Case) -> None:
    """More tokens than lists have room for; the number that the message gives is enough."""
    large = for_frame(Case("many tokens", (9000, 8500), 64, 2, 2, "uniform", BF16), check.frame)
    with check.buffer() as buffer:
        check_round(check, buffer, case)
        arguments = arguments_of(check, large)
        error, _ = error_of(check, buffer, lambda: buffer.dispatch(**arguments))
        tokens = arguments["x"].shape[0]
        is_a(check, error, InvalidArgument, f"x has {tokens} tokens", "num_nvl_bytes=")
        num_bytes = int(re.search(r"num_nvl_bytes=(\d+)", str(error))[1])  # type: ignore[index]
        check_round(check, buffer, case, 1)
    num_bytes = max(check.ranks.allgather(num_bytes))
    with check.buffer(num_bytes) as buffer:
        check.case = f"num_nvl_bytes={num_bytes}"
        check_round(check, buffer, large)


def run_one_has_many(check: Checker, case: Case) -> None:
    """One rank is refused for its many tokens, and then makes the call that the others wait in."""
    large = for_frame(Case("too many", (9000,), 64, 2, 2, "uniform", BF16), check.frame)
    with check.buffer() as buffer:
        check_round(check, buffer, case)
        arguments = arguments_of(check, large)
        if check.rank == LATE:
            error, _ = error_of(check, buffer, lambda: buffer.dispatch(**arguments))
            is_a(check, error, InvalidArgument, "x has 9000 tokens")
        # "Nothing was sent; the Buffer works as before."
        check_round(check, buffer, case, 1)


def run_bad_choices(check: Checker, case: Case) -> None:
    """One rank chooses what is no expert: where dispatch makes the layout, all are told at once."""
    with check.buffer(NUM_BYTES) as buffer:
        check_round(check, buffer, case)
        arguments = arguments_of(check, case)
        if check.rank == LATE:
            choices = check.frame.numpy(arguments["topk_idx"]).copy()
            choices[-1, 0] = arguments["num_experts"]
            arguments["topk_idx"] = check.frame.make(choices)
        check.frame.synchronize()
        for num_worst_tokens in (0, 200):
            check.case = f"bad choices, num_worst_tokens={num_worst_tokens}"
            call = partial(buffer.dispatch, **arguments, num_worst_tokens=num_worst_tokens)
            error, _ = error_of(check, buffer, call)
            is_a(check, error, InvalidArgument, f"topk_idx of rank {LATE}", "on all ranks")
            check_round(check, buffer, case, 1)


def run_low_latency_disagree(check: Checker, case: Case) -> None:
    """One rank's low-latency calls are for more tokens, for which there is no room yet."""
    small = LowLatencyCase("small", (5, 7), 8, 256, 3, 4, "uniform")
    large = replace(small, num_max=2 * small.num_max)
    with check.buffer() as buffer:
        call_plainly(check, buffer, small)
        check.case = "disagreement, low-latency"
        own = large if check.rank == LATE else small
        error, _ = error_of(check, buffer, lambda: send(check, buffer, own, 0))
        numbers = (f"rank 0: {small.num_max}", f"rank {LATE}: {large.num_max}")
        is_a(check, error, RankMismatch, "num_max_dispatch_tokens_per_rank", *numbers)
        for agreed in (small, large):
            call_plainly(check, buffer, agreed)


SCENARIOS: dict[str, Callable[[Checker, Case], None]] = {
    "late-dispatch": run_late_dispatch,
    "late-combine": run_late_combine,
    "disagree": run_disagree,
    "disagree-and-grow": run_disagree_and_grow,
    "worst": run_worst,
    "many-tokens": run_many_tokens,
    "one-has-many": run_one_has_many,
    "bad-choices": run_bad_choices,
    "low-latency-disagree": run_low_latency_disagree,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("frame", choices=FRAMES)
    parser.add_argument("scenario", choices=SCENARIOS)
    options = parser.parse_args()
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    frame = frame_of(options.frame)
    frame.set_up(comm.rank)
    check = Checker(comm, frame, "cuda")
    check.case = options.scenario
    SCENARIOS[options.scenario](check, for_frame(CASE, frame))
    sys.stdout.write(f"EPCOMM-OK {comm.rank}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
