"""Every kernel in every configuration compiles for every architecture, without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
from launch import ROOT


@pytest.mark.timeout(600)
def test_all_kernels_compile_without_spills() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    probe = "from cupy.cuda import nvrtc; nvrtc.getVersion()"
    found = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60
    )
    if found.returncode:
        pytest.skip(f"NVRTC is not installed: {found.stderr.strip().splitlines()[-1]}")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "compile_kernels", "--quiet"],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 wrong" in done.stdout
