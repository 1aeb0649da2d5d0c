"""The cuda engine's low-latency half without a GPU: what it passes to kernels, emulated.

CuPy's memory is NumPy's here, slabs are this process's memory, and launches run on the emulator.
"""

from __future__ import annotations

import ctypes
import importlib
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator import low_latency as emulated
from emulator.build import Toolchain
from ranks import oracle

from epcomm import run_threads
from epcomm.arrays import ArrayView, empty_aligned, view_numpy
from epcomm.cuda_layout import low_latency_region_bytes
from epcomm.engines import cuda_failures, cuda_launch, cuda_params
from epcomm.engines.base import (
    CombinePrecision,
    Fp8Format,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
)
from epcomm.errors import InvalidArgument, RankMismatch, TransportError
from epcomm.group import Group

cuda_low_latency = pytest.importorskip(
    "epcomm.engines.cuda_low_latency", reason="CuPy is not installed"
)
cuda_low_latency_room = importlib.import_module("epcomm.engines.cuda_low_latency_room")

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64",
    reason="the emulator's fibers need g++ and an x86-64 processor",
)

Array = np.ndarray[Any, np.dtype[Any]]
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


class _Memory:
    """Stands in for a CuPy array."""

    def __init__(self, shape: Any, dtype: Any) -> None:
        self.array = empty_aligned(shape if isinstance(shape, tuple) else (shape,), np.dtype(dtype))
        self.array.view(np.uint8)[...] = 0
        self.data = SimpleNamespace(ptr=self.array.ctypes.data)
        self.nbytes = self.array.nbytes

    def get(self) -> Array:
        return self.array


_RUNTIME = SimpleNamespace(
    deviceSynchronize=lambda: None,
    memcpyDeviceToDevice=3,
    memcpyAsync=lambda to, source, size, kind, stream: ctypes.memmove(to, source, size),
    memsetAsync=lambda ptr, value, size, stream: ctypes.memset(ptr, value, size),
)
_CUPY = SimpleNamespace(zeros=_Memory, empty=_Memory, cuda=SimpleNamespace(runtime=_RUNTIME))


class _Slabs:
    """Stands in for CudaSlabs."""

    def __init__(
        self, group: Group, device: int, num_bytes: int, num_zeroed: int, timeout_s: float
    ) -> None:
        self.num_bytes = num_bytes
        self.memory = empty_aligned((num_bytes,), np.dtype(np.uint8), 256)
        self.memory[:num_zeroed] = 0
        self.memory[num_zeroed:] = 0xFF
        own = self.memory.ctypes.data
        self.ptrs = tuple(group.allgather(own, timeout_s=timeout_s, phase="slabs"))
        self.others = group.allgather(self.memory, timeout_s=timeout_s, phase="slabs")

    def close(self, is_collective: bool) -> None:
        self.ptrs = ()


@pytest.fixture
def on_cpu(toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what needs a GPU."""

    def launch(spec: Any, *, stream: Any, num_blocks: int, num_threads: int, **rest: Any) -> None:
        toolchain.compile([spec])
        toolchain.launch(
            spec,
            num_blocks=num_blocks,
            num_threads=num_threads,
            params=np.frombuffer(rest["params"], np.uint8),
            shared_bytes=rest["shared_bytes"],
            seed=stream.next_seed(),
            rank=stream.ptr,
        )

    for module in (cuda_low_latency, cuda_low_latency_room):
        monkeypatch.setattr(module, "cupy", _CUPY)
    monkeypatch.setattr(cuda_low_latency_room, "CudaSlabs", _Slabs)
    monkeypatch.setattr(cuda_launch, "launch", launch)


class _Rank:
    """One rank with its engine half."""

    def __init__(
        self, group: Group, num_bytes: int = 0, *, can_mask: bool = False, timeout_s: float = 60.0
    ) -> None:
        self.rank, self.size = group.rank, group.size
        self.record = np.zeros((), cuda_params.FAILURE_RECORD)
        self.is_capturing = False
        seeds = np.random.default_rng(group.rank)
        stream = SimpleNamespace(ptr=group.rank, next_seed=lambda: int(seeds.integers(1 << 60)))
        self.timeout_s = timeout_s
        self.engine = cuda_low_latency.CudaLowLatency(
            group,
            0,
            num_bytes,
            num_blocks=lambda: 2,
            record=self.record,
            timeout_s=timeout_s,
            can_mask=can_mask,
            launcher=cuda_launch.PeerLauncher(group, False, timeout_s, range(group.size)),
            stream=lambda: stream,
            is_capturing=lambda: self.is_capturing,
            before_growth=self.check,
        )

    def check(self) -> None:
        error = cuda_failures.error_in(self.record, self.rank, range(self.size), self.timeout_s)
        if error is not None:
            raise error

    def dispatch(
        self, case: emulated.Case, inputs: emulated.Inputs, *, has_hook: bool = False
    ) -> LowLatencyDispatchResult:
        return self.engine.dispatch(
            LowLatencyDispatchRequest(
                data=view_numpy(_aligned(inputs.rows)),
                topk_idx=view_numpy(inputs.topk_idx),
                shape=case.shape,
                fp8=case.fp8,
                recv_stats=None,
                wait_stats=view_numpy(np.zeros(case.num_ranks, np.int64)),
                has_hook=has_hook,
                allocate=_allocate,
            )
        )

    def combine(
        self,
        case: emulated.Case,
        inputs: emulated.Inputs,
        rows: Array | ArrayView,
        layout_range: ArrayView,
        *,
        has_hook: bool = False,
        is_zero_copy: bool = False,
    ) -> tuple[Array, Callable[[], None]]:
        out = empty_aligned((len(inputs.rows), case.hidden), emulated.BF16)
        request = LowLatencyCombineRequest(
            data=rows if isinstance(rows, ArrayView) else view_numpy(_aligned(rows)),
            topk_idx=view_numpy(inputs.topk_idx),
            topk_weights=view_numpy(inputs.topk_weights),
            layout_range=layout_range,
            shape=case.shape,
            precision=case.precision,
            is_zero_copy=is_zero_copy,
            wait_stats=None,
            has_hook=has_hook,
            out=view_numpy(out),
        )
        return out, self.engine.combine(request)


def _aligned(values: Array) -> Array:
    array = empty_aligned(values.shape, values.dtype)
    array[...] = values
    return array


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> ArrayView:
    array = empty_aligned(shape, dtype)
    array.view(np.uint8)[...] = 0xFF
    return view_numpy(array)


def _received(result: LowLatencyDispatchResult) -> emulated.Received:
    scales = None if result.scales is None else result.scales.numpy().view(np.uint32)
    views = (result.recv_count, result.src_info, result.layout_range)
    return emulated.Received(
        result.data.numpy().view(np.uint8), scales, *(view.numpy() for view in views)
    )


def _fill(
    case: emulated.Case,
    rank: int,
    rows: Array,
    origins: oracle.ExpertRows,
    inputs: list[emulated.Inputs],
) -> Array:
    for local, sources in enumerate(origins.origins):
        for row, (source, token) in enumerate(sources):
            k = inputs[source].topk_idx[token].tolist().index(rank * case.num_local + local)
            rows[local, row] = inputs[source].results[token, k]
    return rows


def round_trip(
    rank: _Rank, case: emulated.Case, round_index: int, *, is_zero_copy: bool = False
) -> None:
    """Dispatch and combine, held to the oracle."""
    inputs = [emulated.make_inputs(case, round_index, i, 8) for i in range(case.num_ranks)]
    own = inputs[rank.rank]
    result = rank.dispatch(case, own)
    result.receive()
    origins = emulated.check_received(case, rank.rank, _received(result), inputs)
    if is_zero_copy:
        view = rank.engine.next_combine_buffer(case.shape)
        raw = (ctypes.c_uint8 * view.num_bytes).from_address(view.ptr)
        buffer = np.frombuffer(raw, emulated.BF16).reshape(view.shape)
        _fill(case, rank.rank, buffer, origins, inputs)
        rows: Array | ArrayView = view
    else:
        shape = (case.num_local, case.num_rows, case.hidden)
        rows = _fill(case, rank.rank, np.zeros(shape, emulated.BF16), origins, inputs)
    sums, receive = rank.combine(case, own, rows, result.layout_range, is_zero_copy=is_zero_copy)
    receive()
    emulated.same("sums", rank.rank, sums, emulated.wanted_sums(case, own))
    rank.check()


_EXPERT = CombinePrecision.EXPERT
_CASE = emulated.Case("plain", (5, 3), 6, hidden=640, fp8=Fp8Format.FLOAT_SCALES)
_LARGE = emulated.Case(
    "large", (9, 12), 12, hidden=1024, num_topk=5, precision=_EXPERT, idx_dtype=np.int32
)
_PACKED = emulated.Case("packed", (2, 4), 4, hidden=512, fp8=Fp8Format.PACKED_UE8M0_SCALES)


def test_calls_of_every_kind_on_slabs_that_grow(on_cpu: None) -> None:
    def fn(group: Group) -> list[int]:
        rank, sizes = _Rank(group), []
        for round_index, case in enumerate((_PACKED, _CASE, _LARGE, _CASE, _LARGE)):
            round_trip(rank, case, round_index, is_zero_copy=round_index % 2 == 1)
            sizes.append(rank.engine.local_memory().num_bytes)
        return sizes

    first, *_ = run_threads(fn, 2)
    assert first[0] < first[1] < first[2] == first[3] == first[4]


@pytest.mark.parametrize("call", ["dispatch", "combine"])
@pytest.mark.parametrize("needs_more", [_LARGE, replace(_CASE, num_max=99)], ids=["all", "tokens"])
def test_one_rank_alone_needs_more_room(on_cpu: None, call: str, needs_more: emulated.Case) -> None:
    """It tells the others what it passes before it waits for them to grow."""
    needs_more = replace(needs_more, num_topk=_CASE.num_topk, num_local=_CASE.num_local)

    def fn(group: Group) -> None:
        rank = _Rank(group)
        round_trip(rank, _CASE, 0)
        case = needs_more if rank.rank == 1 else _CASE
        own = emulated.make_inputs(case, 1, rank.rank, 8)
        rows = np.zeros((case.num_local, case.num_rows, case.hidden), emulated.BF16)
        ranges = view_numpy(np.zeros((case.num_local, 2), np.int64))
        said = f"num_max_.*rank 0: {_CASE.num_max}, rank 1: {needs_more.num_max}"

        def disagree() -> None:
            if call == "dispatch":
                rank.dispatch(case, own)
            else:
                rank.combine(case, own, rows, ranges)
            rank.check()

        with pytest.raises(RankMismatch, match=said):
            disagree()
        for round_index, agreed in enumerate((_CASE, _LARGE), start=2):
            round_trip(rank, agreed, round_index)

    run_threads(fn, 2)


def test_a_call_that_ranks_disagreed_on_took_a_slot_on_all(on_cpu: None) -> None:
    """So the call after it needs that of the one before, whose hook must be called first."""

    def fn(group: Group) -> None:
        rank = _Rank(group)
        inputs = [emulated.make_inputs(_CASE, 0, i, 8) for i in range(2)]
        own = inputs[rank.rank]
        waiting = rank.dispatch(_CASE, own, has_hook=True)

        def disagree() -> None:
            rank.dispatch(replace(_CASE, num_max=99) if rank.rank == 1 else _CASE, own)
            rank.check()

        with pytest.raises(RankMismatch):
            disagree()
        with pytest.raises(InvalidArgument, match=r"call the oldest hook\(\) first"):
            rank.dispatch(_CASE, own)
        waiting.receive()
        emulated.check_received(_CASE, rank.rank, _received(waiting), inputs)
        round_trip(rank, _CASE, 1)

    run_threads(fn, 2)


def test_an_earlier_failure_is_raised_before_ranks_meet_to_grow(on_cpu: None) -> None:
    """So that the call can be made again: the others still wait for it."""
    expert_twice = 6

    def fn(group: Group) -> None:
        rank = _Rank(group)
        round_trip(rank, _CASE, 0)
        if rank.rank == 1:
            rank.record["failure"] = expert_twice
            with pytest.raises(InvalidArgument, match="chooses an expert twice"):
                rank.dispatch(_LARGE, emulated.make_inputs(_LARGE, 1, rank.rank, 8))
        round_trip(rank, _LARGE, 1)

    run_threads(fn, 2)


def test_the_hint_is_enough(on_cpu: None) -> None:
    hint = low_latency_region_bytes(_LARGE.shape)

    def fn(group: Group) -> None:
        rank = _Rank(group, hint)
        rank.is_capturing = True  # growing would be refused
        round_trip(rank, _LARGE, 0)
        assert rank.engine.local_memory().num_bytes == hint

    run_threads(fn, 2)


def test_slabs_do_not_grow_in_a_captured_graph(on_cpu: None) -> None:
    def fn(group: Group) -> None:
        rank = _Rank(group)
        round_trip(rank, _PACKED, 0)
        rank.is_capturing = True
        with pytest.raises(InvalidArgument, match=r"num_rdma_bytes=\d+"):
            rank.dispatch(_LARGE, emulated.make_inputs(_LARGE, 0, rank.rank, 8))
        round_trip(rank, _PACKED, 1)

    run_threads(fn, 2)


def test_hooks_across_growth_and_the_third_call(on_cpu: None) -> None:
    def fn(group: Group) -> None:
        rank = _Rank(group)
        inputs = [emulated.make_inputs(_CASE, 0, i, 8) for i in range(2)]
        large = [emulated.make_inputs(_LARGE, 1, i, 8) for i in range(2)]
        first = rank.dispatch(_CASE, inputs[rank.rank], has_hook=True)
        second = rank.dispatch(_LARGE, large[rank.rank], has_hook=True)
        with pytest.raises(InvalidArgument, match=r"call the oldest hook\(\) first"):
            rank.dispatch(_CASE, inputs[rank.rank])
        second.receive()
        with pytest.raises(InvalidArgument, match="call each hook once"):
            second.receive()
        with pytest.raises(InvalidArgument, match=r"call the oldest hook\(\) first"):
            rank.dispatch(_CASE, inputs[rank.rank])
        first.receive()
        emulated.check_received(_CASE, rank.rank, _received(first), inputs)
        emulated.check_received(_LARGE, rank.rank, _received(second), large)
        round_trip(rank, _CASE, 2)

    run_threads(fn, 2)


def test_a_buffer_that_is_not_the_next_combine_buffer(on_cpu: None) -> None:
    def fn(group: Group) -> None:
        rank = _Rank(group)
        own = emulated.make_inputs(_CASE, 0, rank.rank, 8)
        shape = (_CASE.num_local, _CASE.num_rows, _CASE.hidden)
        ranges = view_numpy(np.zeros((_CASE.num_local, 2), np.int64))
        with pytest.raises(InvalidArgument, match="zero_copy=True"):
            rank.combine(_CASE, own, np.zeros(shape, emulated.BF16), ranges, is_zero_copy=True)

    run_threads(fn, 2)


def test_masks_are_set_copied_and_heeded(on_cpu: None) -> None:
    def fn(group: Group) -> None:
        rank = _Rank(group, low_latency_region_bytes(_CASE.shape), can_mask=True)
        out = np.full(2, 7, np.int32)
        other = 1 - rank.rank
        for is_masked in (True, False):
            rank.engine.set_masked(other, is_masked)
            rank.engine.copy_masks(view_numpy(out))
            assert out.tolist() == [int(is_masked and i == other) for i in range(2)]
            inputs = [emulated.make_inputs(_CASE, 3, i, 8) for i in range(2)]
            result = rank.dispatch(_CASE, inputs[rank.rank])
            result.receive()
            emulated.check_received(
                _CASE, rank.rank, _received(result), inputs, [other] if is_masked else []
            )

    run_threads(fn, 2)


def test_slabs_do_not_grow_while_a_rank_is_masked(on_cpu: None) -> None:
    """Growing takes all ranks."""

    def fn(group: Group) -> None:
        rank = _Rank(group, num_bytes=1, can_mask=True)
        rank.engine.set_masked(1 - rank.rank, True)
        with pytest.raises(TransportError, match=r"masked.*num_rdma_bytes=\d+"):
            rank.dispatch(_LARGE, emulated.make_inputs(_LARGE, 0, rank.rank, 8))
        rank.engine.set_masked(1 - rank.rank, False)
        round_trip(rank, _LARGE, 1)

    run_threads(fn, 2)


def test_more_than_kernels_take_is_refused(on_cpu: None) -> None:
    def fn(group: Group) -> None:
        rank = _Rank(group)
        for case, message in (
            (emulated.Case("many", (1,), 1025, hidden=8), "at most 1024"),
            (emulated.Case("experts", (1,), 1, hidden=8, num_local=1025), "at most 1024 a rank"),
        ):
            with pytest.raises(InvalidArgument, match=message):
                rank.dispatch(case, emulated.make_inputs(case, 0, 0, 8))

    run_threads(fn, 1)
