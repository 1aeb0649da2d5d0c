"""What rows cost: bytes and microseconds on links, messages, and memory of a rank.

docs/scaling.md tells the model and its limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from epcomm.arrays import BFLOAT16, FLOAT8_E4M3
from epcomm.cli.traffic import (
    Floats,
    Job,
    Loads,
    Rounds,
    find_rounds,
    load_by_rail,
    load_direct,
    simulate,
)
from epcomm.config import Config
from epcomm.cuda_layout import areas_for, slot_row_bytes, staged_row_bytes
from epcomm.engines.base import DEFAULT_CHUNKS
from epcomm.engines.sections import Sections
from epcomm.fp8 import BLOCK
from epcomm.rail_link import Window

#: What long streams reach when each of four H200s pushes to all others at once: measured.
DEFAULT_NVLINK_GB_S = 357.0
#: NOTE: assumed, not measured: one 400 Gbit/s adapter a GPU.
DEFAULT_NETWORK_GB_S = 50.0
#: NOTE: about the least that recorded row moves took beyond their bytes over the wire, see
#: docs/results/row_moves.json. That a step over the network, or a node's rows' call inside a node,
#: takes as long is assumed.
DEFAULT_LATENCY_US = 30.0

#: Dtypes that dispatch can carry; combine carries bf16.
DTYPES = {"bf16": BFLOAT16, "fp8": FLOAT8_E4M3}
_F32, _INT64 = np.dtype(np.float32), np.dtype(np.int64)


@dataclass(frozen=True)
class Rates:
    """What links do.

    Attributes:
        nvlink_gb_s: 10^9 bytes a second over a rank's NVLink, each way.
        network_gb_s: The same over its network adapter.
        latency_us: Fixed microseconds of a step over the network, and of a call inside a node.
    """

    nvlink_gb_s: float = DEFAULT_NVLINK_GB_S
    network_gb_s: float = DEFAULT_NETWORK_GB_S
    latency_us: float = DEFAULT_LATENCY_US


@dataclass(frozen=True)
class Spread:
    """Least, mean and largest of some numbers; 0 where there are none."""

    min: float
    mean: float
    max: float

    @classmethod
    def of(cls, values: Floats) -> Spread:
        """Return what spread the values have."""
        if values.size == 0:
            return cls(0.0, 0.0, 0.0)
        return cls(float(values.min()), float(values.mean()), float(values.max()))


@dataclass(frozen=True)
class Cost:
    """What a dispatch or a combine costs.

    Attributes:
        nvlink_sent_bytes, nvlink_received_bytes: Over ranks.
        network_sent_bytes, network_received_bytes: Over ranks.
        num_messages: Messages that a rank sends over the network: of the rank that sends the most.
        message_bytes: Over messages.
        us: Microseconds of the slowest rank.
    """

    nvlink_sent_bytes: Spread
    nvlink_received_bytes: Spread
    network_sent_bytes: Spread
    network_received_bytes: Spread
    num_messages: int
    message_bytes: Spread
    us: float


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, with rails; of the rank that needs the most.

    Attributes:
        slab_bytes: What the cuda engine's slab takes for these calls.
        hint_bytes: The ``num_nvl_bytes`` with which a slab never grows.
        gpu_staging_bytes: Rows and sums on the GPU that go to other nodes, or came from there.
        pinned_staging_bytes: Messages under way between nodes, in pinned host memory.
    """

    slab_bytes: int
    hint_bytes: int
    gpu_staging_bytes: int
    pinned_staging_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a job costs.

    Attributes:
        job: The job.
        rates: What its links do.
        row_bytes: Of a dispatched and a combined row, by ``"dispatch"`` and ``"combine"``.
        sampled_tokens: Tokens a rank that were simulated.
        costs: By way, ``"rails"`` (over the network once a node) or ``"direct"`` (once a rank);
            then by ``"dispatch"`` and ``"combine"``.
        memory: With rails.
    """

    job: Job
    rates: Rates
    row_bytes: dict[str, int]
    sampled_tokens: int
    costs: dict[str, dict[str, Cost]]
    memory: Memory


def make_plan(job: Job, rates: Rates) -> Plan:
    """Simulate a job's routing and tell what it costs.

    Raises:
        UnsupportedConfig: The cuda engine does not take so many ranks a node.
    """
    traffic = simulate(job)
    rails, direct, rounds = load_by_rail(traffic), load_direct(traffic), find_rounds(traffic)
    rows, sums = row_bytes(job.dtype, job.hidden), row_bytes("bf16", job.hidden)
    costs = {
        "rails": {
            "dispatch": cost_of(rails, rows, dispatch_us(rounds, rows, rates)),
            "combine": cost_of(rails.backwards(), sums, combine_us(rounds, sums, rates)),
        },
        "direct": {
            "dispatch": cost_of(direct, rows, direct_us(direct, rows, rates)),
            "combine": cost_of(direct.backwards(), sums, direct_us(direct, sums, rates)),
        },
    }
    return Plan(
        job=job,
        rates=rates,
        row_bytes={"dispatch": rows, "combine": sums},
        sampled_tokens=job.sampled_tokens,
        costs=costs,
        memory=memory_by_rail(job, traffic.node_rows),
    )


def itemsize(dtype: str) -> int:
    """Return the bytes of an element of one of ``DTYPES``."""
    return int(DTYPES[dtype].itemsize)


def num_scales(dtype: str, hidden: int) -> int:
    """Return the scales of a row of one of ``DTYPES``."""
    return -(-hidden // BLOCK) if dtype == "fp8" else 0


def row_bytes(dtype: str, hidden: int) -> int:
    """Return the bytes of a row of one of ``DTYPES``, its scales included."""
    return hidden * itemsize(dtype) + num_scales(dtype, hidden) * _F32.itemsize


def num_calls(job: Job) -> int:
    """Return how often a node's ranks call each other: for the rows of each source node."""
    return job.num_nodes


def dispatch_us(rounds: Rounds, bytes_a_row: int, rates: Rates) -> float:
    """Return the time of the slowest node's dispatch with rails.

    While a round's rows cross, those of the round before spread; nothing crosses while the last do.
    """
    nvlink_us, network_us = _round_times(rounds, bytes_a_row, rates)
    hidden = np.maximum(network_us[1:], nvlink_us[:-1])
    return float((hidden.sum(axis=0) + nvlink_us[-1]).max())


def combine_us(rounds: Rounds, bytes_a_row: int, rates: Rates) -> float:
    """Return the time of the slowest node's combine with rails.

    A round's sums are made when all messages of the round before are through, and sent after that.
    """
    nvlink_us, network_us = _round_times(rounds, bytes_a_row, rates)
    return float((nvlink_us.sum(axis=0) + network_us[1:].sum(axis=0)).max())


def direct_us(loads: Loads, bytes_a_row: int, rates: Rates) -> float:
    """Return the slowest rank's time where rows go straight to their receivers over both links."""
    nvlink_rows = np.maximum(loads.nvlink_sent, loads.nvlink_received)
    network_rows = np.maximum(loads.network_sent, loads.network_received)
    nvlink_us = _us_of(nvlink_rows, bytes_a_row, rates.nvlink_gb_s)
    network_us = _us_of(network_rows, bytes_a_row, rates.network_gb_s)
    return float(np.maximum(nvlink_us, network_us).max()) + rates.latency_us


def cost_of(loads: Loads, bytes_a_row: int, us: float) -> Cost:
    """Return the cost of a call that takes so long."""
    return Cost(
        nvlink_sent_bytes=Spread.of(loads.nvlink_sent * bytes_a_row),
        nvlink_received_bytes=Spread.of(loads.nvlink_received * bytes_a_row),
        network_sent_bytes=Spread.of(loads.network_sent * bytes_a_row),
        network_received_bytes=Spread.of(loads.network_received * bytes_a_row),
        num_messages=int(_num_messages(loads.message_rows).sum(axis=2).max()),
        message_bytes=_message_bytes(loads.message_rows, bytes_a_row),
        us=us,
    )


def memory_by_rail(job: Job, node_rows: Floats) -> Memory:
    """Return the memory that a rank needs for dispatch and combine.

    Choices are taken to be int64, and weights to travel in combine too: the most that can be.

    Args:
        job: The job.
        node_rows: Of its `epcomm.cli.traffic.Traffic`.

    Raises:
        UnsupportedConfig: The cuda engine does not take so many ranks a node.
    """
    combine_bytes = row_bytes("bf16", job.hidden)
    # NOTE: the same with several nodes. The node's engine takes all tokens of this rank in one
    # call, and of its rail peers those that come here, which may be as many.
    areas = areas_for(
        job.gpus_per_node,
        job.num_tokens,
        staged_row_bytes(
            job.hidden * itemsize(job.dtype), num_scales(job.dtype, job.hidden), job.num_topk
        ),
        slot_row_bytes(combine_bytes, job.num_topk),
    )
    crossings = _crossings_of(node_rows) if job.num_nodes > 1 else set()
    return Memory(
        slab_bytes=areas.num_bytes,
        hint_bytes=Config().get_nvl_buffer_size_hint(
            combine_bytes, job.gpus_per_node, num_max_tokens=job.num_tokens
        ),
        gpu_staging_bytes=max((_gpu_staging_bytes(job, one) for one in crossings), default=0),
        pinned_staging_bytes=max((_pinned_staging_bytes(job, one) for one in crossings), default=0),
    )


class _Crossing(NamedTuple):
    """What of a rank crosses.

    Attributes:
        most_incoming: Rows that come from one node, at most.
        most_outgoing: Rows that go to one node, at most.
        num_sums: Rows that go to all other nodes, whose sums come back.
    """

    most_incoming: int
    most_outgoing: int
    num_sums: int

    @property
    def message_rows(self) -> int:
        """Rows of the longest message."""
        return min(DEFAULT_CHUNKS.num_tokens, max(self.most_incoming, self.most_outgoing))


def _crossings_of(node_rows: Floats) -> set[_Crossing]:
    """Return what crosses of any rank."""
    crossing = node_rows * ~np.eye(len(node_rows), dtype=bool)[:, None, :]
    arrays = crossing.max(axis=0).T, crossing.max(axis=2), crossing.sum(axis=2)
    numbers = (np.ceil(array).astype(int).ravel().tolist() for array in arrays)
    return set(map(_Crossing, *numbers))


def _dispatch_sections(job: Job, num_rows: int) -> Sections:
    return Sections(
        {
            "data": ((num_rows, job.hidden), DTYPES[job.dtype]),
            "scales": ((num_rows, num_scales(job.dtype, job.hidden)), _F32),
            "topk_idx": ((num_rows, job.num_topk), _INT64),
            "topk_weights": ((num_rows, job.num_topk), _F32),
        }
    )


def _combine_sections(job: Job, num_rows: int) -> Sections:
    return Sections(
        {
            "data": ((num_rows, job.hidden), BFLOAT16),
            "topk_weights": ((num_rows, job.num_topk), _F32),
        }
    )


def _gpu_staging_bytes(job: Job, crossing: _Crossing) -> int:
    """Return what `epcomm.engines.device_rail_moves` keeps on the GPU."""
    incoming = _dispatch_sections(job, crossing.most_incoming).end
    gathered = _dispatch_sections(job, crossing.message_rows).end
    own_choices = job.num_tokens * job.num_topk * _INT64.itemsize
    sums_to_send = _combine_sections(job, crossing.most_incoming).end
    sums = _combine_sections(job, crossing.num_sums).end
    # One node's rows spread while those of the next come.
    return 2 * incoming + gathered + own_choices + sums_to_send + sums


def _pinned_staging_bytes(job: Job, crossing: _Crossing) -> int:
    """Return the bytes of the largest window of messages."""
    depth, num_others = DEFAULT_CHUNKS.num_in_flight, job.num_nodes - 1
    routes = Sections(
        {
            "mask": ((job.num_tokens, job.gpus_per_node), np.dtype(bool)),
            "pairs": ((job.gpus_per_node, job.num_experts // job.num_ranks), np.dtype(np.int32)),
        }
    )
    num_rows = crossing.message_rows
    windows = (
        Window(routes.end, num_others, num_others),
        Window(_dispatch_sections(job, num_rows).end, depth, depth),
        Window(_combine_sections(job, num_rows).end, depth, depth),
    )
    return max(window.num_bytes for window in windows)


def _us_of(rows: Floats, bytes_a_row: int, gb_s: float) -> Floats:
    return rows * (bytes_a_row / 1e3 / gb_s)  # 1 GB/s is 1 kilobyte a microsecond


def _round_times(rounds: Rounds, bytes_a_row: int, rates: Rates) -> tuple[Floats, Floats]:
    """Return each round's microseconds by node, on NVLink and on the network."""
    return (
        _us_of(rounds.nvlink, bytes_a_row, rates.nvlink_gb_s) + rates.latency_us,
        _us_of(rounds.network, bytes_a_row, rates.network_gb_s) + rates.latency_us,
    )


def _num_messages(message_rows: Floats) -> Floats:
    return np.ceil(message_rows / DEFAULT_CHUNKS.num_tokens)


def _message_bytes(message_rows: Floats, bytes_a_row: int) -> Spread:
    """Return the spread over messages: all are full but the last of a sender to a receiver."""
    rows = message_rows[message_rows > 0]
    if rows.size == 0:
        return Spread(0.0, 0.0, 0.0)
    full, num_messages = DEFAULT_CHUNKS.num_tokens, _num_messages(rows)
    return Spread(
        min=float((rows - (num_messages - 1) * full).min() * bytes_a_row),
        mean=float(rows.sum() / num_messages.sum() * bytes_a_row),
        max=float(min(full, rows.max()) * bytes_a_row),
    )
