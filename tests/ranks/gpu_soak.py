"""Random rounds for a while: shapes, routing, dtypes, tuning numbers; every bit held to the oracle.

Every fourth round is one of low-latency calls, inside one node.

    gpu_soak.py [--seconds S] [--seed N] [--frame FRAME] [--engine ENGINE]

Prints ``EPCOMM-ROUNDS n`` on rank 0: rounds of dispatch and combine.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
from common import Checker, frame_of, rng_of
from contract_dispatch import (
    BF16,
    E4M3,
    F16,
    F32,
    I8,
    I32,
    I64,
    U8,
    Case,
    Scales,
    check_combine,
    check_dispatch,
    check_repeated,
    for_frame,
)
from contract_low_latency import FP8, finish, receive, send, send_back
from contract_low_latency import Case as LowLatencyCase
from frames import FRAMES, MEMORY_ORDERS, poisoned_outputs

from epcomm import Buffer

#: Rounds between looks at rank 0's clock, and with one Buffer.
ROUNDS_A_LOOK, ROUNDS_A_BUFFER = 20, 400
#: Reserved by every other Buffer; the others grow, which num_worst_tokens rules out.
NUM_BYTES = 256 * 2**20
ROUTINGS = ("uniform", "zipf", "some", "none", "one_expert", "one_rank", "a_rank_each", "repeats")
DTYPES = (BF16, BF16, F16, F32, E4M3, I8, U8, I64)
NUM_SMS = (2, 4, 8, 16, 20, 24, 32, 64)


def random_case(rng: Any, name: str, num_ranks: int, is_reserved: bool) -> Case:
    """Return a case; mostly small ones, so that there are many."""

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    most_tokens = 300 if rng.random() < 0.02 else pick(1, 8, 24, 40)
    hidden = 16 * int(rng.integers(1, 512 if rng.random() < 0.05 else 40))
    dtype = pick(*DTYPES)
    scales = None
    if dtype.itemsize == 1 and rng.random() < 0.7:
        scales = Scales(int(rng.integers(1, 20)), pick(F32, I32), pick(*MEMORY_ORDERS))
    return Case(
        id=name,
        num_tokens=tuple(rng.integers(0, most_tokens + 1, num_ranks).tolist()),
        hidden=hidden,
        num_topk=int(rng.integers(1, 10)),
        num_local=int(rng.integers(1, 17)),
        routing=pick(*ROUTINGS),
        dtype=dtype,
        idx_dtype=pick(I32, I64),
        scales=scales,
        alignment=pick(1, 1, 4, 128),
        num_spare=int(rng.integers(0, 20)) if is_reserved and rng.random() < 0.4 else None,
        is_special=bool(rng.random() < 0.1),
        num_rounds=6,
    )


def run_round(check: Checker, buffer: Buffer, number: int, seed: int, is_reserved: bool) -> None:
    """Check one random round; all ranks draw the same numbers."""
    rng = rng_of("soak", seed, number)
    case = random_case(rng, f"soak {seed} {number}", check.size, is_reserved)
    case = for_frame(case, check.frame)
    round_ = int(rng.integers(case.num_rounds))
    num_sms = int(rng.choice(NUM_SMS))
    check.case = f"{case}, round {round_}, num_sms {num_sms}"
    Buffer.set_num_sms(num_sms)
    sent = check_dispatch(check, buffer, case, round_)
    if rng.random() < 0.3:
        check_repeated(check, buffer, case, round_, sent)
    check_combine(check, buffer, case, round_, sent, has_weights=bool(rng.random() < 0.7))
    if rng.random() < 0.3:  # as many tokens, other routes; and longer rows, for which slabs grow
        times = 1 if is_reserved else int(rng.choice((1, 1, 1, 4)))
        again = replace(
            case,
            id=f"{case.id} again",
            routing=str(rng.choice(ROUTINGS)),
            hidden=case.hidden * times,
        )
        check.case = f"{again}, round {round_}, num_sms {num_sms}"
        sent = check_dispatch(check, buffer, again, round_)
        check_combine(check, buffer, again, round_, sent)


def random_low_latency_case(rng: Any, name: str, check: Checker) -> LowLatencyCase:
    """Return a case of low-latency calls."""
    fp8 = str(rng.choice([*FP8]))
    step = {"none": 8, "ue8m0": 512}.get(fp8, 128)
    most = int(rng.choice((1, 4, 16, 40)))
    return LowLatencyCase(
        id=name,
        num_tokens=tuple(rng.integers(0, most + 1, check.size).tolist()),
        num_max=most + int(rng.integers(0, 3)),
        hidden=step * int(rng.integers(1, 2048 // step + 1)),
        num_topk=int(rng.integers(1, 12)),
        num_local=int(rng.integers(1, 17)),
        routing=str(rng.choice([name for name in ROUTINGS if name != "repeats"])),
        fp8=fp8,
        precision=str(rng.choice(("rank", "expert"))),
        idx_dtype=check.frame.dtype(rng.choice((I32, I64))),
    )


def run_low_latency_round(check: Checker, buffer: Buffer, number: int, seed: int) -> None:
    """Check one random round of low-latency calls, with hooks or without."""
    rng = rng_of("low-latency soak", seed, number)
    case = random_low_latency_case(rng, f"soak {seed} {number}", check)
    hooks = {"return_recv_hook": True} if check.frame.is_mutable and rng.random() < 0.5 else {}
    check.case = f"{case}, {hooks}"
    waiting = [send(check, buffer, case, round_, **hooks) for round_ in range(1 + len(hooks))]
    for sent in waiting:
        receive(check, sent)
        finish(check, send_back(check, buffer, sent, **hooks))


def soak(check: Checker, seconds: float, seed: int) -> int:
    """Run rounds until rank 0's time is up; return how many."""
    end, number, is_over = time.monotonic() + seconds, 0, False
    while not is_over:
        is_reserved = number // ROUNDS_A_BUFFER % 2 == 0
        with check.buffer(NUM_BYTES if is_reserved else 0) as buffer:
            for _ in range(ROUNDS_A_BUFFER):
                number += 1
                if number % 4 == 0 and check.num_nodes == 1:
                    run_low_latency_round(check, buffer, number, seed)
                else:
                    run_round(check, buffer, number, seed, is_reserved)
                if number % ROUNDS_A_LOOK == 0:
                    # Rank 0 decides: clocks differ, and all have to make the same calls.
                    is_over = check.ranks.allgather(time.monotonic() > end)[0]
                if is_over:
                    break
    return number


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frame", default="cupy", choices=FRAMES)
    parser.add_argument("--engine", default="cuda")
    options = parser.parse_args()
    frame = frame_of(options.frame)
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    frame.set_up(comm.rank)
    np.seterr(all="ignore")  # random bits are NaNs and infinities too
    with poisoned_outputs(frame):
        rounds = soak(Checker(comm, frame, options.engine), options.seconds, options.seed)
    # One write, so that the lines of other ranks do not fall between.
    first = f"EPCOMM-ROUNDS {rounds}\n" if comm.rank == 0 else ""
    sys.stdout.write(f"{first}EPCOMM-OK {comm.rank}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
