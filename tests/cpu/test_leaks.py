"""Nothing is left behind: files, descriptors and memory maps, whatever ends a Buffer or a rank."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import launch
import numpy as np
import pytest
from processes import Processes, start
from ranks import fail_common as common

from epcomm import Buffer, PeerMapError, SingleGroup, TransportError, env, run_threads, slab
from epcomm.slab import HostSlabs

pytestmark = pytest.mark.timeout(120)

NUM_ROUNDS = 200


@pytest.fixture
def shm_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that EPCOMM_SHM_DIR names."""
    folder = tmp_path / "slabs"
    folder.mkdir()
    monkeypatch.setenv("EPCOMM_SHM_DIR", str(folder))
    env.settings.cache_clear()
    yield folder
    monkeypatch.undo()
    env.settings.cache_clear()


def use(buffer: Buffer, seed: int) -> None:
    common.check_round(buffer, seed)
    common.check_low_latency_round(buffer, seed)


# --- rounds of create, use, destroy ---------------------------------------------------------------


def measure() -> tuple[int, int, list[str]]:
    gc.collect()
    return common.open_files(), len(common.epcomm_maps()), common.epcomm_files()


@pytest.mark.parametrize("end", ["destroy", "del"])
def test_threads(end: str) -> None:
    """The collector is off: what a Buffer held is free as soon as nobody holds the Buffer."""

    def fn(group: Any) -> None:
        for seed in range(NUM_ROUNDS // 10 if end == "del" else NUM_ROUNDS):
            buffer = Buffer(group, num_nvl_bytes=seed * 1000, timeout_s=10.0)
            use(buffer, seed)
            if end == "destroy":
                buffer.destroy()
            del buffer

    run_threads(fn, 2)
    before = measure()
    num_maps = common.num_maps()
    gc.disable()
    try:
        run_threads(fn, 2)
        assert len(common.epcomm_maps()) == 0
    finally:
        gc.enable()
    assert measure() == before
    assert common.num_maps() < num_maps + 20


def test_threads_with_files(shm_dir: Path) -> None:
    def fn(group: Any) -> None:
        for seed in range(20):
            buffer = Buffer(group, num_rdma_bytes=1 << 16, timeout_s=10.0)
            use(buffer, seed)
            assert os.listdir(shm_dir) == []
            buffer.destroy()

    run_threads(fn, 2)
    before = measure()
    run_threads(fn, 2)
    assert measure() == before
    assert os.listdir(shm_dir) == []


def test_refused_and_failed_buffers() -> None:
    """Buffers that fail halfway keep nothing."""

    def fn(group: Any) -> None:
        for _ in range(20):
            with pytest.raises(TransportError):
                Buffer(group, num_nvl_bytes=1 << 60, timeout_s=10.0)
            with pytest.raises(TransportError):
                Buffer(group, num_rdma_bytes=1 << 60, timeout_s=10.0)

    run_threads(fn, 2)
    before = measure()
    run_threads(fn, 2)
    assert measure() == before
    assert common.epcomm_maps() == []


def test_slab_that_grows() -> None:
    def fn(group: Any) -> None:
        buffer = Buffer(group, timeout_s=10.0)
        for num_tokens in (1, 100, 1000, 5000, 10000):
            x = np.ones((num_tokens, 256), np.float32)
            idx = np.zeros((num_tokens, 1), np.int64)
            weights = np.ones((num_tokens, 1), np.float32)
            recv, *_, handle, _ = buffer.dispatch(
                x, topk_idx=idx, topk_weights=weights, num_experts=2
            )
            buffer.combine(recv, handle)
            group.barrier()
            # Old slabs are gone: the board, and two slabs a rank at most.
            assert len(common.epcomm_maps()) <= 1 + 2 * 2
            group.barrier()

    run_threads(fn, 2)
    gc.collect()
    assert common.epcomm_maps() == []


def test_200_rounds_of_two_mpi_ranks(mpiexec: Callable[..., launch.Result]) -> None:
    mpiexec("fail_leaks", 2, NUM_ROUNDS, timeout_s=60)


def test_communicators_are_not_used_up(mpiexec: Callable[..., launch.Result]) -> None:
    """A job may make and free communicators all day; MPICH has about 2000 at a time."""
    mpiexec("fail_communicators", 2, 2500, timeout_s=60)


# --- a place of the caller's choice ---------------------------------------------------------------


def test_folder_is_used_and_emptied(shm_dir: Path) -> None:
    seen: list[str] = []

    class Watching:
        """A single rank that looks at the folder whenever it exchanges something."""

        rank, size = 0, 1

        def allgather(self, obj: Any, *, timeout_s: Any = None, phase: str = "") -> list[Any]:
            seen.append(f"{phase}: {len(os.listdir(shm_dir))}")
            return [obj]

        def barrier(self, **_: Any) -> None:
            pass

        def split(self, color: int) -> Any:
            return self

        def check(self) -> None:
            pass

    (shm_dir / "epcomm-abandoned").touch()  # gone before room is taken: it might be needed
    buffer = Buffer(Watching(), num_nvl_bytes=4096)
    assert "exchanging slabs: 1" in seen
    assert "exchanging slabs: 2" not in seen
    assert "mapping slabs: 1" in seen
    assert os.listdir(shm_dir) == []
    assert [str(shm_dir) in line for line in common.epcomm_maps()] == [True] * 2
    use(buffer, 0)
    buffer.destroy()
    gc.collect()
    assert common.epcomm_maps() == []
    assert os.listdir(shm_dir) == []


def test_folder_between_processes(tmp_path: Path) -> None:
    group, folder = tmp_path / "group", tmp_path / "slabs"
    group.mkdir()
    folder.mkdir()
    environment = {"EPCOMM_SHM_DIR": str(folder)}
    with start("fail_killed_in_wait", 2, folder=group, env=environment) as ranks:
        for rank in range(2):
            ranks.wait_for(f"ready-{rank}")
        maps = Path(f"/proc/{ranks.processes[0].pid}/maps").read_text()
        assert f"{folder}/epcomm-" in maps
        assert os.listdir(folder) == []
        for rank in (1, 0):
            ranks.kill(rank)
    assert os.listdir(folder) == []


@pytest.fixture
def sharing(tmp_path: Path) -> Iterator[tuple[Processes, Path]]:
    """Two ranks with a file each in a folder, which they have not yet mapped."""
    group, folder = tmp_path / "group", tmp_path / "slabs"
    group.mkdir()
    folder.mkdir()
    environment = {"EPCOMM_SHM_DIR": str(folder)}
    with start("fail_killed_sharing", 2, folder=group, env=environment) as ranks:
        for rank in range(2):
            ranks.wait_for(f"ready-{rank}")
        assert len(os.listdir(folder)) == 2
        yield ranks, folder


def test_survivor_removes_the_file_of_a_killed_rank(sharing: tuple[Processes, Path]) -> None:
    ranks, folder = sharing
    ranks.kill(1)
    ranks.tell("killed")
    assert ranks.results()[0] == "CommTimeout\n"
    assert os.listdir(folder) == []


def test_files_of_killed_ranks_are_removed_by_the_next(
    sharing: tuple[Processes, Path],
) -> None:
    """Those of ranks that live, and files of others, stay."""
    ranks, folder = sharing
    other = folder / "somebody's"
    other.touch()
    HostSlabs(SingleGroup(), [4096], str(folder), 5.0).close()
    assert len(os.listdir(folder)) == 3
    for rank in range(2):
        ranks.kill(rank)
    HostSlabs(SingleGroup(), [4096], str(folder), 5.0).close()
    assert os.listdir(folder) == [other.name]


def test_no_name_between_processes(tmp_path: Path) -> None:
    with start("fail_killed_in_wait", 2, folder=tmp_path) as ranks:
        for rank in range(2):
            ranks.wait_for(f"ready-{rank}")
        maps = Path(f"/proc/{ranks.processes[0].pid}/maps").read_text()
        assert "memfd:epcomm-" in maps
        ranks.kill(0)
        ranks.kill(1)
    assert common.epcomm_files() == []


def test_folders_that_differ() -> None:
    """Ranks that name different folders are told so: see the table of disagreements."""
    from epcomm.buffer import _agree_on_setup
    from epcomm.errors import RankMismatch

    def fn(group: Any) -> None:
        mine = {"EPCOMM_SHM_DIR": "/a" if group.rank else None}
        with pytest.raises(RankMismatch, match="EPCOMM_SHM_DIR"):
            _agree_on_setup(group, mine, 5.0)

    run_threads(fn, 2)


def errors_of_all(num_ranks: int, **options: Any) -> list[str]:
    """Return the TransportError that each rank gets from making a Buffer."""

    def fn(group: Any) -> str:
        with pytest.raises(TransportError) as caught:
            Buffer(group, timeout_s=5.0, **options)
        assert type(caught.value) is TransportError
        return str(caught.value)

    return run_threads(fn, num_ranks)


def test_folder_that_does_not_exist(shm_dir: Path) -> None:
    shm_dir.rmdir()
    messages = errors_of_all(2)
    assert len(set(messages)) == 1
    assert f"rank 0: EPCOMM_SHM_DIR is {shm_dir}, which is no folder here" in messages[0]
    assert "Make it, name another, or unset the variable." in messages[0]


def test_limits_of_nested_control_groups(tmp_path: Path) -> None:
    """A job's limit stands in some group above the process's own; the least room counts."""
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    for folder, limit in ((tmp_path, "max"), (tmp_path / "job", "5000"), (inner, "max")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("3000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    assert [slab._free_in(folder) for folder in (tmp_path, tmp_path / "job", inner)] == [
        None,
        2500,
        None,
    ]
    assert slab._control_groups(tmp_path)[-1] == tmp_path


def test_more_than_the_machine_has() -> None:
    before = measure()
    for option in ("num_nvl_bytes", "num_rdma_bytes"):
        messages = errors_of_all(2, **{option: 1 << 50})
        assert len(set(messages)) == 1
        assert "rank 0: no room for a slab of 1073741824.0 MiB in memory: all" in messages[0]
        assert "Pass fewer tokens a call or a smaller num_nvl_bytes" in messages[0]
    assert measure() == before


@pytest.mark.parametrize("num_bytes", [1 << 62, 1 << 64, 1 << 70])
def test_more_than_any_file_can_have(shm_dir: Path, num_bytes: int) -> None:
    before = measure()
    messages = errors_of_all(2, num_nvl_bytes=num_bytes)
    assert "no room for a slab" in messages[0]
    assert measure() == before
    assert os.listdir(shm_dir) == []


def test_growth_that_fails_is_told_and_the_buffer_works(shm_dir: Path) -> None:
    """The place is gone when a call needs more room: every rank is told, nothing is sent."""

    def fn(group: Any) -> str:
        buffer = Buffer(group, timeout_s=5.0)
        use(buffer, 0)
        group.barrier()
        if group.rank == 0:
            shm_dir.rmdir()
        group.barrier()
        x = np.ones((1000, 1024), np.float32)
        idx = np.zeros((1000, 1), np.int64)
        weights = np.ones((1000, 1), np.float32)
        with pytest.raises(TransportError, match="which is no folder here") as caught:
            buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=2)
        use(buffer, 1)
        return str(caught.value)

    assert len(set(run_threads(fn, 2))) == 1


@pytest.mark.parametrize("limit", ["file-size", "tmpfs"])
def test_place_that_is_too_small(limit: str, tmp_path: Path) -> None:
    """A clear error on every rank where Docker's 64 MB would give SIGBUS."""
    group, folder = tmp_path / "group", tmp_path / "small"
    group.mkdir()
    folder.mkdir()
    environment = {"EPCOMM_SHM_DIR": str(folder)}
    mounted = limit == "tmpfs" and mount_tmpfs(folder, "1m")
    if limit == "tmpfs" and not mounted:
        pytest.skip("mounting a tmpfs needs root and a kernel that lets it")
    try:
        with start("fail_no_room", 2, limit, folder=group, env=environment) as ranks:
            printed = ranks.results()
        assert os.listdir(folder) == []
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True, timeout=20)
    for text in printed:
        lines = text.splitlines()
        assert len(lines) == 2
        assert all("no room for a slab of" in line for line in lines)
        assert all(f"EPCOMM_SHM_DIR={folder}" in line for line in lines)
    assert printed[0] == printed[1]


def mount_tmpfs(folder: Path, size: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except OSError:
        return False


def test_process_that_cannot_be_seen() -> None:
    """A peer whose /proc entry is hidden: every rank is told, with the remedy."""

    class Hidden:
        """Makes rank 1's offer name a process that is not there."""

        def __init__(self, group: Any) -> None:
            self._group = group
            self.rank, self.size = group.rank, group.size
            self.barrier, self.split, self.check = group.barrier, group.split, group.check

        def allgather(self, obj: Any, **options: Any) -> list[Any]:
            said = self._group.allgather(obj, **options)
            if options.get("phase") == "exchanging slabs" and self.rank == 0:
                return [said[0], gone(said[1])]
            return said

    def gone(offer: Any) -> Any:
        return replace(offer, pid=2**22 + 1, key="none", path=f"/proc/{2**22 + 1}/fd/3")

    def fn(group: Any) -> str:
        with pytest.raises(PeerMapError) as caught:
            HostSlabs(Hidden(group), [4096, 4096], None, 5.0)
        return str(caught.value)

    messages = run_threads(fn, 2)
    assert len(set(messages)) == 1
    assert "rank 0: rank 0 (pid" in messages[0]
    assert "cannot map the slab of rank 1" in messages[0]
    assert "EPCOMM_SHM_DIR" in messages[0]
    gc.collect()
    assert common.epcomm_maps() == []


def test_wrong_memory_is_not_mapped(tmp_path: Path) -> None:
    """Two containers of one host may both run as pid 1, each with a /proc of its own.

    Then the path in a peer's offer opens, but something else lies there.
    """
    other = tmp_path / "other"
    other.write_bytes(bytes(4096))

    class Elsewhere:
        """Makes rank 1's offer lead to another file of the same size."""

        def __init__(self, group: Any) -> None:
            self._group = group
            self.rank, self.size = group.rank, group.size
            self.barrier, self.split, self.check = group.barrier, group.split, group.check

        def allgather(self, obj: Any, **options: Any) -> list[Any]:
            said = self._group.allgather(obj, **options)
            if options.get("phase") != "exchanging slabs" or self.rank == 1:
                return said
            return [said[0], replace(said[1], path=str(other), key="another process's")]

    def fn(group: Any) -> None:
        with pytest.raises(PeerMapError):
            HostSlabs(Elsewhere(group), [4096, 4096], None, 5.0)

    run_threads(fn, 2)


def test_single_rank_holds_two_maps_at_most() -> None:
    buffer = Buffer(SingleGroup(), num_nvl_bytes=4096, num_rdma_bytes=4096)
    assert len(common.epcomm_maps()) == 3  # the board and two slabs
    del buffer
    assert common.epcomm_maps() == []
