"""Every rank stops where its slab has a name; rank 0 goes on when the test says so."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import fail_common as common

from epcomm import CommTimeout, slab

FOLDER = Path(os.environ[common.FOLDER])


def main() -> None:
    group = common.folder_group()
    map_all = slab._map_all

    def stop(*args: Any) -> Any:
        (FOLDER / f"ready-{group.rank}").touch()
        while group.rank or not (FOLDER / "killed").exists():
            time.sleep(0.005)
        return map_all(*args)

    slab._map_all = stop
    try:
        slab.HostSlabs(group, [4096] * group.size, os.environ["EPCOMM_SHM_DIR"], 1.0)
    except CommTimeout as error:
        print(type(error).__name__)


if __name__ == "__main__":
    main()
