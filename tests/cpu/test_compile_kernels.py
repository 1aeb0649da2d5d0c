"""Every kernel in every configuration compiles for every architecture, without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
from launch import ROOT, run_command

#: It takes three minutes of two fast processors that nobody else uses, and took 17 of slow ones.
LIMIT_S = 2400.0


@pytest.mark.timeout(LIMIT_S + 60)
def test_all_kernels_compile_without_spills() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    probe = "from cupy.cuda import nvrtc; nvrtc.getVersion()"
    found = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60
    )
    if found.returncode:
        pytest.skip(f"NVRTC is not installed: {found.stderr.strip().splitlines()[-1]}")
    # Ends all that it started, the compiling processes too.
    command = f"{sys.executable} scripts/compile_kernels --quiet"
    done = run_command(command, cwd=ROOT, timeout_s=LIMIT_S)
    assert "0 wrong" in done.stdout
