"""Compiling: one process at a time for each kernel. Kernels themselves: test_compile_kernels.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT

from epcomm.jit.compile import one_process_compiles
from epcomm.jit.kernels import layout_spec, route_spec

ENTER = """
import signal
from epcomm.jit.compile import one_process_compiles
from epcomm.jit.kernels import layout_spec, route_spec
signal.alarm(2)  # a process that waits is ended
with one_process_compiles({spec}):
    print("entered")
"""


def other_process_enters(spec: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", ENTER.format(spec=spec)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout == "entered\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "made" / "cache"
    monkeypatch.setenv("CUPY_CACHE_DIR", str(folder))
    return folder


def test_others_wait_for_the_kernel_that_one_compiles(cache: Path) -> None:
    with one_process_compiles(layout_spec(2)):
        assert cache.is_dir()
        assert not other_process_enters("layout_spec(2)")
        assert other_process_enters("layout_spec(3)")
        assert other_process_enters("route_spec(2)")
    assert other_process_enters("layout_spec(2)")


def test_a_failure_lets_the_next_in(cache: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), one_process_compiles(route_spec(2)):
        raise ValueError("wrong")
    assert other_process_enters("route_spec(2)")


def test_without_a_cache_each_compiles_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(file / "below"))
    with one_process_compiles(layout_spec(2)):
        assert other_process_enters("layout_spec(2)")
