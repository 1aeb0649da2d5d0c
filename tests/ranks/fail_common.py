"""What the failure and leak tests share: a group of plain processes, and rounds that must work."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from epcomm import Buffer, CommTimeout

#: Variables that tell a process of `processes.start` who it is.
FOLDER, RANK, SIZE = "TEST_GROUP_FOLDER", "TEST_GROUP_RANK", "TEST_GROUP_SIZE"

HIDDEN = 32
NUM_TOPK = 3
MAX_TOKENS = 8


class FolderGroup:
    """An `epcomm.Group` of plain processes, which leave each other files: any may be killed."""

    def __init__(self, folder: Path, rank: int, size: int, name: str = "all") -> None:
        self.rank = rank
        self.size = size
        self._folder = folder
        self._name = name
        self._round = 0

    def allgather(
        self, obj: Any, *, timeout_s: float | None = None, phase: str = "allgather"
    ) -> list[Any]:
        self._round += 1
        limit_s = 30.0 if timeout_s is None else timeout_s
        paths = [self._folder / f"{self._name}-{self._round}-{rank}" for rank in range(self.size)]
        mine = paths[self.rank]
        partial = mine.with_name(mine.name + ".partial")
        partial.write_bytes(pickle.dumps(obj))
        partial.rename(mine)
        end = time.monotonic() + limit_s
        while missing := [rank for rank, path in enumerate(paths) if not path.exists()]:
            if time.monotonic() > end:
                raise CommTimeout(phase, self.rank, missing, limit_s)
            time.sleep(0.002)
        return [pickle.loads(path.read_bytes()) for path in paths]

    def barrier(self, *, timeout_s: float | None = None, phase: str = "barrier") -> None:
        self.allgather(None, timeout_s=timeout_s, phase=phase)

    def split(self, color: int) -> FolderGroup:
        colors = self.allgather(color, phase="split")
        members = [rank for rank, other in enumerate(colors) if other == color]
        name = f"{self._name}.{self._round}.{color}"
        return FolderGroup(self._folder, members.index(self.rank), len(members), name)

    def check(self) -> None:
        pass


def folder_group() -> FolderGroup:
    """Return the group that this process was started in."""
    return FolderGroup(Path(os.environ[FOLDER]), int(os.environ[RANK]), int(os.environ[SIZE]))


def open_group() -> Any:
    """Return the group that this rank was started in: plain processes, or mpiexec's."""
    if FOLDER in os.environ:
        return folder_group()
    from mpi4py import MPI

    return MPI.COMM_WORLD


def make_inputs(
    seed: int, rank: int, num_ranks: int, num_tokens: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows, choices and weights of one rank; small whole numbers, so that sums are exact.

    ``[num_tokens, HIDDEN] f32``, ``[num_tokens, NUM_TOPK] int64`` of ``2 * num_ranks`` experts,
    all different or -1, ``[num_tokens, NUM_TOPK] f32`` multiples of 1/4.
    """
    rng = np.random.default_rng((seed, rank))
    x = rng.integers(-8, 9, (num_tokens, HIDDEN)).astype(np.float32)
    num_experts = max(2 * num_ranks, NUM_TOPK + 1)
    idx = np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :NUM_TOPK]
    idx = np.where((idx >= 2 * num_ranks) | (rng.random(idx.shape) < 0.2), -1, idx)
    weights = rng.integers(1, 5, idx.shape).astype(np.float32) / 4
    return x, idx.astype(np.int64), weights


class Arrays:
    """Where the arrays of `dispatch` and `check_round` are: a NumPy or a CuPy module."""

    def __init__(self) -> None:
        self.module: Any = np

    def use_gpu(self, rank: int) -> None:
        """Take a GPU; ranks share them where there are too few."""
        import cupy

        cupy.cuda.Device(rank % cupy.cuda.runtime.getDeviceCount()).use()
        self.module = cupy

    def give(self, *arrays: np.ndarray) -> Any:
        """Return the arrays there."""
        return tuple(self.module.asarray(array) for array in arrays)

    def fetch(self, *arrays: Any) -> Any:
        """Return what arrays hold."""
        return tuple(array if self.module is np else array.get() for array in arrays)


arrays = Arrays()


def dispatch(buffer: Buffer, seed: int, **options: Any) -> tuple[Any, ...]:
    """Dispatch this rank's inputs; returns what `Buffer.dispatch` does."""
    x, idx, weights = arrays.give(*make_inputs(seed, buffer.rank, buffer.group_size))
    num_experts = 2 * buffer.group_size
    return buffer.dispatch(
        x, topk_idx=idx, topk_weights=weights, num_experts=num_experts, **options
    )


def check_round(buffer: Buffer, seed: int) -> None:
    """Dispatch, dispatch again and combine; compare with what the rule says, bit for bit."""
    me, num_ranks = buffer.rank, buffer.group_size
    sent = [make_inputs(seed, rank, num_ranks) for rank in range(num_ranks)]
    goes = [(idx[:, :, None] // 2 == np.arange(num_ranks)).any(axis=1) for _, idx, _ in sent]
    want = np.concatenate([x[to[:, me]] for (x, _, _), to in zip(sent, goes, strict=True)])
    recv_x, recv_idx, recv_weights, per_expert, handle, _ = dispatch(buffer, seed)
    np.testing.assert_array_equal(*arrays.fetch(recv_x), want)
    chosen = np.concatenate([idx.ravel() for _, idx, _ in sent])
    assert per_expert == [int((chosen == 2 * me + local).sum()) for local in (0, 1)]
    assert recv_idx.shape == recv_weights.shape == (len(want), NUM_TOPK)
    x, idx, weights = sent[me]
    again, *_ = buffer.dispatch(*arrays.give(x + 1), handle=handle)
    np.testing.assert_array_equal(*arrays.fetch(again), want + 1)
    sums = buffer.combine(recv_x, handle, topk_weights=recv_weights)
    combined, combined_weights = arrays.fetch(*sums[:2])
    np.testing.assert_array_equal(combined, x * goes[me].sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(combined_weights, np.where(idx >= 0, weights, 0))


def low_latency_dispatch(buffer: Buffer, seed: int, **options: Any) -> tuple[Any, ...]:
    """Dispatch this rank's inputs as bf16; returns what `Buffer.low_latency_dispatch` does."""
    x, idx, _ = make_inputs(seed, buffer.rank, buffer.group_size)
    num_experts = 2 * buffer.group_size
    return buffer.low_latency_dispatch(
        x.astype(ml_dtypes.bfloat16), idx, MAX_TOKENS, num_experts, use_fp8=False, **options
    )


def low_latency_combine(buffer: Buffer, seed: int, rows: Any, handle: Any, **options: Any) -> Any:
    """Combine rows with this rank's choices; returns what `Buffer.low_latency_combine` does."""
    _, idx, weights = make_inputs(seed, buffer.rank, buffer.group_size)
    return buffer.low_latency_combine(rows, idx, weights, handle, **options)


def check_received(buffer: Buffer, seed: int, result: Any, gone: tuple[int, ...] = ()) -> None:
    """Compare the rows of a low-latency dispatch, once received, with what the rule says."""
    num_ranks = buffer.group_size
    sent = [make_inputs(seed, rank, num_ranks) for rank in range(num_ranks)]
    rows, count = result[0], result[1]
    for local in (0, 1):
        want = [
            x[(idx == 2 * buffer.rank + local).any(axis=1)]
            for rank, (x, idx, _) in enumerate(sent)
            if rank not in gone
        ]
        want = np.concatenate(want)
        assert count[local] == len(want)
        np.testing.assert_array_equal(rows[local, : len(want)].astype(np.float32), want)


def combined_rows(buffer: Buffer, seed: int, gone: tuple[int, ...] = ()) -> np.ndarray:
    """Return what a low-latency combine must give where experts return what they got."""
    x, idx, weights = make_inputs(seed, buffer.rank, buffer.group_size)
    counts = (idx >= 0) & ~np.isin(idx // 2, gone)
    return x * np.where(counts, weights, 0).sum(axis=1, keepdims=True)


def check_low_latency_round(buffer: Buffer, seed: int, gone: tuple[int, ...] = ()) -> None:
    """Low-latency dispatch and combine, without the ranks that are gone."""
    result = low_latency_dispatch(buffer, seed)
    check_received(buffer, seed, result, gone)
    combined, _, _ = low_latency_combine(buffer, seed, result[0], result[2])
    np.testing.assert_array_equal(combined.astype(np.float32), combined_rows(buffer, seed, gone))


def open_files() -> int:
    """Return how many file descriptors this process holds."""
    return len(os.listdir("/proc/self/fd"))


def num_maps() -> int:
    """Return how many memory maps this process has."""
    return len(Path("/proc/self/maps").read_text().splitlines())


def epcomm_maps() -> list[str]:
    """Return this process's memory maps that are epcomm's."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "epcomm-" in line.rpartition("/")[2]]


def epcomm_files(folder: str = "/dev/shm") -> list[str]:
    """Return what epcomm left in a folder."""
    return [name for name in os.listdir(folder) if "epcomm" in name]
