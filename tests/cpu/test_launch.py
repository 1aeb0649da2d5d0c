"""The launcher of rank programs: what it passes on, what it refuses, and what it leaves behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import ROOT, Result

Mpiexec = Callable[..., Result]


def processes_with(mark: str) -> list[str]:
    """Return the command lines of all processes that have a text in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.with_name("cmdline").read_text())
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_arguments_arrive_and_every_rank_counts(mpiexec: Mpiexec, num_ranks: int) -> None:
    result = mpiexec("launch_probe", num_ranks, "shows", "a b", 3)
    assert result.returncode == 0
    assert not result.timed_out
    assert result.ok_ranks() == list(range(num_ranks))
    assert result.stdout.count(f"{num_ranks} ['a b', '3']") == num_ranks


def test_environment_is_clean_but_for_what_was_asked(
    mpiexec: Mpiexec, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A job that pytest itself may run in, and settings of whoever started it.
    for name in ("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "EPCOMM_ENGINE"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    result = mpiexec("launch_probe", 2, "shows", env={"EPCOMM_TIMEOUT_S": "5 s"})
    assert result.stdout.count("EPCOMM_TIMEOUT_S=5 s\n") == 2
    assert result.stdout.count("EPCOMM_ENGINE=host\n") == 2
    assert "PYTHONUNBUFFERED" not in result.stdout


def test_a_rank_that_raises_fails_the_launch_and_shows_why(mpiexec: Mpiexec) -> None:
    with pytest.raises(AssertionError) as caught:
        mpiexec("launch_probe", 3, "raises")
    message = str(caught.value)
    assert "RuntimeError: rank 0 raises" in message
    assert "-n 3" in message
    assert "launch_probe.py raises" in message
    assert mpiexec("launch_probe", 3, "raises", check=False).returncode != 0


@pytest.mark.parametrize(
    ("how", "marks"), [("is silent", [1, 2]), ("repeats itself", [0, 0, 1, 2])]
)
def test_every_rank_must_tell_its_success_once(
    mpiexec: Mpiexec, how: str, marks: list[int]
) -> None:
    with pytest.raises(AssertionError, match="exit 0"):
        mpiexec("launch_probe", 3, how)
    assert mpiexec("launch_probe", 3, how, check=False).ok_ranks() == marks


def test_an_exit_code_counts_even_after_all_marks(mpiexec: Mpiexec) -> None:
    with pytest.raises(AssertionError, match=r"success marks of ranks \[0, 1\]"):
        mpiexec("launch_probe", 2, "exits late")


def test_a_launch_past_its_deadline_shows_its_stacks_and_is_gone(
    mpiexec: Mpiexec, tmp_path: Path
) -> None:
    env = {"PROBE": str(tmp_path)}
    # On a busy machine the ranks need a while to get to where they hang.
    for timeout_s in (3, 10, 40):
        with pytest.raises(AssertionError) as caught:
            mpiexec("launch_probe", 3, "hangs", timeout_s=timeout_s, env=env, check=False)
        message = str(caught.value)
        if "in wait_for_nobody" in message:
            break
    assert "in wait_for_nobody" in message
    assert "past its deadline" in message
    assert processes_with(str(tmp_path)) == []
    # The library's own shared memory, which it has no chance to remove.
    assert not any(path.exists() for path in map(Path, re.findall(r"/dev/shm/\S+", message)))


def test_nothing_is_left_of_a_launch_that_went_well(mpiexec: Mpiexec, tmp_path: Path) -> None:
    env = {"PROBE": str(tmp_path)}
    mpiexec("launch_probe", 2, "leaves a child", timeout_s=30, env=env)
    assert processes_with(str(tmp_path)) == []


def test_pytest_itself_must_not_import_mpi(
    mpiexec: Mpiexec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", object())
    with pytest.raises(RuntimeError, match="imported mpi4py"):
        mpiexec("launch_probe", 1, "shows")


def test_gpu_mark_skips_where_there_are_fewer(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu(99)\n"
        "def test_needs_99(): raise AssertionError\n"
        "@pytest.mark.gpu(0)\n"
        "def test_needs_none(): pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", ROOT / "setup.cfg", "-p", "conftest", tmp_path],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    assert "needs 99 GPU(s) that CuPy can use, found " in done.stdout
