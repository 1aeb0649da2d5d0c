"""A node that is slow, stuck, absent or killed; 4 ranks as 2 nodes of 2.

rails_fail.py SCENARIO [PLACE] [--fake-gpus | --gpus]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import fail_common as common
import numpy as np
import pytest
from fail_common import check_round
from fake_gpu import FakeFrame

from epcomm import (
    Buffer,
    CommTimeout,
    EpcommError,
    InvalidArgument,
    TransportError,
    UnsupportedConfig,
)
from epcomm.engines import device_exchange, device_rail_moves, host_rail_moves, rails

#: Node 1 is the odd one; the rail peers of ranks 0 and 1 are these.
ODD = (2, 3)
TIMEOUT_S = 1.0
#: Where node 1 stops: what runs just before, and what the others are then waiting for.
PLACES = {
    "routes": (rails.RailsEngine, "_exchange_routes", "dispatch: routes"),
    "rows": (host_rail_moves.Spread, "send", "dispatch: rows"),
    "sums": (host_rail_moves.Sums, "send", "combine: rows"),
}
GPU_PLACES = {
    "rows": (device_exchange.Exchange, "run", "dispatch: rows"),
    "sums": (device_rail_moves.DeviceMoves, "combine", "combine: rows"),
}


def before(place: str, act: Callable[[], Any]) -> None:
    """Make this rank act when it first comes to a place."""
    owner, name, _ = PLACES[place]
    usual, state = getattr(owner, name), {"is_first": True}

    def wrapped(*args: Any) -> Any:
        if state["is_first"]:
            state["is_first"] = False
            act()
        return usual(*args)

    setattr(owner, name, wrapped)


def error_of(call: Callable[[], Any], kind: type[EpcommError]) -> Any:
    with pytest.raises(kind) as caught:
        call()
    return caught.value


def check_slow(comm: Any, place: str) -> None:
    """Within the deadline a slow node is waited for, wherever it is slow."""
    buffer = Buffer(comm, timeout_s=20.0)
    check_round(buffer, 0)
    if comm.rank in ODD:
        before(place, lambda: time.sleep(0.7))
    start_s = time.monotonic()
    check_round(buffer, 1)
    assert time.monotonic() - start_s > 0.6
    check_round(buffer, 2)
    buffer.destroy()


def check_stuck(comm: Any, place: str) -> None:
    """Past the deadline the others name the rail peer and what they wait for; nobody hangs."""
    buffer = Buffer(comm, timeout_s=TIMEOUT_S)
    check_round(buffer, 0)
    start_s = time.monotonic()
    if comm.rank in ODD:
        before(place, lambda: time.sleep(3 * TIMEOUT_S))
        # What it waits for may have come already; then it fails at the call after that.
        error_of(lambda: [check_round(buffer, seed) for seed in (1, 2)], TransportError)
    else:
        error = error_of(lambda: check_round(buffer, 1), CommTimeout)
        assert error.phase == PLACES[place][2], error
        assert error.rank == comm.rank
        assert set(error.peers) <= set(ODD), error
        assert "rank(s) " in str(error)
    assert time.monotonic() - start_s < 6 * TIMEOUT_S + rails.GRACE_S
    later = error_of(lambda: check_round(buffer, 2), TransportError)
    assert "an earlier call on this Buffer failed" in str(later)
    assert "make a new one" in str(later)
    buffer.destroy()
    comm.Barrier()
    check_new_buffer(comm)


def check_new_buffer(comm: Any) -> None:
    """A new Buffer on the same communicator takes no message of the old one for its own."""
    buffer = Buffer(comm, timeout_s=20.0)
    check_round(buffer, 3)
    buffer.destroy()


def check_refuses(comm: Any, place: str) -> None:
    """A refusal breaks the Buffer where others wait for what was not sent, and not before."""
    buffer = Buffer(comm, timeout_s=TIMEOUT_S)
    error_of(lambda: common.dispatch(buffer, 0, num_worst_tokens=1), InvalidArgument)
    recv_x, *_, handle, _ = common.dispatch(buffer, 0)
    x = np.zeros((handle.num_tokens, recv_x.shape[1]), recv_x.dtype)
    calls = {
        "routes": lambda: common.dispatch(buffer, 1),
        "rows": lambda: buffer.dispatch(x, handle=handle),
        "sums": lambda: buffer.combine(recv_x, handle),
    }

    def refuse() -> None:
        raise InvalidArgument("This is refused. Do not.")

    if comm.rank in ODD:
        before(place, refuse)
    error_of(calls[place], InvalidArgument if comm.rank in ODD else TransportError)
    later = str(error_of(lambda: check_round(buffer, 2), TransportError))
    assert "an earlier call on this Buffer failed (" in later
    assert comm.rank not in ODD or "(This is refused)" in later
    comm.Barrier()
    buffer.destroy()


def check_absent(comm: Any, who: str) -> None:
    """A node, or one of its ranks, does not make a call: all others learn who."""
    absent = ODD if who == "node" else ODD[1:]
    buffer = Buffer(comm, timeout_s=TIMEOUT_S)
    check_round(buffer, 0)
    start_s = time.monotonic()
    if comm.rank not in absent:
        error = error_of(lambda: common.dispatch(buffer, 1), CommTimeout)
        assert error.phase == "dispatch: arrival"
        assert error.rank == comm.rank
        assert error.peers[0] in absent, error
        if who == "node" and comm.rank == 0:
            assert error.peers == (2,)
        if who == "rank" and comm.rank == 0:
            assert "rank 1 of this node gave up waiting for it" in str(error)
    assert time.monotonic() - start_s < 2 * TIMEOUT_S + rails.GRACE_S
    comm.Barrier()
    buffer.destroy()
    check_new_buffer(comm)


def check_killed(comm: Any, place: str) -> None:
    """Node 1 is killed. Survivors cannot finalize MPI, so all end as they stand."""
    buffer = Buffer(comm, timeout_s=TIMEOUT_S)
    check_round(buffer, 0)
    if comm.rank in ODD:
        before(place, lambda: os.kill(os.getpid(), signal.SIGKILL))
    start_s = time.monotonic()
    # MPI may notice by itself, and then says so before the deadline.
    error = error_of(lambda: check_round(buffer, 1), TransportError)
    assert PLACES[place][2] in str(error)
    assert "rank(s) 2" in str(error) or "rank(s) 3" in str(error) or "rail peer" in str(error)
    assert time.monotonic() - start_s < 2 * TIMEOUT_S + rails.GRACE_S
    buffer.destroy()
    print(f"EPCOMM-OK {comm.rank}", flush=True)
    os._exit(0)


def check_cut(comm: Any, device: str) -> None:
    """The network between the nodes is cut in a call, and mended for mpiexec when all have failed.

    Only where `device`, on rank 0, is that network.
    """
    buffer = Buffer(comm, timeout_s=TIMEOUT_S)
    check_round(buffer, 0)
    comm.Barrier()

    def set_link(state: str) -> None:
        subprocess.run(["ip", "link", "set", device, state], check=True)

    if comm.rank == 0:
        before("rows", lambda: set_link("down"))
    start_s = time.monotonic()
    # Rows may have arrived before the cut; then it is the next call that finds it.
    error = error_of(lambda: [check_round(buffer, seed) for seed in (1, 2)], TransportError)
    assert "rail peer" in str(error) or "rank(s) " in str(error)
    assert time.monotonic() - start_s < 4 * TIMEOUT_S + 2 * rails.GRACE_S
    if comm.rank == 0:
        time.sleep(2 * TIMEOUT_S)
        set_link("up")
    print(f"EPCOMM-OK {comm.rank}", flush=True)
    time.sleep(4 * TIMEOUT_S)
    os._exit(0)


def check_unequal(comm: Any, what: str) -> None:
    """Nodes of different numbers of ranks are refused by all ranks."""
    error = error_of(lambda: Buffer(comm, timeout_s=10.0), UnsupportedConfig)
    assert "node 0 has 3 (0, 1, 2), node 1 has 1 (3,)" in str(error)


def check_refused(comm: Any, what: str) -> None:
    """What stays inside a node says what to use."""
    buffer = Buffer(comm, timeout_s=10.0, enable_shrink=True)
    handle = (np.zeros((2, 32), np.int32), np.zeros((2, 4), np.int64), 8, 32, 8)
    rows, idx = np.zeros((2, 32, 32), common.ml_dtypes.bfloat16), np.zeros((1, 3), np.int64)
    weights = np.zeros((1, 3), np.float32)
    calls = [
        lambda: common.low_latency_dispatch(buffer, 0),
        lambda: buffer.low_latency_combine(rows, idx, weights, handle),
        lambda: buffer.get_next_low_latency_combine_buffer(handle),
        lambda: buffer.low_latency_update_mask_buffer(1, True),
    ]
    for call in calls:
        message = str(error_of(call, UnsupportedConfig))
        assert "the group spans 2 nodes" in message
        assert "num_worst_tokens" in message
    status = np.ones(4, np.int32)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 0, 0, 0]
    buffer.low_latency_clean_mask_buffer()
    check_round(buffer, 0)
    buffer.destroy()


CHECKS = {
    "slow": check_slow,
    "stuck": check_stuck,
    "absent": check_absent,
    "killed": check_killed,
    "refused": check_refused,
    "refuses": check_refuses,
    "cut": check_cut,
    "unequal": check_unequal,
}


def main(what: str, where: str = "", place: str = "") -> None:
    comm = common.open_group()
    if place:
        PLACES.update(GPU_PLACES)
    if place == "--gpus":
        common.arrays.use_gpu(comm.rank)
    with FakeFrame("jax", has_rails=True).in_use() if place == "--fake-gpus" else nullcontext():
        CHECKS[what](comm, where)
    comm.Barrier()
    print(f"EPCOMM-OK {comm.rank}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
