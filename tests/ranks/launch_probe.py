"""Behaves, on rank 0 or on every rank, as the first argument says; tests the launcher itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from mpi4py import MPI

comm = MPI.COMM_WORLD
how = sys.argv[1]
mark = f"EPCOMM-OK {comm.rank}\n"


def say(text: str) -> None:
    # One write, so that the lines of other ranks do not fall between.
    sys.stdout.write(text)
    sys.stdout.flush()


def wait_for_nobody() -> None:
    time.sleep(1000)


def start_child() -> None:
    # Out of reach of signals to the rank's process group. Without the rank's output: mpiexec itself
    # waits for whoever holds it.
    nothing = subprocess.DEVNULL
    subprocess.Popen(["sleep", "1000"], stdout=nothing, stderr=nothing, start_new_session=True)


if how == "shows":
    names = [name for name in sorted(os.environ) if name.startswith(("EPCOMM_", "PYTHONUNBUF"))]
    shown = [f"{name}={os.environ[name]}" for name in names]
    say("".join(f"{line}\n" for line in [f"{comm.size} {sys.argv[2:]}", *shown]) + mark)
elif how == "raises":
    if comm.rank == 0:
        raise RuntimeError("rank 0 raises")
    comm.barrier()
elif how == "hangs":
    start_child()
    mapped = {
        line.split(maxsplit=5)[-1]
        for line in Path("/proc/self/maps").read_text().split("\n")
        if "/dev/shm/" in line
    }
    say("".join(f"{path}\n" for path in mapped))
    comm.barrier()
    if comm.rank == 0:
        wait_for_nobody()
    comm.barrier()
elif how == "leaves a child":
    start_child()
    comm.barrier()
    say(mark)
elif how == "is silent":
    say(mark if comm.rank else "")
elif how == "repeats itself":
    say(mark if comm.rank else 2 * mark)
elif how == "exits late":
    comm.barrier()
    say(mark)
    MPI.Finalize()
    sys.exit(0 if comm.rank else 3)
else:
    raise ValueError(how)
