"""Tuning numbers of a call, and how much memory a Buffer needs."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from epcomm.errors import InvalidArgument

#: Tokens a rank that the size hints assume.
DEFAULT_MAX_TOKENS = 4096
#: What a token carries beside its row: 128 choices (8-byte id, 4-byte weight), and a flag a rank.
_TOPK_BYTES = 128 * 12
_FIXED_BYTES = 1 << 20


@dataclass(frozen=True)
class Config:
    """Tuning numbers of dispatch and combine.

    Only ``num_sms`` means something here; the ring sizes are taken for compatibility.

    Attributes:
        num_sms: Multiprocessors of a GPU that a call may use: even, at least 2.
        num_max_nvl_chunked_send_tokens: Not used.
        num_max_nvl_chunked_recv_tokens: Not used.
        num_max_rdma_chunked_send_tokens: Not used.
        num_max_rdma_chunked_recv_tokens: Not used.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        check_num_sms(self.num_sms)

    def get_nvl_buffer_size_hint(
        self, hidden_bytes: int, num_ranks: int, *, num_max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> int:
        """Return the bytes with which no throughput call ever has to grow a rank's slab.

        Host engine: a rank stages its own tokens for dispatch, and for combine every row that it
        received, all ranks' tokens at worst. Cuda engine: two stages of its own tokens, and a slot
        of as many rows for each peer.

        Args:
            hidden_bytes: Bytes of one row, scales included.
            num_ranks: Ranks of the node.
            num_max_tokens: Most tokens that a rank passes in one call.
        """
        _check_sizes(hidden_bytes=hidden_bytes, num_ranks=num_ranks, num_max_tokens=num_max_tokens)
        num_rows = (num_ranks + 1) * num_max_tokens + 1
        return num_rows * (hidden_bytes + _TOPK_BYTES) + num_ranks * num_max_tokens + _FIXED_BYTES

    def get_rdma_buffer_size_hint(
        self, hidden_bytes: int, num_ranks: int, *, num_max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> int:
        """Return the bytes needed between nodes: 0, all ranks being in one node."""
        _check_sizes(hidden_bytes=hidden_bytes, num_ranks=num_ranks, num_max_tokens=num_max_tokens)
        return 0


def check_num_sms(num_sms: int) -> None:
    """Raise InvalidArgument unless it is an even number of at least 2."""
    if not isinstance(num_sms, Integral) or num_sms < 2 or num_sms % 2:
        raise InvalidArgument(f"num_sms is {num_sms!r}; it must be even and at least 2.")


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, Integral) or value < 1:
            raise InvalidArgument(f"{name} is {value!r}; it must be a whole number of at least 1.")
