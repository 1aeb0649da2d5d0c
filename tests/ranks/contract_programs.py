"""Several contract programs on the host engine in one start, under mpiexec.

    contract_programs.py [--frame FRAME] PROGRAM...

Prints each rank's digest of each program as soon as that program has passed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings

from common import frame_of
from frames import FRAMES, poisoned_outputs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("programs", nargs="+")
    parser.add_argument("--frame", default="numpy", choices=FRAMES)
    options = parser.parse_args()
    frame = frame_of(options.frame)
    modules = {name: importlib.import_module(name) for name in options.programs}
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    warnings.simplefilter("error")
    frame.set_up(rank)
    with poisoned_outputs(frame):
        for name, module in modules.items():
            digest = module.run(MPI.COMM_WORLD, frame, "host")
            # One write a line, so that those of other ranks do not fall between.
            sys.stdout.write(f"EPCOMM-DIGEST {name} {rank} {digest}\n")
            sys.stdout.flush()
    sys.stdout.write(f"EPCOMM-OK {rank}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
