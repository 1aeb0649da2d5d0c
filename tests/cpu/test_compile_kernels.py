"""Every kernel in every configuration compiles for every architecture, without a GPU."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
from typing import Any

import pytest
from launch import ROOT, run_command

from epcomm.cuda_layout import MAX_LOW_LATENCY_LOCAL_EXPERTS
from epcomm.engines import cuda_tuning
from epcomm.jit import kernels

#: It takes three minutes of two fast processors that nobody else uses, and took 17 of slow ones.
LIMIT_S = 2400.0


@pytest.fixture(scope="module")
def nvrtc() -> None:
    """Skip where kernels cannot be compiled."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    probe = "from cupy.cuda import nvrtc; nvrtc.getVersion()"
    found = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60
    )
    if found.returncode:
        pytest.skip(f"NVRTC is not installed: {found.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def gate() -> Any:
    """The script, as a module."""
    path = str(ROOT / "scripts" / "compile_kernels")
    loader = importlib.machinery.SourceFileLoader("compile_kernels", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.timeout(LIMIT_S + 60)
def test_all_kernels_compile_without_spills(nvrtc: None) -> None:
    # Ends all that it started, the compiling processes too.
    command = f"{sys.executable} scripts/compile_kernels --quiet"
    done = run_command(command, cwd=ROOT, timeout_s=LIMIT_S)
    assert "0 wrong" in done.stdout


def test_too_much_shared_memory_is_wrong(
    nvrtc: None, gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a launch adds counts, too: here one byte more than there is."""
    spec = kernels.layout_spec(2)
    *_, log, wrong = gate.compile_one(spec, "90")
    assert not wrong
    rest = gate.SHARED_BYTES - gate.static_bytes(log)
    for number, is_wrong in ((rest, False), (rest + 1, True)):
        monkeypatch.setattr(gate, "most_dynamic_bytes", lambda spec, number=number: number)
        assert ("bytes of shared memory" in gate.compile_one(spec, "90")[-1]) == is_wrong


def test_what_launches_of_low_latency_kernels_add(gate: Any) -> None:
    grid, most = cuda_tuning.LOW_LATENCY_COMBINE_GRID, MAX_LOW_LATENCY_LOCAL_EXPERTS
    combine = kernels.low_latency_combine_spec(8, grid)
    assert gate.most_dynamic_bytes(combine) == kernels.low_latency_combine_bytes(grid, most)
    dispatch = kernels.low_latency_dispatch_spec(8, True, cuda_tuning.LOW_LATENCY_DISPATCH_GRID)
    assert gate.most_dynamic_bytes(dispatch) == kernels.low_latency_dispatch_bytes(8, most)
