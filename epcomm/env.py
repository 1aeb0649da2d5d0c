"""Every environment variable that epcomm reads, parsed once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from epcomm.errors import InvalidArgument

#: Name, default as shown to people, and meaning of every variable.
VARIABLES: tuple[tuple[str, str, str], ...] = (
    ("EPCOMM_ENGINE", "auto", "engine of a Buffer that names none: auto, host or cuda"),
    ("EPCOMM_TIMEOUT_S", "100", "seconds until a wait for peers ends in CommTimeout"),
    ("EPCOMM_RANKS_PER_NODE", "by host", "ranks that count as one node, consecutive ranks each"),
    ("EPCOMM_SHM_DIR", "none", "folder for the host engine's shared memory (default: unnamed)"),
    ("EPCOMM_MPI_DEVICE_POINTERS", "as MPI says", "1: rows of GPUs go to MPI as they are, or 0"),
)

ENGINES = ("auto", "host", "cuda")


@dataclass(frozen=True)
class Settings:
    """The parsed variables.

    Attributes:
        engine: One of ``ENGINES``.
        timeout_s: Deadline of every wait, in seconds, above 0.
        ranks_per_node: What counts as a node, or None for one node a host.
        shm_dir: Folder for shared memory files, or None for memory without a name.
        mpi_device_pointers: Whether MPI takes pointers to a GPU's memory; None asks the library.
    """

    engine: str = "auto"
    timeout_s: float = 100.0
    ranks_per_node: int | None = None
    shm_dir: str | None = None
    mpi_device_pointers: bool | None = None


def parse(environ: Mapping[str, str]) -> Settings:
    """Parse the variables.

    Args:
        environ: The environment, usually ``os.environ``.

    Raises:
        InvalidArgument: A variable does not hold what it must.
    """
    engine = environ.get("EPCOMM_ENGINE") or "auto"
    if engine not in ENGINES:
        raise _bad("EPCOMM_ENGINE", engine, f"one of {', '.join(ENGINES)}")
    ranks = environ.get("EPCOMM_RANKS_PER_NODE") or None
    if ranks is not None and (not ranks.isascii() or not ranks.isdigit() or int(ranks) < 1):
        raise _bad("EPCOMM_RANKS_PER_NODE", ranks, "a whole number of at least 1")
    pointers = environ.get("EPCOMM_MPI_DEVICE_POINTERS") or None
    if pointers not in (None, "0", "1"):
        raise _bad("EPCOMM_MPI_DEVICE_POINTERS", pointers, "0 or 1")
    return Settings(
        engine=engine,
        timeout_s=_seconds(environ.get("EPCOMM_TIMEOUT_S") or "100"),
        ranks_per_node=None if ranks is None else int(ranks),
        shm_dir=environ.get("EPCOMM_SHM_DIR") or None,
        mpi_device_pointers=None if pointers is None else pointers == "1",
    )


@lru_cache(maxsize=1)
def settings() -> Settings:
    """Return this process's settings; the environment is read at the first call only."""
    return parse(os.environ)


def kernel_cache_dir() -> Path:
    """Return the folder in which CuPy keeps compiled kernels."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise _bad("EPCOMM_TIMEOUT_S", text, "a number of seconds above 0")
    return value


def _bad(name: str, got: str, rule: str) -> InvalidArgument:
    return InvalidArgument(f"{name} is {got!r}; it must be {rule}. Correct it or unset it.")
