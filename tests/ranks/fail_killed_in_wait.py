"""All ranks use a Buffer; rank 0 then waits in a call for rank 1, until both are killed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import fail_common as common

from epcomm import Buffer


def main() -> None:
    group = common.folder_group()
    buffer = Buffer(group, num_nvl_bytes=1 << 16, timeout_s=60.0)
    common.check_round(buffer, 0)
    common.check_low_latency_round(buffer, 1)
    (Path(os.environ[common.FOLDER]) / f"ready-{group.rank}").touch()
    if group.rank == 0:
        common.dispatch(buffer, 2)
    time.sleep(60)


if __name__ == "__main__":
    main()
