"""Dispatch right after its layout: what the Buffer itself has made is not looked at twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from epcomm import Buffer, InvalidArgument, SingleGroup, arguments

NUM_EXPERTS, HIDDEN = 4, 64


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    made = Buffer(SingleGroup(), engine="host")
    yield made
    made.destroy()


@pytest.fixture
def viewed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the arguments that are viewed."""
    names: list[str] = []
    view_of = arguments.view_of

    def record(array: Any, name: str, *args: Any, **options: Any) -> Any:
        names.append(name)
        return view_of(array, name, *args, **options)

    monkeypatch.setattr(arguments, "view_of", record)
    return names


def arrays(num_tokens: int, make: Any = np.asarray) -> tuple[Any, Any, Any]:
    idx = np.arange(num_tokens * 2).reshape(-1, 2) % NUM_EXPERTS
    weights = np.arange(num_tokens * 2, dtype=np.float32).reshape(-1, 2)
    x = np.random.default_rng(num_tokens).random((num_tokens, HIDDEN), np.float32)
    return make(x), make(idx), make(weights)


def dispatch(buffer: Buffer, inputs: tuple[Any, Any, Any], layout: Any) -> Any:
    x, idx, weights = inputs
    per_rank, _, per_expert, in_rank, _ = layout
    return buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, weights)


def torch_tensors() -> Any:
    torch = pytest.importorskip("torch")
    return torch.from_numpy


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_once_for_each_layout(buffer: Buffer, viewed: list[str], framework: str) -> None:
    make = np.asarray if framework == "numpy" else torch_tensors()
    inputs = arrays(5, make)
    layout = buffer.get_dispatch_layout(inputs[1], NUM_EXPERTS)
    everything = ["x", "topk_idx", "topk_weights"]
    everything += ["num_tokens_per_expert", "num_tokens_per_rank", "is_token_in_rank"]
    for want in (["x", "topk_weights"], everything):
        viewed.clear()
        recv_x, recv_idx, _, counts, *_ = dispatch(buffer, inputs, layout)
        assert viewed == want
        np.testing.assert_array_equal(np.asarray(recv_x), np.asarray(inputs[0]))
        np.testing.assert_array_equal(np.asarray(recv_idx), np.asarray(inputs[1]))
        assert counts == [3, 3, 2, 2]


def test_layouts_in_flight(buffer: Buffer, viewed: list[str]) -> None:
    lanes = [arrays(num_tokens) for num_tokens in (5, 7)]
    layouts = [buffer.get_dispatch_layout(idx, NUM_EXPERTS) for _, idx, _ in lanes]
    for inputs, layout in zip(lanes, layouts, strict=True):
        viewed.clear()
        recv_x, *_ = dispatch(buffer, inputs, layout)
        np.testing.assert_array_equal(recv_x, inputs[0])
    assert viewed == ["x", "topk_weights"]  # the last layout is known until it is dispatched


def test_other_choices_than_those_of_the_layout(buffer: Buffer) -> None:
    x, idx, weights = arrays(6)
    layout = buffer.get_dispatch_layout(idx, NUM_EXPERTS)
    other = np.ascontiguousarray(idx[:, ::-1])
    _, recv_idx, *_ = dispatch(buffer, (x, other, weights), layout)
    np.testing.assert_array_equal(recv_idx, other)


def test_arrays_of_another_number_of_tokens(buffer: Buffer) -> None:
    layout = buffer.get_dispatch_layout(arrays(6)[1], NUM_EXPERTS)
    with pytest.raises(InvalidArgument, match=r"is_token_in_rank has shape \[6, 1\]"):
        dispatch(buffer, arrays(5), layout)
    x, idx, weights = arrays(6)
    layout = buffer.get_dispatch_layout(idx, NUM_EXPERTS)
    with pytest.raises(InvalidArgument, match=r"topk_idx has shape \[6, 2\]"):
        dispatch(buffer, (x[:5], idx, weights), layout)


def test_arrays_that_were_changed_since(buffer: Buffer) -> None:
    inputs = arrays(6)
    layout = buffer.get_dispatch_layout(inputs[1], NUM_EXPERTS)
    layout[3].shape = (3, 2)
    with pytest.raises(InvalidArgument, match=r"is_token_in_rank has shape \[3, 2\]"):
        dispatch(buffer, inputs, layout)


def test_tensors_that_were_changed_since(buffer: Buffer) -> None:
    inputs = arrays(6, torch_tensors())
    layout = buffer.get_dispatch_layout(inputs[1], NUM_EXPERTS)
    inputs[1].t_()
    with pytest.raises(InvalidArgument, match=r"topk_idx has shape \[2, 6\]"):
        dispatch(buffer, inputs, layout)
    inputs[1].t_()
    layout[2].set_(layout[2].clone())  # the same in other memory
    given, known = (layout[0], layout[2], layout[3]), buffer._known_layout
    views = arguments.view_layout(*given, 6, buffer._place, known)
    assert views.num_tokens_per_expert.ptr == layout[2].data_ptr()


def test_tensors_of_another_dtype_since(buffer: Buffer) -> None:
    inputs = arrays(6, torch_tensors())
    layout = buffer.get_dispatch_layout(inputs[1], NUM_EXPERTS)
    layout[2].data = layout[2].data.view(inputs[0].dtype)  # in the same memory
    with pytest.raises(InvalidArgument, match="num_tokens_per_expert is float32"):
        dispatch(buffer, inputs, layout)


def test_tensors_of_other_strides_since(buffer: Buffer) -> None:
    x, idx, weights = arrays(2, torch_tensors())
    layout = buffer.get_dispatch_layout(idx, NUM_EXPERTS)
    idx.t_()  # of the same shape, in the same memory
    with pytest.raises(InvalidArgument, match="topk_idx"):
        dispatch(buffer, (x, idx, weights), layout)


@pytest.mark.parametrize("makes_layout", [True, False])
def test_who_makes_the_layout(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch, makes_layout: bool
) -> None:
    """The engine in dispatch where it can and gets no layout; else the Buffer before."""

    class Seen(Exception):
        pass

    requests: list[Any] = []

    def see(request: Any) -> Any:
        requests.append(request)
        raise Seen

    monkeypatch.setattr(buffer._engine, "makes_layout_in_dispatch", makes_layout, raising=False)
    monkeypatch.setattr(buffer._engine, "dispatch", see)
    x, idx, weights = arrays(6)
    with pytest.raises(Seen):
        buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=NUM_EXPERTS)
    with pytest.raises(Seen):
        dispatch(buffer, (x, idx, weights), buffer.get_dispatch_layout(idx, NUM_EXPERTS))
    made = [(each.layout is None, each.num_experts) for each in requests]
    assert made == [(True, NUM_EXPERTS) if makes_layout else (False, 0), (False, 0)]
    assert all(each.topk is not None for each in requests)


def test_nothing_is_kept_once_it_is_dispatched(buffer: Buffer) -> None:
    inputs = arrays(4)
    layout = buffer.get_dispatch_layout(inputs[1], NUM_EXPERTS)
    assert buffer._known_layout is not None
    dispatch(buffer, inputs, layout)
    assert buffer._known_layout is None
    buffer.dispatch(inputs[0], topk_idx=inputs[1], topk_weights=inputs[2], num_experts=NUM_EXPERTS)
    assert buffer._known_layout is None
    buffer.get_dispatch_layout(inputs[1], NUM_EXPERTS)
    buffer.destroy()
    assert buffer._known_layout is None
