"""The routing record that combine and a repeated dispatch need; opaque to callers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class DispatchHandle:
    """What one dispatch decided: who sends which row where. Callers only pass it on.

    Attributes:
        buffer_id: The Buffer it belongs to.
        serial: Number of the dispatch on that Buffer, the same on every rank.
        num_tokens: Tokens of this rank.
        num_recv_rows: Rows of this rank's ``recv_x``, with the tail of ``num_worst_tokens``.
        num_recv_tokens: Rows that arrived on this rank, or None where only the device knows.
        routing: The engine's own record.
    """

    buffer_id: int
    serial: int
    num_tokens: int
    num_recv_rows: int
    num_recv_tokens: int | None
    routing: Any = field(repr=False)
