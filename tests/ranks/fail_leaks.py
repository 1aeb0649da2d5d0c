"""Rounds of create, use and destroy: descriptors, maps and /dev/shm stay as they are."""

from __future__ import annotations

import gc
import sys

import fail_common as common

from epcomm import Buffer


def rounds(comm: object, count: int) -> None:
    for seed in range(count):
        buffer = Buffer(comm, num_rdma_bytes=seed * 100, timeout_s=10.0)
        common.check_round(buffer, seed)
        common.check_low_latency_round(buffer, seed)
        buffer.destroy()


def main(count: int) -> None:
    comm = common.open_group()
    rounds(comm, 10)
    gc.collect()
    comm.Barrier()
    files, maps = common.open_files(), common.num_maps()
    rounds(comm, count)
    gc.collect()
    comm.Barrier()
    assert common.open_files() == files, (common.open_files(), files)
    assert common.epcomm_maps() == []
    assert common.num_maps() < maps + 20, (common.num_maps(), maps)
    assert common.epcomm_files() == []
    print(f"EPCOMM-OK {comm.rank}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
