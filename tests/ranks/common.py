"""What contract programs share: the checker, the data of a case, and running under mpiexec.

A contract program has ``run(group, frame, engine) -> digest``: one body for every group (an mpi4py
communicator, a thread's group), every framework and every engine. Every rank derives all ranks'
inputs from the case's name, so what is expected needs no communication.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import oracle
from frames import FRAMES, NumpyFrame, poisoned_outputs

from epcomm import Buffer, as_group

Array = npt.NDArray[Any]
Run = Callable[[Any, NumpyFrame, str], str]
Function = TypeVar("Function", bound=Callable[..., Any])

#: Values whose sums show lost signs of zeros, and how infinities and NaNs are treated.
SPECIAL = np.array([0.0, -0.0, -0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-7], np.float32)
#: Deadline of every wait in contract programs: a rank that failed ends the others.
TIMEOUT_S = 60.0


class Checker:
    """Compares what came out with what must, in the name of a rank, and remembers it all.

    Args:
        group: What `Buffer` takes as group.
        frame: The framework of all arrays.
        engine: The engine of all Buffers; "staged" is the host engine with the rank's GPU.
    """

    def __init__(self, group: Any, frame: NumpyFrame, engine: str) -> None:
        self.group = group
        self.ranks = as_group(group)
        self.rank, self.size = self.ranks.rank, self.ranks.size
        self.frame, self.engine = frame, engine
        ranks_per_node = int(os.environ.get("EPCOMM_RANKS_PER_NODE") or self.size)
        #: Node of each rank.
        self.nodes = [rank // ranks_per_node for rank in range(self.size)]
        self.num_nodes = self.nodes[-1] + 1
        #: What is being tested, for messages.
        self.case = ""
        self._outputs = hashlib.sha256()
        self._inputs: list[tuple[str, Any, Array]] = []

    @property
    def place(self) -> dict[str, Any]:
        """The arguments of a Buffer that say where it works."""
        if self.engine in ("host", "auto"):
            return {"engine": self.engine}
        engine = "host" if self.engine == "staged" else self.engine
        return {"engine": engine, "device": self.frame.gpu()}

    def digest(self) -> str:
        """Return the digest of all outputs that were compared."""
        return self._outputs.hexdigest()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave out of the digest what is compared meanwhile: not all engines and dtypes do it."""
        before = self._outputs.copy()
        yield
        self._outputs = before

    @contextmanager
    def buffer(self, *args: int, **options: Any) -> Iterator[Buffer]:
        """Make a Buffer, and destroy it when all went well."""
        options = {**self.place, "timeout_s": TIMEOUT_S} | options
        buffer = Buffer(self.group, *args, **options)
        yield buffer
        buffer.destroy()

    def poison_slabs(self, buffer: Buffer, *, is_low_latency: bool = False) -> None:
        """Fill all ranks' slabs with NaNs, so that what an earlier call left is not taken."""
        self.frame.synchronize()
        self.ranks.barrier(timeout_s=TIMEOUT_S)
        slab = buffer.get_local_buffer_tensor(np.uint8, use_rdma_buffer=is_low_latency)
        slab[...] = 0xFF
        self.frame.synchronize()
        self.ranks.barrier(timeout_s=TIMEOUT_S)

    def combined(
        self,
        rows_by_rank: Sequence[Array],
        topk_idx: Array,
        num_experts: int,
        biases: Sequence[Array] = (),
    ) -> Array:
        """Return what combine must give for this rank's tokens, see `oracle.combine`."""
        return oracle.combine(
            rows_by_rank, topk_idx, num_experts, biases, nodes=self.nodes, me=self.rank
        )

    # --- inputs --------------------------------------------------------------------------------

    def make(self, name: str, values: Array, order: str = "rows") -> Any:
        """Make an input array; `unchanged` checks later that it was not written."""
        array = self.frame.make(values, order)
        self._inputs.append((name, array, np.array(self.frame.numpy(array))))
        return array

    def unchanged(self) -> None:
        """Check that no input made since the last call was written, and forget them."""
        for name, array, before in self._inputs:
            self.same(f"input {name}, which was written", self.frame.numpy(array), before)
        self._inputs.clear()

    # --- outputs -------------------------------------------------------------------------------

    def fail(self, what: str, detail: str) -> None:
        raise AssertionError(f"{self.case}: rank {self.rank} of {self.size}: {what}: {detail}")

    def holds(self, condition: bool, what: str, detail: object = "") -> None:
        """Check a condition."""
        if not condition:
            self.fail(what, str(detail) or "does not hold")

    def equal(self, what: str, got: Any, want: object) -> None:
        """Check plain Python values."""
        if got != want or type(got) is not type(want):
            self.fail(what, f"got {got!r}, want {want!r}")
        self._outputs.update(repr(want).encode())

    def array(
        self,
        what: str,
        got: Any,
        want: Array,
        *,
        parts: Sequence[Any] = (...,),
        any_nan: bool = False,
        frame: NumpyFrame | None = None,
    ) -> None:
        """Check an output array: framework, device, dtype, shape, and every bit.

        Args:
            what: Its name.
            got: The output.
            want: What it must be.
            parts: Indices of the parts to compare; the others are undefined.
            any_nan: Whether any NaN equals any other.
            frame: Whose array it must be; None takes the frame of the inputs.
        """
        frame = frame or self.frame
        if not frame.owns(got, want.dtype):
            self.fail(what, f"is a {type(got)}, not an array of {frame.name} on its device")
        values = frame.numpy(got)
        if (values.dtype, values.shape) != (want.dtype, want.shape):
            have = f"{values.dtype}{list(values.shape)}"
            self.fail(what, f"is {have}, want {want.dtype}{list(want.shape)}")
        if any_nan:
            values, want = _plain_nans(values), _plain_nans(want)
        for part in parts:
            where = "" if part is ... else f"[{part}]"
            self.same(what + where, values[part], want[part])
            self._outputs.update(np.ascontiguousarray(values[part]).tobytes())

    def same(self, what: str, got: Array, want: Array) -> None:
        """Check that two NumPy arrays have the same bits."""
        raw = np.dtype(f"u{want.dtype.itemsize}")
        differs = _packed(got).view(raw) != _packed(want).view(raw)
        if differs.any():
            at = tuple(np.argwhere(differs)[0].tolist())
            self.fail(
                what,
                f"{differs.sum()} of {want.size} elements of {want.dtype}{list(want.shape)} "
                f"differ, first at {list(at)}: got {got[at]!r}, want {want[at]!r}",
            )


def _packed(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(array.shape)


def _plain_nans(array: Array) -> Array:
    plain = np.array(array)
    plain[np.isnan(array.astype(np.float32))] = np.nan
    return plain


# --- data --------------------------------------------------------------------------------------


def once(function: Function) -> Function:
    """Keep recent results, and let one thread make what all threads want."""
    cached, lock = lru_cache(maxsize=2048)(function), threading.RLock()

    @wraps(function)
    def locked(*args: Any) -> Any:
        with lock:
            return cached(*args)

    return locked  # type: ignore[return-value]


def rng_of(*key: object) -> np.random.Generator:
    """Return the generator of random numbers for a key, the same on every rank."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in key])


def frozen(array: Array) -> Array:
    """Make an array read-only, and return it."""
    array.flags.writeable = False
    return array


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return any bits at all, NaNs with payloads among them."""
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return rng.integers(0, 256, size, np.uint8).view(dtype)


def expand(pattern: Sequence[int], rank: int) -> int:
    """Return a rank's entry of a pattern that repeats."""
    return pattern[rank % len(pattern)]


def choose_experts(
    routing: str,
    rng: np.random.Generator,
    num_tokens: int,
    num_topk: int,
    num_experts: int,
    num_ranks: int,
) -> npt.NDArray[np.int64]:
    """Return ``[num_tokens, num_topk]`` choices of one of `ROUTINGS`, -1 where there is none."""
    return _ROUTINGS[routing](rng, (num_tokens, num_topk), num_experts, num_ranks)


def _best(scores: Array, num_topk: int) -> npt.NDArray[np.int64]:
    """Choose the experts with the largest scores, in random order where there are too few."""
    best = np.argsort(-scores, axis=1)[:, :num_topk]
    idx = np.full((len(scores), num_topk), -1, np.int64)
    idx[:, : best.shape[1]] = best
    return idx


def _uniform(rng: Any, shape: tuple[int, int], num_experts: int, num_ranks: int) -> Any:
    return _best(rng.random((shape[0], num_experts)), shape[1])


def _zipf(rng: Any, shape: tuple[int, int], num_experts: int, num_ranks: int) -> Any:
    # Gumbel noise on the log of the weights draws without replacement.
    noise = rng.gumbel(size=(shape[0], num_experts))
    return _best(noise - 1.5 * np.log(np.arange(num_experts) + 1), shape[1])


def _some(rng: Any, shape: tuple[int, int], num_experts: int, num_ranks: int) -> Any:
    idx = _uniform(rng, shape, num_experts, num_ranks)
    idx[rng.random(shape) < 0.4] = -1
    idx[rng.random(shape[0]) < 0.2] = -1
    return idx


def _none(rng: Any, shape: tuple[int, int], num_experts: int, num_ranks: int) -> Any:
    return np.full(shape, -1, np.int64)


def _one_expert(rng: Any, shape: tuple[int, int], num_experts: int, num_ranks: int) -> Any:
    idx = np.full(shape, -1, np.int64)
    idx[:, -1] = 2 * num_experts // 3
    return idx


def _a_rank_each(rng: Any, shape: tuple[int, int], num_experts: int, num_ranks: int) -> Any:
    """Each rank sends all to one, drawn anew every round: what arrives there varies the most."""
    num_local = num_experts // num_ranks
    idx = _best(rng.random((shape[0], num_local)), shape[1])
    return np.where(idx < 0, -1, idx + int(rng.integers(num_ranks)) * num_local)


def _one_rank(rng: Any, shape: tuple[int, int], num_experts: int, num_ranks: int) -> Any:
    num_local = num_experts // num_ranks
    idx = _best(rng.random((shape[0], num_local)), shape[1])
    return np.where(idx < 0, -1, idx + (num_ranks - 1) * num_local)


def _repeats(rng: Any, shape: tuple[int, int], num_experts: int, num_ranks: int) -> Any:
    return rng.integers(-1, num_experts, shape)


_ROUTINGS: dict[str, Callable[..., npt.NDArray[np.int64]]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "some": _some,
    "none": _none,
    "one_expert": _one_expert,
    "one_rank": _one_rank,
    "a_rank_each": _a_rank_each,
    "repeats": _repeats,
}


# --- running -----------------------------------------------------------------------------------


@cache
def frame_of(name: str) -> NumpyFrame:
    """Return the frame of a name, made once a process."""
    return FRAMES[name]()


def main(run: Run) -> None:
    """Run a program as one rank of MPI.COMM_WORLD; print its digest and the success mark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", default="host")
    parser.add_argument("--frame", default="numpy", choices=FRAMES)
    options = parser.parse_args()
    frame = frame_of(options.frame)
    os.environ["EPCOMM_ENGINE"] = options.engine  # for Buffers that a program does not make itself
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    warnings.simplefilter("error")
    frame.set_up(comm.rank)
    with poisoned_outputs(frame):
        digest = run(comm, frame, options.engine)
    # One write, so that the lines of other ranks do not fall between.
    sys.stdout.write(f"EPCOMM-DIGEST {comm.rank} {digest}\nEPCOMM-OK {comm.rank}\n")
    sys.stdout.flush()
