"""A GPU that is none: streams that put work off as long as they may, over CPU memory.

    fake_gpu.py KIND PROGRAM...

runs contract programs under mpiexec with every Buffer staged through it; with ``--rails`` the rows
of all Buffers cross between nodes as those of GPUs do, and the node's engine is staged.

What a stream holds is done when somebody waits for it, and not before. So an engine that does not
wait for its inputs computes with poison, and a caller whose stream does not wait for the outputs
finds poison in them. Each thread has a current stream of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import sys
import threading
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from frames import NumpyFrame, poison, poisoned_outputs

from epcomm import buffer, streams
from epcomm.arrays import CPU, ArrayView, view_numpy
from epcomm.engines import make
from epcomm.engines.base import (
    CombineRequest,
    CombineResult,
    DispatchRequest,
    DispatchResult,
    FurtherRows,
)
from epcomm.engines.device_rail_moves import DeviceMoves
from epcomm.engines.staged import StagedEngine
from epcomm.frameworks.numpy import NumpyFramework
from epcomm.mpi_memory import takes_device_pointers
from epcomm.topology import Topology

#: Kinds of framework: whether it has streams that callers see, and orders its memory by them.
KINDS = {"torch": (True, True), "cupy": (True, False), "jax": (False, False)}

_lock = threading.RLock()
_numbers = itertools.count(100)
_streams: weakref.WeakValueDictionary[int, FakeStream] = weakref.WeakValueDictionary()
_of_thread = threading.local()


def _nothing() -> None:
    pass


class FakeStream:
    """Work that is put off."""

    def __init__(self) -> None:
        self.ptr = next(_numbers)
        self._work: list[Callable[[], Any]] = []
        self._num_done = 0
        _streams[self.ptr] = self

    def add(self, work: Callable[[], Any]) -> int:
        """Queue work; return how much was queued so far."""
        with _lock:
            self._work.append(work)
            return len(self._work)

    def run(self, end: int | None = None) -> None:
        """Do the work up to a place, in order."""
        with _lock:
            end = len(self._work) if end is None else end
            while self._num_done < end:
                work, self._work[self._num_done] = self._work[self._num_done], _nothing
                self._num_done += 1
                work()

    def has_run(self, end: int) -> bool:
        """Return whether the work up to a place is done."""
        return self._num_done >= end


class FakeEvent:
    """A place in a stream."""

    def __init__(self, stream: int) -> None:
        self._stream = _streams[stream]
        self._end = self._stream.add(_nothing)

    @property
    def done(self) -> bool:
        """Whether it has passed; it has when one asks again."""
        was_done = self._stream.has_run(self._end)
        self.synchronize()
        return was_done

    def synchronize(self) -> None:
        """Wait for it."""
        self._stream.run(self._end)


def _current() -> FakeStream:
    if not hasattr(_of_thread, "stream"):
        _of_thread.stream = FakeStream()
    return _of_thread.stream


def _depth() -> int:
    depth: int = getattr(_of_thread, "depth", 0)
    return depth


def _check_active() -> None:
    """Hold whoever allocates to do it while the GPU is current."""
    assert _depth() > 0, "another GPU may be current here: allocate inside active()"


def _wait(stream: int, event: FakeEvent) -> None:
    _streams[stream].add(event.synchronize)


def run_all() -> None:
    """Do all that any stream holds."""
    for stream in list(_streams.values()):
        stream.run()


class _Held:
    """Memory for one array, which goes back when nobody refers to it any more."""

    def __init__(self, raw: npt.NDArray[np.uint8], give_back: Callable[[Any], None]) -> None:
        self.__array_interface__ = raw.__array_interface__
        weakref.finalize(self, give_back, raw).atexit = False


class FakeCopies:
    """See `epcomm.engines.staged.Copies`. What goes back to the pool of host memory is poisoned.

    Attributes:
        num_unread: Copies to the host that are queued, and not done.
        num_waits: How often the host has waited.
        num_bytes: Bytes copied, either way.
    """

    def __init__(self) -> None:
        self.comm_stream = FakeStream()
        self.num_unread = self.num_waits = self.num_bytes = 0
        self._pool: dict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)

    @contextmanager
    def active(self) -> Iterator[None]:
        """See `Copies.active`: of the thread, as a GPU is current."""
        _of_thread.depth = _depth() + 1
        try:
            yield
        finally:
            _of_thread.depth -= 1

    def empty_on_host(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """See `Copies.empty_on_host`."""
        _check_active()
        pool = self._pool[num_bytes]
        raw = pool.pop() if pool else poison(np.empty(num_bytes, np.uint8))
        return np.asarray(_Held(raw, lambda raw: pool.append(poison(raw))))

    def empty_on_device(self, num_bytes: int) -> Any:
        """See `Copies.empty_on_device`."""
        _check_active()
        memory = poison(np.empty(num_bytes, np.uint8))
        return mock.Mock(ptr=memory.ctypes.data, memory=memory)

    def to_host(self, ptr: int, memory: npt.NDArray[np.uint8], stream: int) -> None:
        """See `Copies.to_host`."""
        to, num_bytes = memory.ctypes.data, memory.nbytes
        self.num_unread += 1
        self.num_bytes += num_bytes

        def copy() -> None:
            self.num_unread -= 1
            ctypes.memmove(to, ptr, num_bytes)

        _streams[stream].add(copy)

    def to_device(self, memory: npt.NDArray[np.uint8], ptr: int, stream: int) -> None:
        """See `Copies.to_device`."""
        begin, num_bytes = memory.ctypes.data, memory.nbytes
        self.num_bytes += num_bytes
        _streams[stream].add(lambda: ctypes.memmove(ptr, begin, num_bytes))

    def synchronize(self, stream: int) -> None:
        """See `Copies.synchronize`."""
        self.num_waits += 1
        _streams[stream].run()


class FakeRowCopies(FakeCopies):
    """See `epcomm.engines.row_copies.RowCopies`."""

    def new_stream(self) -> FakeStream:
        """See `RowCopies.new_stream`."""
        _check_active()
        return FakeStream()

    def empty_in_pool(self, num_bytes: int) -> Any:
        """See `RowCopies.empty_in_pool`."""
        return self.empty_on_device(num_bytes)

    def bytes_on_device(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """See `RowCopies.bytes_on_device`."""
        _check_active()
        return poison(np.empty(num_bytes, np.uint8))

    def address(self, memory: npt.NDArray[np.uint8]) -> int:
        """See `RowCopies.address`."""
        return memory.ctypes.data

    def copy(self, source: int, to: int, num_bytes: int, stream: int) -> None:
        """See `RowCopies.copy`."""
        _streams[stream].add(lambda: ctypes.memmove(to, source, num_bytes))

    def set_bits(self, ptr: int, num_bytes: int, stream: int) -> None:
        """See `RowCopies.set_bits`."""
        _streams[stream].add(lambda: ctypes.memset(ptr, 0xFF, num_bytes))

    def gather(self, rows: ArrayView, idx: ArrayView, to: int, stream: int) -> None:
        """See `RowCopies.gather`."""

        def gather() -> None:
            picked = np.ascontiguousarray(rows.numpy()[idx.numpy()])
            ctypes.memmove(to, picked.ctypes.data, picked.nbytes)

        _streams[stream].add(gather)

    def look_up(self, table: ArrayView, idx: ArrayView, stream: int) -> None:
        """See `RowCopies.look_up`."""

        def look_up() -> None:
            choices = idx.numpy()
            choices[...] = table.numpy()[choices]

        _streams[stream].add(look_up)


class FakeNodeEngine(StagedEngine):
    """A staged host engine that takes a node's parts as the cuda engine does."""

    def call_stream(self) -> int:
        """See `DeviceNodeEngine.call_stream`."""
        ptr: int = self._streams.stream.ptr
        return ptr

    def check_part(self, request: Any, max_tokens: int) -> None:
        """See `DeviceNodeEngine.check_part`."""

    def fail(self, missed: int) -> None:
        """See `NodeEngine.fail`."""
        self._inner.fail(missed)

    def check_failed(self, phase: str) -> None:
        """See `NodeEngine.check_failed`."""
        self._inner.check_failed(phase)

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """See `Engine.dispatch`."""
        into = request.into
        assert into is not None
        # In the order in which the staged engine allocates.
        outputs = [into.data] if into.scales is None else [into.data, into.scales]
        if into.topk is not None:
            outputs = [into.topk.idx, into.topk.weights, *outputs]
        ready = iter(outputs)
        return super().dispatch(request._replace(into=None, allocate=lambda *_: next(ready)))

    def combine(self, request: CombineRequest) -> CombineResult:
        """See `Engine.combine`."""
        assert request.into is not None
        ready = iter(request.into)
        sums = request.further_sums
        further: list[FurtherRows] = []
        if sums is not None:
            data, places = self._fetch(sums.data), self._fetch(sums.places)
            weights = None if sums.topk_weights is None else self._fetch(sums.topk_weights)
            self._wait()
            further = [
                FurtherRows(
                    _with_spare(data.numpy()),
                    None if weights is None else _with_spare(weights.numpy()),
                    np.where(column < 0, len(data.numpy()), column).astype(np.int64),
                )
                for column in places.numpy().T
            ]
        return super().combine(
            request._replace(
                into=None, allocate=lambda *_: next(ready), further=further, further_sums=None
            )
        )


def _with_spare(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate([rows, np.full_like(rows, -0.0, shape=(1, rows.shape[1]))])


class CheckedEngine(StagedEngine):
    """Fails a call that leaves anything of the caller's unread."""

    def end(self, order: Any, keep: Any) -> Any:
        """See `Engine.end`."""
        assert self._copies.num_unread == 0, "the caller's arrays are read after the call"
        return super().end(order, keep)


class FakeFrame(NumpyFrame):
    """NumPy arrays that stand for some on a GPU.

    Args:
        kind: One of `KINDS`.
        has_rails: Whether rows cross between nodes as those of GPUs do.
    """

    def __init__(self, kind: str, has_rails: bool = False) -> None:
        self._has_rails = has_rails
        self._has_streams, self._tracks_streams = KINDS[kind]

    def numpy(self, array: Any) -> npt.NDArray[Any]:
        if self._has_streams:
            _current().run()
        return np.asarray(array)

    def overwrite(self, array: Any) -> None:
        poison(array)  # now: when a call has returned, it has read

    def fill(self, array: Any, values: npt.NDArray[Any]) -> None:
        values = np.array(values)
        if self._has_streams:
            _current().add(lambda: np.copyto(array, values))
        else:
            array[...] = values

    def synchronize(self) -> None:
        run_all()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Make NumPy a framework of this kind, and stage every Buffer."""
        make_engine, make_host = buffer.make_engine, make._make_host
        empty = NumpyFramework.empty

        def make_staged(*args: Any) -> Any:
            if self._has_rails:
                return make_engine(*args)
            return CheckedEngine(make_engine(*args), FakeCopies(), CPU)

        def make_staged_node(*args: Any) -> StagedEngine:
            return FakeNodeEngine(make_host(*args), FakeCopies(), CPU)

        def make_device_moves(topology: Topology, engine: Any) -> DeviceMoves:
            has_pointers = takes_device_pointers()
            return DeviceMoves(topology, engine, FakeRowCopies(), CPU, has_pointers)

        def make_held(framework: Any, *args: Any) -> ArrayView:
            # As where memory is freed in the order of streams: their work is done before.
            raw = empty(framework, *args).numpy()
            flat = raw.reshape(-1).view(np.uint8)
            held = np.asarray(_Held(flat, lambda raw: run_all()))
            return view_numpy(held.view(raw.dtype).reshape(raw.shape))

        def stream(*args: Any) -> int | None:
            return _current().ptr if self._has_streams else None

        changed: dict[Any, dict[str, Any]] = {
            buffer: {"make_engine": make_staged},
            make: (
                {"_make_host": make_staged_node, "HostMoves": make_device_moves}
                if self._has_rails
                else {}
            ),
            NumpyFramework: {
                "empty": make_held,
                "has_streams": self._has_streams,
                "tracks_streams": self._tracks_streams,
                "current_stream": lambda framework, device: stream(),
            },
            streams: {
                "current_stream": stream,
                "record": FakeEvent,
                "wait": _wait,
                "is_capturing": lambda stream: False,
            },
        }
        with ExitStack() as stack:
            for owner, attributes in changed.items():
                if attributes:
                    stack.enter_context(mock.patch.multiple(owner, **attributes))
            yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("programs", nargs="+")
    parser.add_argument("--rails", action="store_true")
    options = parser.parse_args()
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    warnings.simplefilter("error")
    frame = FakeFrame(options.kind, options.rails)
    lines = []
    with poisoned_outputs(frame):
        for name in options.programs:
            digest = importlib.import_module(name).run(MPI.COMM_WORLD, frame, "host")
            lines.append(f"EPCOMM-DIGEST {name} {rank} {digest}\n")
    sys.stdout.write("".join(lines) + f"EPCOMM-OK {rank}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
