"""Rank 1 is killed by the test that started this; the others say what they saw, as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import fail_common as common
import numpy as np

from epcomm import Buffer, CommTimeout, EpcommError

TIMEOUT_S = 1.0
FOLDER = Path(os.environ[common.FOLDER])


def wait_for_file(name: str) -> None:
    end = time.monotonic() + 20
    while not (FOLDER / name).exists():
        if time.monotonic() > end:
            sys.exit(f"no file {name}")
        time.sleep(0.005)


def wait_to_be_killed() -> None:
    (FOLDER / "ready-1").touch()
    time.sleep(60)


def stop_after_arrival(buffer: Buffer) -> None:
    """Let this rank be killed where it has told the others that it is there, and no further."""
    board = buffer._engine._board  # type: ignore[union-attr]
    post = board.post

    def post_and_stop(cell: int, value: int) -> None:
        if cell != 0:
            wait_to_be_killed()
        post(cell, value)

    board.post = post_and_stop  # type: ignore[method-assign]


def fail(group: Any, buffer: Buffer | None, when: str) -> None:
    """Make the call in which the others notice."""
    if buffer is None:
        Buffer(group, timeout_s=TIMEOUT_S)
    elif when.endswith("combine"):
        _, _, _, _, handle, _ = HELD
        buffer.combine(HELD[0], handle)
    elif "ll" in when:
        common.low_latency_dispatch(buffer, 1)
    else:
        common.dispatch(buffer, 1)


HELD: Any = None


def main(when: str) -> None:
    global HELD
    group = common.folder_group()
    survivors = group.split(0 if group.rank != 1 else 1)
    buffer = None
    if when == "shrink":
        size = Buffer.get_low_latency_rdma_size_hint(common.MAX_TOKENS, common.HIDDEN, 3, 6)
        buffer = Buffer(group, num_rdma_bytes=size, enable_shrink=True, timeout_s=TIMEOUT_S)
        common.check_low_latency_round(buffer, 0)
    elif when != "before_construction":
        buffer = Buffer(group, timeout_s=TIMEOUT_S)
        HELD = common.dispatch(buffer, 0)
        common.check_low_latency_round(buffer, 0)
    if group.rank == 1:
        if when.startswith("in_"):
            stop_after_arrival(buffer)
            fail(group, buffer, when)
        wait_to_be_killed()
    if not when.startswith("in_"):
        wait_for_file("killed")
    if when == "shrink":
        for seed in range(1, 4):
            common.check_low_latency_round(buffer, seed, gone=(1,))
        mask = np.zeros(3, np.int32)
        buffer.low_latency_query_mask_buffer(mask)
        print(json.dumps({"mask": mask.tolist()}))
        return
    report(group, buffer, survivors, when)


def report(group: Any, buffer: Buffer | None, survivors: Any, when: str) -> None:
    try:
        fail(group, buffer, when)
        sys.exit("the call did not fail")
    except CommTimeout as error:
        found = {
            "error": type(error).__name__,
            "phase": error.phase,
            "rank": error.rank,
            "peers": error.peers,
            "message": str(error),
        }
    found["later"] = ""
    if buffer is not None:
        try:
            common.dispatch(buffer, 2)
            sys.exit("a later call did not fail")
        except EpcommError as error:
            found["later"] = type(error).__name__
        buffer.destroy()
    found["maps_after"] = common.epcomm_maps()
    left = Buffer(survivors, timeout_s=10.0)
    common.check_round(left, 3)
    common.check_low_latency_round(left, 4)
    found["survivors_work"] = True
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
