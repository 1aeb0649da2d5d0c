"""What tests of tests/gpu share."""

from __future__ import annotations

import os
import re

import pytest
from launch import Result

#: The contract programs that ``gpu_contract`` runs in one start.
PROGRAMS = {
    "throughput": ("contract_dispatch", "contract_buffers", "contract_training"),
    "low-latency": ("contract_low_latency", "contract_slots"),
}
#: Frames, and the one on the CPU whose arrays have the same dtypes: their digests are equal.
ON_CPU = {"cupy": "numpy", "torch-cuda": "numpy", "jax-cuda": "jax"}
MODULES = {"cupy": "cupy", "torch-cuda": "torch", "jax-cuda": "jax"}

Digests = dict[str, list[str]]

frames = pytest.mark.parametrize("frame", list(ON_CPU))


def on_gpus(*numbers: int) -> pytest.MarkDecorator:
    """Parametrize a test with ``num_ranks``, each rank on a GPU of its own."""
    params = [pytest.param(n, marks=pytest.mark.gpu(n), id=str(n)) for n in numbers]
    return pytest.mark.parametrize("num_ranks", params)


def gpus_up_to(number: int) -> str:
    """Return what makes CUDA show so many of the GPUs that it shows here."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ",".join(shown.split(",")[:number] if shown else map(str, range(number)))


def need(frame: str) -> None:
    """Skip where the frame's framework is missing, or sees no GPU."""
    module = pytest.importorskip(MODULES[frame], reason=f"{MODULES[frame]} is not installed")
    if frame == "torch-cuda" and not module.version.cuda:
        pytest.skip("this torch was built without CUDA")


def digests_in(result: Result, kind: str, num_ranks: int) -> Digests:
    """Return each program's digests by rank."""
    found = re.findall(r"EPCOMM-DIGEST (\w+) (\d+) (\w+)", result.stdout)
    by_key = {(name, int(rank)): digest for name, rank, digest in found}
    return {name: [by_key[name, rank] for rank in range(num_ranks)] for name in PROGRAMS[kind]}
