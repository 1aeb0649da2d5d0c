"""Config, and size hints that are true: no call within them ever makes a slab grow."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from epcomm import Buffer, Config, InvalidArgument, env, run_threads, training
from epcomm.config import DEFAULT_MAX_TOKENS

pytestmark = pytest.mark.timeout(60)

BF16 = np.dtype(ml_dtypes.bfloat16)


def test_defaults_and_order() -> None:
    config = Config()
    assert dataclasses.astuple(config) == (20, 6, 256, 6, 256)
    assert dataclasses.astuple(Config(2, 1, 3, 5, 7)) == (2, 1, 3, 5, 7)
    assert Config(4).num_sms == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_sms = 8  # type: ignore[misc]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8, 16, 72])
def test_recommended_configs(num_ranks: int) -> None:
    for get in (Buffer.get_dispatch_config, Buffer.get_combine_config):
        assert get(num_ranks) == Config(Buffer.num_sms)


def test_set_num_sms() -> None:
    before = Buffer.num_sms
    try:
        Buffer.set_num_sms(8)
        assert Buffer.num_sms == 8
        assert Buffer.get_dispatch_config(4).num_sms == 8
        assert Buffer.get_combine_config(4).num_sms == 8
    finally:
        Buffer.set_num_sms(before)
    assert Buffer.num_sms == before == 20


def test_nothing_is_needed_between_nodes_where_there_is_one() -> None:
    assert Config().get_rdma_buffer_size_hint(4096, 8) == 0
    assert Config().get_rdma_buffer_size_hint(4096, 8, num_max_tokens=1) == 0


def test_hint_between_nodes_is_that_of_the_messages_under_way() -> None:
    hint = Config().get_rdma_buffer_size_hint
    of_chunk = Config().num_max_rdma_chunked_recv_tokens * 14336
    depth = Config().num_max_rdma_chunked_send_tokens
    assert 2 * depth * of_chunk < hint(14336, 16) < 3 * depth * of_chunk
    # However many tokens there are; fewer than a chunk need less.
    few, many = (hint(14336, 16, num_max_tokens=tokens) for tokens in (16, 1024))
    assert few < many == hint(14336, 16)
    assert hint(14336, 16) < hint(14336, 64) < 2 * hint(14336, 512)
    small = Config(num_max_rdma_chunked_send_tokens=2, num_max_rdma_chunked_recv_tokens=32)
    assert 10 * small.get_rdma_buffer_size_hint(14336, 16) < hint(14336, 16)


@pytest.mark.parametrize("name", ["send", "recv"])
def test_chunks_have_tokens(name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"rdma_chunked_{name}_tokens is 0; it must be"):
        Config(**{f"num_max_rdma_chunked_{name}_tokens": 0})


def test_hint_assumes_4096_tokens() -> None:
    config = Config()
    assert DEFAULT_MAX_TOKENS == 4096
    for hidden_bytes, num_ranks in itertools.product((16, 14336), (1, 2, 8)):
        usual = config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks)
        assert usual == config.get_nvl_buffer_size_hint(
            hidden_bytes, num_ranks, num_max_tokens=4096
        )
        assert usual > 4096 * hidden_bytes * num_ranks


def test_hint_grows_with_each_of_its_arguments() -> None:
    hint = Config().get_nvl_buffer_size_hint
    assert hint(32, 2) > hint(16, 2)
    assert hint(16, 3) > hint(16, 2)
    assert hint(16, 2, num_max_tokens=9) > hint(16, 2, num_max_tokens=8)


def test_hint_is_that_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of other nodes have no slots in a slab."""
    hint = Config().get_nvl_buffer_size_hint
    assert hint(14336, 7) < hint(14336, 8) == hint(14336, 64) == hint(14336, 256)
    monkeypatch.setattr(env, "settings", lambda: env.Settings(ranks_per_node=2))
    assert hint(14336, 1) < hint(14336, 2) == hint(14336, 4)


def test_hint_takes_tokens_by_name_only() -> None:
    with pytest.raises(TypeError):
        Config().get_nvl_buffer_size_hint(16, 2, 128)  # type: ignore[misc]
    with pytest.raises(InvalidArgument):
        Config().get_nvl_buffer_size_hint(16, 2, num_max_tokens=-1)


@dataclasses.dataclass(frozen=True)
class Load:
    """The worst that a hint must cover: every token goes to every rank."""

    num_ranks: int
    num_tokens: int
    hidden: int
    dtype: np.dtype[Any]
    num_topk: int = 128
    num_scales: int = 0
    num_local_experts: int = 8

    def id(self) -> str:
        values = self.num_ranks, self.num_tokens, self.hidden, self.dtype.name, self.num_topk
        return "-".join(map(str, values))


LOADS = [
    Load(1, 1, 8, BF16),
    Load(1, 333, 64, BF16),
    Load(2, 100, 8, BF16),
    Load(2, 77, 512, np.dtype(np.float32)),
    Load(3, 65, 136, BF16, num_topk=1),
    Load(3, 1, 16, np.dtype(np.float16)),
    Load(2, 128, 256, np.dtype(ml_dtypes.float8_e4m3fn), num_topk=8, num_scales=2),
    Load(4, 40, 24, BF16, num_topk=64, num_local_experts=64),
    Load(2, 2048, 32, BF16),
]


@pytest.mark.parametrize("load", LOADS, ids=Load.id)
def test_hint_is_enough(load: Load) -> None:
    """The slab keeps its size, and fewer bytes than are staged would not do."""
    row_bytes = load.hidden * load.dtype.itemsize + load.num_scales * 4
    # One-byte rows come back as 16-bit ones.
    hidden_bytes = max(row_bytes, load.hidden * 2)
    hint = Config().get_nvl_buffer_size_hint(
        hidden_bytes, load.num_ranks, num_max_tokens=load.num_tokens
    )

    def fn(group: Any) -> None:
        buffer = Buffer(group, num_nvl_bytes=hint, timeout_s=20.0)
        size = lambda: buffer.get_local_buffer_tensor(np.uint8).size  # noqa: E731
        assert size() == hint
        x: Any = np.ones((load.num_tokens, load.hidden), load.dtype)
        num_experts = load.num_ranks * load.num_local_experts
        idx = np.arange(load.num_tokens * load.num_topk, dtype=np.int64) % num_experts
        idx = idx.reshape(load.num_tokens, load.num_topk)
        weights = np.ones(idx.shape, np.float32)
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, num_experts)
        in_rank[...] = True
        per_rank[...] = load.num_tokens
        if load.num_scales:
            x = (x, np.ones((load.num_tokens, load.num_scales), np.float32))
        recv, _, recv_weights, _, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=in_rank,
            topk_idx=idx,
            topk_weights=weights,
        )
        rows = recv[0].astype(BF16) if load.num_scales else recv
        assert len(rows) == load.num_tokens * load.num_ranks
        combined, _, _ = buffer.combine(rows, handle, topk_weights=recv_weights)
        assert (combined == load.num_ranks).all()
        assert size() == hint
        buffer.destroy()

    run_threads(fn, load.num_ranks)


def test_slab_grows_beyond_its_hint_and_stays_right() -> None:
    hint = Config().get_nvl_buffer_size_hint(64, 2, num_max_tokens=16)

    def fn(group: Any) -> int:
        buffer = Buffer(group, num_nvl_bytes=hint, timeout_s=20.0)
        for num_tokens in (16, 20000, 16):
            x = np.full((num_tokens, 32), group.rank + 1, BF16)
            idx = np.arange(num_tokens)[:, None] % 2
            weights = np.ones(idx.shape, np.float32)
            recv, _, _, _, handle, _ = buffer.dispatch(
                x, topk_idx=idx, topk_weights=weights, num_experts=2
            )
            assert len(recv) == num_tokens
            half = num_tokens // 2
            assert (recv[:half] == 1).all()
            assert (recv[half:] == 2).all()
            combined, _, _ = buffer.combine(recv, handle)
            assert (combined == group.rank + 1).all()
        return int(buffer.get_local_buffer_tensor(np.uint8).size)

    sizes = run_threads(fn, 2)
    assert min(sizes) > hint


LOW_LATENCY = [(1, 1, 8, 1, 1), (2, 8, 256, 4, 3), (3, 5, 128, 9, 8), (4, 64, 1024, 32, 32)]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("num_ranks", "most", "hidden", "experts", "topk"), LOW_LATENCY)
def test_low_latency_hint_is_enough(
    num_ranks: int, most: int, hidden: int, experts: int, topk: int, fp8: bool
) -> None:
    if fp8 and hidden % 128:
        pytest.skip("fp8 rows are blocks of 128")
    hint = Buffer.get_low_latency_rdma_size_hint(most, hidden, num_ranks, experts)

    def fn(group: Any) -> None:
        buffer = Buffer(group, num_rdma_bytes=hint, low_latency_mode=True, timeout_s=20.0)

        def size() -> int:
            return int(buffer.get_local_buffer_tensor(np.uint8, use_rdma_buffer=True).size)

        assert size() == hint
        x = np.full((most, hidden), group.rank + 1, BF16)
        idx = np.full((most, topk), -1, np.int64)
        idx[:, : min(topk, experts)] = np.arange(min(topk, experts))
        weights = np.ones(idx.shape, np.float32)
        for _ in range(3):
            recv, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, most, experts, use_fp8=fp8)
            rows = np.zeros((experts // num_ranks, num_ranks * most, hidden), BF16)
            if not fp8:
                rows[...] = recv
            combined, _, _ = buffer.low_latency_combine(rows, idx, weights, handle)
            if not fp8:
                assert (combined == x * min(topk, experts)).all()
        assert size() == hint
        buffer.destroy()

    run_threads(fn, num_ranks)


def test_low_latency_hint_of_the_cuda_engine_has_room_for_all_choices() -> None:
    """By expert each of 32 choices has a line, also where most are -1 as there are few experts."""
    hint = Buffer.get_low_latency_rdma_size_hint(48, 512, 1, 4, engine="cuda")
    assert hint == 2 * 32 * 48 * 512 * 2


def test_low_latency_hint_is_not_far_too_much() -> None:
    """Two or three slots, each as large as the larger of what dispatch and combine stage."""
    most, hidden, num_ranks, experts = 128, 7168, 8, 64
    rows = experts // num_ranks * num_ranks * most * hidden * 2
    hint = Buffer.get_low_latency_rdma_size_hint(most, hidden, num_ranks, experts)
    assert 2 * rows <= hint <= 3 * rows * 1.01


@pytest.mark.parametrize(
    ("x", "hidden_bytes"),
    [
        (np.zeros((3, 64), BF16), 128),
        (np.zeros((3, 64), np.float32), 256),
        (np.zeros((0, 64), np.uint8), 128),
        ((np.zeros((3, 64), ml_dtypes.float8_e4m3fn), np.zeros((3, 1), np.float32)), 128),
    ],
    ids=["bf16", "f32", "bytes", "pair"],
)
def test_hidden_bytes(x: Any, hidden_bytes: int) -> None:
    assert training.get_hidden_bytes(x) == hidden_bytes


def test_buffer_of_training_never_grows() -> None:
    def fn(group: Any) -> None:
        x = np.ones((512, 64), BF16)
        buffer = training.get_buffer(group, training.get_hidden_bytes(x))
        before = buffer.get_local_buffer_tensor(np.uint8).size
        assert before == Config().get_nvl_buffer_size_hint(128, group.size)
        idx = np.arange(512 * 4).reshape(512, 4) % 4
        weights = np.ones(idx.shape, np.float32)
        recv, _, recv_weights, _, handle, _ = training.dispatch_forward(x, idx, weights, 4)
        training.combine_forward(recv, handle)
        training.dispatch_backward(recv, recv_weights, handle)
        training.combine_backward(x, handle)
        assert training.get_buffer(group, 128) is buffer
        assert training.get_buffer(group, 64) is buffer
        assert buffer.get_local_buffer_tensor(np.uint8).size == before
        assert training.get_buffer(group, 256) is not buffer
        assert buffer.is_destroyed
        training.get_buffer(group, 16).destroy()

    run_threads(fn, 2)
