"""Late ranks, missing ranks and ranks that disagree, as MPI processes; 3 ranks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import fail_common as common
import ml_dtypes
import numpy as np
import pytest

from epcomm import Buffer, CommTimeout, EpcommError, InvalidArgument, RankMismatch, TransportError


def error_of(call: Callable[[], Any], kind: type[EpcommError]) -> Any:
    with pytest.raises(kind) as caught:
        call()
    return caught.value


def check_same(comm: Any, message: str, *pieces: str) -> None:
    messages = comm.allgather(message)
    assert len(set(messages)) == 1, messages
    for piece in pieces:
        assert piece in message, message


def check_disagreement(comm: Any) -> None:
    is_odd = comm.rank == 1
    error = error_of(lambda: Buffer(comm, 1 << 20 if is_odd else 0, timeout_s=10.0), RankMismatch)
    check_same(comm, str(error), "num_nvl_bytes", "rank 0: 0, rank 1: 1048576, rank 2: 0")
    buffer = Buffer(comm, timeout_s=10.0)
    recv, _, _, _, handle, _ = common.dispatch(buffer, 0)
    x, idx, weights = common.make_inputs(0, comm.rank, comm.size)

    def dispatch(rows: Any, **changed: Any) -> Callable[[], Any]:
        arguments = {"topk_idx": idx, "topk_weights": weights, "num_experts": 6} | changed
        return lambda: buffer.dispatch(rows, **arguments)

    def low_latency(max_tokens: int) -> Callable[[], Any]:
        rows = x.astype(ml_dtypes.bfloat16)
        return lambda: buffer.low_latency_dispatch(rows, idx, max_tokens, 6, use_fp8=False)

    table = [
        (dispatch(x), dispatch(np.zeros((5, 64), np.float32)), "hidden", "rank 1: 64"),
        (dispatch(x), dispatch(x.astype(ml_dtypes.bfloat16)), "dtype", "rank 1: bfloat16"),
        (dispatch(x), dispatch(x, num_experts=9), "num_experts", "rank 1: 9"),
        (dispatch(x), dispatch(x, expert_alignment=8), "expert_alignment", "rank 1: 8"),
        (low_latency(8), low_latency(16), "num_max_dispatch_tokens_per_rank", "rank 1: 16"),
    ]
    for usual, odd, *pieces in table:
        error = error_of(odd if is_odd else usual, RankMismatch)
        check_same(comm, str(error), *pieces)
        common.check_round(buffer, 1)
        common.check_low_latency_round(buffer, 2)
    worst = dispatch(x, num_worst_tokens=1 if is_odd else 100)
    check_same(comm, str(error_of(worst, InvalidArgument)), "num_worst_tokens is 1 on rank 1")
    np.testing.assert_array_equal(buffer.dispatch(x, handle=handle)[0], recv)
    buffer.destroy()


def check_missing_and_late(comm: Any) -> None:
    buffer = Buffer(comm, timeout_s=0.5)
    common.check_round(buffer, 0)
    if comm.rank == 1:
        comm.Barrier()
        start_s = time.monotonic()
        error_of(lambda: common.dispatch(buffer, 1), TransportError)
        assert time.monotonic() - start_s < 0.5
    else:
        error = error_of(lambda: common.dispatch(buffer, 1), CommTimeout)
        assert (error.phase, error.rank, error.peers) == ("dispatch: arrival", comm.rank, (1,))
        comm.Barrier()
    buffer.destroy()
    comm.Barrier()
    buffer = Buffer(comm, timeout_s=10.0)
    common.check_round(buffer, 2)
    buffer.destroy()


def check_late_to_construction(comm: Any) -> None:
    """Rank 1 comes when the others have given up; a few tries later all are in step again."""
    Buffer(comm, timeout_s=10.0).destroy()
    if comm.rank == 1:
        comm.Barrier()
    else:
        error = error_of(lambda: Buffer(comm, timeout_s=1.0), CommTimeout)
        assert (error.phase, error.peers) == ("making a Buffer", (1,))
        comm.Barrier()
    make_in_five_tries(comm)


def make_in_five_tries(comm: Any) -> None:
    for _ in range(5):
        try:
            buffer = Buffer(comm, timeout_s=1.0)
        except TransportError:
            continue
        common.check_round(buffer, 3)
        buffer.destroy()
        return
    raise AssertionError("no Buffer after five tries")


def check_late_to_the_first_use(comm: Any) -> None:
    """As before on a new communicator: the deadline is the Buffer's there, too."""
    new = comm.Dup()
    if comm.rank == 1:
        comm.Barrier()
    else:
        start_s = time.monotonic()
        error_of(lambda: Buffer(new, timeout_s=0.5), CommTimeout)
        assert time.monotonic() - start_s < 10
        comm.Barrier()
    make_in_five_tries(new)


def check_calls(comm: Any) -> None:
    """Ranks that make different calls."""
    buffer = Buffer(comm, timeout_s=10.0)
    recv, _, _, _, handle, _ = common.dispatch(buffer, 0)
    if comm.rank == 1:
        error = error_of(lambda: buffer.combine(recv, handle), RankMismatch)
    else:
        error = error_of(lambda: common.dispatch(buffer, 1), RankMismatch)
    common.check_round(buffer, 2)
    buffer.destroy()
    check_same(comm, str(error), "rank 0: dispatch, rank 1: combine, rank 2: dispatch")


CHECKS = {
    "disagree": check_disagreement,
    "calls": check_calls,
    "missing": check_missing_and_late,
    "construction": check_late_to_construction,
    "first_use": check_late_to_the_first_use,
}


def main(what: str) -> None:
    comm = common.open_group()
    CHECKS[what](comm)
    comm.Barrier()
    print(f"EPCOMM-OK {comm.rank}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
