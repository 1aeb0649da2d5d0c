"""Communicators that are made, used as groups, and freed, many times over."""

from __future__ import annotations

import sys

import fail_common as common

from epcomm import Buffer, as_group


def main(count: int) -> None:
    comm = common.open_group()
    for seed in range(count):
        own = comm.Dup()
        if seed % 500 == 0:
            buffer = Buffer(own, timeout_s=10.0)
            common.check_round(buffer, seed)
            buffer.destroy()
        else:
            as_group(own)
        own.Free()
    print(f"EPCOMM-OK {comm.rank}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
