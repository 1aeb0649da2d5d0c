"""Rank 1 raises while the others wait for it with a long deadline."""

from __future__ import annotations

import fail_common as common

from epcomm import Buffer


class UserError(Exception):
    """Raised by a rank's own code."""


def main() -> None:
    comm = common.open_group()
    buffer = Buffer(comm, timeout_s=60.0)
    common.check_round(buffer, 0)
    if comm.rank == 1:
        raise UserError("out of ideas")
    common.check_round(buffer, 1)
    print(f"EPCOMM-OK {comm.rank}", flush=True)


if __name__ == "__main__":
    main()
