"""compute-sanitizer finds nothing in a few tiny rounds: one rank, and two on one GPU."""

from __future__ import annotations

import shlex
import shutil
import sys

import pytest
from launch import ROOT, run_command

ERROR_EXIT = 9
OPTIONS = {
    # A library asks CUDA things that it may refuse: no fault of a kernel.
    "memcheck": ["--report-api-errors", "no"],
    # Warps of these meet by acquire and release in shared memory, which racecheck takes for races;
    # tests/emulator runs them under ThreadSanitizer.
    "racecheck": [
        *("--kernel-name-exclude", "kernel_substring=epcomm_combine"),
        *("--kernel-name-exclude", "kernel_substring=epcomm_low_latency"),
    ],
}


def find_sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if found is None:
        pytest.skip("no compute-sanitizer on PATH or in /usr/local/cuda/bin")
    return found


@pytest.mark.gpu(1)
@pytest.mark.timeout(90)
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("tool", list(OPTIONS))
def test_nothing_found(tool: str, num_ranks: int) -> None:
    program = str(ROOT / "tests" / "ranks" / "gpu_small.py")
    command = [find_sanitizer(), "--tool", tool, "--error-exitcode", str(ERROR_EXIT)]
    command += OPTIONS[tool]
    command += [sys.executable, program, str(num_ranks)]
    result = run_command(shlex.join(command), cwd=ROOT, timeout_s=85)
    assert result.ok_ranks() == list(range(num_ranks)), result
