"""Rank 1 kills itself while the others wait for it with a long deadline."""

from __future__ import annotations

import os
import signal

import fail_common as common

from epcomm import Buffer


def main() -> None:
    comm = common.open_group()
    buffer = Buffer(comm, timeout_s=60.0)
    result = common.dispatch(buffer, 0)
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    buffer.combine(result[0], result[4])
    print(f"EPCOMM-OK {comm.rank}", flush=True)


if __name__ == "__main__":
    main()
