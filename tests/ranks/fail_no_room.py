"""The place for slabs is too small; prints the error of the first attempt, and of growth."""

from __future__ import annotations

import resource
import sys

import fail_common as common
import numpy as np

from epcomm import Buffer, TransportError

ROOM = 1 << 20


def error_of_construction(group: common.FolderGroup) -> str:
    try:
        Buffer(group, num_nvl_bytes=16 * ROOM, timeout_s=10.0)
    except TransportError as error:
        return str(error)
    sys.exit("a slab that is too large was made")


def error_of_growth(group: common.FolderGroup) -> str:
    buffer = Buffer(group, timeout_s=10.0)
    x = np.ones((5000, 1024), np.float32)
    idx, weights = np.zeros((5000, 1), np.int64), np.ones((5000, 1), np.float32)
    try:
        buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=2)
    except TransportError as error:
        return str(error)
    sys.exit("the slab grew beyond its place")


def main(limit: str) -> None:
    group = common.folder_group()
    if limit == "file-size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
    print(error_of_construction(group))
    print(error_of_growth(group))


if __name__ == "__main__":
    main(sys.argv[1])
