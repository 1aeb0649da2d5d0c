"""The demo on the ranks of MPI.COMM_WORLD, held to its reference; further arguments go to it."""

from __future__ import annotations

import sys

from mpi4py import MPI

from epcomm.cli import main

exit_code = main(["demo", "--check", "--steps=3", "--quiet", *sys.argv[1:]])
assert exit_code == 0, f"rank {MPI.COMM_WORLD.rank}: exit code {exit_code}"
# One write, so that the lines of other ranks do not fall between.
sys.stdout.write(f"EPCOMM-OK {MPI.COMM_WORLD.rank}\n")
sys.stdout.flush()
