"""``python -m epcomm info`` on the ranks of MPI.COMM_WORLD."""

from __future__ import annotations

import sys

from mpi4py import MPI

from epcomm.cli import main

assert main(["info"]) == 0
# Rank 0 prints the report: its marks come after it.
sys.stdout.flush()
MPI.COMM_WORLD.barrier()
sys.stdout.write(f"EPCOMM-OK {MPI.COMM_WORLD.rank}\n")
sys.stdout.flush()
