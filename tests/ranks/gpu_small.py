"""A few tiny rounds of one process on GPU 0, for compute-sanitizer.

    gpu_small.py NUM_RANKS

Ranks are threads, each with a stream of its own.
"""

from __future__ import annotations

import sys
from typing import Any

from common import Checker, frame_of
from contract_dispatch import (
    BF16,
    F32,
    U8,
    Case,
    Scales,
    check_combine,
    check_dispatch,
    check_repeated,
)
from contract_low_latency import Case as LowLatencyCase
from contract_low_latency import finish, receive, send, send_back

from epcomm import Buffer, as_group, run_threads
from epcomm.engines.cuda import CudaEngine

NUM_SMS = 4
TIMEOUT_S = 300.0  # the sanitizer slows kernels down a lot
CASES = (
    Case("rows", (5, 3), 64, 2, 2, "some", F32),
    Case("pair", (7, 18), 32, 3, 2, "uniform", U8, scales=Scales(3, F32, "columns")),
    Case("worst", (4, 6), 64, 2, 2, "uniform", BF16, num_spare=3),
)
LOW_LATENCY_CASES = (
    LowLatencyCase("fp8", (5, 3), 6, 640, 3, 4, "some"),
    LowLatencyCase("by-expert", (4, 7), 7, 72, 4, 3, "uniform", "none", "expert"),
)


def run(group: Any) -> None:
    import cupy

    frame = frame_of("cupy")
    cupy.cuda.Device(0).use()
    check = Checker(group, frame, "cuda")
    with (
        cupy.cuda.Stream(non_blocking=True),
        check.buffer(2**20, timeout_s=TIMEOUT_S) as buffer,
    ):
        for round_, case in enumerate(CASES):
            check.case = case.id
            sent = check_dispatch(check, buffer, case, round_)
            check_combine(check, buffer, case, round_, sent)
            if case.num_spare is None:
                check_repeated(check, buffer, case, round_, sent)
        for round_, low_latency_case in enumerate(LOW_LATENCY_CASES):
            check.case = low_latency_case.id
            hooks = {"return_recv_hook": round_ == 1}
            dispatched = send(check, buffer, low_latency_case, round_, **hooks)
            receive(check, dispatched)
            finish(check, send_back(check, buffer, dispatched, **hooks))
    sys.stdout.write(f"EPCOMM-OK {as_group(group).rank}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    Buffer.set_num_sms(NUM_SMS)
    # The sanitizer takes its time for every thread.
    CudaEngine._num_low_latency_blocks = lambda self: NUM_SMS  # type: ignore[method-assign]
    run_threads(run, int(sys.argv[1]))
