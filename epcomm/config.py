"""Tuning numbers of a call, and how much memory a Buffer needs."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from epcomm import env
from epcomm.errors import InvalidArgument

#: Tokens a rank that the size hints assume.
DEFAULT_MAX_TOKENS = 4096
#: What a token carries beside its row: 128 choices (8-byte id, 4-byte weight), and a flag a rank.
_TOPK_BYTES = 128 * 12
_FIXED_BYTES = 1 << 20
_MESSAGE_BYTES = 1 << 10
#: Ranks that a node is taken to have where nothing tells.
_MAX_RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Config:
    """Tuning numbers of dispatch and combine.

    Between nodes rows cross in chunks, and the two ``rdma`` numbers say how; pass the same ones on
    every rank. The ``nvl`` numbers are taken for compatibility.

    Attributes:
        num_sms: Multiprocessors of a GPU that a call may use: even, at least 2.
        num_max_nvl_chunked_send_tokens: Not used.
        num_max_nvl_chunked_recv_tokens: Not used.
        num_max_rdma_chunked_send_tokens: Messages, each the rows of one chunk for one node, that a
            rank has under way between nodes each way. The name is the one of V1, where they are
            tokens.
        num_max_rdma_chunked_recv_tokens: Tokens of a chunk: what a rank sends to a node at a time.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        check_num_sms(self.num_sms)
        _check_sizes(
            num_max_rdma_chunked_send_tokens=self.num_max_rdma_chunked_send_tokens,
            num_max_rdma_chunked_recv_tokens=self.num_max_rdma_chunked_recv_tokens,
        )

    def get_nvl_buffer_size_hint(
        self, hidden_bytes: int, num_ranks: int, *, num_max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> int:
        """Return the bytes with which no throughput call ever has to grow a rank's slab.

        Host engine: a rank stages its own tokens for dispatch, and for combine every row that it
        received, all ranks' tokens at worst. Cuda engine: two stages of its own tokens, and a slot
        of as many rows for each peer.

        Args:
            hidden_bytes: Bytes of one row, scales included.
            num_ranks: Ranks of the group. Those of a node count: EPCOMM_RANKS_PER_NODE, else 8.
            num_max_tokens: Most tokens that a rank passes in one call.
        """
        _check_sizes(hidden_bytes=hidden_bytes, num_ranks=num_ranks, num_max_tokens=num_max_tokens)
        num_ranks = min(num_ranks, _ranks_per_node())
        num_rows = (num_ranks + 1) * num_max_tokens + 1
        return num_rows * (hidden_bytes + _TOPK_BYTES) + num_ranks * num_max_tokens + _FIXED_BYTES

    def get_rdma_buffer_size_hint(
        self, hidden_bytes: int, num_ranks: int, *, num_max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> int:
        """Return the bytes with which a rank's staging memory between nodes never has to grow.

        0 where the ranks fit in one node: EPCOMM_RANKS_PER_NODE of them, else 8. Otherwise the
        messages under way: dispatch has so many each way, and combine holds in addition those of
        one chunk from every other node.

        Args:
            hidden_bytes: Bytes of one row, scales included.
            num_ranks: Ranks of the group.
            num_max_tokens: Most tokens that a rank passes in one call.
        """
        _check_sizes(hidden_bytes=hidden_bytes, num_ranks=num_ranks, num_max_tokens=num_max_tokens)
        ranks_per_node = _ranks_per_node()
        num_others = -(-num_ranks // ranks_per_node) - 1
        if num_others == 0:
            return 0
        num_rows = min(self.num_max_rdma_chunked_recv_tokens, num_max_tokens) + 1
        num_messages = 2 * self.num_max_rdma_chunked_send_tokens + num_others
        rows_bytes = num_messages * (num_rows * (hidden_bytes + _TOPK_BYTES) + _MESSAGE_BYTES)
        # Before the rows, where they go crosses: a flag a rank of a node and token.
        return max(rows_bytes, 2 * num_others * (ranks_per_node * num_max_tokens + _FIXED_BYTES))


def _ranks_per_node() -> int:
    return env.settings().ranks_per_node or _MAX_RANKS_PER_NODE


def check_num_sms(num_sms: int) -> None:
    """Raise InvalidArgument unless it is an even number of at least 2."""
    if not isinstance(num_sms, Integral) or num_sms < 2 or num_sms % 2:
        raise InvalidArgument(f"num_sms is {num_sms!r}; it must be even and at least 2.")


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, Integral) or value < 1:
            raise InvalidArgument(f"{name} is {value!r}; it must be a whole number of at least 1.")
