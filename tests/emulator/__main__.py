"""Runs cases in a process of their own: ``python -m emulator --cache DIR``.

Ends with 0 when all is right, with FOUND when an output is wrong, a call failed or a kernel did
what no kernel may do, and with ThreadSanitizer's code when that found something.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from emulator import cases, low_latency
from emulator.build import EmulatorError, Toolchain
from emulator.world import CallFailed
from epcomm.jit.sources import source_dir

#: The process's end when something is wrong with the kernels.
FOUND = 3


def run_case(
    case: cases.Case | low_latency.Case, toolchain: Toolchain, seed: int, timeout_s: float
) -> None:
    """Run a case of either kind."""
    if isinstance(case, low_latency.Case):
        low_latency.run_case(case, toolchain, seed=seed, timeout_s=timeout_s)
    else:
        cases.run_case(case, toolchain, seed=seed, timeout_s=timeout_s)


def main() -> int:
    """Run the cases that the arguments name, with several seeds."""
    parser = argparse.ArgumentParser(prog="python -m emulator", description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder for libraries")
    parser.add_argument("--sources", type=Path, default=source_dir(), help="the CUDA sources")
    parser.add_argument("--case", action="append", help="name of a case; all where left out")
    parser.add_argument(
        "--watched", action="store_true", help="tell ThreadSanitizer of all threads"
    )
    parser.add_argument("--seeds", type=int, default=1, help="how often, each in another order")
    parser.add_argument("--timeout", type=float, default=60.0, help="deadline of waits, in s")
    args = parser.parse_args()
    toolchain = Toolchain(args.cache, args.sources, is_sanitized=args.watched)
    plain = (*cases.CASES, *low_latency.CASES)
    watched = (*cases.WATCHED_CASES, *low_latency.WATCHED_CASES)
    for case in watched if args.watched else plain:
        if args.case and case.name not in args.case:
            continue
        begin = time.monotonic()
        try:
            for seed in range(args.seeds):
                run_case(case, toolchain, seed, args.timeout)
        except (AssertionError, CallFailed, EmulatorError) as error:
            print(f"{case.name}, seed {seed}: {type(error).__name__}: {error}")
            return FOUND
        print(f"{case.name}: right, {time.monotonic() - begin:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
