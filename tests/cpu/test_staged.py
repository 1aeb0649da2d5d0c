"""GPU arrays that are copied through host memory, on a GPU that is none: see ranks/fake_gpu.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import contract
import ml_dtypes
import numpy as np
import pytest
from launch import Result

from epcomm import (
    Buffer,
    EventHandle,
    EventOverlap,
    InvalidArgument,
    SingleGroup,
    UnsupportedConfig,
    arguments,
    engines,
    env,
    run_threads,
    streams,
)
from epcomm.arguments import Place
from epcomm.arrays import CPU, ArrayView, Device, view_numpy
from epcomm.engines import choose_engine

fake_gpu = importlib.import_module("fake_gpu")
frames = importlib.import_module("frames")

BF16 = np.dtype(ml_dtypes.bfloat16)
NUM_EXPERTS, HIDDEN, NUM_MAX = 4, 128, 8


@pytest.fixture(autouse=True)
def host_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "settings", lambda: env.Settings(engine="host"))


# --- the whole contract ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "num_ranks"), [("torch", 1), ("torch", 2), ("torch", 3), ("cupy", 2), ("jax", 2)]
)
@pytest.mark.parametrize("program", contract.PROGRAMS)
def test_contract_with_the_same_bits(program: str, kind: str, num_ranks: int) -> None:
    module, frame = importlib.import_module(program), fake_gpu.FakeFrame(kind)
    with frames.poisoned_outputs(frame):
        digests = run_threads(lambda group: module.run(group, frame, "host"), num_ranks)
    assert digests == contract.run_as_threads(program, num_ranks)


@pytest.mark.parametrize(
    ("kind", "ranks_per_node"), [("torch", 2), ("torch", 1), ("cupy", 2), ("jax", 1)]
)
def test_contract_between_nodes(
    mpiexec: Callable[..., Result], kind: str, ranks_per_node: int
) -> None:
    programs = ("contract_dispatch", "contract_buffers", "contract_training")
    mpiexec("fake_gpu", 4, kind, *programs, env={"EPCOMM_RANKS_PER_NODE": str(ranks_per_node)})


# --- streams, copies and waits of single calls -------------------------------------------------


@pytest.fixture(params=["torch", "cupy"])
def frame(request: pytest.FixtureRequest) -> Iterator[Any]:
    used = fake_gpu.FakeFrame(request.param)
    with frames.poisoned_outputs(used):
        yield used


@pytest.fixture
def buffer(frame: Any) -> Iterator[Buffer]:
    made = Buffer(SingleGroup(), num_nvl_bytes=1 << 20)
    yield made
    made.destroy()


def copies_of(buffer: Buffer) -> Any:
    return buffer._engine._copies


def fill_later(frame: Any, values: Any) -> Any:
    """Return an array that is written when the current stream comes to it."""
    array = frames.poison(np.empty_like(values))
    frame.fill(array, values)
    return array


def choices(num_tokens: int) -> tuple[Any, Any]:
    idx = np.arange(num_tokens)[:, None] * [1, 1] % NUM_EXPERTS + [0, -NUM_EXPERTS]
    weights = np.arange(num_tokens * 2, dtype=np.float32).reshape(-1, 2)
    return np.maximum(idx, -1), weights


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("has_previous", [False, True])
def test_calls_come_between_inputs_and_consumers(
    frame: Any, buffer: Buffer, has_previous: bool, is_async: bool
) -> None:
    for round_ in range(3):
        values = np.random.default_rng(round_).random((6, HIDDEN), np.float32)
        idx, weights = choices(6)
        x, *topk = (fill_later(frame, array) for array in (values, idx, weights))
        options = {"previous_event": Buffer.capture()} if has_previous else {}
        recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
            x,
            **dict(zip(("topk_idx", "topk_weights"), topk, strict=True)),
            num_experts=NUM_EXPERTS,
            async_finish=is_async,
            **options,
        )
        event.current_stream_wait()
        rows = fill_later(frame, 2 * values)
        options = {"previous_event": Buffer.capture()} if has_previous else {}
        combined, _, done = buffer.combine(rows, handle, async_finish=is_async, **options)
        done.current_stream_wait()
        assert (event.event is None, done.event is None) == (not is_async, not is_async)
        np.testing.assert_array_equal(frame.numpy(combined), 2 * values)
        np.testing.assert_array_equal(frame.numpy(recv_x), values)
        np.testing.assert_array_equal(frame.numpy(recv_idx), idx)
        np.testing.assert_array_equal(frame.numpy(recv_weights)[:, 0], weights[:, 0])
        assert counts == [2, 2, 1, 1]


def test_a_previous_event_of_another_stream_is_waited_for(frame: Any, buffer: Buffer) -> None:
    other, values = fake_gpu.FakeStream(), np.ones((5, HIDDEN), np.float32)
    x = np.zeros_like(values)
    other.add(lambda: np.copyto(x, values))
    ready = EventOverlap(EventHandle.of(streams.record(other.ptr), streams.current_stream))
    idx, weights = choices(5)
    layout = buffer.get_dispatch_layout(idx, NUM_EXPERTS)
    recv_x, *_, event = buffer.dispatch(
        x, None, *layout[:2], layout[3], layout[2], idx, weights, previous_event=ready
    )
    np.testing.assert_array_equal(frame.numpy(recv_x), values)
    assert event.event is None


@pytest.mark.parametrize("is_async", [False, True])
def test_a_layout_made_in_dispatch_waits_for_the_event(
    frame: Any, buffer: Buffer, is_async: bool
) -> None:
    other, values = fake_gpu.FakeStream(), np.ones((5, HIDDEN), np.float32)
    idx, weights = choices(5)
    late = np.zeros_like(idx)
    other.add(lambda: np.copyto(late, idx))
    ready = EventOverlap(EventHandle.of(streams.record(other.ptr), streams.current_stream))
    *_, counts, _, event = buffer.dispatch(
        values,
        topk_idx=late,
        topk_weights=weights,
        num_experts=NUM_EXPERTS,
        previous_event=ready,
        async_finish=is_async,
    )
    event.current_stream_wait()
    assert counts == [2, 1, 1, 1]


def test_statistics_add_up_whatever_stream_calls_run_on(frame: Any, buffer: Buffer) -> None:
    stats = np.zeros(NUM_EXPERTS, np.int32)
    idx, _ = choices(5)
    x = np.ones((5, HIDDEN), BF16)
    hooks = []
    for options in ({"async_finish": True}, {}, *[{"return_recv_hook": True}] * 2):
        *_, hook = buffer.low_latency_dispatch(x, idx, NUM_MAX, NUM_EXPERTS, stats, **options)
        hooks += [hook] if hook else []
    for hook in reversed(hooks):
        hook()
    np.testing.assert_array_equal(frame.numpy(stats), 4 * np.array([2, 1, 1, 1]))


def test_the_host_waits_once(frame: Any, buffer: Buffer) -> None:
    copies = copies_of(buffer)
    idx, weights = choices(6)
    x = np.ones((6, HIDDEN), np.float32)

    def waits_of(call: Callable[[], Any]) -> Any:
        before = copies.num_waits
        result = call()
        return result, copies.num_waits - before

    layout, num_waits = waits_of(lambda: buffer.get_dispatch_layout(idx, NUM_EXPERTS))
    assert num_waits == 1
    arguments = (x, None, *layout[:2], layout[3], layout[2], idx, weights)
    (*_, handle, _), num_waits = waits_of(lambda: buffer.dispatch(*arguments))
    assert num_waits == 1
    _, num_waits = waits_of(lambda: buffer.combine(x, handle, weights, bias=(x, x)))
    assert num_waits == 1
    x = x.astype(BF16)
    sent, num_waits = waits_of(
        lambda: buffer.low_latency_dispatch(x, idx, NUM_MAX, NUM_EXPERTS, return_recv_hook=True)
    )
    assert num_waits == 1
    _, num_waits = waits_of(sent[-1])
    assert num_waits == 0


def test_rows_that_hold_nothing_are_not_copied(frame: Any, buffer: Buffer) -> None:
    copies, num_worst, row_bytes = copies_of(buffer), 10_000, 4 * HIDDEN
    idx, weights = choices(6)
    x = np.ones((6, HIDDEN), np.float32)
    recv_x, *_, handle, _ = buffer.dispatch(
        *(x, None), topk_idx=idx, topk_weights=weights, num_experts=NUM_EXPERTS, num_worst_tokens=64
    )
    assert recv_x.shape == (64, HIDDEN)
    before = copies.num_bytes
    buffer.combine(recv_x, handle)
    assert copies.num_bytes - before == 2 * 6 * row_bytes
    before = copies.num_bytes
    rows, _, handle, *_ = buffer.low_latency_dispatch(
        x.astype(BF16), idx, num_worst, NUM_EXPERTS, use_fp8=False
    )
    buffer.low_latency_combine(rows, idx, weights, handle)
    assert copies.num_bytes - before < num_worst * row_bytes / 2


def test_zero_copy_takes_the_buffer_alone(frame: Any, buffer: Buffer) -> None:
    idx, weights = choices(5)
    x = np.ones((5, HIDDEN), BF16)
    rows, _, handle, *_ = buffer.low_latency_dispatch(x, idx, NUM_MAX, NUM_EXPERTS, use_fp8=False)
    with pytest.raises(InvalidArgument, match="get_next_low_latency_combine_buffer"):
        buffer.low_latency_combine(rows, idx, weights, handle, zero_copy=True)
    own = buffer.get_next_low_latency_combine_buffer(handle)
    frame.fill(own, frame.numpy(rows))
    combined, *_ = buffer.low_latency_combine(own, idx, weights, handle, zero_copy=True)
    want = weights[:, :1].astype(BF16) * x
    np.testing.assert_array_equal(frame.numpy(combined), want)


def test_captures_are_refused(frame: Any, buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    idx, weights = choices(5)
    x = np.ones((5, HIDDEN), np.float32)
    *_, hook = buffer.low_latency_dispatch(
        x.astype(BF16), idx, NUM_MAX, NUM_EXPERTS, return_recv_hook=True
    )

    def calls() -> tuple[Callable[[], Any], ...]:
        return (
            lambda: buffer.get_dispatch_layout(idx, NUM_EXPERTS),
            lambda: buffer.dispatch(
                x, topk_idx=idx, topk_weights=weights, num_experts=NUM_EXPERTS, num_worst_tokens=5
            ),
            lambda: buffer.low_latency_dispatch(x.astype(BF16), idx, NUM_MAX, NUM_EXPERTS),
            hook,
        )

    num_bytes = copies_of(buffer).num_bytes
    with monkeypatch.context() as patch:
        patch.setattr(streams, "is_capturing", lambda stream: True)
        for call in calls():
            with pytest.raises(UnsupportedConfig, match=r"CUDA graph.*Nothing was sent"):
                call()
    assert copies_of(buffer).num_bytes == num_bytes
    for call in calls():
        call()


def test_a_refused_call_leaves_the_buffer_as_it_was(frame: Any, buffer: Buffer) -> None:
    idx, weights = choices(5)
    x = np.ones((5, HIDDEN), np.float32)
    options = {"topk_idx": idx, "topk_weights": weights, "num_experts": NUM_EXPERTS}
    with pytest.raises(InvalidArgument, match="expert ids from 0 to 3"):
        buffer.dispatch(x, **options | {"topk_idx": idx + NUM_EXPERTS})
    with pytest.raises(InvalidArgument, match="num_worst_tokens is 1"):
        buffer.dispatch(x, num_worst_tokens=1, **options)
    recv_x, *_ = buffer.dispatch(x, **options)
    np.testing.assert_array_equal(frame.numpy(recv_x), x)


def test_names_and_memory(frame: Any, buffer: Buffer) -> None:
    assert "host+staged engine, slab 1.0 MiB" in repr(buffer)
    assert buffer.get_comm_stream() is copies_of(buffer).comm_stream
    slab = buffer.get_local_buffer_tensor(np.uint8)
    assert isinstance(slab, np.ndarray)
    assert slab.size == 1 << 20


# --- which engine, and where its arrays are ----------------------------------------------------


@pytest.mark.parametrize(
    ("num_gpus", "wanted", "engine"),
    [
        (0, "auto", "host"),
        (2, "auto", "cuda"),
        (2, "host", "host"),
        (2, "cuda", "cuda"),
    ],
)
def test_choice(monkeypatch: pytest.MonkeyPatch, num_gpus: int, wanted: str, engine: str) -> None:
    monkeypatch.setattr(engines, "find_num_gpus", lambda: num_gpus)
    assert choose_engine(wanted) == engine


def test_size_hint_is_that_of_the_engine_that_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    def hint(engine: str | None) -> int:
        return Buffer.get_low_latency_rdma_size_hint(8, 128, 2, 4, engine=engine)

    on_host, on_cuda = hint("host"), hint("cuda")
    assert on_host != on_cuda
    assert hint(None) == on_host  # the settings say host
    assert hint("auto") == on_host
    monkeypatch.setattr(engines, "find_num_gpus", lambda: 1)
    assert hint("auto") == on_cuda
    assert hint(None) == on_host


def test_device_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from epcomm import buffer

    monkeypatch.setattr(buffer, "find_num_gpus", lambda: 0)
    with pytest.raises(UnsupportedConfig, match=r"device=0, but CuPy finds no GPU.*leave device"):
        Buffer(SingleGroup(), device=0)
    monkeypatch.setattr(buffer, "find_num_gpus", lambda: 2)
    for device in (2, -1, "cuda:0"):
        with pytest.raises(InvalidArgument, match="device is"):
            Buffer(SingleGroup(), device=device)


def view_on(device: Device) -> ArrayView:
    view = view_numpy(np.zeros((2, 4), np.float32))
    return ArrayView(view.ptr, view.shape, view.strides, view.dtype, device, False, view.owner)


@pytest.mark.parametrize(
    ("array", "place", "remedy"),
    [
        (CPU, Device("cuda", 0), "engine='host' and without device= (or set EPCOMM_ENGINE=host)"),
        (Device("cuda", 1), CPU, "engine='host', device=1"),
        (Device("cuda", 1), CPU, "engine='cuda', device=1"),
        (Device("cuda", 1), Device("cuda", 0), "make the Buffer with device=1."),
    ],
)
def test_arrays_elsewhere_are_told_the_remedy(
    monkeypatch: pytest.MonkeyPatch, array: Device, place: Device, remedy: str
) -> None:
    monkeypatch.setattr("epcomm.frameworks.numpy.NumpyFramework.view", lambda *args: view_on(array))
    with pytest.raises(InvalidArgument) as caught:
        arguments.view_rows(np.zeros((2, 4), np.float32), Place(place, 1))
    assert f"x is on {array}, but this Buffer works on {place}" in str(caught.value)
    assert remedy in str(caught.value)
