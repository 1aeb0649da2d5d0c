"""Slabs: memory of one rank that its peers see.

On the host a slab is shared memory. By default it has no name (a memfd that peers open through
the owner's ``/proc`` entry), so there is nothing to leave behind whatever kills a rank, and no
limit of ``/dev/shm`` applies. Where ranks cannot see each other's ``/proc`` (separate PID
namespaces), EPCOMM_SHM_DIR names a folder for files that are removed as soon as all have mapped
them. A rank that is killed in between leaves one, without the lock that its owner held: ranks that
share a folder remove such files, those that survived when they fail and others when they begin.
Ranks that are threads of one process share plain memory instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from epcomm.errors import EpcommError, PeerMapError, TransportError
from epcomm.group import Group

Bytes = npt.NDArray[np.uint8]

_PREFIX = "epcomm-"

#: Slabs of this process by key, for peers that are threads of it.
_slabs_here: dict[str, Bytes] = {}
_slabs_here_lock = threading.Lock()


@dataclass(frozen=True)
class _Offer:
    """What a rank tells its peers of its slab."""

    num_bytes: int
    pid: int
    key: str
    path: str
    file: tuple[int, int]
    error: str = ""


class HostSlabs:
    """The slabs of all ranks of a group, each rank's own memory mapped by all. Collective.

    Args:
        group: Ranks of one host.
        num_bytes: Size of every rank's slab, by rank; the same list on every rank.
        shm_dir: Folder for files, or None for memory without a name.
        timeout_s: Deadline of the exchange, in seconds.

    Raises:
        TransportError: Some rank has not enough memory. Every rank raises it, and nothing is kept.
        PeerMapError: Some rank cannot map a peer's slab. Every rank raises it.
        CommTimeout: Some rank did not take part.
    """

    def __init__(
        self, group: Group, num_bytes: Sequence[int], shm_dir: str | None, timeout_s: float
    ) -> None:
        self.num_bytes = tuple(num_bytes)
        memory = _OwnMemory(num_bytes[group.rank], sum(num_bytes), shm_dir)
        try:
            offers: list[_Offer] = group.allgather(
                memory.offer, timeout_s=timeout_s, phase="exchanging slabs"
            )
            _raise_first(TransportError, [offer.error for offer in offers])
            views, error = _map_all(offers, group.rank, memory)
            errors = group.allgather(error, timeout_s=timeout_s, phase="mapping slabs")
            _raise_first(PeerMapError, errors)
        finally:
            memory.withdraw()
        #: Every rank's slab, [num_bytes of that rank] uint8, by rank.
        self.views: tuple[Bytes, ...] = tuple(views)

    def close(self) -> None:
        """Let go of the memory. Views that are still held keep their slab mapped."""
        self.views = ()


class _OwnMemory:
    """This rank's slab, open to peers until `withdraw`."""

    def __init__(self, num_bytes: int, num_bytes_of_all: int, shm_dir: str | None) -> None:
        self._fd = -1
        self._path = ""
        self._file = (0, 0)
        self._key = secrets.token_hex(16)
        self.view: Bytes = np.empty(0, np.uint8)
        error = ""
        try:
            self._reserve(num_bytes, num_bytes_of_all, shm_dir)
        except (OSError, OverflowError, ValueError, TransportError) as problem:
            error = _no_memory(num_bytes, shm_dir, problem)
        self.offer = _Offer(num_bytes, os.getpid(), self._key, self._peer_path(), self._file, error)
        with _slabs_here_lock:
            _slabs_here[self._key] = self.view

    def _reserve(self, num_bytes: int, num_bytes_of_all: int, shm_dir: str | None) -> None:
        if num_bytes == 0:
            return
        if shm_dir is None:
            _check_free_memory(num_bytes_of_all)
            self._fd = os.memfd_create(f"{_PREFIX}{self._key}", os.MFD_CLOEXEC)
        else:
            _remove_abandoned(shm_dir)  # first, for the room that they take
            self._fd, self._path = _create_locked(shm_dir)
        self._file = _file_of(self._fd)
        # Pages are taken now: a full file system is an error here, not a SIGBUS later.
        os.posix_fallocate(self._fd, 0, num_bytes)
        self.view = _map(self._fd, num_bytes)

    def _peer_path(self) -> str:
        return self._path or f"/proc/{os.getpid()}/fd/{self._fd}"

    def withdraw(self) -> None:
        """Close the ways in; what is mapped stays mapped."""
        with _slabs_here_lock:
            _slabs_here.pop(self._key, None)
        if self._path:
            os.unlink(self._path)
            # A peer that was killed meanwhile could not.
            _remove_abandoned(os.path.dirname(self._path))
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._path = -1, ""


def _create_locked(folder: str) -> tuple[int, str]:
    """Create a file that tells by its lock that its owner lives; return descriptor and path."""
    while True:
        path = os.path.join(folder, f"{_PREFIX}{secrets.token_hex(16)}")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: nobody removes it either
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd, path
        os.close(fd)  # taken for abandoned before it was locked


def _remove_abandoned(folder: str) -> None:
    """Remove the slabs in a folder whose owners are gone."""
    for path in Path(folder).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # gone meanwhile, another user's, or locked by its owner
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)


def _map(fd: int, num_bytes: int) -> Bytes:
    memory = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
    return np.frombuffer(memory, np.uint8)


def _map_all(offers: Sequence[_Offer], rank: int, own: _OwnMemory) -> tuple[list[Bytes], str]:
    """Map every offer; return the views, and what went wrong or an empty string."""
    views = []
    for peer, offer in enumerate(offers):
        try:
            views.append(own.view if peer == rank else _map_offer(offer))
        except (OSError, ValueError, KeyError) as problem:
            return [], (
                f"rank {rank} (pid {os.getpid()}) cannot map the slab of rank {peer} (pid "
                f"{offer.pid}): {problem}. Ranks of one host must see each other's /proc entries; "
                "if they run in separate containers, mount one folder into all of them and name "
                "it in EPCOMM_SHM_DIR."
            )
    return views, ""


def _map_offer(offer: _Offer) -> Bytes:
    if offer.num_bytes == 0:
        return np.empty(0, np.uint8)
    if offer.pid == os.getpid():
        with _slabs_here_lock:
            if offer.key in _slabs_here:
                return _slabs_here[offer.key]
    fd = os.open(offer.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        # Where two containers have a process of the same number each, the path leads elsewhere.
        if _file_of(fd) != offer.file:
            raise OSError(f"{offer.path} is not the slab")
        return _map(fd, offer.num_bytes)
    finally:
        os.close(fd)


def _file_of(fd: int) -> tuple[int, int]:
    """Return what tells an open file from all others of this host."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _check_free_memory(num_bytes_of_all: int) -> None:
    """Refuse what the host cannot hold: reserving it would wake the kernel's OOM killer.

    All ranks look at about the same time, so each asks for the room of all slabs together.
    """
    found = [free for free in (_free_on_host(), _free_in_container()) if free is not None]
    if found and num_bytes_of_all > min(found):
        raise TransportError(
            f"all ranks' slabs take {num_bytes_of_all / 2**20:.0f} MiB, and only "
            f"{min(found) / 2**20:.0f} MiB of memory are free"
        )


def _free_on_host() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError):
        return None


def _free_in_container() -> int | None:
    """Return what the control group's limit leaves; None where there is no limit."""
    found = [free for folder in _control_groups() if (free := _free_in(folder)) is not None]
    return min(found, default=None)


def _control_groups(root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """Return the folders of the control groups (version 2) that this process is in."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
    except (OSError, StopIteration):
        own = ""
    folder = root / own
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]


def _free_in(folder: Path) -> int | None:
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Cached files make room when it is needed.
        return limit - used + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):  # not version 2, or no limit ("max")
        return None


def _no_memory(num_bytes: int, shm_dir: str | None, problem: Exception) -> str:
    if shm_dir is not None and not os.path.isdir(shm_dir):
        return (
            f"EPCOMM_SHM_DIR is {shm_dir}, which is no folder here; it must be one that all ranks "
            "of the host can write. Make it, name another, or unset the variable."
        )
    where = "memory" if shm_dir is None else f"EPCOMM_SHM_DIR={shm_dir}"
    remedy = "" if shm_dir is None else ", name a roomier EPCOMM_SHM_DIR, or unset it"
    return (
        f"no room for a slab of {num_bytes / 2**20:.1f} MiB in {where}: {problem}. Pass fewer "
        f"tokens a call or a smaller num_nvl_bytes or num_rdma_bytes{remedy}."
    )


def _raise_first(kind: type[EpcommError], errors: Sequence[str]) -> None:
    for rank, error in enumerate(errors):
        if error:
            raise kind(f"rank {rank}: {error}")
