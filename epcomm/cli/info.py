"""``python -m epcomm info``: what was found on this machine, and how to get what is missing."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from epcomm import __version__, env, topology
from epcomm.cli.launch import launched_group
from epcomm.config import DEFAULT_MAX_TOKENS, Config
from epcomm.cuda_layout import MAX_LOW_LATENCY_TOKENS
from epcomm.engines import choose_engine
from epcomm.errors import UnsupportedConfig
from epcomm.gpus import find_num_gpus
from epcomm.mpi_memory import takes_device_pointers
from epcomm.topology import Topology

#: Import name, the distributions that bring it, and the extra that installs it.
_FRAMEWORKS = (
    ("torch", ("torch",), "torch"),
    ("jax", ("jax",), "jax"),
    ("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy"), "cuda12"),
    ("matplotlib", ("matplotlib",), "demo"),
    ("threadpoolctl", ("threadpoolctl",), "demo"),
)

#: What the size of a slab is told for: bf16 rows of 7168 elements, on as many ranks as a node has.
_ROW_BYTES, _NUM_RANKS = 14336, 8

Line = tuple[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments: it has none."""


def run(args: argparse.Namespace) -> int:
    """Print the report, on rank 0 only; collective where mpiexec started ranks."""
    group, nodes, problem = None, None, ""
    try:
        group = launched_group()
    except (ImportError, RuntimeError) as error:  # an MPI that does not load: told of below
        problem = f"unknown: MPI does not load ({error})"
    if group is not None:
        nodes = topology.discover(group, env.settings())
        if group.rank > 0:
            return 0
    sections: list[tuple[str, list[Line]]] = [
        ("epcomm", [("version", __version__), ("python", sys.version.split()[0])]),
        ("ranks", [("ranks", problem)] if problem else list(_describe_ranks(nodes))),
        ("MPI", list(_describe_mpi())),
        ("GPUs", list(_describe_gpus())),
        ("engine", list(_describe_engine(nodes))),
        ("frameworks", list(_describe_frameworks())),
        ("memory", list(_describe_memory())),
        ("environment", list(_describe_environment())),
    ]
    for title, lines in sections:
        print(title)
        for name, text in lines:
            print(f"  {name:<22} {text}")
    return 0


def _describe_ranks(nodes: Topology | None) -> Iterator[Line]:
    if nodes is None:
        yield "ranks", "1: not started by mpiexec (mpiexec -n 4 python -m mpi4py -m epcomm info)"
        return
    yield "ranks", str(len(nodes.node_of_rank))
    yield "nodes", f"{nodes.num_nodes} (node of each rank: {list(nodes.node_of_rank)})"


def _describe_mpi() -> Iterator[Line]:
    yield "mpi4py", _version_of(("mpi4py",)) or "missing: pip install mpi4py"
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    yield "mpiexec", found or "missing: pip install 'epcomm[mpich]'"
    try:
        from mpi4py import MPI

        first_line = MPI.Get_library_version().rstrip("\0").splitlines()[0]
        yield "library", " ".join(first_line.split())
    except (ImportError, RuntimeError) as error:
        yield "library", f"missing ({error}): pip install 'epcomm[mpich]'"


def _describe_gpus() -> Iterator[Line]:
    yield from _describe_driver()
    cache = env.kernel_cache_dir()
    num_files = sum(1 for _ in cache.glob("*")) if cache.is_dir() else 0
    yield "kernel cache", f"{cache} (CuPy's; {num_files} files)"


def _has_driver() -> bool:
    is_loaded = any(Path("/proc/driver/nvidia").glob("version"))
    return is_loaded or shutil.which("nvidia-smi") is not None


def _describe_driver() -> Iterator[Line]:
    if not _has_driver():
        yield "driver", "none found: epcomm works on CPU arrays here (host engine)"
        return
    if importlib.util.find_spec("cupy") is None:
        yield "CuPy", "missing: pip install 'epcomm[cuda12]', or 'epcomm[cuda13]' for CUDA 13"
        return
    import cupy

    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        yield "driver", f"CuPy cannot use it: {error}"
        return
    version = runtime.driverGetVersion()
    yield "driver", f"CUDA {version // 1000}.{version % 1000 // 10}"
    for index in range(count):
        properties = runtime.getDeviceProperties(index)
        peers = [
            peer
            for peer in range(count)
            if peer != index and runtime.deviceCanAccessPeer(index, peer)
        ]
        yield (
            f"GPU {index}",
            f"{properties['name'].decode()}, sm_{properties['major']}{properties['minor']}, "
            f"{properties['totalGlobalMem'] / 2**30:.0f} GiB, peer access to {peers or 'none'}",
        )


def _describe_engine(nodes: Topology | None) -> Iterator[Line]:
    """Tell what a Buffer does that names neither engine nor device."""
    wanted, num_nodes = env.settings().engine, 1 if nodes is None else nodes.num_nodes
    try:
        engine = choose_engine(wanted)
    except UnsupportedConfig as error:
        yield "engine", str(error)
        return
    means = f"auto: {engine}" if wanted == "auto" else f"{engine}, by EPCOMM_ENGINE"
    if num_nodes > 1:
        means += f", and MPI between {num_nodes} nodes"
    if engine == "cuda":
        yield "engine", f"{means}; CPU arrays need engine='host'"
        yield "arrays", "on GPUs, which must have peer access; else engine='host', device=i"
        if num_nodes > 1:
            yield "between nodes", _describe_rails()
            return
        # Measured: see "Where decoding and throughput meet" in docs/performance.md.
        yield (
            "decoding",
            f"low-latency calls up to {MAX_LOW_LATENCY_TOKENS} tokens a rank, their most; dispatch "
            "and combine for more",
        )
    else:
        yield "engine", means
        staged = "; on GPU i, staged through host memory, with engine='host', device=i"
        yield "arrays", "in CPU memory" + (staged if find_num_gpus() else "")


def _describe_rails() -> str:
    if takes_device_pointers():
        return (
            "rows go from GPU to MPI and from MPI to GPU; EPCOMM_MPI_DEVICE_POINTERS=0 puts pinned "
            "host memory between"
        )
    if env.settings().mpi_device_pointers is None:
        why = "as this MPI takes no pointers to GPUs; one built with CUDA does"
    else:
        why = "by EPCOMM_MPI_DEVICE_POINTERS"
    return f"rows cross through pinned host memory, {why} (EPCOMM_MPI_DEVICE_POINTERS=1 overrules)"


def _describe_frameworks() -> Iterator[Line]:
    yield "numpy", _version_of(("numpy",)) or "missing"
    yield "ml_dtypes", f"{_version_of(('ml_dtypes',)) or 'missing'} (NumPy's bf16 and fp8)"
    for name, distributions, extra in _FRAMEWORKS:
        missing = f"not installed: pip install 'epcomm[{extra}]'"
        if name == "cupy" and not _has_driver():
            missing = "not installed: of use with a GPU only, and there is none here"
        yield name, _version_of(distributions) or missing


def _describe_memory() -> Iterator[Line]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        yield "free host memory", f"{free / 2**20:.1f} GiB"
    except (OSError, StopIteration):
        yield "free host memory", "unknown"
    yield "processors", f"{len(os.sched_getaffinity(0))} ({platform.machine()})"
    where = env.settings().shm_dir
    if where is not None and not Path(where).is_dir():
        yield "host slabs", f"missing: EPCOMM_SHM_DIR is {where}, no folder here: mkdir -p {where}"
    else:
        yield "host slabs", f"files in {where}" if where else "memory without a name (memfd)"
    hint = Config().get_nvl_buffer_size_hint(_ROW_BYTES, _NUM_RANKS)
    yield (
        "slab of a rank",
        f"{hint / 2**20:.0f} MiB for {DEFAULT_MAX_TOKENS} tokens of {_ROW_BYTES} bytes a rank on "
        f"{_NUM_RANKS} ranks (Config.get_nvl_buffer_size_hint); a Buffer's repr tells its own",
    )


def _describe_environment() -> Iterator[Line]:
    for name, default, meaning in env.VARIABLES:
        value = os.environ.get(name)
        yield name, f"{value if value is not None else f'not set ({default})'}: {meaning}"


def _version_of(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
