"""Several contract programs on arrays of GPUs in one start, under mpiexec or as threads.

    gpu_contract.py FRAME [--threads N] [--engine ENGINE] PROGRAM...

With ``--threads`` this one process plays all ranks. Prints each rank's digest of each program.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from contextlib import nullcontext
from typing import Any

from common import frame_of
from frames import FRAMES, poisoned_outputs

from epcomm import as_group, run_threads


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("frame", choices=FRAMES)
    parser.add_argument("programs", nargs="+")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--engine", default="cuda", choices=("cuda", "staged", "auto"))
    options = parser.parse_args()
    frame = frame_of(options.frame)
    modules = {name: importlib.import_module(name) for name in options.programs}

    def run(group: Any) -> None:
        rank = as_group(group).rank
        frame.set_up(rank)
        lines = []
        # Threads that share a GPU must not share its default stream, where kernels wait for peers.
        has_own_stream = options.threads and options.engine == "cuda"
        with frame.own_stream() if has_own_stream else nullcontext():
            for name, module in modules.items():
                digest = module.run(group, frame, options.engine)
                lines.append(f"EPCOMM-DIGEST {name} {rank} {digest}\n")
        # One write, so that the lines of other ranks do not fall between.
        sys.stdout.write("".join(lines) + f"EPCOMM-OK {rank}\n")
        sys.stdout.flush()

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="(jax|torch|cupy|cupyx)")
    with poisoned_outputs(frame):
        if options.threads:
            run_threads(run, options.threads)
        else:
            from mpi4py import MPI

            run(MPI.COMM_WORLD)


if __name__ == "__main__":
    main()
